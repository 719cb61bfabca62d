"""Batches to run the model on: drawn from a dataset, or the last ones that it was trained on.

A batch is what the model's forward takes, a dict of tensors. Knows nothing of rounding.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from merge_callback.errors import MergeError
from merge_callback.forked import POSSIBLE, forked

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]

# Collators that keep the names of the columns.
_KEEP_NAMES = ("transformers.data.data_collator", "trl.trainer.sft_trainer")
# What a batch is made of, (rows, ...): the first that is there tells how many tokens.
_TEXTS = ("input_ids", "inputs_embeds", "decoder_input_ids")
_BESIDE = ("labels", "mask")  # how the names end of what is no input by itself
_PATCH = 16  # pixels a side, of which most encoders make a token
_SAMPLES = 320  # of sound, 20 ms, the same
_FRAMES = 2  # of a spectrogram, the same


class Drawn:
    """Batches of a trainer's map-style dataset, shuffled with a fixed seed.

    Empty where the dataset does not give what the model takes. Each iteration draws anew.

    Args:
        model: the model below the adapter's wrapper.
        loader: the trainer's, or None. Only its dataset and its collator are read, in a process of
            their own.
        batch_size: sequences in a batch.
    """

    def __init__(self, model: PreTrainedModel, loader: Any, batch_size: int):
        self._inputs = ("inputs_embeds", *_main_inputs(model))
        self._loader = loader
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        dataset = getattr(self._loader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset) or not POSSIBLE:
            return
        batches = forked(self._batches)
        try:
            first = next(batches, None)
        except MergeError as error:  # no reason to stop a training
            logger.info("the dataset cannot be asked for batches (%s)", error)
            return
        if not isinstance(first, Mapping):  # examples, of which the trainer makes batches itself
            return
        if not any(isinstance(first.get(key), Tensor) for key in self._inputs):
            return
        yield first
        yield from batches

    @property
    def is_certain(self) -> bool:
        """Whether the dataset's columns show that it gives what the model takes."""
        collate = getattr(self._loader, "collate_fn", None)
        module = getattr(collate, "__module__", None)  # of a function, or of an object's class
        columns = getattr(getattr(self._loader, "dataset", None), "column_names", None) or ()
        given = module in _KEEP_NAMES and not set(self._inputs).isdisjoint(columns)
        return given and POSSIBLE

    def _batches(self) -> Iterator[Batch]:
        return iter(
            DataLoader(
                self._loader.dataset,
                batch_size=self._batch_size,
                shuffle=True,
                collate_fn=self._loader.collate_fn,
                generator=torch.Generator().manual_seed(0),
            )
        )


class TrainingData:
    """Drawn from the trainer's dataset; where that is not possible, the last batches there were.

    No row is drawn before batches are asked for.

    Args:
        model: the model below the adapter's wrapper.
        loader: the trainer's.
        batch_size: sequences in a batch.
        tokens: of the last batches to keep.
    """

    def __init__(self, model: PreTrainedModel, loader: Any, *, batch_size: int, tokens: int):
        self._model = model
        self._tokens = tokens
        self._drawn = Drawn(model, loader, batch_size)
        self._last: _LastBatches | None = None

    def watch(self) -> None:
        """Keep the last batches from now on, unless the dataset is certain to give some."""
        if self._last is None and not self._drawn.is_certain:
            self._last = _LastBatches(self._model, self._tokens)

    def batches(self) -> Iterator[Batch]:
        """What there is, without an effect on the training."""
        batches = iter(self._drawn)
        first = next(batches, None)
        if first is not None:
            self.close()
            yield first
            yield from batches
        elif self._last is not None:
            yield from self._last.taken()

    def close(self) -> None:
        """Stop looking at what the model is trained on."""
        if self._last is not None:
            self._last.close()


def datasets_of(loader: Any) -> tuple[str, ...]:
    """Where on the Hub the dataset of a trainer's loader came from."""
    info = getattr(getattr(loader, "dataset", None), "info", None)
    sources = getattr(info, "download_checksums", None) or {}
    found = [re.match(r"hf://datasets/([^/@]+/[^/@]+)@", source) for source in sources]
    return tuple(sorted({match[1] for match in found if match}))


