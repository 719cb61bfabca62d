"""Choose codes and scales with data, within the minutes and the memory that there are."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from merge_callback.batches import Batch, hold_out, input_device, take
from merge_callback.calibration.distillation import distil
from merge_callback.calibration.sequential import NothingCalibrated, calibrate, unfit
from merge_callback.errors import MergeError
from merge_callback.host_memory import free_memory
from merge_callback.options import MergeOptions
from merge_callback.plan import Plan
from merge_callback.processes import ALONE, Processes
from merge_callback.rounding.grid import Rounded
from merge_callback.stand_ins import evaluating, generators_kept, without_cache
from merge_callback.verification.kernels import base_of, way

logger = logging.getLogger(__name__)

_HELD_BACK = 1 / 32  # of the tokens: they tell whether distillation helped
_STREAM_BYTES = 8  # a token and a hidden dimension, in the live and in the merged model


@dataclass(frozen=True)
class Choice:
    """How `merged_4bit` rounds.

    Attributes:
        method: `"nearest"`, `"stochastic"`, `"calibrated"` or `"tuned"`; None: there is no 4-bit
            output.
        rounded: weight -> its codes and scales, for those that were chosen with data.
        report: what the manifest says of the data and what it was good for.
    """

    method: str | None
    rounded: Mapping[str, Rounded] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None


def choose(
    plan: Plan,
    options: MergeOptions,
    batches: Iterable[Batch] | None,
    *,
    last: bool,
    processes: Processes = ALONE,
) -> Choice:
    """Choose how to round, and the codes too where that takes data.

    The model computes with other weights meanwhile, and is as it was afterwards; so is every
    random generator. A method that `rounding="auto"` chose and that fails gives way to one that
    needs no data.

    Args:
        batches: None: there is no data.
        last: training is over, so that `rounding="auto"` may take its time.
        processes: that choose together; what counts is what the leader has chosen.

    Raises:
        MergeError: the rounding that was asked for cannot be had.
    """
    if "merged_4bit" not in plan.methods:
        return Choice(None)
    without_data = "stochastic" if plan.on_a_grid else "nearest"
    method = options.rounding
    if method == "auto":
        with_data = "tuned" if last else "calibrated"
        without = torch.tensor(batches is None, dtype=torch.int32)
        processes.add_up(without)  # all of them calibrate, or none
        possible = not without and plan.to_round() and not plan.sharded
        method = with_data if possible else without_data
    if method == "stochastic" and not plan.on_a_grid:
        logger.warning("the base is not on a 4-bit grid: merging with rounding='nearest'")
        method = without_data
    if method in ("calibrated", "tuned") and not plan.to_round():
        logger.info("no 4-bit weight changes, so there is nothing to round")
        return Choice(without_data)
    if method not in ("calibrated", "tuned"):
        return Choice(method)
    try:
        with processes.alike():
            with generators_kept(), evaluating(plan.model), without_cache(plan.model):
                return _with_data(plan, options, method, batches or (), processes)
    except Exception as error:
        left_out = error.left_out if isinstance(error, NothingCalibrated) else None
        if options.rounding != "auto" and left_out is None:
            raise
        logger.warning(
            "rounding with data failed (%s): merging with rounding=%r, which keeps less of what "
            "was trained",
            error,
            without_data,
        )
    return Choice(without_data, report=left_out and {"left_out": left_out})


def rounding_problems(plan: Plan, options: MergeOptions) -> Iterator[str]:
    """What stands against rounding with data that was asked for, as far as the model tells.

    Layers that will be left out are named in a warning.
    """
    weights, left_out = plan.to_round(), unfit(plan)
    if options.rounding not in ("calibrated", "tuned") or not left_out:
        return
    name, why = next(iter(left_out.items()))
    if len(left_out) == len(weights):
        yield (
            f"rounding={options.rounding!r}: no layer can be calibrated, for {name} and "
            f"{len(weights) - 1} others: {why}; use rounding='stochastic'"
        )
        return
    logger.warning(
        "%d of %d layers will be rounded without data, since %s: %s",
        len(left_out),
        len(weights),
        why,
        ", ".join(left_out),
    )


def _with_data(
    plan: Plan,
    options: MergeOptions,
    method: str,
    batches: Iterable[Batch],
    processes: Processes,
) -> Choice:
    minutes = options.rounding_minutes
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    taken = take(batches, _tokens(plan, options))
    seen, held = hold_out(taken, _HELD_BACK) if method == "tuned" else (taken, ())
    if not seen:
        raise MergeError(f"rounding={method!r} needs data, and {len(taken)} batches came")
    found = way(plan.peft_model, seen[0], processes)
    wrapped = found.of(plan.peft_model)
    plan = replace(plan, model=base_of(wrapped), peft_model=wrapped)
    done = calibrate(
        plan,
        _share(seen, processes),
        deadline=deadline,
        progress=options.progress and processes.leads,
        processes=processes,
        uncalled=found.uncalled,
    )
    report: dict[str, Any] = {
        "tokens": done.tokens,
        "stream_error": done.error,
        "left_out": done.left_out,
    }
    if found.told is not None:
        report["kernels"] = found.told
        logger.info("%s", found.told)
    _say_left_out(done.left_out)
    if method == "calibrated" or time.monotonic() > deadline or not processes.leads:
        return Choice("calibrated", done.rounded, report)
    try:
        tuned = distil(
            plan, done.rounded, seen, held or seen, deadline=deadline, progress=options.progress
        )
    except Exception as error:  # of memory, mostly: what was calibrated is good
        logger.warning("distillation failed (%s): the calibrated weights are kept", error)
        return Choice("calibrated", done.rounded, report)
    report |= {"steps": tuned.steps, "kl_before": tuned.before, "kl_after": tuned.after}
    return Choice("tuned", tuned.rounded, report)


def _say_left_out(left_out: Mapping[str, str]) -> None:
    """Each reason once, with its layers."""
    for why in dict.fromkeys(left_out.values()):
        names = [name for name, reason in left_out.items() if reason == why]
        logger.warning(
            "%d layers were rounded without data, since %s: %s", len(names), why, ", ".join(names)
        )


def _share(batches: Sequence[Batch], processes: Processes) -> Sequence[Batch]:
    """This process's part of batches that all processes have; the first is everybody's."""
    own = batches[processes.rank :: processes.count]
    return own if processes.leads else [batches[0], *own]


def _tokens(plan: Plan, options: MergeOptions) -> int:
    """How many tokens to look at, as far as their streams fit into memory."""
    memory = options.calibration_memory or _free_memory(plan) // 4
    fitting = int(memory / (_STREAM_BYTES * _width(plan)))
    if fitting < options.calibration_tokens:
        logger.warning(
            "calibrating with %d tokens instead of %d: more do not fit into %.1f GB of "
            "calibration_memory",
            fitting,
            options.calibration_tokens,
            memory / 1e9,
        )
    return min(options.calibration_tokens, fitting)


def _width(plan: Plan) -> int:
    """Of the stream between blocks: what the config says, or the widest that layers tell of."""
    told = getattr(plan.model.config.get_text_config(), "hidden_size", None)
    if isinstance(told, int):
        return told
    return max((min(weight.stored.shape) for weight in plan.to_round().values()), default=1)


def _free_memory(plan: Plan) -> int:
    """Bytes that are free where the model is."""
    device = input_device(plan.model)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()
