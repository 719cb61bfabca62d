"""The weights of a rebuilt model against the live model's: is each what was to be written?

Nothing is encoded here, so that what wrote a file does not judge it. A 16-bit value must be the
nearest to the exact sum. A 4-bit code that was chosen without data must be next to the exact sum on
the table of its format, under a scale that fits its block; a code that was chosen with data must be
the one that was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from merge_callback.codecs import Container, runs
from merge_callback.codecs.bnb4 import Bnb4, Bnb4Weight
from merge_callback.codecs.plain import Plain
from merge_callback.cores import in_order
from merge_callback.live import Weight, read_weights
from merge_callback.plan import Plan
from merge_callback.rounding.grid import NESTED_BLOCKSIZE, Grid

_FEW = 0.005  # share of values that may round the other way, as a sum on another device does
_FAR = 0.5  # relative error; rounding to 4 bits without data gives 0.1
_FAR_BY_CHOICE = 0.7  # with data more: what one layer loses another makes good
_BOUNDARY = 2e-3  # of a scale: other devices add in other orders
_SCALE = 1e-6  # relative: what another device adds up otherwise
_NESTED = 0.0072  # of the largest of 256 scales less their offset: half a gap of the 8-bit map
_OUTGROWN = 1.1
_UNBIASED = 6.0  # standard errors that a sum of random roundings may be off


@dataclass(frozen=True)
class Deviation:
    """How far a weight in a file is from the exact sum of base and adapter.

    Attributes:
        error: |file - sum| / |sum|.
        broken: it is not what was to be written.
    """

    error: float
    broken: bool


_UNREADABLE = Deviation(math.nan, True)


def deviations(plan: Plan, method: str, rebuilt: PreTrainedModel) -> dict[str, Deviation]:
    """Compare every weight of a rebuilt model with the live one, its adapters added.

    On as many cores as the merge computes with: sums are the same to their last places then.
    """
    found = read_weights(rebuilt)
    containers = plan.containers[method]

    @torch.no_grad()
    def deviation(key: str) -> Deviation:
        weight = plan.whole(plan.weights[key])
        return _deviation(weight, containers[key], found.get(key))

    return dict(in_order(plan.threads, deviation, plan.weights))


def tie_problems(plan: Plan, rebuilt: PreTrainedModel) -> Iterator[str]:
    """Weights that are one in the live model and two in the rebuilt one, or the reverse."""
    ties = getattr(plan.model, "all_tied_weights_keys", None) or {}
    for name in plan.tied_names:
        one, other = (rebuilt.get_parameter(end) for end in (name, ties[name]))
        if one.data_ptr() != other.data_ptr():
            yield f"{name} is tied to {ties[name]} in the live model, and not in the file"
    for name, source in (getattr(rebuilt, "all_tied_weights_keys", None) or {}).items():
        apart = name in plan.ties_broken or ties.get(name) != source
        if apart and name in plan.weights and source in plan.weights:
            yield f"{name} is tied to {source} when the file is loaded, and not in the live model"


def _deviation(weight: Weight, container: Container, found: Weight | None) -> Deviation:
    try:
        return _deviation_on(weight.stored.device, weight, container, found)
    except torch.OutOfMemoryError:
        return _deviation_on(torch.device("cpu"), weight, container, found)


def _deviation_on(
    device: torch.device, weight: Weight, container: Container, found: Weight | None
) -> Deviation:
    if found is None or isinstance(found.stored, Bnb4Weight) != isinstance(container, Bnb4):
        return _UNREADABLE
    there = found.decoded(device)
    if _is_transposed(container, found):
        there = there.t()
    if there.shape != weight.stored.shape:
        return _UNREADABLE
    if isinstance(container, Bnb4):
        assert isinstance(found.stored, Bnb4Weight)
        return _of_4_bits(device, weight, container, found.stored, there)
    return _of_floats(device, weight, container.dtype, there)


def _parts(weight: Weight, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat runs of the base and of the exact values, as the writer computes them."""
    if weight.updates:
        for base, merged in weight.in_parts(device):
            yield base.reshape(-1), merged.reshape(-1)
    else:
        for (exact,) in runs(weight.decoded(device)):
            yield exact, exact


