"""Round up or down by chance, so that on average nothing is lost. Knows nothing of adapters.

On the grid that a base lies on, rounding to nearest undoes any change smaller than half a gap, in
the same direction everywhere. Here a value between two neighbours a < w < b becomes b with the
probability (w - a) / (b - a): its mean is w, and its variance (w - a)(b - w), for a small change d
at a grid value about |d| gap, is less than that of nearest rounding on any fresh grid, gap^2 / 12.
Source: Gupta et al. 2015, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_callback.rounding.grid import RUN, Codes, Grid, Rounded


def stochastic(weight: Tensor, grid: Grid, scales: Tensor) -> Rounded:
    """Round each value to one of its two neighbours on a given grid.

    Args:
        weight: any shape, float32.
        grid: the format.
        scales: float32, one a block, as a loader would have them. Where the weight has outgrown
            them wider ones are taken, and rounding is to nearest: there the base lies on no grid.

    Returns:
        Codes for the scales that double quantisation makes of these. The same for the same
        input, whatever the state of torch's generators. Streams: temporaries of a few MiB.
    """
    codes = Codes(grid, weight.device)
    wider = grid.widen(scales, weight)
    chances = wider == scales
    scales = wider
    stored = grid.stored(scales)
    # A seed of its own for each weight: with one for all, their errors would add up.
    seed = int(scales.view(torch.int32).sum(dtype=torch.int64)) & 0xFFFFFFFF
    generator = torch.Generator(weight.device).manual_seed(seed)
    divisors = torch.where(stored != 0, stored, 1)  # a block of scale 0 holds zeros alone
    lower = codes.values.roll(1)
    gaps = codes.values - lower
    packed = []
    for start, run in enumerate(torch.split(weight.reshape(-1), RUN)):
        padded = torch.nn.functional.pad(run, (0, -len(run) % grid.blocksize))
        blocks = padded.view(-1, grid.blocksize)
        first = start * RUN // grid.blocksize
        here = slice(first, first + len(blocks))
        ratios = (blocks / divisors[here, None]).clamp_(-1, 1)
        above = codes.above(ratios).clamp_(1, 15)
        places = above.flatten()
        low, gap = (table.index_select(0, places).view_as(ratios) for table in (lower, gaps))
        random = torch.rand(blocks.shape, generator=generator, device=run.device)
        threshold = torch.where(chances[here, None], random, 0.5)
        below = threshold * gap >= ratios - low
        packed.append(codes.pack((above - below.int()).flatten()[: len(run)]))
    return Rounded(torch.cat(packed), scales)
