"""Read the live model: its tensors as if no adapter were attached.

Knows PEFT's wrappers and bitsandbytes' parameters; knows nothing of outputs or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftMixedModel, PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import unwrap_model

from merge_callback.adapters import ALL, Update, kinds
from merge_callback.codecs import Stored, row_parts
from merge_callback.codecs.bnb4 import Bnb4Weight
from merge_callback.codecs.bnb8 import Bnb8Weight
from merge_callback.codecs.plain import Dequantised, OffloadedWeight, PlainWeight
from merge_callback.engines import can_be_here, keeps_parts
from merge_callback.errors import MergeRefused
from merge_callback.sharding import is_sharded, unit_of, whole

_ADAPTER_PARTS = ("lora_", "modules_to_save", "token_adapter")


@dataclass(frozen=True)
class Weight:
    """One tensor of the model under its name in the unadapted model, and what was trained of it.

    `linear`: it is the weight of a linear layer, which a 4-bit checkpoint may quantise. `conv1d`:
    its checkpoint is the transpose of what bitsandbytes holds. `replaced`: it was trained whole, as
    modules_to_save and biases are. `original`: what the adapter is added to, if not to `stored`.
    """

    key: str
    stored: Stored
    original: Stored | None = None
    updates: tuple[Update, ...] = ()
    linear: bool = False
    conv1d: bool = False
    replaced: bool = False

    @property
    def on_a_grid(self) -> bool:
        """Whether it is added to a 4-bit weight, whose scales hold it without any error."""
        return self.original is None and isinstance(self.stored, Bnb4Weight)

    @property
    def source(self) -> Stored:
        """What the adapter is added to."""
        return self.original or self.stored

    def decoded(self, device: torch.device | None = None) -> Tensor:
        """What the adapter is added to, on its own device or another; never write to it."""
        return self.source.decode(device or self.stored.device)

    def merged(self, base: Tensor) -> Tensor:
        """The decoded base plus the changes of all active adapters; a float32 tensor of its own."""
        return self._merged(base, ALL)

    def in_parts(self, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
        """Base and merged weight, rows by rows (`row_parts`), as often as it is iterated.

        Where an update wants the whole weight both are held, and computed once.
        """
        rows = list(row_parts(self.stored.shape, device))
        if any(update.whole for update in self.updates):
            base = self.decoded(device)
            merged = self.merged(base)
            return [(base[part], merged[part]) for part in rows]
        return _Parts(self, rows, self.source.rows(device))

    def _merged(self, base: Tensor, rows: slice) -> Tensor:
        merged = base.to(torch.float32, copy=True)
        for update in self.updates:
            update.add_to(merged, base, rows)
        return merged

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The trained tensors behind this weight."""
        if self.replaced:
            return (self.decoded(),)
        return tuple(tensor for update in self.updates for tensor in update.tensors())


@dataclass(frozen=True)
class _Parts:
    """The rows of a weight, decoded and merged as they are asked for."""

    weight: Weight
    rows: list[slice]
    decode: Callable[[slice], Tensor]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self.rows:
            base = self.decode(part)
            yield base, self.weight._merged(base, part)


def read_weights(base: PreTrainedModel) -> dict[str, Weight]:
    """Every parameter and persistent buffer under its name in the unadapted model."""
    return {weight.key: weight for weight in _walk(base, "", replaced=False)}