def _of_floats(
    device: torch.device, weight: Weight, dtype: torch.dtype, there: Tensor
) -> Deviation:
    """Each value must be the nearest to the exact sum; a few may be its neighbours."""
    values = there.reshape(-1)
    apart = size = 0.0
    unequal, beyond, done = 0, False, 0
    for base, exact in _parts(weight, device):
        value = values[done : done + len(exact)]
        done += len(exact)
        if not _is_computed(exact.dtype):
            beyond = beyond or not _same_bytes(exact, value)
            continue
        wanted = exact.to(dtype).to(value.dtype)
        if not torch.equal(value, wanted):
            differing, far = _differences(value, wanted, base)
            unequal, beyond = unequal + differing, beyond or far
        off, whole = exact.float() - value.float(), exact.float()
        if not math.isfinite(float(whole.sum())):
            off, whole = (t[exact.isfinite() & value.isfinite()] for t in (off, whole))
        apart += float(torch.dot(off, off))
        size += float(torch.dot(whole, whole))
    broken = beyond or unequal > _FEW * len(values) + 1
    return Deviation(math.sqrt(apart / size if size else apart), broken)


def _is_computed(dtype: torch.dtype) -> bool:
    """Whether values of a dtype can be compared; of the others the bytes are."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _same_bytes(exact: Tensor, there: Tensor) -> bool:
    """Whether a loader has the very values; of integers in another dtype, too."""
    if not exact.dtype.is_floating_point and not exact.is_complex():
        exact = exact.to(there.dtype)
    if exact.dtype != there.dtype:
        return False
    one, other = (t.resolve_conj().contiguous().reshape(-1) for t in (exact, there))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _differences(one: Tensor, other: Tensor, base: Tensor) -> tuple[int, bool]:
    """How many values differ, and whether one does by more than rounding the other way.

    Args:
        base: what `other` is a sum of, with the adapter's change.
    """
    unequal = int(((one != other) & ~(one.isnan() & other.isnan())).sum())
    if not unequal:
        return 0, False
    limits = torch.finfo(one.dtype)
    if one.dtype.itemsize > 2:  # sums of floats differ in the last places of their summands
        size = other.abs() + base.to(other.dtype).abs()
        close = (one - other).abs() <= 32 * limits.eps * size + limits.tiny
        return 0, not bool((close | (one == other) | (one.isnan() & other.isnan())).all())
    near = torch.allclose(one, other, rtol=2 * limits.eps, atol=2 * limits.tiny * limits.eps)
    return unequal, not near


class _Table(NamedTuple):
    """A format's values at scale 1 and the gaps to their neighbours; (16,) float32, by code."""

    value: Tensor
    below: Tensor
    above: Tensor

    @classmethod
    def of(cls, quant_type: str, device: torch.device) -> _Table:
        import bitsandbytes.functional as bnb

        value: Tensor = bnb.get_4bit_type(quant_type, device=device).float()
        apart = value[:, None] - value[None, :]  # (code, other)
        below = torch.where(apart > 0, apart, math.inf).amin(1)
        above = torch.where(apart < 0, -apart, math.inf).amin(1)
        return cls(value, below, above)