class _LastBatches:
    """The last batches that a model was trained on, seen by a forward pre-hook."""

    def __init__(self, model: PreTrainedModel, tokens: int):
        self._batches: deque[Batch] = deque()
        self._tokens = tokens
        self._count = 0
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def taken(self) -> list[Batch]:
        """What there is, on the CPU."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return list(self._batches)

    def close(self) -> None:
        self._handle.remove()

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return  # an evaluation, or a sample that is being generated
        named = dict(
            zip(inspect.signature(type(model).forward).parameters, (model, *args), strict=False)
        )
        batch = {  # into pinned memory: training does not wait for the copies
            key: value.detach().to("cpu", non_blocking=True)
            for key, value in {**named, **kwargs}.items()
            if isinstance(value, Tensor) and value.dim() > 0
        }
        if not _positions_in(batch):
            return
        self._batches.append(batch)
        self._count += _positions_in(batch)
        while self._count - _positions_in(self._batches[0]) >= self._tokens:
            self._count -= _positions_in(self._batches.popleft())


def tokens_in(batch: Batch) -> int:
    """Tokens of a batch that are no padding."""
    positions, mask = _positions_in(batch), token_mask(batch)
    if mask is None or not mask.numel():
        return positions
    return positions * int(mask.sum()) // mask.numel()  # a mask of sound has one value a sample


def _positions_in(batch: Batch) -> int:
    """Tokens of a batch, padding included; from shapes, so that no device is waited for."""
    rows, length = _shape_of(batch)
    return rows * length


def _shape_of(batch: Batch) -> tuple[int, int]:
    """Rows of a batch, and the tokens that a model makes of one, as most encoders do."""
    key, inputs = next(_inputs(batch), ("", None))
    if inputs is None:
        return 0, 0
    rows, *sizes = inputs.shape
    if key in _TEXTS:
        return rows, sizes[0]
    if len(sizes) == 1:
        length = sizes[0] // (_SAMPLES if key == "input_values" else 1)
    elif len(sizes) == 2:  # the longer one is time
        length = max(sizes) // _FRAMES
    else:  # images, or frames of a video
        length = math.prod(sizes[:-3]) * math.prod(sizes[-2:]) // _PATCH**2
    return rows, max(1, length)


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


def hold_out(
    batches: Sequence[Batch], share: float, most: float = math.inf
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Split off the last batches: at least one, and up to a share of all tokens, or `most`.

    One sequence alone cannot be split.
    """
    if len(batches) == 1:
        batches = split_batch(batches[0], 1)
    if len(batches) < 2:
        return batches, ()
    wanted = min(most, share * sum(map(tokens_in, batches)))
    count, tokens = 1, tokens_in(batches[-1])
    while count + 1 < len(batches) and tokens + tokens_in(batches[-count - 1]) <= wanted:
        count += 1
        tokens += tokens_in(batches[-count])
    return batches[:-count], batches[-count:]


def split_batch(batch: Batch, tokens: int) -> list[Batch]:
    """Pieces of about this many tokens, at least one sequence each, where rows are sequences."""
    rows, length = _shape_of(batch)
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    split = {key for key, value in tensors.items() if value.dim() and len(value) == rows}
    if any(value.dim() and key not in split for key, value in tensors.items()):
        return [batch]  # its rows are no sequences: patches of images, ends of packed texts
    at_once = max(1, tokens // max(1, length))
    return [
        {k: v[start : start + at_once] if k in split else v for k, v in batch.items()}
        for start in range(0, rows, at_once)
    ]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its inputs: where its first parameter is.

    A model on several devices moves them by itself.
    """
    devices = [p.device for p in model.parameters() if p.device.type != "meta"]  # offloaded
    return devices[0]


def model_inputs(
    model: PreTrainedModel, batch: Batch, device: torch.device | None = None
) -> dict[str, Any]:
    """A batch as the model's forward takes it: on its device, no cache, and no labels but where the
    inputs of a decoder are made of them.

    Args:
        device: None: where the model takes its inputs.
    """
    known = _parameters(model)
    device = device or input_device(model)
    dtype = model.dtype

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # Pictures and sounds come in float32, and autocast is off.
        narrow = value.is_floating_point() and dtype.itemsize < value.dtype.itemsize
        return value.to(device, dtype if narrow else None)

    inputs = {
        key: fit(value)
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

    A label belongs to the token before it, and without labels each token is one.
    """
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if isinstance(labels, Tensor) and labels.dim() < 2:  # of whole sequences
        return token_mask(batch)
    if isinstance(labels, Tensor) and labels.dim() == 2:
        counted = labels.cpu() != -100
    elif isinstance(ids, Tensor) and ids.dim() == 2:
        mask = token_mask(batch)
        counted = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.cpu()
    else:
        return None
    wanted = torch.zeros_like(counted)
    wanted[:, :-1] = counted[:, 1:]
    return wanted


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _main_inputs(model: PreTrainedModel) -> tuple[str, ...]:
    """What the model is made to take: one name, or several for some."""
    names = model.main_input_name
    return (names,) if isinstance(names, str) else tuple(names)


def _inputs(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """What has a row for each example; text first, then whatever a model may take."""
    others = (key for key in batch if key not in _TEXTS and not key.endswith(_BESIDE))
    for key in (*_TEXTS, *others):
        if isinstance(batch.get(key), Tensor) and batch[key].dim() > 1:
            yield key, batch[key]
