"""The 16-bit checkpoint that a quantised base was made from. Read only, a tensor at a time.

It is found where `from_pretrained` found it, in a directory or in the hub's cache, never over the
network, and each weight is checked to be the one that was quantised. Knows nothing of outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from merge_callback.codecs.bnb4 import Bnb4Weight
from merge_callback.codecs.bnb8 import Bnb8Weight
from merge_callback.conversions import CheckpointNames
from merge_callback.errors import MergeError, MergeRefused

_CURE = "use base='live', or load the base from its 16-bit checkpoint in safetensors files"


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


def _files(model: PreTrainedModel) -> dict[str, Path]:
    """Tensor of the checkpoint -> its file."""
    source = getattr(model.config, "_name_or_path", "")
    revision = getattr(model.config, "_commit_hash", None)

    def locate(file: str) -> Path | None:
        found = cached_file(
            source,
            file,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    index = locate(SAFE_WEIGHTS_INDEX_NAME) if source else None
    if index is not None:
        parts: dict[str, str] = json.loads(index.read_text())["weight_map"]
        located = {part: locate(part) for part in set(parts.values())}
        return {name: path for name, part in parts.items() if (path := located[part]) is not None}
    single = locate(SAFE_WEIGHTS_NAME) if source else None
    if single is None:
        raise MergeRefused(
            [f"base='original': the checkpoint of {source or 'the base'} is not here; {_CURE}"]
        )
    with safe_open(single, "pt") as checkpoint:
        return dict.fromkeys(checkpoint.keys(), single)
