"""Weights stored as they are: floats of 16 and 32 bits, integers. Knows nothing of quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_callback.codecs import Encoder, Stored, TensorSpec, runs
from merge_callback.sharding import whole


@dataclass(frozen=True)
class _Held:
    """What its tensor tells of itself."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.tensor.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        return torch.device(self.tensor.device)

    def decode(self, device: torch.device) -> Tensor:
        tensor: Tensor = self.tensor.detach().to(device)
        return tensor

    def rows(self, device: torch.device) -> Callable[[slice], Tensor]:
        return self.decode(device).__getitem__


@dataclass(frozen=True)
class PlainWeight(_Held):
    """A parameter or buffer that is no more than its tensor."""

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether all values survive a cast to `dtype`, as those of an up-cast weight do."""
        if not self.dtype.is_floating_point or dtype.itemsize >= self.dtype.itemsize:
            return False
        values = whole(self.tensor.detach())
        return all(torch.equal(run.to(dtype).to(run.dtype), run) for (run,) in runs(values))


@dataclass(frozen=True)
class OffloadedWeight:
    """A parameter that lies elsewhere, on the CPU or the disk, until its layer computes."""

    tensor: Tensor  # on the meta device
    device: torch.device  # where the layer computes
    load: Callable[[], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def decode(self, device: torch.device) -> Tensor:
        return self.load().detach().to(device, self.dtype)

    def rows(self, device: torch.device) -> Callable[[slice], Tensor]:
        return self.decode(device).__getitem__

    def fits(self, dtype: torch.dtype) -> bool:
        return False


@dataclass(frozen=True)
class Dequantised(_Held):
    """A weight of another quantiser, whose tensor can give its values by itself (torchao's)."""

    def decode(self, device: torch.device) -> Tensor:
        values: Tensor = self.tensor.detach().dequantize()
        return values.to(device, self.dtype)


@dataclass(frozen=True)
class Plain:
    """One tensor of one dtype under the weight's own name.

    `transposed`: the checkpoint has it (in, out), the module (out, in), as for a Conv1D that
    bitsandbytes turned into a linear layer.
    """

    dtype: torch.dtype
    transposed: bool = False

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(shape[::-1] if self.transposed else shape, self.dtype)}

    def encoder(self, name: str, shape: tuple[int, ...], device: torch.device) -> Encoder:
        (spec,) = self.specs(name, shape).values()
        return _Encoder(name, torch.empty(spec.shape, dtype=spec.dtype, device=device), self)

    def copy(self, name: str, stored: Stored, device: torch.device) -> dict[str, Tensor]:
        weight = stored.decode(device)
        return {name: (weight.t() if self.transposed else weight).to(self.dtype).contiguous()}

    def values(self, name: str, encoded: Mapping[str, Tensor], numel: int) -> Iterator[Tensor]:
        weight = encoded[name].t() if self.transposed else encoded[name]
        for (run,) in runs(weight):
            yield run.float()


class _Encoder:
    """Casts rows into their places."""

    surveys = False

    def __init__(self, name: str, out: Tensor, container: Plain):
        self._name = name
        self._out = out
        self._rows = out.t() if container.transposed else out
        self._done = 0

    def survey(self, part: Tensor) -> None:
        """There is nothing to learn of them."""

    def add(self, part: Tensor) -> Tensor:
        place = self._rows[self._done : self._done + len(part)]
        self._done += len(part)
        return place.copy_(part)

    def tensors(self) -> dict[str, Tensor]:
        return {self._name: self._out}
