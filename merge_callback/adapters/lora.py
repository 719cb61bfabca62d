"""LoRA, rsLoRA and DoRA on linear and embedding layers and on experts, as PEFT 0.21 trains them.

    LoRA (Hu et al. 2021, section 4.1):       W' = W + s B A,        B (out, r), A (r, in)
    DoRA (Liu et al. 2024, equation 5):       W' = m * (W + s B A) / |W + s B A|,  norms by row
    Embedding:                                E' = E + s (B A)^T,    B (dim, r), A (r, vocabulary)

`s` is PEFT's own `scaling[name]`: rsLoRA, rank and alpha patterns and `set_scale` are in it.
Several active adapters make their changes one after the other, as PEFT's forward does. Knows
nothing of how weights are stored or written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from merge_callback.adapters import ALL, Update
from merge_callback.compat import delta_factors

_ROW_VALUES = 1 << 21  # values of a DoRA temporary


@dataclass(frozen=True)
class LowRank:
    """W' = W + s B A; `transposed` where the weight is stored (in, out)."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float
    transposed: bool = False
    whole = False

    def add_to(self, merged: Tensor, base: Tensor, rows: slice = ALL) -> None:
        if self.transposed:
            a, b = _float32(self.a[:, rows], merged), _float32(self.b, merged)
            merged.t().addmm_(b, a, alpha=self.scaling)
        else:
            a, b = _float32(self.a, merged), _float32(self.b[rows], merged)
            merged.addmm_(b, a, alpha=self.scaling)  # (out, r) @ (r, in)

    def tensors(self) -> Iterable[Tensor]:
        return (self.a, self.b, torch.tensor(self.scaling))


@dataclass(frozen=True)
class Dora:
    """W' = m * V / |W0 + s B A| with V = W + s B A, by rows of the (out, in) matrix.

    W is W0 with the changes of the adapters before this one, which PEFT's forward rescales too.
    """

    low_rank: LowRank
    magnitude: Tensor  # (out,)

    @property
    def whole(self) -> bool:
        return self.low_rank.transposed  # its norms are of what is stored as columns

    def add_to(self, merged: Tensor, base: Tensor, rows: slice = ALL) -> None:
        a, b = _float32(self.low_rank.a, merged), _float32(self.low_rank.b[rows], merged)
        magnitude = _float32(self.magnitude.reshape(-1, 1)[rows], merged)
        if self.low_rank.transposed:
            merged, base = merged.t(), base.t()
        step = max(1, _ROW_VALUES // base.shape[1])
        for start in range(0, base.shape[0], step):
            part = slice(start, start + step)
            change = self.low_rank.scaling * (b[part] @ a)
            length = torch.linalg.norm(base[part].float() + change, dim=1, keepdim=True)
            merged[part] = (merged[part] + change) * (magnitude[part] / length)

    def tensors(self) -> Iterable[Tensor]:
        return (*self.low_rank.tensors(), self.magnitude)


@dataclass(frozen=True, eq=False)
class Experts:
    """W' = W + s B A for each expert of a fused parameter, as PEFT reads its factors."""

    layer: ParamWrapper
    name: str

    @property
    def whole(self) -> bool:
        return bool(self.layer.get_param().dim() == 2)

    def add_to(self, merged: Tensor, base: Tensor, rows: slice = ALL) -> None:
        exact: Any = copy.copy(self.layer)  # PEFT casts the factors to the parameter's dtype
        exact.get_param = lambda: torch.empty(0)
        lhs, rhs, scaling = delta_factors(exact, self.name)
        if merged.dim() == 2:  # (out, in): those factors are of the transpose
            lhs, rhs = rhs.transpose(1, 2), lhs.transpose(1, 2)
        experts = merged if merged.dim() == 3 else merged[None]
        factors = zip(lhs[rows].detach(), rhs[rows].detach(), strict=True)
        for expert, (a, b) in zip(experts, factors, strict=True):
            expert.addmm_(_float32(a, merged), _float32(b, merged), alpha=scaling)

    def tensors(self) -> Iterable[Tensor]:
        a, b = self.layer.lora_A[self.name].weight, self.layer.lora_B[self.name].weight
        return (a.detach(), b.detach(), torch.tensor(self.layer.scaling[self.name]))


def updates(layer: LoraLayer) -> tuple[Update, ...]:
    """The changes that the active adapters of `layer` make to its base weight."""
    return tuple(_update(layer, name) for name in _active(layer))


def knows(layer: nn.Module) -> bool:
    """Whether `layer` is a LoRA or DoRA that this file has the formula of."""
    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
        return False
    if not type(layer).__module__.startswith(LoraLayer.__module__.rpartition(".")[0]):
        return False  # AdaLoRA's
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear | nn.Embedding) and type(base).__name__ != "Conv1D":
        return False
    variants = (
        type(layer.lora_variant[name]) for name in _active(layer) if name in layer.lora_variant
    )
    return all(variant is DoraLinearVariant for variant in variants)


def expert_updates(layer: ParamWrapper) -> dict[str, tuple[Update, ...]]:
    """The changes to parameters of experts, of this wrapper and of those nested in it, by name."""
    found: dict[str, tuple[Update, ...]] = {}
    while isinstance(layer, ParamWrapper):
        own = tuple(Experts(layer, name) for name in layer.active_adapters if name in layer.lora_A)
        found[layer.parameter_name] = (*found.get(layer.parameter_name, ()), *own)
        layer = layer.base_layer
    return found


def _active(layer: LoraLayer) -> list[str]:
    return [n for n in layer.active_adapters if n in layer.lora_A or n in layer.lora_embedding_A]


def _update(layer: LoraLayer, name: str) -> Update:
    scaling = float(layer.scaling[name])
    if name in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        return LowRank(a.detach(), b.detach(), scaling, transposed=True)
    low_rank = LowRank(
        layer.lora_A[name].weight.detach(),
        layer.lora_B[name].weight.detach(),
        scaling,
        transposed=bool(getattr(layer, "fan_in_fan_out", False)),
    )
    if name not in layer.lora_variant:
        return low_rank
    return Dora(low_rank, layer.lora_magnitude_vector[name].weight.detach())


def _float32(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(device=like.device, dtype=torch.float32)
