"""A copy of one adapted layer, in float32, that computes apart from the live model.

PEFT's own forward of the copy says what an adapter does, whatever its kind. Its base weight is the
tensor that it is given; everything else is its own.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

_NOT_COPIED = {"forward", "_old_forward", "_hf_hook"}  # what accelerate puts on a module


def detached(layer: Any, base: Tensor) -> Any:
    """Copy a tuner layer of PEFT; its base weight becomes `base`.

    Args:
        layer: adapted; only read.
        base: float32, as the base layer has it, or (out, in) where that is quantised.
    """
    inner = layer.get_base_layer()
    known: dict[int, Any] = {id(inner): _base_layer(inner, base)}
    if hasattr(layer, "_tied_adapter"):  # a list with the layer of a whole embedding in it
        known[id(layer._tied_adapter)] = []
    for module in layer.modules():  # hooks are not copied: they may hold anything
        known |= {id(v): type(v)() for k, v in vars(module).items() if _is_hooks(k)}
        for name in _NOT_COPIED & vars(module).keys():
            known[id(vars(module)[name])] = None
        if "kwargs" in vars(module):  # nobody reads them; views of a tied adapter may be in there
            known[id(vars(module)["kwargs"])] = {}
    # What a forward has left in a buffer may hang on its graph.
    known |= {id(b): b.detach().clone() for b in layer.buffers() if not b.is_leaf}
    alone = copy.deepcopy(layer, known)
    for module in alone.modules():
        for name in _NOT_COPIED & vars(module).keys():
            del vars(module)[name]
        if isinstance(vars(module).get("dtype"), torch.dtype):  # what it casts its inputs to
            module.dtype = torch.float32
    if type(inner).__module__.startswith("bitsandbytes"):
        alone.__class__ = _unquantised_class(type(layer))
        alone.quantization_backend = None
        if not hasattr(alone, "fan_in_fan_out"):
            alone.fan_in_fan_out = False
    return alone.float().eval()


def _is_hooks(attribute: str) -> bool:
    return attribute.startswith("_") and "_hooks" in attribute


def _base_layer(inner: Any, base: Tensor) -> nn.Module:
    """A layer that computes with `base` as `inner` does with its weight."""
    weight = nn.Parameter(base, requires_grad=False)
    bias = getattr(inner, "bias", None)
    if bias is not None:
        bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    if type(inner).__module__.startswith("bitsandbytes"):
        made: Any = nn.Linear(base.shape[1], base.shape[0], bias=False, device="meta")
        made.weight, made.bias = weight, bias
        return made  # type: ignore[no-any-return]
    made = copy.copy(inner)
    for name in _NOT_COPIED & vars(made).keys():
        del vars(made)[name]
    others = {name: p for name, p in inner._parameters.items() if name not in ("weight", "bias")}
    made._parameters = {**copy.deepcopy(others), "weight": weight}
    if "bias" in inner._parameters:
        made._parameters["bias"] = bias
    made._buffers, made._modules = (copy.deepcopy(d) for d in (inner._buffers, inner._modules))
    for name, value in vars(inner).items():
        if _is_hooks(name):
            vars(made)[name] = type(value)()
    return made  # type: ignore[no-any-return]


def _unquantised_class(kind: type) -> type:
    """PEFT's class of the same layer on a base of floats."""
    package, _, module = kind.__module__.rpartition(".")
    if module != "bnb":
        return kind
    name = kind.__name__.removesuffix("4bit").removesuffix("8bitLt")
    return getattr(sys.modules[f"{package}.layer"], name, kind)


def is_linear(layer: nn.Module) -> bool:
    """Whether a base layer multiplies with a matrix, (out, in) or a Conv1D's (in, out)."""
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def width(layer: Any) -> int:
    """How many inputs a linear base layer takes."""
    inputs: int = layer.weight.shape[1] if isinstance(layer, nn.Linear) else layer.weight.shape[0]
    return inputs


def units(count: int, start: int, end: int, device: torch.device) -> Tensor:
    """Rows `start` to `end` of the unit matrix, (end - start, count) float32."""
    return torch.eye(end - start, count, device=device).roll(start, 1)
