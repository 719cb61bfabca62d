"""What an adapter does to one weight. Knows nothing of how weights are stored or written.

`lora` and `tokens` know one kind each, and are exact and cheap; `affine` asks PEFT itself, for all
others. `kinds` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

ALL = slice(None)


class Update(Protocol):
    """The change that one adapter makes to one weight."""

    @property
    def whole(self) -> bool:
        """Whether it can be made to all rows of the weight at once alone."""
        ...

    def add_to(self, merged: Tensor, base: Tensor, rows: slice = ALL) -> None:
        """Add the change to `merged`, in place.

        Args:
            merged: float32; the base plus the changes of the adapters before this one.
            base: the weight that the adapter was trained on, any float dtype; not written to.
            rows: which rows of the weight these two are; ALL where `whole`.
        """
        ...

    def tensors(self) -> Iterable[Tensor]:
        """All that the change is made of: the trained tensors, and their scale."""
        ...
