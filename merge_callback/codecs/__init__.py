"""How a weight lies in memory, and how it is written. Know nothing of adapters, models or files.

A `Stored` weight is what the live model holds; it can be decoded. A `Container` is what a
checkpoint holds; a decoded weight is encoded into it, under one name or several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import Protocol

import torch
from torch import Tensor

from merge_callback.rounding.grid import LARGEST_BLOCK, RUN

_RUN_ON_DEVICE = 1 << 24  # there a call costs more than what it computes on a few values


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

    def rows(self, device: torch.device) -> Callable[[slice], Tensor]:
        """Decodes some rows at a time, those of `row_parts`; what it gives is as `decode`'s."""
        ...


class Encoder(Protocol):
    """One weight on its way into a container, some rows after the other, those of `row_parts`."""

    @property
    def surveys(self) -> bool:
        """Whether it wants to see all rows before the first are added."""
        ...

    def survey(self, part: Tensor) -> None:
        """See the next rows, float32."""
        ...

    def add(self, part: Tensor) -> Tensor:
        """Round the next rows, float32; what a loader makes of them, any float dtype."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is to be written, once all rows have been added."""
        ...


class Container(Protocol):
    """A way to write a weight."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that a loader decodes it to."""
        ...

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the tensors of a weight of this shape."""
        ...

    def encoder(self, name: str, shape: tuple[int, ...], device: torch.device) -> Encoder:
        """To round a weight once into this container."""
        ...

    def copy(self, name: str, stored: Stored, device: torch.device) -> dict[str, Tensor]:
        """Write a weight that nothing changed: its own bytes where the container can."""
        ...

    def values(self, name: str, encoded: Mapping[str, Tensor], numel: int) -> Iterator[Tensor]:
        """What a loader makes of `encoded`: flat float32 runs of RUN, in the module's order."""
        ...


def row_parts(shape: tuple[int, ...], device: torch.device) -> Iterator[slice]:
    """Slices of the first dimension that hold about RUN values each, and whole blocks all but the
    last: what a merge has in flight at a time, so that on a CPU it stays in the cache.
    """
    rows, row = shape[0], max(1, prod(shape[1:]))
    whole = LARGEST_BLOCK // gcd(row, LARGEST_BLOCK)  # so many rows are blocks of any size
    most = RUN if device.type == "cpu" else _RUN_ON_DEVICE
    step = max(1, most // (row * whole)) * whole
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def encode(container: Container, name: str, weight: Tensor) -> dict[str, Tensor]:
    """Round `weight`, float32 and as a whole, into a container."""
    encoder = container.encoder(name, tuple(weight.shape), weight.device)
    parts = [weight[rows] for rows in row_parts(tuple(weight.shape), weight.device)]
    if encoder.surveys:
        for part in parts:
            encoder.survey(part)
    for part in parts:
        encoder.add(part)
    return encoder.tensors()


def runs(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching slices of flattened tensors, RUN values each."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), RUN):
        yield tuple(tensor[start : start + RUN] for tensor in flat)
