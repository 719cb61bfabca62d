"""The reasons to refuse a live model, each with its cure. Knows nothing of outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from merge_callback.adapters import kinds
from merge_callback.codecs import Stored
from merge_callback.codecs.bnb4 import Bnb4Weight
from merge_callback.codecs.plain import PlainWeight
from merge_callback.live import Weight, active_adapters, decoder
from merge_callback.model_code import cast_to
from merge_callback.sharding import is_sharded

# Tuners whose layers change what flows through the model, not what its weights are.
_BESIDE_THE_WEIGHTS = {"ADAPTION_PROMPT", "CARTRIDGE", "POLY", "SHADOW", "XLORA"}


def sharding_problems(base: PreTrainedModel, *, known_engine: bool) -> Iterator[str]:
    """Why a sharded model cannot be merged, each with its cure."""
    if getattr(base, "_tp_size", None) not in (None, 1):
        yield "tensor parallel plans (tp_plan) do not merge; train with FSDP, ZeRO-3 or DDP"
        return
    if not known_engine:
        yield "an unknown engine has sharded its tensors; train with FSDP, ZeRO-3 or DDP"
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and kinds.is_active(module):
            if not kinds.has_formula(module):
                kind = type(module).__name__
                yield f"{name}: a {kind} on a sharded model does not merge here; train with LoRA"
                return


def adapter_problems(
    model: PeftModel, base: nn.Module, weights: Mapping[str, Weight]
) -> Iterator[str]:
    """Why the adapter of `model` cannot be merged, each with its cure.

    Args:
        weights: what `read_weights` found.
    """
    layers = {n: m for n, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    for name in active_adapters(model):
        config = model.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or kind in _BESIDE_THE_WEIGHTS:
            yield f"{kind} works beside the weights, so it cannot be merged; train with LoRA"
            return
        if getattr(config, "layer_replication", None):
            yield "layer_replication makes layers that the base does not have; train without it"
    if not layers and not any(isinstance(m, ModulesToSaveWrapper) for m in base.modules()):
        yield "the adapter has no layer in the model that could be merged; train with LoRA"
        return
    wrappers = [m for m in base.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    yield from _state_problems(layers.values(), wrappers)
    yield from _layer_problems(layers, weights)


def _state_problems(
    layers: Iterable[BaseTunerLayer], wrappers: Iterable[AuxiliaryTrainingWrapper]
) -> Iterator[str]:
    layers = list(layers)
    if any(part.disable_adapters for part in (*layers, *wrappers)):
        yield "the adapter is disabled; call model.enable_adapter_layers() first"
    if any(layer.merged_adapters for layer in layers):
        yield (
            "the adapter is already merged into the live weights, which on a quantised base has "
            "rounded it away; load base and adapter again, or model.unmerge_adapter() in 16 bits"
        )
    if layers and not any(layer.active_adapters for layer in layers):
        yield "no adapter is active; call model.set_adapter(name) first"


def _layer_problems(
    layers: Mapping[str, BaseTunerLayer], weights: Mapping[str, Weight]
) -> Iterator[str]:
    """Each problem once, with the first layer that has it and how many others do.

    Layers of a kind are alike: the first answers for those whose base is of the same class.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in layers.items():
        inner = layer.get_base_layer()
        below = layer.base_layer
        if isinstance(below, BaseTunerLayer) and not hasattr(below, "parameter_name"):
            yield f"{name}: one adapter is laid over another there; train one at a time"
            return
        if isinstance(below, BaseTunerLayer) and not hasattr(layer, "parameter_name"):
            yield f"{name}: target_modules and target_parameters meet there; use one of them"
            return
        if not (hasattr(layer, "parameter_name") or kinds.is_active(layer)):
            continue
        biased = getattr(inner, "bias", None) is not None
        variants = [type(v) for v in getattr(layer, "lora_variant", {}).values()]
        alike.setdefault((type(layer), type(inner), biased, *variants), []).append(name)
    for names in alike.values():
        weight = weights.get(f"{names[0]}.weight")
        others = f" and {len(names) - 1} other layers" if len(names) > 1 else ""
        for problem in kinds.problems(layers[names[0]], decoder(weight)):
            yield f"{names[0]}{others}: {problem}"


def _is_plain_float(stored: Stored) -> bool:
    """Whether values are what they seem: floats of 16 bits and more, or decoded ones."""
    if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
        return False
    tensor = getattr(stored, "tensor", None)
    plain = type(tensor) in (torch.Tensor, nn.Parameter, type(None)) or is_sharded(tensor)
    return plain or not isinstance(stored, PlainWeight)


def weight_problems(weights: Iterable[Weight]) -> Iterator[str]:
    """Each problem once, with the first weight that has it and how many others do."""
    having: dict[str, list[str]] = {}
    for weight in weights:
        for problem in _own_problems(weight):
            having.setdefault(problem, []).append(weight.key)
    for problem, keys in having.items():
        others = f" and {len(keys) - 1} others" if len(keys) > 1 else ""
        yield f"{keys[0]}{others}: {problem}"


def code_problems(base: nn.Module, weights: Mapping[str, Weight]) -> Iterator[str]:
    """4-bit weights to whose uint8 the model's own code casts activations."""
    packed = [
        k for k in cast_to(base) if k in weights and isinstance(weights[k].stored, Bnb4Weight)
    ]
    if packed:
        names = sorted({key.removesuffix(".weight").rpartition(".")[2] for key in packed})
        yield (
            f"{min(packed)} and {len(packed) - 1} others: the model casts activations to the dtype "
            "of this weight, which is uint8 in 4 bits, so its outputs are not those of any model "
            f"that could be merged; load the base with llm_int8_skip_modules={names}"
        )


def _own_problems(weight: Weight) -> Iterator[str]:
    stored = weight.stored
    if getattr(getattr(stored, "state", None), "packing_format_for_cpu", False):
        yield (
            "bitsandbytes repacked this weight for AVX512 during an evaluation, "
            "and its values are no longer exact; reload the model and set "
            "support_avx512bf16_for_cpu = False on every Linear4bit before the first forward "
            "in eval mode (MergeOnSaveCallback does so when it is given to the trainer)"
        )
    elif any(t.device.type == "meta" for update in weight.updates for t in update.tensors()):
        yield (
            "its adapter is on the meta device, where PEFT puts those of "
            "offloaded layers and nothing is learned; load the model with the layer on a device"
        )
    elif stored.device.type == "meta":
        yield "offloaded to disk; load the model with all weights on a device"
    elif weight.updates and not _is_plain_float(stored):
        kind = f"{stored.dtype} of an unknown quantiser"
        yield f"{kind}; use a bitsandbytes or 16-bit base"
