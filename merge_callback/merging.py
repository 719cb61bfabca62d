"""One weight: base plus adapter, rounded into containers, some rows at a time.

What is in flight is a few MiB, which a CPU has in its cache, and the containers' outputs. Knows
nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from merge_callback.codecs import Container, Encoder
from merge_callback.errors import MergeError
from merge_callback.live import Weight

K = TypeVar("K")


class Merging(Generic[K]):
    """A weight with updates, on its way into one container or several.

    Args:
        weight: what is merged.
        containers: what it is written into, by any key.
        device: where it is computed.
    """

    def __init__(self, weight: Weight, containers: Mapping[K, Container], device: torch.device):
        self._weight = weight
        self._parts = weight.in_parts(device)
        shape = weight.stored.shape
        self._encoders: dict[K, Encoder] = {
            key: container.encoder(weight.key, shape, device)
            for key, container in containers.items()
        }
        self._largest = min(torch.finfo(c.dtype).max for c in containers.values())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[K, Tensor]]]:
        """Some rows of the base, of the merged weight, and of what loaders make of what is written.

        Raises:
            MergeError: a value is not finite, or too large for a container.
        """
        waiting = [encoder for encoder in self._encoders.values() if encoder.surveys]
        if waiting:
            for _, merged in self._parts:
                check_finite(self._weight, merged, self._largest)
                for encoder in waiting:
                    encoder.survey(merged)
        for base, merged in self._parts:
            if not waiting:
                check_finite(self._weight, merged, self._largest)
            yield base, merged, {k: encoder.add(merged) for k, encoder in self._encoders.items()}

    def tensors(self, key: K) -> dict[str, Tensor]:
        """What a container holds of it, after all rows."""
        return self._encoders[key].tensors()


def check_finite(weight: Weight, merged: Tensor, largest: float) -> None:
    """Refuse values that are not finite, or larger than `largest`.

    Raises:
        MergeError: naming the weight, and what can be done.
    """
    low, high = (float(end) for end in torch.aminmax(merged))
    if not (abs(low) <= largest and abs(high) <= largest):  # false for NaN
        raise MergeError(
            f"{weight.key}: the merged weight is not finite, or too large for the output dtype "
            f"(from {low:g} to {high:g}, {largest:g} fits); if the training diverged, export an "
            "earlier checkpoint; if it did not, use dtype='bfloat16'"
        )
