"""Round a model layer by layer, each making good what was lost in those before.

With x the inputs of a layer in the model as rounded so far, x_l those in the live model, and V the
live model's weight, the weight to be rounded is not V but the one that gives the live outputs best:

    W* = argmin E |V x_l - W* x|^2 + c |W* - V|^2 = V + V C (H + c I)^-1,
    H = E[x x^T],  C = E[(x_l - x) x^T]

A layer whose outputs are added to a stream s can make good the whole error of the stream. With
r = s + V x what is read of it behind the layer, and r_l the same in the live model:

    W* = V + D (H + c I)^-1,  D = E[(r_l - r) x^T]

There tokens are weighted by 1 / |r_l|^2, since the norm that follows divides by |r_l|.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from merge_callback.batches import Batch, token_mask, tokens_in
from merge_callback.calibration.blocks import NOT_ALL, Block, Group, Unrunnable
from merge_callback.calibration.recording import find_blocks, inputs_of, record
from merge_callback.codecs.bnb4 import Bnb4Weight
from merge_callback.errors import MergeError
from merge_callback.live import Weight
from merge_callback.plan import Plan
from merge_callback.processes import ALONE, Processes
from merge_callback.rounding.calibrated import Rows, calibrated, solve
from merge_callback.rounding.grid import Grid, Rounded
from merge_callback.stand_ins import computing_dtype, is_a_product

_CORRECTION_DAMPING = 0.02  # c, in units of the mean of H's diagonal, and at least
_CORRECTION_DAMPING_OF_FEW = 0.3  # times the inputs to a token
OUT_OF_TIME = "time was up"
_NO_TOKENS = "no tokens reached them"
_NO_PRODUCT = "their forward is more than a product with the weight"
# Of the weight's own size. A larger one comes of inputs that tell next to nothing of the error.
_LARGEST_CORRECTION = 0.5


@dataclass
class Calibration:
    """What came of it.

    Attributes:
        rounded: weight -> its codes and scales.
        left_out: layers that could not be calibrated -> why.
        tokens: how many were looked at.
        error: relative error of the stream behind the last block that was run,
            |live - merged| / |live|; None: there is none.
    """

    rounded: dict[str, Rounded] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    error: float | None = None


@torch.no_grad()
def calibrate(
    plan: Plan,
    batches: Sequence[Batch],
    *,
    deadline: float = math.inf,
    progress: bool = False,
    processes: Processes = ALONE,
    uncalled: Mapping[str, str] = MappingProxyType({}),
) -> Calibration:
    """Round all 4-bit weights of a plan, whose model is in eval mode.

    Holds what is chosen, one more 4-bit copy of the model; one block at a time in float32 and twice
    in 16 bits; the streams of both models in float32, 8 bytes times tokens times hidden size; and
    what `rounding.calibrated` needs for the layers of one group.

    Args:
        batches: what to calibrate with.
        deadline: of `time.monotonic`; blocks that are not begun by then are left out.
        processes: that calibrate together, each with batches of its own behind the first, which is
            the leader's and counts once.
        uncalled: layers that the model is known not to call -> why.

    Raises:
        MergeError: the live model does not run on these data, or gives values that are not finite.
        NothingCalibrated: none of its layers can be calibrated.
    """
    tokens = torch.tensor(sum(map(tokens_in, batches[0 if processes.leads else 1 :])))
    processes.add_up(tokens)
    done = Calibration(tokens=int(tokens))
    weights = plan.to_round()
    done.left_out |= unfit(plan)
    linears = [name for name in weights if name not in done.left_out]
    blocks = _recorded(plan, linears, batches)
    reached = {name for block in blocks for name in block.linears.values()}
    done.left_out |= {
        name: uncalled.get(name, _NO_TOKENS) for name in linears if name not in reached
    }
    walk = _Walk(plan, batches, done, processes, uncalled)
    for block in tqdm(blocks, desc="calibrate", unit="block", disable=not progress):
        if processes.from_leader(time.monotonic() > deadline):
            done.left_out |= dict.fromkeys(block.linears.values(), OUT_OF_TIME)
        else:
            walk.through(block, {n: weights[full] for n, full in block.linears.items()})
    done.error = walk.error
    if weights and not done.rounded and OUT_OF_TIME not in done.left_out.values():
        raise NothingCalibrated(done.left_out)
    return done


class NothingCalibrated(MergeError):
    """No layer of a model can be calibrated; why, by layer."""

    def __init__(self, left_out: dict[str, str]):
        self.left_out = left_out
        name, why = next(iter(left_out.items()))
        super().__init__(f"none of {len(left_out)} layers can be calibrated ({name}: {why})")


def unfit(plan: Plan) -> dict[str, str]:
    """Layers that no data can calibrate -> why; what the structure of the model tells of it."""
    layers = {name: plan.model.get_submodule(name) for name in plan.to_round()}
    return {name: _NO_PRODUCT for name, layer in layers.items() if not is_a_product(layer)}


def _recorded(plan: Plan, linears: Sequence[str], batches: Sequence[Batch]) -> list[Block]:
    try:
        return record(plan.model, find_blocks(plan.model, linears), batches)
    except (MergeError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # columns that are not its inputs, a layer that PEFT cannot run
        raise MergeError(f"the live model does not run on these data: {error}") from error


class _Walk:
    """The way through the model: what has been rounded, and the two streams so far."""

    def __init__(
        self,
        plan: Plan,
        batches: Sequence[Batch],
        done: Calibration,
        processes: Processes,
        uncalled: Mapping[str, str],
    ):
        self._plan = plan
        self._uncalled = uncalled
        self._processes = processes
        self._batches = batches
        self._masks = [token_mask(batch) for batch in batches]
        self._done = done
        self._live: list[Tensor] = []  # inputs of the next block, batch by batch
        self._merged: list[Tensor] = []
        self.error: float | None = None

    def through(self, block: Block, weights: Mapping[str, Weight]) -> None:
        """Round the layers of a block, and go on to the next.

        Where a block cannot be run alone its layers are left out, and the next one begins with what
        the live model gives to it.
        """
        wanted = {name: weight.merged(weight.decoded()) for name, weight in weights.items()}
        live = {name: weight.to(computing_dtype(weight.device)) for name, weight in wanted.items()}
        try:
            groups, reason = self._understood(block, live)
            if reason is None:
                self._through(block, groups, weights, wanted, live)
        except FloatingPointError as error:
            raise MergeError(f"{error}; did training diverge?") from error
        except Exception as error:
            if self._processes.count > 1 or isinstance(error, torch.OutOfMemoryError | MemoryError):
                raise
            reason = f"rounding their block failed ({_told(error)})"
        if reason is not None:
            self._live, self._merged = [], []
        for name, full in block.linears.items():
            if weights[name].key not in self._done.rounded:
                self._done.left_out[full] = reason or self._uncalled.get(full, _NO_TOKENS)
        block.forget()

    def _understood(
        self, block: Block, live: Mapping[str, Tensor]
    ) -> tuple[Sequence[Group], str | None]:
        """The groups of a block; or why it cannot be run, which all processes find alike."""
        groups: Sequence[Group] = ()
        failed: Exception | None = None
        try:
            groups = self._groups(block, live)
        except (FloatingPointError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            failed = error
        reason = None if failed is None else f"their block cannot be run alone ({_told(failed)})"
        reason = self._processes.from_leader(reason)
        if failed is not None and reason is None:
            raise failed
        return groups, reason

    def _groups(self, block: Block, live: Mapping[str, Tensor]) -> Sequence[Group]:
        if len(block.calls) < len(self._batches):
            raise Unrunnable(NOT_ALL)
        block.check()
        if block.starts or not self._live:
            self._live = inputs_of(self._plan.model, block, self._batches)
            self._merged = list(self._live)
        with block.opened():
            block.check_with(live)
            return block.groups(self._live[0], live) if live else ()

    def _through(
        self,
        block: Block,
        groups: Sequence[Group],
        weights: Mapping[str, Weight],
        wanted: Mapping[str, Tensor],
        live: Mapping[str, Tensor],
    ) -> None:
        merged = dict(live)
        with block.opened():
            for group in groups:
                for name, rounded in self._round(block, group, weights, wanted, live, merged):
                    self._done.rounded[weights[name].key] = rounded
                    merged[name] = self._decode(weights[name], rounded)
            self._live = [block.run(i, h, live) for i, h in enumerate(self._live)]
            self._merged = [block.run(i, h, merged) for i, h in enumerate(self._merged)]
        self.error = self._apart()

    def _apart(self) -> float:
        """How far the streams are apart."""
        apart = sum(
            float((a - b).pow(2).sum()) for a, b in zip(self._live, self._merged, strict=True)
        )
        return math.sqrt(apart / (sum(float(a.pow(2).sum()) for a in self._live) or 1.0))

    def _round(
        self,
        block: Block,
        group: Group,
        weights: Mapping[str, Weight],
        wanted: Mapping[str, Tensor],
        live: Mapping[str, Tensor],
        merged: Mapping[str, Tensor],
    ) -> Iterator[tuple[str, Rounded]]:
        """Round the layers of a group."""
        moments = _Moments()
        for i, mask in enumerate(self._masks):
            there = block.meet(i, self._live[i], live, group)
            here = block.meet(i, self._merged[i], merged, group)
            moments.add(group, mask, there, here, count=i > 0 or self._processes.leads)
        moments.add_up(self._processes)
        target = torch.cat([wanted[name] for name in group.names])
        try:
            few = len(moments.inputs) / moments.tokens
            damping = max(_CORRECTION_DAMPING, _CORRECTION_DAMPING_OF_FEW * few)
            correction = solve(moments.inputs, moments.correction(target), damping)
            corrected = target + bounded(correction, target)
            parts = torch.split(corrected, [len(wanted[n]) for n in group.names])
            rows = [
                Rows(part, *self._start(weights[name], wanted[name]))
                for name, part in zip(group.names, parts, strict=True)
            ]
            yield from zip(
                group.names, calibrated(rows, moments.inputs, moments.tokens), strict=True
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{weights[group.names[0]].key}: {error}") from error

    def _start(self, weight: Weight, wanted: Tensor) -> tuple[Grid, Tensor]:
        """The grid to begin with: the base's own, or that of nearest rounding."""
        grid = self._plan.grid(weight)
        if weight.on_a_grid and isinstance(weight.stored, Bnb4Weight):
            return grid, grid.widen(weight.stored.scales(wanted.device), grid.largest(wanted))
        return grid, grid.stored(grid.largest(wanted))

    def _decode(self, weight: Weight, rounded: Rounded) -> Tensor:
        grid, shape = self._plan.grid(weight), weight.stored.shape
        stored = grid.stored(rounded.scales)
        flat = grid.decode(rounded.packed, stored, math.prod(shape), torch.float32)
        return flat.view(shape).to(computing_dtype(flat.device))


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, Unrunnable) else f"{type(error).__name__}: {error}"


