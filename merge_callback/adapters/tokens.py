"""Embedding rows that were trained whole: PEFT's trainable tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor

from merge_callback.adapters import ALL


@dataclass(frozen=True, eq=False)
class Rows:
    """W'[i] = the trained row, for some i."""

    indices: tuple[int, ...]
    values: Tensor  # (len(indices), dim)
    whole = False

    def add_to(self, merged: Tensor, base: Tensor, rows: slice = ALL) -> None:
        start = rows.start or 0
        index = torch.tensor(self.indices, device=merged.device) - start
        here = (index >= 0) & (index < len(merged))
        merged.index_copy_(0, index[here], self.values.to(merged)[here])

    def tensors(self) -> Iterable[Tensor]:
        return (self.values, torch.tensor(self.indices))


def updates(layer: TrainableTokensLayer) -> tuple[Rows, ...]:
    """The rows of the active adapters."""
    return tuple(
        Rows(tuple(layer.token_indices[name]), layer.trainable_tokens_delta[name].detach())
        for name in layer.active_adapters
        if name in layer.trainable_tokens_delta
    )
