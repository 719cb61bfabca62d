"""Let the live model compute with other weights for a while, and leave it as it was.

Knows nothing of rounding. Everything here is undone when its context is left, by an error too.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from peft import PeftModel
from torch import Tensor, nn

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


def computing_dtype(device: torch.device) -> torch.dtype:
    """What products of large matrices are computed in: 16 bits where the device is fast at that."""
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Inputs (..., in) times a weight (out, in), in the weight's dtype."""
    return nn.functional.linear(inputs.to(weight.dtype), weight)


@contextlib.contextmanager
def standing_in(model: nn.Module, stand_ins: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Put stand-ins, by the names of the layers, in the place of their forwards."""
    with contextlib.ExitStack() as undo:
        for name, stand in stand_ins.items():
            layer = model.get_submodule(name)
            own = vars(layer).get("forward")  # accelerate's hooks put one there
            layer.forward = stand
            undo.callback(_restore, layer, own)
        yield


def _restore(layer: nn.Module, forward: Any) -> None:
    del layer.forward
    if forward is not None:
        layer.forward = forward


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient checkpointing; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def without_adapters(model: PeftModel) -> Iterator[None]:
    """The base alone; what is trainable stays trainable."""
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trained biases stay is what PEFT warns of
        try:
            with model.disable_adapter():
                yield
        finally:
            for parameter, wanted in trainable:
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)


@contextlib.contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers of 16 bits and up to SMALL values in float32."""
    with contextlib.ExitStack() as undo:
        for owner in module.modules():
            members: list[dict[str, Any]] = [owner._parameters, owner._buffers]
            for tensors in members:
                for name, tensor in tensors.items():
                    if tensor is None or tensor.numel() > SMALL:
                        continue
                    if tensor.dtype in (torch.bfloat16, torch.float16):
                        undo.callback(tensors.__setitem__, name, tensor)
                        tensors[name] = nn.Parameter(tensor.detach().float(), requires_grad=False)
        yield


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """The state of every random generator comes back: Python's, NumPy's, torch's on each device."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