def bounded(correction: Tensor, weight: Tensor) -> Tensor:
    """The correction of a weight, or none where it is too large to be one."""
    small = correction.norm() <= _LARGEST_CORRECTION * weight.norm()
    return correction if small else torch.zeros_like(correction)


class _Moments:
    """Sums over tokens for one group of layers; see the module's docstring."""

    def __init__(self) -> None:
        self.tokens = 0
        self.inputs: Any = 0  # H, (in, in)
        self._inner: Any = 0  # C, (in, in)
        self._outer: Any = 0  # D, (out, in)

    def add(
        self, group: Group, mask: Tensor | None, there: Any, here: Any, *, count: bool = True
    ) -> None:
        """Add a batch: what `Block.meet` found in the live and in the merged model.

        Args:
            count: False: another process counts it.
        """
        x = _rows(here[0], mask)
        if not count:
            mask = torch.zeros(len(x), dtype=torch.bool)
            x = _rows(here[0], mask)
        self.tokens += len(x)
        if group.reader is not None:
            read_live, read = (_rows(r[1], mask) for r in (there, here))
            scale = read_live.pow(2).mean(1, keepdim=True).clamp(min=1e-12).rsqrt()
            x = x * scale
            self._outer = self._outer + ((read_live - read) * scale / group.reader.factor).t() @ x
        elif there[0].shape == here[0].shape:  # not where routing differs
            self._inner = self._inner + (_rows(there[0], mask) - x).t() @ x
        self.inputs = self.inputs + x.t() @ x

    def add_up(self, processes: Processes) -> None:
        """Sum over all processes."""
        tokens = torch.tensor(self.tokens)
        sums = [
            part for part in (self.inputs, self._inner, self._outer) if isinstance(part, Tensor)
        ]
        processes.add_up(tokens, *sums)
        self.tokens = int(tokens)

    def correction(self, weight: Tensor) -> Tensor:
        """E[e x^T] with e what the outputs lack; (out, in)."""
        found: Tensor = torch.zeros_like(weight) + self._outer
        return found + weight @ self._inner if isinstance(self._inner, Tensor) else found


def _rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens that are no padding, (tokens, width) float32."""
    flat = inputs.reshape(-1, inputs.shape[-1]).float()
    if mask is None or mask.numel() != len(flat):
        return flat
    return flat[mask.flatten().to(flat.device)]
