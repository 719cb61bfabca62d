"""Round to the nearest code, as bitsandbytes does. Knows nothing of adapters or files.

A block of `blocksize` values in row-major order shares one scale, its largest magnitude:

    scale_b = max |w_i|,    code_i = argmin_c |w_i / scale_b - table[c]|    for i in block b

On a weight that was dequantised from this very grid it gives the old codes back unless an update is
larger than half a step: nearly all of a LoRA update is lost (huggingface/peft#2321).
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_callback.rounding.grid import RUN, Grid, Rounded


def nearest(weight: Tensor, grid: Grid) -> Rounded:
    """Quantise with bitsandbytes' own kernel, a run of blocks at a time.

    Args:
        weight: any shape, float32.
        grid: the format; the scales do not depend on its offset.

    Returns:
        Codes and scales, both equal to those of `bitsandbytes.functional.quantize_4bit(weight)` bit
        for bit. Streams: temporaries of a few MiB.
    """
    import bitsandbytes.functional as bnb

    packed, scales = [], []
    for run in torch.split(weight.reshape(-1), RUN):
        codes, state = bnb.quantize_4bit(
            run, blocksize=grid.blocksize, quant_type=grid.quant_type, compress_statistics=False
        )
        packed.append(codes)
        scales.append(state.absmax)
    return Rounded(torch.cat(packed), torch.cat(scales))
