"""Batches to calibrate with: from a dataset, or caught as the model meets them.

A batch is what the model's forward takes, a dict of tensors. Knows nothing of rounding.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from merge_callback.errors import MergeError
from merge_callback.stand_ins import generators_kept

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


class TrainingData:
    """The data of a trainer, to calibrate with. Neither its sampler nor its workers notice.

    Args:
        model: the model below the adapter's wrapper.
        loader: the trainer's; only its dataset and its collator are used.
        batch_size: sequences in a batch.
        tokens: of the last batches to keep, where the dataset cannot be asked for some.
    """

    def __init__(self, model: PreTrainedModel, loader: Any, *, batch_size: int, tokens: int):
        self._loader: DataLoader[Batch] | None = None
        self._last: _LastBatches | None = None
        dataset = getattr(loader, "dataset", None)
        if dataset is not None and not isinstance(dataset, IterableDataset):
            self._loader = DataLoader(
                dataset,
                batch_size=batch_size,
                shuffle=True,
                collate_fn=loader.collate_fn,
                generator=torch.Generator().manual_seed(0),
            )
        if self._loader is None or not _gives_inputs(model, self._loader):
            self._loader, self._last = None, _LastBatches(model, tokens)

    def batches(self) -> Iterable[Batch]:
        """Batches in an order of chance that is always the same, or the last ones there were."""
        if self._loader is not None:
            assert self._loader.generator is not None
            self._loader.generator.manual_seed(0)
            return self._loader
        assert self._last is not None
        return list(self._last.batches)

    def close(self) -> None:
        """Stop looking at what the model is trained on."""
        if self._last is not None:
            self._last.close()


def _gives_inputs(model: PreTrainedModel, loader: Iterable[Batch]) -> bool:
    """Whether the loader gives what the model's forward takes; random generators do not move."""
    try:
        with generators_kept():
            batch = next(iter(loader), None)
    except Exception as error:  # whatever a foreign dataset raises is no reason not to train
        logger.info("the training dataset cannot be asked for batches (%s)", error)
        return False
    return (
        isinstance(batch, Mapping)
        and next(_inputs(batch), None) is not None
        and batch.keys() <= _parameters(model) | {"labels"}
    )


class _LastBatches:
    """The last batches that a model was trained on, caught at its door."""

    def __init__(self, model: PreTrainedModel, tokens: int):
        self.batches: deque[Batch] = deque()
        self._tokens = tokens
        self._count = 0
        self._handle = model.register_forward_pre_hook(self._catch, with_kwargs=True)

    def close(self) -> None:
        self._handle.remove()

    def _catch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return  # an evaluation, or a sample that is being generated
        named = dict(
            zip(inspect.signature(type(model).forward).parameters, (model, *args), strict=False)
        )
        batch = {
            key: value.detach().cpu()
            for key, value in {**named, **kwargs}.items()
            if isinstance(value, Tensor) and value.dim() > 0
        }
        if not tokens_in(batch):
            return
        self.batches.append(batch)
        self._count += tokens_in(batch)
        while self._count - tokens_in(self.batches[0]) >= self._tokens:
            self._count -= tokens_in(self.batches.popleft())


def tokens_in(batch: Batch) -> int:
    """Tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.sum())
    ids = next(iter(_inputs(batch)), None)
    return 0 if ids is None else ids.shape[0] * ids.shape[1]


def take(batches: Iterable[Batch], tokens: int) -> list[Batch]:
    """As many batches as make `tokens` tokens, on the CPU.

    Raises:
        MergeError: one of them is no batch.
    """
    taken: list[Batch] = []
    count = 0
    for batch in batches:
        if count >= tokens:
            break
        if not isinstance(batch, Mapping) or not tokens_in(batch):
            raise MergeError(
                f"calibration data: batch {len(taken)} holds no tokens; give dicts of tensors as "
                "the model's forward takes them, input_ids of shape (batch, length) among them"
            )
        taken.append({k: v.cpu() if isinstance(v, Tensor) else v for k, v in batch.items()})
        count += tokens_in(batch)
    return taken


def split_batch(batch: Batch, tokens: int) -> list[Batch]:
    """Pieces of about this many tokens, at least one sequence each, where rows are sequences."""
    shapes = [value.shape for value in batch.values() if isinstance(value, Tensor)]
    rows = shapes[0][0]
    if len(shapes) < len(batch) or any(shape != shapes[0] for shape in shapes):
        return [batch]
    at_once = max(1, tokens // shapes[0][1])
    return [
        {key: value[start : start + at_once] for key, value in batch.items()}
        for start in range(0, rows, at_once)
    ]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its inputs."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    return device


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """A batch as the model's forward takes it: on its device, no cache, and no labels but where the
    inputs of a decoder are made of them.
    """
    known = _parameters(model)
    device = input_device(model)
    inputs = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key in known and (key != "labels" or getattr(model.config, "is_encoder_decoder", False))
    }
    return inputs | ({"use_cache": False} if "use_cache" in known else {})


def token_mask(batch: Batch) -> Tensor | None:
    """Which tokens are no padding, (batch, length) bool; None: all."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def loss_mask(batch: Batch) -> Tensor | None:
    """Tokens whose prediction training looked at, (batch, length) bool; None: all.

    A label belongs to the token before it.
    """
    labels, mask = batch.get("labels"), token_mask(batch)
    if not isinstance(labels, Tensor):
        return mask
    wanted = torch.zeros(labels.shape, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:].cpu() != -100
    return wanted


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _inputs(batch: Batch) -> Iterator[Tensor]:
    for key in ("input_ids", "inputs_embeds", "decoder_input_ids"):
        if isinstance(batch.get(key), Tensor) and batch[key].dim() > 1:
            yield batch[key]
