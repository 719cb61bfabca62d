"""Let the live model compute with other weights for a while, and leave it as it was.

Knows nothing of rounding. Everything here is undone when its context is left, by an error too.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from merge_callback.undo import Undone, put

SMALL = 1 << 20  # values of an unquantised weight that may be held in float32: of norms, of biases


class Reached(Exception):
    """A forward came as far as it was wanted to; it carries what was found there."""

    def __init__(self, value: Tensor):
        super().__init__("stopped")
        self.value = value


class StandIn:
    """The forward of a linear layer, with a product that is not its own.

    Attributes:
        product: from inputs (..., in) to outputs (..., out), both of any float dtype.
        watch: called with the inputs; may raise `Reached`.
        listen: called with the outputs.
        shift: added to the outputs, (out,); None: nothing.
    """

    def __init__(self, bias: Tensor | None):
        self._bias = bias
        self.product: Callable[[Tensor], Tensor] | None = None
        self.watch: Callable[[Tensor], None] | None = None
        self.listen: Callable[[Tensor], None] | None = None
        self.shift: Tensor | None = None

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.watch is not None:
            self.watch(inputs)
        assert self.product is not None
        outputs = self.product(inputs).to(inputs.dtype)
        for term in (self._bias, self.shift):
            if term is not None:
                outputs = outputs + term.detach().to(outputs.dtype)
        if self.listen is not None:
            self.listen(outputs)
        return outputs


def stand_in(layer: nn.Module) -> StandIn:
    """A stand-in for `layer`, adapted or not."""
    inner: Any = getattr(layer, "base_layer", layer)
    return StandIn(getattr(inner, "bias", None))


def is_a_product(layer: nn.Module) -> bool:
    """Whether a linear layer computes no more than one, so that a stand-in does as well.

    A router may be a subclass that returns scores and choices, or one for each group of inputs.
    """
    inner: Any = layer
    while isinstance(inner, BaseTunerLayer):
        inner = inner.base_layer
    owner = next(kind for kind in type(inner).__mro__ if "forward" in vars(kind))
    return owner in (nn.Linear, Conv1D) or owner.__module__.startswith("bitsandbytes.")


def computing_dtype(device: torch.device) -> torch.dtype:
    """What products of large matrices are computed in: 16 bits where the device is fast at that."""
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Inputs (..., in) times a weight (out, in), in the weight's dtype."""
    return nn.functional.linear(inputs.to(weight.dtype), weight)


def standing_in(model: nn.Module, stand_ins: Mapping[str, Callable[..., Tensor]]) -> Undone:
    """Put stand-ins, by the names of the layers, in the place of their forwards."""

    def change(undo: ExitStack) -> None:
        for name, stand in stand_ins.items():
            put(undo, vars(model.get_submodule(name)), "forward", stand)  # accelerate may have one

    return Undone(change)


def without_cache(model: nn.Module) -> Undone:
    """No keys and values are kept, by whatever way a forward is told so."""

    def change(undo: ExitStack) -> None:
        for module in model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and vars(config).get("use_cache"):
                put(undo, vars(config), "use_cache", False)

    return Undone(change)


def evaluating(model: nn.Module) -> Undone:
    """No dropout, no gradient checkpointing; each module's own mode comes back."""

    def change(undo: ExitStack) -> None:
        for module in model.modules():
            if module.training:
                undo.callback(vars(module).__setitem__, "training", True)
        model.eval()

    return Undone(change)


def without_adapters(model: PeftModel) -> Undone:
    """The base alone; what is trainable stays trainable."""

    def change(undo: ExitStack) -> None:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # that trained biases stay is what PEFT warns of
        for part in model.modules():  # PEFT registers no undo before its change
            for flag in {"_disable_adapters", "_adapters_disabled"} & vars(part).keys():
                undo.callback(vars(part).__setitem__, flag, vars(part)[flag])
        undo.enter_context(model.disable_adapter())

    return Undone(change)


def in_float32(module: nn.Module) -> Undone:
    """Parameters and buffers of 16 bits and up to SMALL values in float32."""

    def change(undo: ExitStack) -> None:
        for owner in module.modules():
            members: list[dict[str, Any]] = [owner._parameters, owner._buffers]
            for tensors in members:
                for name, tensor in tensors.items():
                    if tensor is None or tensor.numel() > SMALL:
                        continue
                    if tensor.dtype in (torch.bfloat16, torch.float16):
                        wide = nn.Parameter(tensor.detach().float(), requires_grad=False)
                        put(undo, tensors, name, wide)

    return Undone(change)


def generators_kept() -> Undone:
    """The state of every random generator comes back: Python's, NumPy's, torch's on each device."""

    def change(undo: ExitStack) -> None:
        undo.callback(random.setstate, random.getstate())
        undo.callback(numpy.random.set_state, numpy.random.get_state())
        undo.enter_context(torch.random.fork_rng())

    return Undone(change)