def _of_4_bits(
    device: torch.device, weight: Weight, container: Bnb4, found: Bnb4Weight, there: Tensor
) -> Deviation:
    if not _is_of_format(container, found):
        return _UNREADABLE
    values = there.reshape(-1)
    if not weight.updates and isinstance(weight.source, Bnb4Weight):
        exact = weight.decoded(device).reshape(-1)
        return Deviation(0.0, not torch.equal(exact, values)) if len(exact) else _UNREADABLE
    codes = _unpacked(found.packed.to(device), len(values))
    scales = found.scales(device)
    sums = _Sums()
    if container.rounded is not None:
        chosen = _unpacked(container.rounded.packed.to(device), len(values))
        fits = _fits(container.grid, scales, container.rounded.scales.to(device))
        sums.broken = not torch.equal(codes, chosen) or not fits
    kept = None if container.base is None else container.base.scales(device)
    table = _Table.of(container.grid.quant_type, device)
    done, size, wanted_scales = 0, container.grid.blocksize, []
    for base, exact in _parts(weight, device):
        run, blocks = (slice(done // n, -(-(done + len(exact)) // n)) for n in (1, size))
        done += len(exact)
        if container.rounded is None:
            wanted = _wanted_scales(exact, size, None if kept is None else kept[blocks])
            # bitsandbytes rounds under a scale that is not quantised yet.
            own = wanted if kept is None else scales[blocks]
            wanted_scales.append(wanted)
            ratio = _over_blocks(exact.float(), own, size)
            if kept is None:
                sums.add_nearest(table, codes[run], ratio)
            else:  # blocks that have outgrown their scale are rounded to nearest
                fair = (wanted == kept[blocks]).repeat_interleave(size)[: len(exact)]
                change = exact.float() - base.float()
                own = own.repeat_interleave(size)[: len(exact)]
                sums.add_random(table, codes[run], ratio, own, change, fair)
        sums.add(exact.float(), values[run].float())
    if wanted_scales:
        fits = _fits(container.grid, scales, torch.cat(wanted_scales))
        sums.broken = sums.broken or not fits
    return sums.deviation(chosen=container.rounded is not None)


def _is_of_format(container: Bnb4, found: Bnb4Weight) -> bool:
    one, other = container.grid, found.grid
    formats = [(g.quant_type, g.blocksize, g.nested) for g in (one, other)]
    return formats[0] == formats[1] and container.dtype == found.dtype


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """Codes of a stock container, (n,) uint8: two to a byte, the first in the high half."""
    flat = packed.detach().view(torch.uint8).reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).reshape(-1)[:count]


def _over_blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Values over the scales of their blocks, (n,) float32; 0 where both are 0."""
    padded = values
    if len(values) % size:
        padded = torch.nn.functional.pad(values, (0, -len(values) % size))
    return (padded.view(-1, size) / scales[:, None]).view(-1)[: len(values)].nan_to_num_(nan=0.0)


def _wanted_scales(exact: Tensor, size: int, kept: Tensor | None) -> Tensor:
    """Each block's largest magnitude; its base's scale where it has not outgrown that."""
    magnitudes = torch.nn.functional.pad(exact.float().abs(), (0, -len(exact) % size))
    largest = magnitudes.view(-1, size).amax(1)
    return largest if kept is None else torch.where(largest > _OUTGROWN * kept.abs(), largest, kept)


def _fits(grid: Grid, scales: Tensor, wanted: Tensor) -> bool:
    """Whether a loader has these scales, but for double quantisation."""
    slack = _SCALE * wanted.abs() + torch.finfo(torch.float32).tiny
    if grid.nested:
        apart = (wanted - (wanted.mean() if grid.offset is None else grid.offset)).abs()
        padded = torch.nn.functional.pad(apart, (0, -len(apart) % NESTED_BLOCKSIZE))
        largest = padded.view(-1, NESTED_BLOCKSIZE).amax(1).repeat_interleave(NESTED_BLOCKSIZE)
        slack = slack + _NESTED * largest[: len(wanted)]
    return bool(((scales - wanted).abs() <= slack).all())


@dataclass
class _Lean:
    """A sum of random roundings, in one direction, and what it may be.

    Bernstein's inequality: a sum of independent errors of mean 0, of variance V and of at most M
    each, is beyond 6 sqrt(V) + 12 M once in thirty million times.
    """

    total: float = 0.0
    variance: float = 0.0
    largest: float = 0.0

    def add(self, error: Tensor, gap: Tensor, direction: Tensor) -> None:
        """Args: error: code minus value; gap: between the value's neighbours; both scaled."""
        size = error.abs()
        self.total += float(torch.dot(error, direction))
        self.variance += float(torch.dot(size * (gap - size).clamp_(min=0), direction * direction))
        self.largest = max(self.largest, float((gap * direction).abs().max()))

    @property
    def is_off(self) -> bool:
        most = _UNBIASED * math.sqrt(self.variance) + _UNBIASED**2 / 3 * self.largest
        return not abs(self.total) <= most


class _Sums:
    """Sums over the values of one weight."""

    def __init__(self) -> None:
        self.apart = 0.0  # |file - exact|^2
        self.size = 0.0  # |exact|^2
        self.broken = False
        self._leans = (_Lean(), _Lean())  # of all values; along what was trained

    def add(self, exact: Tensor, value: Tensor) -> None:
        off = value - exact
        self.apart += float(torch.dot(off, off))
        self.size += float(torch.dot(exact, exact))

    def add_nearest(self, table: _Table, codes: Tensor, ratio: Tensor) -> None:
        """Look at each code: is it within half a gap of the exact value, in units of its scale?"""
        index = codes.int()
        low = (table.value - table.below / 2 - _BOUNDARY).index_select(0, index)
        high = (table.value + table.above / 2 + _BOUNDARY).index_select(0, index)
        if not (bool((low <= ratio).all()) and bool((ratio <= high).all())):
            self.broken = True

    def add_random(
        self,
        table: _Table,
        codes: Tensor,
        ratio: Tensor,
        scales: Tensor,
        change: Tensor,
        fair: Tensor,
    ) -> None:
        """Look at each code: is it next to the exact value? Are those rounded at random fair?

        Args:
            ratio: exact values in units of their scales.
            scales: one for each value.
            change: what was trained.
            fair: which values are rounded at random.
        """
        index = codes.int()
        error = table.value.index_select(0, index) - ratio
        below, above = (t.index_select(0, index) for t in (table.below, table.above))
        gap = torch.where(error > 0, below, above)
        self.broken = self.broken or not bool((error.abs() <= gap + _BOUNDARY).all())
        # Beyond the ends of the table there is one neighbour, and nothing to be fair about.
        between = fair & gap.isfinite()
        gap = torch.where(between, gap * scales.abs(), 0)
        error = torch.where(between, error, 0)
        for lean, direction in zip(self._leans, (torch.ones_like(change), change), strict=True):
            lean.add(error * scales, gap, direction)

    def deviation(self, *, chosen: bool) -> Deviation:
        far = not self.apart <= (_FAR_BY_CHOICE if chosen else _FAR) ** 2 * self.size
        error = math.sqrt(self.apart / self.size if self.size else self.apart)
        return Deviation(error, self.broken or far or any(lean.is_off for lean in self._leans))


def _is_transposed(container: Container, found: Weight) -> bool:
    """Whether the file has a Conv1D's (in, out), where the live model has a linear layer."""
    return isinstance(container, Plain) and container.transposed and not found.linear


def worst(deviations: Mapping[str, Deviation], count: int = 5) -> list[str]:
    """The broken ones, the worst first."""
    broken = {key: found for key, found in deviations.items() if found.broken}
    ordered = sorted(broken, key=lambda key: -_rank(broken[key].error))
    told = [f"{key} (off by {broken[key].error:.2g})" for key in ordered[:count]]
    return told + ([f"{len(ordered) - count} more"] if len(ordered) > count else [])


def _rank(error: float) -> float:
    return error if error == error else float("inf")


def carried_problems(plan: Plan, place: Path) -> Iterator[str]:
    """Tensors that no model has: each must have the bytes that it has in the base's files."""
    wanted = {tensor.name: tensor for tensor in plan.carried}
    for path in sorted(place.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in wanted.keys() & set(file.keys()):
                if not _same_bytes(wanted.pop(name).read(), file.get_tensor(name)):
                    yield f"{name} is not the one in the base's checkpoint; merge again"
    for name in wanted:
        yield f"{name} of the base's checkpoint is missing; merge again"


def buffer_problems(plan: Plan, rebuilt: PreTrainedModel) -> Iterator[str]:
    """Buffers that no file has, as rotary frequencies: computed when a model is made."""
    there = dict(rebuilt.named_buffers())
    for name, wanted, owner in _transient(plan.model):
        value = there.get(name)
        if value is None or wanted.device.type == "meta":
            continue
        if value.shape != wanted.shape:  # a cache that grows with the input
            continue
        # A rope that grows with the input has moved since; what it began with is kept beside it.
        own = name.rpartition(".")[2]
        names = (f"original_{own}", own.replace("inv_freq", "original_inv_freq"))
        begun = [getattr(owner, other, None) for other in names]
        alike = [t for t in (wanted, *begun) if isinstance(t, Tensor)]
        if not any(_same_values(value, t) for t in alike):
            yield f"{name}: the rebuilt model computes another value than the live one has"


def _transient(model: Any) -> Iterator[tuple[str, Tensor, Any]]:
    for path, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            tensor = module._buffers.get(name)
            if tensor is not None:
                yield f"{path}.{name}".replace(".base_layer.", ".").lstrip("."), tensor, module


def _same_values(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.detach().cpu(), other.detach().cpu()
    if not (one.is_floating_point() and other.is_floating_point()):
        return bool((one == other).all())
    coarse = max((torch.finfo(t.dtype) for t in (one, other)), key=lambda limits: limits.eps)
    smallest = coarse.tiny * coarse.eps  # a float16 of a high frequency is subnormal
    return torch.allclose(
        one.double(), other.double(), rtol=2 * coarse.eps, atol=smallest, equal_nan=True
    )
