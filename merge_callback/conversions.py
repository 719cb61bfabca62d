"""Names in a checkpoint, as against names in memory. Knows nothing of adapters or files.

transformers renames, fuses and splits weights while it loads them (the experts of a mixture, a
prefix that moved). A checkpoint has to be written under the names that it was loaded from, so each
conversion is run backwards. Some conversions need several weights at once: those form a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from merge_callback.compat import GroupWeightRename, PrefixChange


class CheckpointNames:
    """The way from the names of `model`'s tensors to those of its checkpoint."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._conversions = _conversions(model)
        reverse = [conversion.reverse_transform() for conversion in self._conversions[::-1]]
        self._converters = [c for c in reverse if isinstance(c, WeightConverter)]

    def groups(self, keys: Iterable[str]) -> list[list[str]]:
        """`keys`, in their order, each with those that must be reverted together with it."""
        groups: dict[str, list[str]] = {}
        for key in keys:  # q, k and v have patterns of their own, and one target
            groups.setdefault(rename_source_key(key, [], self._converters)[0], []).append(key)
        return list(groups.values())

    def loaded(self, keys: Iterable[str]) -> Callable[[str], bool]:
        """Whether a name in the checkpoint is loaded into a tensor of one of these names."""
        known, prefix = dict.fromkeys(keys, True), self._model.base_model_prefix
        renamings, converters = self._forward()

        def is_loaded(name: str) -> bool:
            renamed, _ = rename_source_key(name, renamings, converters, prefix, known)
            plain, _ = rename_source_key(name, [], [], prefix, known)
            return renamed in known or plain in known

        return is_loaded

    def renamed(self, names: Iterable[str]) -> set[str]:
        """The names that a loader reports of tensors which the model does not make."""
        renamings, converters = self._forward()
        found = set()
        for name in names:
            renamed, pattern = rename_source_key(name, renamings, converters)
            ends = next((c.target_patterns for c in converters if pattern in c.source_patterns), [])
            found |= {renamed, *(renamed.replace(ends[0], end) for end in ends)}
        return found

    def _forward(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        mapping = get_model_conversion_mapping(self._model)
        renamings = [c for c in mapping if isinstance(c, WeightRenaming)]
        return renamings, [c for c in mapping if isinstance(c, WeightConverter)]

    def revert(self, tensors: Mapping[str, Tensor], *, packed: bool = False) -> dict[str, Tensor]:
        """The tensors of one group, or several, under their names in the checkpoint.

        Args:
            packed: they are quantised, so that none can be cut or joined. Those that transformers
                would cut or join keep their names in memory, which it loads as well.
        """
        converted = (rename_source_key(key, [], self._converters)[1] is not None for key in tensors)
        if not self._conversions or (packed and any(converted)):
            return dict(tensors)
        seen: Any = _Seen(self._model, self._conversions, tensors)
        reverted: dict[str, Tensor] = revert_weight_conversion(seen, dict(tensors))
        return reverted


class _Seen:
    """The live model as conversions look at it: with those given, and without its adapter."""

    def __init__(
        self, model: PreTrainedModel, conversions: list[Any], tensors: Mapping[str, Tensor]
    ):
        self._seen_model = model
        self._weight_conversions = conversions
        self._tensors = tensors

    def get_parameter(self, name: str) -> Tensor:
        """What is converted is asked for by its name; an adapter may have put it elsewhere."""
        found = self._tensors.get(name)
        return self._seen_model.get_parameter(name) if found is None else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen_model, name)


def _conversions(model: PreTrainedModel) -> list[Any]:
    found = getattr(model, "_weight_conversions", None)
    if found is None:  # not made by from_pretrained: its prefixes are those of the class
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        found = [c for c in mapping if not isinstance(c, PrefixChange)]
    # A conversion that only unpacks a quantised checkpoint has no way back, and needs none.
    return [one for c in found if not _unpacks_quantised(c) for one in _stateless(c)]


def _stateless(conversion: Any) -> list[Any]:
    """The same renaming for names that come one at a time, in any order."""
    if not isinstance(conversion, GroupWeightRename):
        return [conversion]
    # It shifts numbers (norm0, norm1 -> norm1, norm2), so backwards the first has to go first.
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    renamings = [WeightRenaming(*pair) for pair in zip(sources, targets, strict=True)][::-1]
    for renaming in renamings:
        renaming.scope_prefix = conversion.scope_prefix
        renaming.base_model_prefix = conversion.base_model_prefix
    return renamings


def _unpacks_quantised(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any(getattr(op, "hf_quantizer", None) is not None for op in operations)
