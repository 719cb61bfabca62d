"""How a weight lies in memory, and how it is written. Know nothing of adapters, models or files.

A `Stored` weight is what the live model holds; it can be decoded. A `Container` is what a
checkpoint holds; a decoded weight is encoded into it, under one name or several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from merge_callback.rounding.grid import RUN


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is going to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Stored(Protocol):
    """A weight as the live model holds it. Only ever read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight, as its module has it."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoded weight."""
        ...

    @property
    def device(self) -> torch.device: ...

    def decode(self, device: torch.device) -> Tensor:
        """The weight's values on `device`; may be the live tensor itself: never write to it."""
        ...


class Container(Protocol):
    """A way to write a weight."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that a loader decodes it to."""
        ...

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of what `encode` gives for a weight of this shape."""
        ...

    def encode(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Round `weight`, any float dtype, once, into this container."""
        ...

    def copy(self, name: str, stored: Stored, device: torch.device) -> dict[str, Tensor]:
        """Write a weight that nothing changed: its own bytes where the container can."""
        ...

    def values(self, name: str, encoded: Mapping[str, Tensor], numel: int) -> Iterator[Tensor]:
        """What a loader makes of `encoded`: flat float32 runs of RUN, in the module's order."""
        ...


def runs(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching slices of flattened tensors, RUN values each."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), RUN):
        yield tuple(tensor[start : start + RUN] for tensor in flat)
