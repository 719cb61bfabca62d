"""How much of what was trained is in what was written. Knows nothing of adapters or files.

With D = merged - base, what the adapter adds to a weight, and D' = written - base, what arrived,

    retention = <D', D> / <D, D>

is 1 when all of it arrived, 0 when rounding gave the base back. Over several weights the two sums
are added up. It looks along D alone: rounding noise at right angles to it does not show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Retention:
    """The two sums of the quotient; they add."""

    kept: float = 0.0  # <written - base, merged - base>
    trained: float = 0.0  # <merged - base, merged - base>

    def __add__(self, other: Retention) -> Retention:
        return Retention(self.kept + other.kept, self.trained + other.trained)

    @property
    def value(self) -> float | None:
        """The quotient; None when nothing was trained."""
        return self.kept / self.trained if self.trained > 0 else None


def retention(base: Tensor, merged: Tensor, written: Tensor) -> Retention:
    """Compare three tensors of one shape, of any float dtype."""
    start = base.float().reshape(-1)
    delta = merged.float().reshape(-1) - start
    arrived = written.float().reshape(-1) - start
    kept, trained = torch.dot(arrived, delta), torch.dot(delta, delta)
    return Retention(float(kept), float(trained))
