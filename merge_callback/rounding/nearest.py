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


def nearest(weight: Tensor, grid: Grid) -> Rounded:
    """Quantise a run of blocks at a time: with bitsandbytes' own kernel, but on the CPU.

    Args:
        weight: any shape, float32.
        grid: the format; the scales do not depend on its offset.

    Returns:
        Codes and scales, both equal to those of `bitsandbytes.functional.quantize_4bit(weight)` bit
        for bit. Streams: temporaries of a few MiB.
    """
    import bitsandbytes.functional as bnb

    if weight.device.type == "cpu":
        return _nearest_on_cpu(weight, grid)
    packed, scales = [], []
    for run in torch.split(weight.reshape(-1), RUN):
        codes, state = bnb.quantize_4bit(
            run, blocksize=grid.blocksize, quant_type=grid.quant_type, compress_statistics=False
        )
        packed.append(codes)
        scales.append(state.absmax)
    return Rounded(torch.cat(packed), torch.cat(scales))


def _nearest_on_cpu(weight: Tensor, grid: Grid) -> Rounded:
    """Operation for operation what bitsandbytes does there, but for the search for the code."""
    codes = Codes(grid, weight.device)
    packed, scales = [], []
    for run in torch.split(weight.reshape(-1), RUN):
        full = len(run) - len(run) % grid.blocksize
        blocks = run[:full].view(-1, grid.blocksize)
        largest = blocks.abs().amax(1)
        ratios = (blocks * (1.0 / largest.clamp(min=_SMALLEST))[:, None]).flatten()
        if full < len(run):
            last = run[full:].abs().max().clamp(min=_SMALLEST)
            ratios = torch.cat([ratios, run[full:] / last])
            largest = torch.cat([largest, last[None]])
        if len(ratios) % 2:  # the half byte that is left holds a zero
            ratios = torch.cat([ratios, ratios.new_zeros(1)])
        packed.append(codes.pack(codes.nearest(ratios)))
        scales.append(largest)
    return Rounded(torch.cat(packed), torch.cat(scales))
