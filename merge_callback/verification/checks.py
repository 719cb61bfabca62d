"""Verification: load the draft, check files, settings and weights, compare outputs, decide."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from merge_callback.base_files import tokenizer_limits
from merge_callback.batches import Batch, input_device
from merge_callback.engines import class_of
from merge_callback.errors import CorruptVersion, VerificationError
from merge_callback.options import MergeOptions
from merge_callback.plan import Plan
from merge_callback.processes import PeerError
from merge_callback.retention import Retention
from merge_callback.stand_ins import evaluating, generators_kept, without_adapters
from merge_callback.verification.adapter_files import adapter_file_problems
from merge_callback.verification.arithmetic import Findings, adapter_findings, base_findings
from merge_callback.verification.kernels import Way, base_of, way
from merge_callback.verification.limits import misses
from merge_callback.verification.outputs import (
    Comparison,
    Silent,
    Speaker,
    Unusable,
    compare_outputs,
    is_routed,
)
from merge_callback.verification.rebuilt import computing_on, is_short_of_memory, rebuild
from merge_callback.verification.settings import (
    config_problems,
    generation_problems,
    processor_problems,
)
from merge_callback.verification.tensors import (
    Deviation,
    buffer_problems,
    carried_problems,
    deviations,
    tie_problems,
    worst,
)

logger = logging.getLogger(__name__)

Kept: TypeAlias = Mapping[str, Mapping[str, Retention]]  # method -> weight -> retention
_WORST = 5
_PASSED, _FAILED = "passed", "failed"
_ROUND_KERNELS = "outputs by transformers' own classes"


@dataclass
class Verification:
    """What was found.

    Attributes:
        data: what the outputs were compared on, in words; None: they were not.
        problems: what is wrong, in words.
        checks: what was checked -> `"passed"`, `"failed"`, or why it did not run.
        comparisons: method -> how near its model comes to the live one.
        deviations: method -> weight -> how far the file is from what was to be written.
    """

    data: str | None = None
    problems: list[str] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    deviations: dict[str, dict[str, Deviation]] = field(default_factory=dict)

    def check(self, what: str, problems: Callable[[], Iterable[str]]) -> None:
        """Run a check. One that breaks down has found something, unless memory is short."""
        try:
            found = list(problems())
        except PeerError:
            raise
        except Exception as error:
            if is_short_of_memory(error):
                self.leave_out(what, f"memory is short: {error}")
                return
            logger.debug("%s", what, exc_info=error)
            found = [f"{what} could not be checked: {type(error).__name__}: {error}"]
        self.problems += found
        self.checks[what] = _FAILED if found else _PASSED

    def check_of(self, method: str, what: str, problems: Callable[[], Iterable[str]]) -> None:
        """The same for what one save method has written."""
        self.check(f"{method}: {what}", lambda: [f"{method}: {told}" for told in problems()])

    def leave_out(self, what: str, why: str) -> None:
        """Note that a check does not run."""
        self.checks[what] = f"not run: {why}"
        logger.warning("verification: %s not checked (%s)", what, why)

    def ask(self, what: str, findings: Callable[[], Findings]) -> None:
        """Run a check that some layers cannot take part in."""
        found = Findings()

        def problems() -> Iterable[str]:
            nonlocal found
            found = findings()
            return found.problems

        self.check(what, problems)
        if found.left_out and self.checks[what] == _PASSED:
            others = f" and {len(found.left_out) - 1} others" if len(found.left_out) > 1 else ""
            self.checks[what] += f"; not run for {found.left_out[0]}{others}: unsupported layers"


@dataclass(frozen=True)
class Written:
    """What a draft has, and what stands beside its weights.

    Attributes:
        places: method -> directory.
        processing_class: tokenizer or processor that was saved there.
        restored: values of the text config that the trainer had changed.
    """

    places: Mapping[str, Path]
    processing_class: Any = None
    restored: Mapping[str, Any] = field(default_factory=dict)


def verify_models(
    plan: Plan,
    options: MergeOptions,
    written: Written,
    kept: Kept,
    *,
    batches: Sequence[Batch] = (),
    data: str | None = None,
    aimed: bool = True,
) -> Verification:
    """Compare what was written, as it lies on the disk, with the live model.

    Beyond the live model and the logits of two models for 1024 tokens, or one sequence, this holds
    four float32 copies of each weight that is looked at (`plan.threads` at a time); on a device
    other than the CPU also the rebuilt model where it fits, else one layer of it. The live model
    and each other one run once over each batch, the live one over one sequence more.

    Args:
        kept: method -> weight -> retention, to name the worst by.
        batches: what to compare outputs on; none: outputs are not compared.
        data: what these are, in words.
        aimed: training lowered the loss on them; if not, no gain is told.

    Raises:
        VerificationError: something is wrong, and `options.verify` is not `"warn"`.
    """
    done = Verification()
    with generators_kept(), evaluating(plan.model), torch.no_grad():
        _check_arithmetic(done, plan)
        _check_settings(done, plan, written)
        models: dict[str, PreTrainedModel] = {}
        for method, place in written.places.items():
            if method != "lora" and (model := _check_model(done, plan, method, place)) is not None:
                models[method] = model
        why = "there was nothing to compare outputs on"
        if batches and models and not done.problems:
            why = _compare(plan, done, models, batches, data)
        if not done.comparisons and not done.problems:
            done.checks.setdefault("outputs", f"not run: {why}")
    if not aimed:
        for method, comparison in done.comparisons.items():
            done.comparisons[method] = replace(comparison, gain_kept=None, gain_error=None)
    for method, comparison in done.comparisons.items():
        known = kept.get(method, {})
        found = list(misses(method, comparison, options, known, routed=is_routed(plan.model)))
        done.problems += found
        done.checks[f"{method}: outputs"] = _FAILED if found else _PASSED
    limits = options.min_gain_kept is not None or options.max_kl is not None
    if limits and not done.problems and len(done.comparisons) < len(models):
        done.problems.append(f"{why}, so min_gain_kept and max_kl cannot be met")
    return _judged(done, options)


def verify_beside_training(plan: Plan, options: MergeOptions, written: Written) -> Verification:
    """What can be verified while a training goes on: all but the models that loaders make.

    Raises:
        VerificationError: as `verify_models`.
    """
    done = Verification()
    _check_arithmetic(done, plan)
    _check_settings(done, plan, written)
    for what in ("weights as they are loaded", "outputs"):
        done.checks[what] = "not run: training went on"
    return _judged(done, options)


def _check_arithmetic(done: Verification, plan: Plan) -> None:
    if plan.sharded:  # PEFT would have to be asked in all processes
        done.checks["adapter"] = done.checks["base"] = "not run: the model is sharded"
        return
    done.ask("adapter", lambda: adapter_findings(plan))
    done.ask("base", lambda: base_findings(plan))


def _check_settings(done: Verification, plan: Plan, written: Written) -> None:
    for method, place in written.places.items():
        given = written.processing_class
        limits = partial(tokenizer_limits, plan.model.config, given)
        done.check_of(method, "tokenizer", partial(processor_problems, place, given, limits))
        if method == "lora":
            if plan.sharded:
                done.checks["lora: adapter files"] = "not run: the model is sharded"
            else:
                files = partial(adapter_file_problems, plan.peft_model, plan.adapters, place)
                done.check_of(method, "adapter files", files)
            continue
        settings = partial(config_problems, plan, method, place, written.restored, given)
        done.check_of(method, "config", settings)
        generation = partial(generation_problems, plan, place, given)
        done.check_of(method, "generation config", generation)


def _check_model(
    done: Verification, plan: Plan, method: str, place: Path
) -> PreTrainedModel | None:
    """Load a model, and look at its weights and buffers."""
    try:
        model = rebuild(place, class_of(plan.model), carried=[t.name for t in plan.carried])
    except CorruptVersion as error:
        if is_short_of_memory(error.__cause__):
            done.leave_out(f"{method}: weights", f"memory is short: {error.__cause__}")
            return None
        done.problems.append(str(error))
        done.checks[f"{method}: weights"] = _FAILED
        return None

    def weights() -> Iterable[str]:
        found = deviations(plan, method, model)
        done.deviations[method] = found
        if broken := worst(found, _WORST):
            yield f"not what was merged: {', '.join(broken)}"

    done.check_of(method, "weights", weights)
    if plan.carried:
        done.check_of(method, "carried tensors", partial(carried_problems, plan, place))
    done.check_of(method, "ties", partial(tie_problems, plan, model))
    done.check_of(method, "buffers", partial(buffer_problems, plan, model))
    return model


def _judged(done: Verification, options: MergeOptions) -> Verification:
    if done.problems and options.verify != "warn":
        raise VerificationError(done.problems)
    for problem in done.problems:
        logger.warning("verification: %s", problem)
    return done


def broken_weights(plan: Plan, places: Mapping[str, Path]) -> str:
    """Which weights of files that are known to be damaged are wrong, in words; "" if unknown."""
    told: list[str] = []
    for method, place in places.items():
        if method != "lora":
            try:
                model = rebuild(place, class_of(plan.model), carried=[t.name for t in plan.carried])
                told += worst(deviations(plan, method, model), _WORST)
            except PeerError:
                raise
            except Exception:  # what is known to be damaged may do anything
                continue
    return ", ".join(told)


def _compare(
    plan: Plan,
    done: Verification,
    models: Mapping[str, PreTrainedModel],
    batches: Sequence[Batch],
    data: str | None,
) -> str:
    """Compare the outputs of all models; why not, if that was not possible."""
    device = input_device(plan.model)
    found = way(plan.peft_model, batches[0])
    _say(done, plan, found)
    wrapped = found.of(plan.peft_model)
    models = {method: found.of_loaded(model) for method, model in models.items()}
    live = Speaker(base_of(wrapped), device)
    base = Speaker(base_of(wrapped), device, partial(without_adapters, wrapped))
    others = {method: Speaker(model, device) for method, model in models.items()}
    try:
        with contextlib.ExitStack() as stack:
            for model in models.values():
                stack.enter_context(computing_on(model, device))
            done.comparisons |= compare_outputs(live, base, others, batches)
        done.data = data
    except Silent as silent:
        done.comparisons |= silent.figures
        done.data = data if silent.figures else None
        for method, error in silent.errors.items():
            if is_short_of_memory(error):
                return _not_compared(done, f"memory is short: {error}")
            done.problems.append(f"{method}: it does not run: {error}")
            done.checks[f"{method}: outputs"] = _FAILED
    except Unusable as error:
        return _not_compared(done, str(error))
    except PeerError:
        raise
    except Exception as error:
        if is_short_of_memory(error):
            return _not_compared(done, f"memory is short: {error}")
        done.problems.append(f"outputs could not be compared: {type(error).__name__}: {error}")
        done.checks["outputs"] = _FAILED
    return ""


def _say(done: Verification, plan: Plan, found: Way) -> None:
    """That outputs are not those of the model's own forwards; or why, where layers go uncalled."""
    adapted = any(name in found.uncalled for name in _adapted(plan))
    if found.around:
        done.checks[_ROUND_KERNELS] = f"passed; {found.told}"
    elif found.told is not None and (adapted or not found.agrees):
        done.leave_out(_ROUND_KERNELS, found.told)


def _adapted(plan: Plan) -> Iterator[str]:
    return (key.removesuffix(".weight") for key, weight in plan.weights.items() if weight.updates)


def _not_compared(done: Verification, why: str) -> str:
    done.leave_out("outputs", why)
    return f"outputs could not be compared ({why})"
