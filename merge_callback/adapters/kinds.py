"""Which of the ways to merge a layer of PEFT's goes with its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from merge_callback.adapters import Update, affine, lora, tokens
from merge_callback.adapters.detached import is_linear

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def updates(layer: Any, weight: Callable[[], Tensor]) -> Mapping[str, tuple[Update, ...]]:
    """The changes that the active adapters of a layer make, by parameter of its base.

    Args:
        weight: decodes the base's weight.
    """
    if isinstance(layer, TrainableTokensLayer):
        return {"weight": tokens.updates(layer)}
    if isinstance(layer, ParamWrapper):
        return lora.expert_updates(layer)
    if not is_active(layer):
        return {}
    base = layer.get_base_layer()
    if isinstance(base, _CONVOLUTIONS):
        names = ("weight",) if base.bias is None else ("weight", "bias")
        return {name: (affine.MergedByPeft(layer, name, weight),) for name in names}
    whole: tuple[Update, ...] = (
        lora.updates(layer) if lora.knows(layer) else (affine.AffineWeight(layer),)
    )
    if getattr(base, "bias", None) is None or _bias_stays(layer):
        return {"weight": whole}
    return {"weight": whole, "bias": (affine.AffineBias(layer, weight),)}


def problems(layer: Any, weight: Callable[[], Tensor]) -> Iterator[str]:
    """Why a layer cannot be merged, each with its cure."""
    if isinstance(layer, LNTuningLayer | TrainableTokensLayer | ParamWrapper):
        return
    if not is_active(layer):
        return
    if lora.knows(layer) and not _any_bias(layer):
        return
    base = layer.get_base_layer()
    if isinstance(base, _CONVOLUTIONS):
        yield from affine.convolution_problems(layer, weight())
        return
    if not is_linear(base) and not isinstance(base, nn.Embedding):
        kind = type(base).__name__
        yield f"an adapter on a {kind} does not merge here; leave it out of target_modules"
        return
    yield from affine.problems(layer, weight())


def has_formula(layer: Any) -> bool:
    """Whether a layer's change is computed here, of its tensors alone, and PEFT is not asked."""
    if isinstance(layer, TrainableTokensLayer):
        return True
    return not isinstance(layer, ParamWrapper) and lora.knows(layer) and not _any_bias(layer)


def is_active(layer: Any) -> bool:
    """Whether a layer holds something of an active adapter."""
    return any(name in _adapters(layer) for name in layer.active_adapters)


def _adapters(layer: Any) -> set[str]:
    """Names of the adapters that a layer holds something of."""
    held: set[str] = set()
    for attribute in layer.adapter_layer_names:
        part = layer
        for name in attribute.split("."):
            part = getattr(part, name, None)
        held |= set(part.keys()) if hasattr(part, "keys") else set()
    return held


def _any_bias(layer: LoraLayer) -> bool:
    return any(layer.lora_bias.get(name) for name in layer.active_adapters)


def _bias_stays(layer: Any) -> bool:
    """Whether adapters of this kind leave the bias alone."""
    return isinstance(layer, LoraLayer) and not _any_bias(layer)
