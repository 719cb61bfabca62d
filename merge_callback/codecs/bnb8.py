"""bitsandbytes LLM.int8() weights: one scale a row. Only read: no 8-bit output is made of them.

`weight = codes * scales / 127`, codes int8 of shape (out, in), scales float32 of shape (out,).
Source: Dettmers et al. 2022, section 3. Knows nothing of adapters, models or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ALL_BUT_TIES = 0.999


@dataclass(frozen=True)
class Bnb8Weight:
    """An `Int8Params`."""

    codes: Tensor  # (out, in) int8
    scales: Tensor  # (out,) float32
    dtype: torch.dtype = torch.float32  # of the decoded weight

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def came_from(self, weight: Tensor) -> bool:
        """Whether bitsandbytes makes these codes of `weight`, but for ties."""
        scales, mine = (t.detach().to(weight.device).float() for t in (self.scales, self.codes))
        codes = (weight.float() * (127 / scales)[:, None]).round()
        return bool((codes == mine).float().mean() > _ALL_BUT_TIES)

    def decode(self, device: torch.device) -> Tensor:
        import bitsandbytes.functional as bnb

        codes, scales = self.codes.detach().to(device), self.scales.detach().to(device)
        weight: Tensor = bnb.int8_vectorwise_dequant(codes, scales)  # float32
        return weight

    def rows(self, device: torch.device) -> Callable[[slice], Tensor]:
        return lambda part: Bnb8Weight(self.codes[part], self.scales[part]).decode(device)
