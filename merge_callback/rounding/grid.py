"""The values that a bitsandbytes 4-bit weight can take. Knows nothing of how they are chosen.

A weight of n values in row-major order is cut into blocks of `blocksize`, the last one may be
shorter and blocks may cross rows. Value i of block b is `table[code_i] * scale_b`. With double
quantisation the scales are stored in 8 bits, `dynamic_map[q_b] * nested_scale + offset`, one nested
scale to 256 scales. Sources: Dettmers et al. 2023, sections 3 and 4; bitsandbytes' `QuantState`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from merge_callback.rounding.steps import Steps

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

# Values handled at once, a multiple of every blocksize: temporaries stay at a few MiB.
RUN = 1 << 18
LARGEST_BLOCK = 4096
_OUTGROWN = 1.1
NESTED_BLOCKSIZE = 256  # what bitsandbytes always uses


class Rounded(NamedTuple):
    """A weight in 4 bits.

    Attributes:
        packed: codes, uint8 of shape ((n + 1) // 2, 1), two to a byte, the first in the high half.
        scales: float32 of shape (ceil(n / blocksize),), before double quantisation.
    """

    packed: Tensor
    scales: Tensor


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a 4-bit format allows.

    Attributes:
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: values that share a scale.
        nested: whether scales are quantised too.
        offset: taken off the scales before they are quantised. None: their mean, and all is done as
            bitsandbytes does it. Under the offset of a base, the base's own scales come out as they
            were: bitsandbytes itself would move some, since its map ends at -0.993 and at 1.
    """

    quant_type: str
    blocksize: int
    nested: bool
    offset: float | None = None

    def table(self, device: torch.device) -> Tensor:
        """The 16 values at scale 1, by code; float32."""
        import bitsandbytes.functional as bnb

        table: Tensor = bnb.get_4bit_type(self.quant_type, device=device)
        return table

    def nest(self, scales: Tensor) -> tuple[Tensor, QuantState, Tensor]:
        """Scales in 8 bits: their codes, their own scales, and the offset taken off before."""
        import bitsandbytes.functional as bnb

        mean = scales.mean()
        if self.offset is None:
            codes, nested = bnb.quantize_blockwise(scales - mean, blocksize=NESTED_BLOCKSIZE)
            return codes, nested, mean
        offset = torch.full_like(mean, self.offset)
        codes, nested = _quantise_exactly_at_the_ends(scales - offset)
        return codes, nested, offset

    def stored(self, scales: Tensor) -> Tensor:
        """What a loader makes of `scales`."""
        import bitsandbytes.functional as bnb

        if not self.nested:
            return scales
        codes, nested, offset = self.nest(scales)
        stored: Tensor = bnb.dequantize_blockwise(codes, nested) + offset
        return stored

    def blocks(self, run: Tensor) -> Tensor:
        """A run of values cut into blocks, (blocks, blocksize); the last one is filled with 0."""
        flat = run.reshape(-1)
        padding = -len(flat) % self.blocksize
        return torch.nn.functional.pad(flat, (0, padding)).view(-1, self.blocksize)

    def largest(self, run: Tensor) -> Tensor:
        """The largest magnitude of each block."""
        return self.blocks(run).abs().amax(1)

    def widen(self, scales: Tensor, largest: Tensor) -> Tensor:
        """`scales`, but a block's largest magnitude where that has outgrown its scale."""
        return torch.where(largest > _OUTGROWN * scales.abs(), largest, scales)

    def decode(self, packed: Tensor, stored: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The flat values of packed codes under the scales that a loader has, cast to `dtype`."""
        import bitsandbytes.functional as bnb

        if packed.device.type == "cpu" and dtype != torch.float32:  # its own casts are slow there
            return self.decode(packed, stored, numel, torch.float32).to(dtype)
        state = bnb.QuantState(
            absmax=stored.contiguous(),
            shape=torch.Size((numel,)),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=dtype,
        )
        values: Tensor = bnb.dequantize_4bit(packed, state)
        return values.reshape(-1)

    def spread(self, scales: Tensor, shape: torch.Size) -> Tensor:
        """One scale for each value of a weight of this shape."""
        return scales.repeat_interleave(self.blocksize)[: shape.numel()].view(shape)


def _quantise_exactly_at_the_ends(values: Tensor) -> tuple[Tensor, QuantState]:
    """8-bit codes whose blocks are scaled so that the largest value of either sign has its own."""
    import bitsandbytes.functional as bnb

    table = bnb.create_dynamic_map().to(values.device)
    padded = torch.nn.functional.pad(values, (0, -len(values) % NESTED_BLOCKSIZE))
    blocks = padded.view(-1, NESTED_BLOCKSIZE)
    absmax = torch.maximum(blocks.amax(1) / table[-1], blocks.amin(1) / table[0])
    ratios = blocks / absmax.clamp(min=torch.finfo(absmax.dtype).tiny)[:, None]
    codes = torch.bucketize(ratios, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    nested = bnb.QuantState(
        absmax=absmax, code=table, blocksize=NESTED_BLOCKSIZE, dtype=values.dtype
    )
    return codes.flatten()[: len(values)], nested


class Codes:
    """The codes of a format in order of their values: which are next to a number.

    Args:
        grid: the format.
        device: where the numbers are.
    """

    def __init__(self, grid: Grid, device: torch.device):
        table = grid.table(device)
        self.values, order = table.sort()
        in_order = bool((order[1:] > order[:-1]).all())
        self._code = None if in_order else order.to(torch.int32)
        self._middles = Steps((self.values[1:] + self.values[:-1]) / 2)
        self._values = Steps(self.values)

    def nearest(self, ratios: Tensor) -> Tensor:
        """Places, in order of value, of the values nearest to `ratios`; int32."""
        return self._middles.below(ratios)

    def above(self, ratios: Tensor) -> Tensor:
        """Places, in order of value, of the first values that are no less than `ratios`; int32."""
        return self._values.below(ratios)

    def pack(self, places: Tensor) -> Tensor:
        """Places as bitsandbytes packs their codes, see `Rounded.packed`."""
        codes = places.reshape(-1).to(torch.int32)
        if self._code is not None:
            codes = self._code.index_select(0, codes)
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_zeros(1)])
        pairs = codes.view(torch.int64)  # little-endian: the first of two is the low half
        return (pairs >> 32).bitwise_or_(pairs << 4).to(torch.uint8).view(-1, 1)
