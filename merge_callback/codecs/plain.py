"""Weights stored as they are: floats of 16 and 32 bits, integers. Knows nothing of quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_callback.codecs import Stored, TensorSpec, runs
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


@dataclass(frozen=True)
class PlainWeight(_Held):
    """A parameter or buffer that is no more than its tensor."""

    def decode(self, device: torch.device) -> Tensor:
        tensor: Tensor = self.tensor.detach().to(device)
        return tensor

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

    def encode(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        return {name: (weight.t() if self.transposed else weight).to(self.dtype).contiguous()}

    def copy(self, name: str, stored: Stored, device: torch.device) -> dict[str, Tensor]:
        return self.encode(name, stored.decode(device))

    def values(self, name: str, encoded: Mapping[str, Tensor], numel: int) -> Iterator[Tensor]:
        weight = encoded[name].t() if self.transposed else encoded[name]
        for (run,) in runs(weight):
            yield run.float()
