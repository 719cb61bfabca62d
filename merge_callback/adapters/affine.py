"""Any tuner of PEFT whose layer is affine in its inputs: what its forward makes of unit vectors.

    y(x) = W' x + b',    so    W' = y(I)^T - b',    b' = y(0);    for an embedding    E' = y(tokens)

PEFT's own forward is asked, in float32 and out of place, so that what is merged is what was
trained, scaling and all, on bases too that PEFT itself does not merge into. A layer that is not
affine (one that routes, or looks at other tokens) is refused: merging it has no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merge_callback.adapters import ALL
from merge_callback.adapters.detached import detached, is_linear, units, width

_AT_ONCE = 1 << 24  # values of a product
_AFFINE = 1e-3  # relative to what the adapter adds


@dataclass(frozen=True, eq=False)
class AffineWeight:
    """The change of all active adapters of a linear or embedding layer to its weight."""

    layer: Any
    whole = True

    def add_to(self, merged: Tensor, base: Tensor, rows: slice = ALL) -> None:
        alone = detached(self.layer, base.float()).to(base.device)
        inner = alone.get_base_layer()
        if isinstance(inner, nn.Embedding):
            count, zero = inner.num_embeddings, None
        else:
            count = width(inner)
            nothing = torch.zeros(1, count, device=base.device)
            zero = alone(nothing) - inner(nothing)
        step = max(1, _AT_ONCE // (merged.numel() // count))
        for start in range(0, count, step):
            end = min(start + step, count)
            change = _change(alone, start, end, zero, count)  # (end - start, out)
            if isinstance(inner, nn.Linear):
                merged[:, start:end] += change.t()
            else:
                merged[start:end] += change

    def tensors(self) -> Iterable[Tensor]:
        return trained(self.layer)


@dataclass(frozen=True, eq=False)
class AffineBias:
    """The change of all active adapters of a linear layer to its bias."""

    layer: Any
    weight: Callable[[], Tensor]  # decodes the layer's weight
    whole = True

    def add_to(self, merged: Tensor, base: Tensor, rows: slice = ALL) -> None:
        alone = detached(self.layer, self.weight().float()).to(base.device)
        inner = alone.get_base_layer()
        zero = torch.zeros(1, width(inner), device=base.device)
        merged += (alone(zero) - inner(zero))[0]

    def tensors(self) -> Iterable[Tensor]:
        return trained(self.layer)


@dataclass(frozen=True, eq=False)
class MergedByPeft:
    """The change to a convolution's parameter, as PEFT's merge of a float32 copy makes it."""

    layer: Any
    parameter: str
    weight: Callable[[], Tensor]  # decodes the layer's weight
    whole = True

    def add_to(self, merged: Tensor, base: Tensor, rows: slice = ALL) -> None:
        weight = self.weight().to(torch.float32, copy=True)
        alone = detached(self.layer, weight).to(base.device)
        alone.merge()
        merged += getattr(alone.get_base_layer(), self.parameter).detach() - base.float()

    def tensors(self) -> Iterable[Tensor]:
        return trained(self.layer)


def _change(alone: Any, start: int, end: int, zero: Tensor | None, count: int) -> Tensor:
    """What the adapter adds to the outputs of some unit vectors, or tokens; `zero`: of none."""
    inner = alone.get_base_layer()
    device = inner.weight.device
    if zero is None:
        tokens = torch.arange(start, end, device=device)
        scale = getattr(inner, "embed_scale", 1.0)  # multiplies both; what is stored is before it
        return (alone(tokens) - inner(tokens)) / scale  # type: ignore[no-any-return]
    inputs = units(count, start, end, device)
    change: Tensor = alone(inputs) - inner(inputs) - zero
    return change


def trained(layer: Any) -> tuple[Tensor, ...]:
    """The tensors of a layer's adapters."""
    base = {id(p) for p in layer.get_base_layer().parameters()}
    named = sorted([*layer.named_parameters(), *layer.named_buffers()], key=lambda item: item[0])
    return tuple(tensor.detach() for _, tensor in named if id(tensor) not in base)


