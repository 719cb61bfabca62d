"""Is what is merged what PEFT and bitsandbytes compute? Asked of the rows that are written.

Decoded rows, with and without the adapter, come from `Weight.in_parts`, as they do for the files.
PEFT's own forward of each adapted layer, and the live model's own forward of each quantised one,
are run on random inputs and compared with the product of those rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from merge_callback.adapters.affine import picture
from merge_callback.adapters.detached import detached, is_linear, width
from merge_callback.codecs.bnb4 import Bnb4Weight
from merge_callback.codecs.bnb8 import Bnb8Weight
from merge_callback.cores import in_order
from merge_callback.live import Weight
from merge_callback.plan import Plan

_SAME_MATHS = 1e-3  # relative to what the adapter adds
_FLOAT32 = 1e-5  # of the outputs: what float32 cannot tell apart
_PROBES = 8
_ONE_ROW = 4.0  # units in the last place that one output may be off; all of them, 1 on average
_CODE8 = 127.0


@dataclass
class Findings:
    """What is wrong, in words, and which layers cannot be asked."""

    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def adapter_findings(plan: Plan) -> Findings:
    """Compare what the adapter adds to each layer with PEFT's own forward of it."""
    layers = {
        path.removesuffix(".token_adapter"): layer  # below PEFT's wrapper of trainable tokens
        for path, layer in plan.model.named_modules()
        # Of wrappers that are nested in one another the outermost answers for all.
        if isinstance(layer, BaseTunerLayer) and not path.endswith(".base_layer")
    }
    found = Findings()
    work = [item for item in layers.items() if _in_plan(plan, *item)]

    def error(item: tuple[str, Any]) -> float | None:
        return _adapter_error(plan, *item)

    for (name, _), off in in_order(plan.threads, torch.no_grad()(error), work):
        if off is None:
            found.left_out.append(name)
        elif not off <= _SAME_MATHS:
            told = f"what is merged differs from PEFT's own by {off:.2g} of the adapter"
            found.problems.append(f"{name}: {told}")
    found.problems += _whole_problems(plan)
    return found


def _whole_problems(plan: Plan) -> Iterator[str]:
    """What was trained whole: the live model's active copy has to be what is written."""
    for path, wrapper in plan.model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for name in wrapper.active_adapters:
            copies = wrapper.modules_to_save
            tensors = copies[name].named_parameters() if name in copies else ()
            for inner, tensor in tensors:
                weight = plan.weights.get(f"{path}.{inner}")
                if weight is not None and not torch.equal(weight.decoded(), tensor):
                    yield f"{path}.{inner}: what is merged is not the copy that was trained"


