"""Round to the nearest code, as bitsandbytes does. Knows nothing of adapters or files.

A block of `blocksize` values in row-major order shares one scale, its largest magnitude:

    scale_b = max |w_i|,    code_i = argmin_c |w_i / scale_b - table[c]|    for i in block b

On a weight that was dequantised from this very grid it gives the old codes back unless an update is
larger than half a step: nearly all of a LoRA update is lost (huggingface/peft#2321).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Values handled at once, a multiple of every blocksize: temporaries stay at a few MiB.
RUN = 1 << 18


def nearest(weight: Tensor, *, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantise with bitsandbytes' own kernel, a run of blocks at a time.

    Args:
        weight: any shape, float32.
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: values that share a scale; the last block may be shorter.

    Returns:
        The packed codes, uint8 of shape ((n + 1) // 2, 1), two to a byte, the first in the high
        half; and the scales, float32 of shape (ceil(n / blocksize),). Both equal
        `bitsandbytes.functional.quantize_4bit(weight)` bit for bit.
    """
    import bitsandbytes.functional as bnb

    flat = weight.reshape(-1)
    packed, scales = [], []
    for run in torch.split(flat, RUN):
        codes, state = bnb.quantize_4bit(
            run, blocksize=blocksize, quant_type=quant_type, compress_statistics=False
        )
        packed.append(codes)
        scales.append(state.absmax)
    return torch.cat(packed), torch.cat(scales)
