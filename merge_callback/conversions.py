"""Names in a checkpoint, as against names in memory. Knows nothing of adapters or files.

transformers renames, fuses and splits weights while it loads them (the experts of a mixture, a
prefix that moved). A checkpoint has to be written under the names that it was loaded from, so each
conversion is run backwards. Some conversions need several weights at once: those form a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    apply_converters,
    revert_weight_conversion,
)


class CheckpointNames:
    """The way from the names of `model`'s tensors to those of its checkpoint."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._conversions = _conversions(model)

    def groups(self, keys: Iterable[str]) -> list[list[str]]:
        """`keys`, in their order, each with those that must be reverted together with it."""
        reverse = [conversion.reverse_transform() for conversion in self._conversions[::-1]]
        converters = [c for c in reverse if isinstance(c, WeightConverter)]
        groups: dict[tuple[str, str], list[str]] = {}
        for key in keys:
            target, pattern = apply_converters(key, converters)
            name = ("", key) if pattern is None else (pattern, target)
            groups.setdefault(name, []).append(key)
        return list(groups.values())

    def revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one group, or several, under their names in the checkpoint."""
        if not self._conversions:
            return dict(tensors)
        seen: Any = _Seen(self._model, self._conversions)
        reverted: dict[str, Tensor] = revert_weight_conversion(seen, dict(tensors))
        return reverted


class _Seen:
    """The live model, seen with other conversions than its own; the model itself is not touched."""

    def __init__(self, model: PreTrainedModel, conversions: list[Any]):
        self._seen_model = model
        self._weight_conversions = conversions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen_model, name)


def _conversions(model: PreTrainedModel) -> list[Any]:
    found = getattr(model, "_weight_conversions", None)
    if found is None:  # not made by from_pretrained: its prefixes are those of the class
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        found = [c for c in mapping if not isinstance(c, PrefixChange)]
    # A conversion that only unpacks a quantised checkpoint has no way back, and needs none.
    return [c for c in found if not _unpacks_quantised(c)]


def _unpacks_quantised(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any(getattr(op, "hf_quantizer", None) is not None for op in operations)
