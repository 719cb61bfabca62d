"""Round to the nearest code, as bitsandbytes does. Knows nothing of adapters or files.

A block of `blocksize` values in row-major order shares one scale, its largest magnitude:

    scale_b = max |w_i|,    code_i = argmin_c |w_i / scale_b - table[c]|    for i in block b

On a weight that was dequantised from this very grid it gives the old codes back unless an update is
larger than half a step: nearly all of a LoRA update is lost (huggingface/peft#2321).
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_callback.rounding.grid import RUN, Codes, Grid, Rounded

_SMALLEST = 1e-38  # scale, as bitsandbytes has it


class Nearest:
    """Codes equal to those of `bitsandbytes.functional.quantize_4bit`, bit for bit: by its own
    kernel, but on the CPU.

    Args:
        grid: the format; codes do not depend on its offset.
        largest: the largest magnitude of each block of the weight.
        numel: values of the weight.

    Attributes:
        scales: float32, one a block, before double quantisation.
        stored: the scales that a loader has.
    """

    def __init__(self, grid: Grid, largest: Tensor, numel: int):
        self._grid = grid
        self.scales = largest
        if numel % grid.blocksize and largest.device.type == "cpu":  # there alone it does so
            self.scales = torch.cat([largest[:-1], largest[-1:].clamp(min=_SMALLEST)])
        self.stored = grid.stored(self.scales)
        self._codes = Codes(grid, largest.device) if largest.device.type == "cpu" else None

    def pack(self, run: Tensor, first: int) -> Tensor:
        """The packed codes of a flat run, float32, whose first block is number `first`."""
        import bitsandbytes.functional as bnb

        if self._codes is not None:
            return self._pack_on_cpu(run, first, self._codes)
        packed: Tensor = bnb.quantize_4bit(
            run,
            blocksize=self._grid.blocksize,
            quant_type=self._grid.quant_type,
            compress_statistics=False,
        )[0]
        return packed

    def _pack_on_cpu(self, run: Tensor, first: int, codes: Codes) -> Tensor:
        """Operation for operation what bitsandbytes does there, but for the search for the code."""
        full = len(run) - len(run) % self._grid.blocksize
        blocks = run[:full].view(-1, self._grid.blocksize)
        largest = self.scales[first : first + len(blocks)].clamp(min=_SMALLEST)
        ratios = (blocks * (1.0 / largest)[:, None]).flatten()
        if full < len(run):
            ratios = torch.cat([ratios, run[full:] / self.scales[-1]])
        if len(ratios) % 2:  # the half byte that is left holds a zero
            ratios = torch.cat([ratios, ratios.new_zeros(1)])
        return codes.pack(codes.nearest(ratios))


def nearest(weight: Tensor, grid: Grid) -> Rounded:
    """Quantise a whole weight, of any shape, float32. Streams: temporaries of a few MiB."""
    rounding = Nearest(grid, grid.largest(weight), weight.numel())
    runs = torch.split(weight.reshape(-1), RUN)
    blocks = RUN // grid.blocksize
    packed = [rounding.pack(run, index * blocks) for index, run in enumerate(runs)]
    return Rounded(torch.cat(packed), rounding.scales)