def moves_bias(layer: Any, base: Tensor) -> bool:
    """Whether an adapter of this kind could change what the layer gives for zeros."""
    alone = _moved(detached(layer, base.float()))
    inner = alone.get_base_layer()
    zero = torch.zeros(1, width(inner), device=inner.weight.device)
    return bool((alone(zero) != inner(zero)).any())


def problems(layer: Any, base: Tensor) -> Iterator[str]:
    """Why what an adapter of this kind does cannot be written as a weight.

    Args:
        base: the layer's decoded weight.
    """
    inner = layer.get_base_layer()
    kind = f"{type(layer).__module__.split('.')[-2]} on a {type(inner).__name__}"
    if not is_linear(inner):
        return
    try:
        error, adds = _curvature(detached(layer, base.float()))
    except Exception as reason:  # whatever it needs beside its inputs
        yield f"{kind} cannot be asked what it adds to a weight ({reason}); train with LoRA"
        return
    if not error <= _AFFINE:
        yield f"{kind} is no product with a matrix, so it cannot be merged; train with LoRA"
    elif not adds:
        yield f"{kind} adds nothing to inputs by themselves, so it cannot be merged; use LoRA"
    elif getattr(inner, "bias", None) is None and moves_bias(layer, base):
        yield f"{kind} trains a bias where the base has none; train without lora_bias"


@torch.no_grad()
def convolution_problems(layer: Any, base: Tensor) -> Iterator[str]:
    """Why PEFT's merge of a convolution is not what its forward computes; it has none for some."""
    kind = f"{type(layer).__module__.split('.')[-2]} on a {type(layer.get_base_layer()).__name__}"
    try:
        alone = _moved(detached(layer, base.to(torch.float32, copy=True)))
        inner = alone.get_base_layer()
        inputs = picture(inner, torch.Generator().manual_seed(1)).to(base.device)
        plain, theirs = inner(inputs), alone(inputs)
        alone.merge()
        error = float((inner(inputs) - theirs).norm()) / float((theirs - plain).norm())
    except Exception as reason:
        yield f"{kind} does not merge in PEFT ({reason}); leave it out of target_modules"
        return
    if not error <= _AFFINE:
        yield f"{kind}: PEFT merges it into another layer than it trains; leave it out"


def picture(convolution: Any, generator: torch.Generator) -> Tensor:
    """Random inputs of a convolution, of which it gives several outputs; float32."""
    sides = [
        2 * dilation * (size - 1) + stride + 1
        for size, stride, dilation in zip(
            convolution.kernel_size, convolution.stride, convolution.dilation, strict=True
        )
    ]
    return torch.randn(2, convolution.in_channels, *sides, generator=generator)


def _moved(alone: Any) -> Any:
    """A copy of a layer whose adapter is moved away from its start, where it may add nothing."""
    generator = torch.Generator().manual_seed(0)
    still = {id(p) for p in alone.get_base_layer().parameters()}
    for parameter in alone.parameters():
        if id(parameter) not in still and parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data = parameter.data + 0.1 * noise
    return alone


@torch.no_grad()
def _curvature(alone: Any) -> tuple[float, bool]:
    """How far a layer is from being affine, each row by itself; and whether it adds anything."""
    alone = _moved(alone)
    inner = alone.get_base_layer()
    x = torch.randn(3, width(inner), generator=torch.Generator().manual_seed(1))
    x = torch.cat([x, x[:1] + x[1:2], torch.zeros_like(x[:1])]).to(inner.weight.device)
    added = alone(x) - inner(x)
    by_itself = alone(x[2:3]) - inner(x[2:3])
    bent = added[3] + added[4] - added[0] - added[1]
    size = float(added.norm())
    wrong = float(bent.norm()) + float((by_itself[0] - added[2]).norm())
    # A change much smaller than what it is added to is not exact in float32.
    return wrong / max(size, 1e-2 * float(inner(x).norm()), 1e-30), size > 0