def base_findings(plan: Plan) -> Findings:
    """Compare the decoded base with what the live model's own layers compute with.

    Weights of one shape and format are decoded alike: the first, the middle and the last are asked.
    """
    found = Findings()
    alike: dict[tuple[Any, ...], list[str]] = {}
    for key, weight in plan.weights.items():
        stored = weight.stored
        if key.endswith(".weight") and isinstance(stored, Bnb4Weight | Bnb8Weight):
            kind = (type(stored), stored.shape, stored.dtype, stored.device)
            alike.setdefault(kind, []).append(key)
    keys = [k for of in alike.values() for k in dict.fromkeys((of[0], of[len(of) // 2], of[-1]))]

    def error(key: str) -> float | None:
        return _base_error(plan, key)

    for key, off in in_order(plan.threads, torch.no_grad()(error), keys):
        if off is None:
            found.left_out.append(key)
        elif not off <= 1:
            found.problems.append(
                f"{key}: what was decoded is not what the live layer computes with; its outputs "
                f"differ by {off:.2g} times what rounding explains"
            )
    return found


def _in_plan(plan: Plan, name: str, layer: Any) -> bool:
    if isinstance(layer, ParamWrapper):
        return True
    return f"{name}.weight" in plan.weights


def _adapter_error(plan: Plan, name: str, layer: Any) -> float | None:
    """|ours - PEFT's| / |PEFT's| of what the adapter adds; None: it cannot be asked."""
    if isinstance(layer, ParamWrapper):
        errors = [_parameter_error(plan, name, part) for part in _wrappers(layer)]
        return max(errors)
    base = layer.get_base_layer()
    if not (isinstance(base, nn.Embedding) or hasattr(base, "in_channels") or is_linear(base)):
        return None
    weight, bias = plan.weights[f"{name}.weight"], plan.weights.get(f"{name}.bias")
    try:
        return _layer_error(weight.stored.device, layer, weight, bias)
    except torch.OutOfMemoryError:
        return _layer_error(torch.device("cpu"), layer, weight, bias)


def _layer_error(device: torch.device, layer: Any, weight: Weight, bias: Weight | None) -> float:
    base, merged = _whole(weight, device)
    alone = detached(layer, base.float()).to(device)
    inner = alone.get_base_layer()
    inputs = _probes(layer, inner).to(device)
    plain = inner(inputs)
    theirs = alone(inputs) - plain
    inner.weight = nn.Parameter(merged, requires_grad=False)
    if bias is not None and bias.updates:
        inner.bias = nn.Parameter(_whole(bias, device)[1], requires_grad=False)
    ours = inner(inputs) - plain
    return _apart(ours, theirs, _FLOAT32 / _SAME_MATHS * float(plain.norm()))


def _parameter_error(plan: Plan, name: str, layer: ParamWrapper) -> float:
    """The same of a parameter of experts, which run only within their model: PEFT's own sum."""
    weight = plan.weights[f"{name}.{layer.parameter_name}"]
    device = weight.stored.device
    wide: Any = copy.copy(layer)  # PEFT casts what it adds to the parameter's dtype
    wide._modules = dict(layer._modules)
    for factor in ("lora_A", "lora_B"):
        wide._modules[factor] = copy.deepcopy(layer._modules[factor]).float()
    shape = torch.empty(weight.stored.shape, device="meta")
    wide.get_param = lambda: _Float32(shape.shape, device)
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    nothing = torch.zeros(weight.stored.shape, device=device)
    theirs = sum((wide.get_delta_weight(n).float() for n in names), nothing)
    base, merged = _whole(weight, device)
    floor = _FLOAT32 / _SAME_MATHS * float(base.float().norm())
    return _apart(merged - base.float(), theirs, floor)


class _Float32:
    """What PEFT asks of a parameter when it computes the change to it."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size, device: torch.device):
        self.shape, self.device = shape, device


def _wrappers(layer: Any) -> Iterator[ParamWrapper]:
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def _apart(ours: Tensor, theirs: Tensor, floor: float) -> float:
    size = max(float(theirs.norm()), floor)
    return float((ours - theirs).norm()) / size if size else float(ours.norm())


def _whole(weight: Weight, device: torch.device) -> tuple[Tensor, Tensor]:
    """Base and merged weight, put together from the parts that are written."""
    parts = list(weight.in_parts(device))
    base, merged = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return base, merged


def _probes(layer: Any, base: Any) -> Tensor:
    """Random inputs of a layer, whose base holds a decoded weight."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        drawn = torch.randint(0, base.num_embeddings, (_PROBES,), generator=generator)
        trained = getattr(layer, "token_indices", {}).values()  # of some tokens alone
        return torch.cat([drawn, *map(torch.as_tensor, trained)])
    if not is_linear(base):
        return picture(base, generator)
    return torch.randn(_PROBES, width(base), generator=generator)


def _base_error(plan: Plan, key: str) -> float | None:
    """How far decoded rows are from the live layer's, 1: as far as its dtype allows."""
    weight = plan.weights[key]
    stored, device = weight.stored, weight.stored.device
    if isinstance(stored, Bnb8Weight):  # its layer rounds its inputs to 8 bits, too
        wanted = stored.codes.float() * (stored.scales.float() / _CODE8)[:, None]
        return _apart(_decoded(stored, device).float(), wanted, 0.0) / _FLOAT32
    if getattr(stored, "misread_on_cpu", False):
        return None
    module: Any = plan.model.get_submodule(key.removesuffix(".weight"))
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if not hasattr(module, "quant_state") and not hasattr(module.weight, "quant_state"):
        return None
    dtype = module.compute_dtype or stored.dtype
    inputs = torch.randn(_PROBES, stored.shape[1], generator=torch.Generator().manual_seed(0)).to(
        device, dtype
    )
    theirs = _apart_from_the_live(module)(inputs).float()
    base = _decoded(stored, device).float()
    ours = inputs.float() @ base.t()
    smallest = torch.finfo(dtype).tiny * stored.shape[1] ** 0.5  # below, float16 is subnormal
    rows = base.norm(dim=1).clamp(min=smallest)
    off = ((theirs - ours) / rows).abs()  # an output of such inputs is about as large as its row
    # A fused kernel need not round what it decodes to the dtype that `decode` gives.
    unit = max(torch.finfo(dtype).eps, torch.finfo(stored.dtype).eps, _FLOAT32)
    return max(float(off.max()) / _ONE_ROW, float(off.pow(2).mean().sqrt())) / unit


def _decoded(stored: Any, device: torch.device) -> Tensor:
    """A quantised weight, put together from the rows that `in_parts` decodes."""
    return torch.cat([base for base, _ in Weight("", stored).in_parts(device)])


def _apart_from_the_live(module: Any) -> Any:
    """A 4-bit layer's own forward, without its bias, which notes nothing in the live layer."""
    alone = copy.copy(module)
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's
        vars(alone).pop(name, None)
    alone._parameters = {"weight": module.weight, "bias": None}
    return alone.forward
