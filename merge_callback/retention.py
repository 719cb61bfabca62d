"""How much of what was trained is in what was written. Knows nothing of adapters or files.

With D = merged - base, what the adapter adds to a weight, and D' = written - base, what arrived,

    retention = <D', D> / <D, D>

is 1 when all of it arrived, 0 when rounding gave the base back. Over several weights the two sums
are added up. It looks along D alone: rounding noise at right angles to it does not show.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def retention(runs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Retention:
    """Compare matching flat runs of (base, merged, written), any float dtype."""
    total = Retention()
    for base, merged, written in runs:
        start = base.float()
        delta = merged.float() - start
        arrived = written.float() - start
        kept, trained = torch.dot(arrived, delta), torch.dot(delta, delta)
        total += Retention(float(kept), float(trained))
    return total
