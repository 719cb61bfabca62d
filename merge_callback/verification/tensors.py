"""The weights of a rebuilt model, and the adapter's arithmetic, against the live model's.

`deviations` looks at what a loader makes of the files: is each weight what was to be written?
`adapter_problems` looks at what was to be written: is it what PEFT itself computes?
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from merge_callback.adapters.affine import picture
from merge_callback.adapters.detached import detached, is_linear, width
from merge_callback.codecs import Container, runs
from merge_callback.codecs.bnb4 import Bnb4
from merge_callback.codecs.plain import Plain
from merge_callback.cores import in_order
from merge_callback.live import Weight, read_weights
from merge_callback.merging import Merging
from merge_callback.plan import Plan

logger = logging.getLogger(__name__)

_FEW = 0.005  # share of values that may round the other way, as a sum on another device does
_BROKEN_4BIT = 0.5  # relative error; rounding to 4 bits without data gives 0.1
_NO_WORSE = 2e-3  # of the squared error that 4 bits have: near the middle of two, both are as good
_SAME_MATHS = 1e-3  # relative to what the adapter adds
_FLOAT32 = 1e-5  # of the outputs: what float32 cannot tell apart
_PROBES = 8
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Deviation:
    """How far a weight in a file is from the exact sum of base and adapter.

    Attributes:
        error: |file - sum| / |sum|.
        broken: it is not what was to be written.
    """

    error: float
    broken: bool


def deviations(plan: Plan, method: str, rebuilt: PreTrainedModel) -> dict[str, Deviation]:
    """Compare every weight of a rebuilt model with the live one, its adapters added.

    On as many cores as `weights` computes with: sums are the same to their last places then.
    """
    found = read_weights(rebuilt)
    containers = plan.containers[method]

    @torch.no_grad()
    def deviation(key: str) -> Deviation:
        return _deviation(plan.whole(plan.weights[key]), containers[key], found.get(key))

    return dict(in_order(plan.threads, deviation, plan.weights))


def tie_problems(plan: Plan, rebuilt: PreTrainedModel) -> Iterator[str]:
    """Weights that are one in the live model, and two in the rebuilt one."""
    ties = getattr(plan.model, "all_tied_weights_keys", None) or {}
    for name in plan.tied_names:
        one, other = (rebuilt.get_parameter(end) for end in (name, ties[name]))
        if one.data_ptr() != other.data_ptr():
            yield f"{name} is tied to {ties[name]} in the live model, and not in the file"


def _deviation(weight: Weight, container: Container, found: Weight | None) -> Deviation:
    try:
        return _deviation_on(weight.stored.device, weight, container, found)
    except torch.OutOfMemoryError:
        return _deviation_on(torch.device("cpu"), weight, container, found)


def _deviation_on(
    device: torch.device, weight: Weight, container: Container, found: Weight | None
) -> Deviation:
    """Encode the weight again, and compare a loader's values with what that gives."""
    there = None if found is None else found.decoded(device)
    if there is not None and found is not None and _is_transposed(container, found):
        there = there.t()
    if there is None or there.shape != weight.stored.shape:
        return Deviation(math.nan, True)
    if isinstance(container, Plain) and not weight.updates:
        same = _same_bytes(weight.decoded(device), there)
        if same or container.dtype not in _FLOATS:  # there is no arithmetic for some of the others
            return Deviation(0.0 if same else math.nan, not same)
    values = there.reshape(-1)
    apart = ours = size = 0.0
    unequal, beyond, done = 0, False, 0
    for wanted, chosen in _wanted(weight, container, device):
        value = values[done : done + len(wanted)]
        done += len(wanted)
        apart += float((wanted.float() - value.float()).pow(2).sum())
        size += float(wanted.float().pow(2).sum())
        chosen = chosen.to(value.dtype)
        ours += float((wanted.float() - chosen.float()).pow(2).sum())
        differing, far = _differences(value, chosen)
        unequal += differing
        beyond = beyond or far
    count = len(values)
    if isinstance(container, Bnb4) and container.rounded is None:
        # Another device adds in another order, and codes or scales next to a boundary go over it.
        beyond = not apart <= (1 + _NO_WORSE) * ours
    broken = beyond or unequal > _FEW * count + 1
    far = not math.sqrt(apart) <= _rounding(container, there.dtype, math.sqrt(size), count)
    return Deviation(math.sqrt(apart / size if size else apart), broken or far)