def adapted(model: nn.Module) -> Any:
    """The model below what engines have wrapped around it, as PEFT has it.

    One whose adapter came from its own `add_adapter` has no wrapper of PEFT's, so it is given one
    here, which shares all of it.
    """
    inner: Any = unwrap_model(model)
    if not getattr(inner, "_hf_peft_config_loaded", False) or isinstance(inner, PeftModel):
        return inner
    names = inner.active_adapters()
    kind = PEFT_TYPE_TO_TUNER_MAPPING[inner.peft_config[names[0]].peft_type]
    tuner: Any = kind.__new__(kind)  # making one would add the adapter again
    wrapped: Any = PeftModel.__new__(PeftModel)
    for module in (tuner, wrapped):
        nn.Module.__init__(module)
    tuner.model, tuner.peft_config, tuner.active_adapter = inner, inner.peft_config, names
    wrapped.base_model, wrapped.active_adapter = tuner, names[0]
    wrapped.peft_type = inner.peft_config[names[0]].peft_type
    wrapped._peft_config, wrapped._is_prompt_learning = None, False
    wrapped._adapters_disabled = False
    return wrapped


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model below the adapter's wrapper.

    Raises:
        MergeRefused: there is none that could be exported.
    """
    if isinstance(model, PeftMixedModel):
        raise MergeRefused(
            ["a PeftMixedModel cannot be exported; load one adapter with PeftModel.from_pretrained"]
        )
    if not isinstance(model, PeftModel):
        raise MergeRefused(
            [
                "the model has no adapter; pass peft_config to the trainer, wrap the model with "
                "peft.get_peft_model, or call model.add_adapter(LoraConfig(...))"
            ]
        )
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise MergeRefused(
            [f"{type(base).__name__} is not a transformers model; its config could not be written"]
        )
    return base


def keep_cpu_weights_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking CPU weights in eval mode, which loses bits of them.

    On a CPU with AVX512-BF16 the first forward in eval mode would do so, in place, for speed
    (bitsandbytes#2078). This sets one flag per layer, and no weight.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, nn.Module's typing


def active_adapters(model: PeftModel) -> tuple[str, ...]:
    """Names of the active adapters."""
    return tuple(model.active_adapters)


def _walk(module: nn.Module, path: str, *, replaced: bool) -> Iterator[Weight]:
    """Every parameter and persistent buffer below `module`, as if no adapter were attached."""
    if isinstance(module, ModulesToSaveWrapper):
        active = [n for n in module.active_adapters if n in module.modules_to_save]
        trained = bool(active) and not module.disable_adapters
        inner = module.modules_to_save[active[0]] if trained else module.original_module
        yield from _walk(inner, path, replaced=trained)
    elif isinstance(module, TrainableTokensWrapper):
        yield from _walk(module.token_adapter, path, replaced=replaced)
    elif isinstance(module, LNTuningLayer):
        active = [n for n in module.active_adapters if n in module.ln_tuning_layers]
        trained = bool(active) and not module.disable_adapters
        inner = module.ln_tuning_layers[active[0]] if trained else module.get_base_layer()
        yield from _walk(inner, path, replaced=trained)
    elif isinstance(module, BaseTunerLayer):
        base = {
            weight.key: weight for weight in _walk(module.get_base_layer(), path, replaced=replaced)
        }
        changes = kinds.updates(module, decoder(base.get(_join(path, "weight"))))
        named = {_join(path, name): found for name, found in changes.items()}
        if lost := sorted(named.keys() - base.keys()):
            inner = type(module.get_base_layer()).__name__
            raise MergeRefused(
                [
                    f"{', '.join(lost)}: the {inner} there has no such parameter to merge into, as "
                    "GPTQ's, AWQ's and torch's attention layers do not; target linear layers of a "
                    "bitsandbytes or 16-bit base"
                ]
            )
        for key, weight in base.items():
            yield replace(weight, updates=named[key]) if key in named else weight
    else:
        yield from _own(module, path, replaced)
        for name, child in module.named_children():
            yield from _walk(child, _join(path, name), replaced=replaced)


def decoder(weight: Weight | None) -> Callable[[], Tensor]:
    """What decodes a weight when it is asked for."""

    def decode() -> Tensor:
        assert weight is not None
        return weight.decoded()

    return decode


def _own(module: nn.Module, path: str, replaced: bool) -> Iterator[Weight]:
    """The parameters and persistent buffers of `module` itself."""
    transient = module._non_persistent_buffers_set
    buffers = [(n, b) for n, b in module.named_buffers(recurse=False) if n not in transient]
    for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
        stored = _stored(module, name, tensor)
        yield Weight(
            _join(path, name),
            stored,
            linear=name == "weight" and type(module) is nn.Linear,
            conv1d=not isinstance(stored, PlainWeight) and _from_conv1d(module),
            replaced=replaced or tensor.requires_grad,
        )


def _stored(module: Any, name: str, tensor: Any) -> Stored:
    kind = type(tensor).__name__
    hook = _offloading_hook(module, name) if tensor.device.type == "meta" else None
    if hook is not None and kind not in ("Params4bit", "Int8Params"):
        device = torch.device(hook.execution_device)
        return OffloadedWeight(tensor, device, partial(hook.weights_map.__getitem__, name))
    if kind == "Params4bit" and getattr(tensor, "quant_state", None) is not None:
        return Bnb4Weight(tensor, tensor.quant_state)
    if is_sharded(tensor):
        state = getattr(tensor, "quant_state", None)
        state = getattr(module, "quant_state", None) if name == "weight" and not state else state
        return PlainWeight(tensor) if state is None else Bnb4Weight(tensor, state)
    if kind == "Int8Params" and tensor.dtype == torch.int8:
        scales = getattr(tensor, "SCB", None)
        scales = module.state.SCB if scales is None else scales  # moved there by the first forward
        return Bnb8Weight(tensor, scales)
    if _knows_its_values(tensor):
        return Dequantised(tensor)
    return PlainWeight(tensor)


def _knows_its_values(tensor: Any) -> bool:
    """Whether it is a tensor of another class, with a `dequantize` of its own."""
    kind = type(tensor.data)
    return kind is not torch.Tensor and kind.dequantize is not torch.Tensor.dequantize


def _offloading_hook(module: Any, name: str) -> Any:
    """accelerate's hook that brings a parameter when its module computes, if there is one."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        if weights is not None and name in {n for n, _ in module.named_parameters(recurse=False)}:
            return one
    return None


def is_sharded_model(model: nn.Module) -> bool:
    """Whether processes hold a part of some weight each."""
    if not can_be_here():
        return False
    return keeps_parts(model) or any(is_sharded(tensor) for tensor in model.parameters())


def trained_state(model: PeftModel) -> dict[str, Tensor]:
    """The entries of its state dict that PEFT may save, as they are whole.

    Those of adapters, what was trained, and input and output embeddings, which PEFT saves where the
    vocabulary was resized. On the CPU, so that no device holds more than one of them.
    """
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    inside = tuple(f"{name}." for name, module in model.named_modules() if module in ends)
    state = model.state_dict(keep_vars=True)
    adapters = [
        name
        for name in state
        if name in trained or name.startswith(inside) or any(p in name for p in _ADAPTER_PARTS)
    ]
    found: dict[str, Tensor] = {}
    for _, names in groupby(sorted(adapters), lambda name: unit_of(state[name]) or name):
        together = {name: state[name].detach() for name in names}
        gathered = whole(tuple(together.values()))
        found |= {n: t.cpu() for n, t in zip(together, gathered, strict=True)}
    return found


def _from_conv1d(module: nn.Module) -> bool:
    return getattr(module, "source_cls", nn.Linear).__name__ == "Conv1D"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def any_4bit(weights: Iterable[Weight]) -> bool:
    """Whether the base is a bitsandbytes 4-bit one."""
    return any(isinstance(weight.stored, Bnb4Weight) for weight in weights)
