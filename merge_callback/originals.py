"""The checkpoint that a base was loaded from, or quantised from. Read only, a tensor at a time.

It is found where `from_pretrained` found it, in a directory or in the hub's cache, never over the
network, and each weight is checked to be the one that was quantised. Knows nothing of outputs.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from merge_callback.base_files import base_file, is_of_the_base
from merge_callback.codecs import TensorSpec
from merge_callback.codecs.bnb4 import Bnb4Weight
from merge_callback.codecs.bnb8 import Bnb8Weight
from merge_callback.conversions import CheckpointNames
from merge_callback.engines import class_of
from merge_callback.errors import MergeError, MergeRefused
from merge_callback.shards import DTYPE_NAMES

logger = logging.getLogger(__name__)

_CURE = "use base='live', or load the base from its 16-bit checkpoint in safetensors files"
# Of older checkpoints: computed when a model is made.
_OLD_BUFFERS = re.compile(r"inv_freq$|position_ids$|\.masked_bias$|\.attn\.bias$")


@dataclass(frozen=True)
class OriginalWeight:
    """A tensor of a checkpoint, and the quantised one that was made from it."""

    file: Path
    name: str  # in the checkpoint
    quantised: Bnb4Weight | Bnb8Weight
    transposed: bool  # in the checkpoint, as against the module

    @property
    def shape(self) -> tuple[int, ...]:
        return self.quantised.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.quantised.dtype

    @property
    def device(self) -> torch.device:
        return self.quantised.device

    def decode(self, device: torch.device) -> Tensor:
        """The tensor on `device`.

        Raises:
            MergeError: the live weight was not made from it.
        """
        with safe_open(self.file, "pt", device="cpu") as checkpoint:
            tensor: Tensor = checkpoint.get_tensor(self.name).to(device)
        if self.transposed:
            tensor = tensor.t().contiguous()
        if tuple(tensor.shape) != self.shape or not self.quantised.came_from(tensor):
            raise MergeError(f"{self.name} in {self.file} is not what was quantised; {_CURE}")
        return tensor

    def rows(self, device: torch.device) -> Callable[[slice], Tensor]:
        return self.decode(device).__getitem__


def find_originals(
    model: PreTrainedModel, quantised: Mapping[str, tuple[Bnb4Weight | Bnb8Weight, bool]]
) -> dict[str, OriginalWeight]:
    """The tensors that quantised weights were made from.

    Args:
        model: the live model, which knows where it came from.
        quantised: weight -> its live form, and whether its checkpoint is the transpose.

    Raises:
        MergeRefused: the checkpoint, or a tensor in it, is not there.
    """
    files = _files(model)
    if not files:
        source = getattr(model.config, "_name_or_path", "") or "the base"
        raise MergeRefused([f"base='original': the checkpoint of {source} is not here; {_CURE}"])
    names = CheckpointNames(model)
    found, missing = {}, []
    for key, (stored, transposed) in quantised.items():
        (name, *others) = names.revert({key: torch.empty(stored.shape, device="meta")})
        if others or name not in files:
            missing.append(name)
        else:
            found[key] = OriginalWeight(files[name], name, stored, transposed)
    if missing:
        raise MergeRefused(
            [f"base='original': {', '.join(missing)} not in the 16-bit checkpoint; {_CURE}"]
        )
    return found


@dataclass(frozen=True)
class Unloaded:
    """A tensor of the base's checkpoint that transformers does not load, as MTP heads are."""

    file: Path
    name: str
    spec: TensorSpec

    def read(self) -> Tensor:
        with safe_open(self.file, "pt", device="cpu") as checkpoint:
            tensor: Tensor = checkpoint.get_tensor(self.name)
        return tensor


def find_unloaded(model: PreTrainedModel, keys: Iterable[str]) -> list[Unloaded]:
    """What the checkpoint of a model has, and the model does not make.

    Nothing where the checkpoint is not at hand, is quantised itself, or is of another class or of
    another number of layers: then what is left out is left out on purpose.

    Args:
        keys: names of the model's tensors, its tied ones and its buffers included.
    """
    try:
        return _find_unloaded(model, keys)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        logger.warning(
            "the base's checkpoint cannot be read (%s): tensors of it that transformers does not "
            "load are not carried along",
            error,
        )
        return []


def _find_unloaded(model: PreTrainedModel, keys: Iterable[str]) -> list[Unloaded]:
    path = base_file(model.config, CONFIG_NAME)
    config = None if path is None else json.loads(path.read_text("utf-8"))
    if path is None or config is None or not _is_of(model, config):
        return []
    files, known = _files(model), CheckpointNames(model).loaded(keys)
    names = [name for name in files if not known(name) and not _OLD_BUFFERS.search(name)]
    if strange := sorted(
        {files[n].name for n in names if not is_of_the_base(files[n], path.parent)}
    ):
        raise ValueError(f"{', '.join(strange)} is outside its directory")
    return [found for name in names if (found := _unloaded(files[name], name)) is not None]


def _unloaded(file: Path, name: str) -> Unloaded | None:
    dtypes = {text: dtype for dtype, text in DTYPE_NAMES.items()}
    with safe_open(file, "pt") as checkpoint:
        tensor = checkpoint.get_slice(name)
        dtype = dtypes.get(tensor.get_dtype())
        shape = tuple(tensor.get_shape())
    return None if dtype is None else Unloaded(file, name, TensorSpec(shape, dtype))


def _is_of(model: PreTrainedModel, config: Mapping[str, Any]) -> bool:
    layers = (config.get("text_config") or config).get("num_hidden_layers")
    own = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return (
        class_of(model).__name__ in (config.get("architectures") or ())
        and layers in (None, own)
        and not config.get("quantization_config")
    )


def _files(model: PreTrainedModel) -> dict[str, Path]:
    """Tensor of the checkpoint -> its file; empty where it is not at hand."""
    locate = partial(base_file, model.config)
    single = locate(SAFE_WEIGHTS_NAME)  # transformers takes it before an index
    if single is not None:
        with safe_open(single, "pt") as checkpoint:
            return dict.fromkeys(checkpoint.keys(), single)
    index = locate(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return {}
    parts: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    located = {part: locate(part) for part in set(parts.values())}
    return {name: path for name, part in parts.items() if (path := located[part]) is not None}