def _same_bytes(exact: Tensor, there: Tensor) -> bool:
    """Whether a loader has the very values, NaN too; of integers in another dtype as well."""
    if exact.dtype not in _FLOATS and not exact.is_complex():
        exact = exact.to(there.dtype)
    if exact.dtype != there.dtype:
        return False
    one, other = (t.resolve_conj().contiguous().reshape(-1) for t in (exact, there))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _wanted(
    weight: Weight, container: Container, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat runs of the exact values, and of what a loader should make of them."""
    if weight.updates:
        for _, merged, written in Merging(weight, {"": container}, device):
            yield merged.reshape(-1), written[""].reshape(-1)
        return
    exact = weight.decoded(device)
    encoded = container.copy(weight.key, weight.source, device)
    for (wanted,), chosen in zip(
        runs(exact), container.values(weight.key, encoded, exact.numel()), strict=True
    ):
        yield wanted, chosen


def _rounding(container: Container, dtype: torch.dtype, size: float, count: int) -> float:
    """The norm that the error of rounding `count` values of norm `size` stays below.

    Asked apart from the container's own answer, which would not tell a transpose of it.
    """
    if isinstance(container, Bnb4):
        return math.inf if container.rounded is not None else _BROKEN_4BIT * size
    if not dtype.is_floating_point:
        return 0.0
    coarse = max((dtype, container.dtype), key=lambda kind: torch.finfo(kind).eps)
    limits = torch.finfo(coarse)
    return limits.eps * size + math.sqrt(count) * limits.tiny * limits.eps


def _differences(one: Tensor, other: Tensor) -> tuple[int, bool]:
    """How many values differ, and whether one does by more than rounding the other way."""
    unequal = int((one != other).sum())
    if not unequal:
        return 0, False
    if not one.dtype.is_floating_point:
        return unequal, True
    limits = torch.finfo(one.dtype)
    if one.dtype.itemsize > 2:  # sums of floats differ in their last places, and that is no matter
        largest = float(other.abs().max())
        near = torch.allclose(one, other, rtol=16 * limits.eps, atol=16 * limits.eps * largest)
        return 0, not near
    near = torch.allclose(one, other, rtol=2 * limits.eps, atol=2 * limits.tiny * limits.eps)
    return unequal, not near


def _is_transposed(container: Container, found: Weight) -> bool:
    """Whether the file has a Conv1D's (in, out), where the live model has a linear layer."""
    return isinstance(container, Plain) and container.transposed and not found.linear


def adapter_problems(plan: Plan) -> Iterator[str]:
    """Layers whose merged weight is not what PEFT computes with, by name."""
    generator = torch.Generator().manual_seed(0)
    for path, layer in plan.model.named_modules():
        name = path.removesuffix(".token_adapter")  # below the wrapper of PEFT's trainable tokens
        weight = plan.weights.get(f"{name}.weight")
        if not isinstance(layer, BaseTunerLayer) or weight is None:
            continue
        if not _asked(layer):
            continue
        bias = plan.weights.get(f"{name}.bias")
        try:
            error = _maths_error(layer, weight, bias, generator)
        except Exception as reason:  # that it cannot be asked is no finding
            logger.warning("%s: its arithmetic could not be checked (%s)", name, reason)
            continue
        if not error <= _SAME_MATHS:
            yield f"{name}: what is merged differs from PEFT's own by {error:.2g} of the adapter"


def _asked(layer: Any) -> bool:
    """Whether a layer can be asked: experts answer only within their model."""
    base = layer.get_base_layer()
    return isinstance(base, nn.Embedding) or hasattr(base, "in_channels") or is_linear(base)


def _maths_error(
    layer: Any, weight: Weight, bias: Weight | None, generator: torch.Generator
) -> float:
    try:
        return _maths_error_on(weight.stored.device, layer, weight, bias, generator)
    except torch.OutOfMemoryError:
        return _maths_error_on(torch.device("cpu"), layer, weight, bias, generator)


def _maths_error_on(
    device: torch.device,
    layer: Any,
    weight: Weight,
    bias: Weight | None,
    generator: torch.Generator,
) -> float:
    """|ours - PEFT's| / |PEFT's| of what the adapter adds to the outputs of random inputs."""
    base = weight.decoded(device).float()
    alone = detached(layer, base).to(device)
    inner = alone.get_base_layer()
    inputs = _probes(layer, inner, generator).to(device)
    plain = inner(inputs)
    theirs = alone(inputs) - plain
    inner.weight = nn.Parameter(weight.merged(base), requires_grad=False)
    if bias is not None and bias.updates:
        merged = bias.merged(bias.decoded(device))
        inner.bias = nn.Parameter(merged, requires_grad=False)
    ours = inner(inputs) - plain
    size = max(float(theirs.norm()), _FLOAT32 / _SAME_MATHS * float(plain.norm()))
    return float((ours - theirs).norm()) / size if size else float(ours.norm())


def _probes(layer: Any, base: Any, generator: torch.Generator) -> Tensor:
    if isinstance(base, nn.Embedding):
        drawn = torch.randint(0, base.num_embeddings, (_PROBES,), generator=generator)
        trained = getattr(layer, "token_indices", {}).values()  # of some tokens alone
        return torch.cat([drawn, *map(torch.as_tensor, trained)])
    if not is_linear(base):
        return picture(base, generator)
    return torch.randn(_PROBES, width(base), generator=generator)


def worst(deviations: Mapping[str, Deviation], count: int = 5) -> list[str]:
    """The broken ones, the worst first."""
    broken = {key: found for key, found in deviations.items() if found.broken}
    ordered = sorted(broken, key=lambda key: -_rank(broken[key].error))
    told = [f"{key} (off by {broken[key].error:.2g})" for key in ordered[:count]]
    return told + ([f"{len(ordered) - count} more"] if len(ordered) > count else [])


def _rank(error: float) -> float:
    return error if error == error else float("inf")
