"""The weights of a rebuilt model, and the adapter's arithmetic, against the live model's.

`file_problems` looks at what a loader makes of the files: is each weight what was to be written?
`adapter_problems` looks at what was to be written: is it what PEFT itself computes?
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from merge_callback.codecs import Container, runs
from merge_callback.codecs.bnb4 import Bnb4
from merge_callback.codecs.plain import Plain, PlainWeight
from merge_callback.live import Weight, read_weights
from merge_callback.plan import Plan

_BROKEN_4BIT = 0.5  # relative error; rounding to 4 bits without data gives 0.1
_SAME_MATHS = 1e-3  # relative to what the adapter adds
_FLOAT32 = 1e-5  # of the outputs: what float32 cannot tell apart
_PROBES = 8


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
    """Compare every weight of a rebuilt model with the live one, its adapters added."""
    found = read_weights(rebuilt)
    containers = plan.containers[method]
    return {
        key: _deviation(weight, containers[key], found.get(key))
        for key, weight in plan.weights.items()
    }


def tie_problems(plan: Plan, rebuilt: PreTrainedModel) -> Iterator[str]:
    """Weights that are one in the live model, and two in the rebuilt one."""
    ties = getattr(plan.model, "all_tied_weights_keys", None) or {}
    for name in plan.tied_names:
        one, other = (rebuilt.get_parameter(end) for end in (name, ties[name]))
        if one.data_ptr() != other.data_ptr():
            yield f"{name} is tied to {ties[name]} in the live model, and not in the file"


def _deviation(weight: Weight, container: Container, found: Weight | None) -> Deviation:
    device = weight.stored.device
    wanted = weight.decoded(device)
    if weight.updates:
        wanted = weight.merged(wanted)
    there = None if found is None else found.decoded(device)
    if there is not None and found is not None and _is_transposed(container, found):
        there = there.t()
    if there is None or there.shape != wanted.shape:
        return Deviation(math.nan, True)
    apart = size = 0.0
    for one, other in runs(wanted, there):
        apart += float((one.float() - other.float()).pow(2).sum())
        size += float(one.float().pow(2).sum())
    error = math.sqrt(apart / size if size else apart)
    if isinstance(container, Bnb4) and container.rounded is not None:
        written = container.values(weight.key, container.encode(weight.key, wanted), wanted.numel())
        pairs = zip(runs(there), written, strict=True)
        return Deviation(error, not all(_equal(run.float(), chosen) for (run,), chosen in pairs))
    return Deviation(error, not error <= _allowed(weight, container))  # so that NaN is broken


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether a loader's values are these but for its cast to 16 bits."""
    return torch.allclose(one, other, rtol=torch.finfo(torch.bfloat16).eps, atol=0.0)


def _allowed(weight: Weight, container: Container) -> float:
    """The error that rounding to a container may make."""
    if not isinstance(container, Plain):
        return _BROKEN_4BIT
    if not weight.updates and container.dtype == weight.source.dtype:
        return 0.0
    return torch.finfo(container.dtype).eps if container.dtype.is_floating_point else 0.0


def _is_transposed(container: Container, found: Weight) -> bool:
    """Whether the file has a Conv1D's (in, out), where the live model has a linear layer."""
    return isinstance(container, Plain) and container.transposed and not found.linear


def adapter_problems(plan: Plan) -> Iterator[str]:
    """Layers whose merged weight is not what PEFT computes with, by name."""
    generator = torch.Generator().manual_seed(0)
    for name, layer in plan.model.named_modules():
        weight = plan.weights.get(f"{name}.weight")
        if not isinstance(layer, BaseTunerLayer) or weight is None:
            continue
        error = _maths_error(layer, weight, generator)
        if not error <= _SAME_MATHS:
            yield f"{name}: what is merged differs from PEFT's own by {error:.2g} of the adapter"


def _maths_error(layer: Any, weight: Weight, generator: torch.Generator) -> float:
    """|ours - PEFT's| / |PEFT's| of what the adapter adds to the outputs of random inputs."""
    base = weight.decoded().float()
    alone = _in_float32(layer, weight, base)
    inputs = _probes(alone.get_base_layer(), generator).to(base.device)
    plain = alone.get_base_layer()(inputs)
    theirs = alone(inputs) - plain
    inner = alone.get_base_layer()
    inner.weight = nn.Parameter(weight.merged(base), requires_grad=False)
    ours = inner(inputs) - plain
    size = max(float(theirs.norm()), _FLOAT32 / _SAME_MATHS * float(plain.norm()))
    return float((ours - theirs).norm()) / size if size else float(ours.norm())


def _in_float32(layer: Any, weight: Weight, base: Tensor) -> Any:
    """A copy of an adapted layer, in float32 and with nothing of the live model in it."""
    inner = layer.get_base_layer()
    known: dict[int, Any] = {}
    if not isinstance(weight.stored, PlainWeight) or weight.original is not None:
        bias = getattr(inner, "bias", None)
        linear = nn.Linear(base.shape[1], base.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(base, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
        known = {id(inner): linear}
    return copy.deepcopy(layer, known).float().eval()


def _probes(base: Any, generator: torch.Generator) -> Tensor:
    if isinstance(base, nn.Embedding):
        return torch.randint(0, base.num_embeddings, (_PROBES,), generator=generator)
    width = base.weight.shape[1] if isinstance(base, nn.Linear) else base.weight.shape[0]
    return torch.randn(_PROBES, width, generator=generator)


def worst(deviations: Mapping[str, Deviation], count: int = 5) -> list[str]:
    """The broken ones, the worst first."""
    broken = {key: found for key, found in deviations.items() if found.broken}
    ordered = sorted(broken, key=lambda key: -_rank(broken[key].error))
    told = [f"{key} (off by {broken[key].error:.2g})" for key in ordered[:count]]
    return told + ([f"{len(ordered) - count} more"] if len(ordered) > count else [])


def _rank(error: float) -> float:
    return error if error == error else float("inf")
