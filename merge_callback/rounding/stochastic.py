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


class Stochastic:
    """Rounds each value to one of its two neighbours on a given grid.

    The same for the same input, whatever the state of torch's generators.

    Args:
        grid: the format.
        scales: float32, one a block, as a loader would have them. Where the weight has outgrown
            them wider ones are taken, and rounding is to nearest: there the base lies on no grid.
        largest: the largest magnitude of each block of the weight.

    Attributes:
        scales: float32, one a block, before double quantisation.
        stored: the scales that a loader has, which the codes are chosen for.
    """

    def __init__(self, grid: Grid, scales: Tensor, largest: Tensor):
        self._grid = grid
        self._codes = Codes(grid, largest.device)
        self.scales = grid.widen(scales, largest)
        self.stored = grid.stored(self.scales)
        self._by_chance = self.scales == scales
        self._divisors = torch.where(self.stored != 0, self.stored, 1)  # scale 0: zeros alone
        # A seed of its own for each weight: with one for all, their errors would add up.
        seed = int(self.scales.view(torch.int32).sum(dtype=torch.int64)) & 0xFFFFFFFF
        self._generator = torch.Generator(largest.device).manual_seed(seed)
        self._lower = self._codes.values.roll(1)
        self._gaps = self._codes.values - self._lower

    def pack(self, run: Tensor, first: int) -> Tensor:
        """The packed codes of the next flat run, float32, whose first block is number `first`."""
        blocks = self._grid.blocks(run)
        here = slice(first, first + len(blocks))
        ratios = (blocks / self._divisors[here, None]).clamp_(-1, 1)
        above = self._codes.above(ratios).clamp_(1, 15)
        places = above.flatten()
        low, gap = (t.index_select(0, places).view_as(ratios) for t in (self._lower, self._gaps))
        random = torch.rand(blocks.shape, generator=self._generator, device=run.device)
        threshold = torch.where(self._by_chance[here, None], random, 0.5)
        below = threshold * gap >= ratios - low
        return self._codes.pack((above - below.int()).flatten()[: len(run)])


def stochastic(weight: Tensor, grid: Grid, scales: Tensor) -> Rounded:
    """Round a whole weight, of any shape, float32. Streams: temporaries of a few MiB."""
    rounding = Stochastic(grid, scales, grid.largest(weight))
    runs = torch.split(weight.reshape(-1), RUN)
    blocks = RUN // grid.blocksize
    packed = [rounding.pack(run, index * blocks) for index, run in enumerate(runs)]
    return Rounded(torch.cat(packed), rounding.scales)
