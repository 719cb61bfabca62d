"""The story of a verification: load the draft, look at its weights, let it speak, judge."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from transformers import PreTrainedModel

from merge_callback.batches import Batch, input_device
from merge_callback.engines import class_of
from merge_callback.errors import CorruptVersion, MergeError, VerificationError
from merge_callback.options import MergeOptions
from merge_callback.plan import Plan
from merge_callback.processes import PeerError
from merge_callback.retention import Retention
from merge_callback.stand_ins import evaluating, generators_kept, without_adapters
from merge_callback.verification.outputs import Comparison, Silent, Speaker, compare_outputs
from merge_callback.verification.rebuilt import computing_on, rebuild
from merge_callback.verification.tensors import (
    Deviation,
    adapter_problems,
    deviations,
    tie_problems,
    worst,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

Kept: TypeAlias = Mapping[str, Mapping[str, Retention]]  # method -> weight -> retention
_PROBE_TEXT = "The 7 quick foxes' jump - über 3.14 日本語 🙂\n\tdef f(x): return x ** 2"
_WORST = 5
_LITTLE = 0.5  # of the gain; 16 bits lose a few percent at the worst


@dataclass
class Verification:
    """What was found.

    Attributes:
        data: what the outputs were compared on, in words; None: they were not.
        problems: what is wrong, in words.
        comparisons: method -> how near its model comes to the live one.
        deviations: method -> weight -> how far the file is from what was to be written.
    """

    data: str | None = None
    problems: list[str] = field(default_factory=list)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    deviations: dict[str, dict[str, Deviation]] = field(default_factory=dict)


def verify_models(
    plan: Plan,
    options: MergeOptions,
    places: Mapping[str, Path],
    kept: Kept,
    *,
    processing_class: Any = None,
    batches: Sequence[Batch] = (),
    data: str | None = None,
) -> Verification:
    """Compare the models in `places`, as they lie on the disk, with the live model.

    Beyond the live model and the logits of two models for 1024 tokens, or one sequence, this holds
    for the largest weight what a merge of it does; on a device other than the CPU also the rebuilt
    model where it fits, else one layer of it. The live model and each other one run once over each
    batch.

    Args:
        kept: method -> weight -> retention, to name the worst by.
        batches: what to compare outputs on; none: outputs are not compared.
        data: what these are, in words.

    Raises:
        VerificationError: something is wrong, and `options.verify` is not `"warn"`.
    """
    done = Verification()
    with generators_kept(), evaluating(plan.model), torch.no_grad():
        if not plan.sharded:  # PEFT would have to be asked in all processes
            done.problems += _try(
                "the adapter's arithmetic", lambda: list(adapter_problems(plan)), []
            )
        models: dict[str, PreTrainedModel] = {}
        for method, place in places.items():
            done.problems += _processor_problems(place, processing_class)
            if method == "lora":
                continue
            try:
                model = rebuild(place, class_of(plan.model))
            except CorruptVersion as error:
                done.problems.append(str(error))
                continue
            found: dict[str, Deviation] = {}
            found = _try(f"{method}: its weights", partial(deviations, plan, method, model), found)
            if found:
                done.deviations[method] = found
            if broken := worst(found, _WORST):
                done.problems.append(f"{method}: not what was merged: {', '.join(broken)}")
            done.problems += (f"{method}: {problem}" for problem in tie_problems(plan, model))
            models[method] = model
        why = "there was nothing to compare outputs on"
        if batches and models and not done.problems:
            why = _compare(plan, done, models, batches, data)
    for method, comparison in done.comparisons.items():
        done.problems += _misses(method, comparison, options, kept.get(method, {}))
    limits = options.min_gain_kept is not None or options.max_kl is not None
    if limits and not done.problems and len(done.comparisons) < len(models):
        done.problems.append(f"{why}, so min_gain_kept and max_kl cannot be met")
    return _judged(done, options)


def verify_arithmetic(plan: Plan, options: MergeOptions) -> Verification:
    """What can be verified beside a training: whether what was merged is what PEFT computes.

    Raises:
        VerificationError: as `verify_models`.
    """
    done = Verification()
    done.problems += _try("the adapter's arithmetic", lambda: list(adapter_problems(plan)), [])
    return _judged(done, options)


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
                model = rebuild(place, class_of(plan.model))
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
    """Let all models speak; why not, if they did not. Of memory mostly: no fault of the files."""
    device = input_device(plan.model)
    live = Speaker(plan.model, device)
    base = Speaker(plan.model, device, partial(without_adapters, plan.peft_model))
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
            if isinstance(error, torch.OutOfMemoryError):
                return _not_compared(error)
            done.problems.append(f"{method}: it does not run: {error}")
    except Exception as error:
        return _not_compared(error)
    return ""


def _not_compared(error: Exception) -> str:
    known = isinstance(error, MergeError)
    logger.warning(
        "outputs could not be compared (%s); weights were", error, exc_info=None if known else error
    )
    return f"outputs could not be compared ({error})"


def _try(what: str, check: Callable[[], _T], otherwise: _T) -> _T:
    """What a check finds; that it cannot be made is no finding."""
    try:
        return check()
    except PeerError:
        raise
    except Exception as error:
        logger.warning("%s could not be checked (%s)", what, error, exc_info=error)
        return otherwise


def _misses(
    method: str, found: Comparison, options: MergeOptions, kept: Mapping[str, Retention]
) -> Iterator[str]:
    """Figures that are worse than what was asked for, with the cure."""
    told = []
    least, most = options.min_gain_kept, options.max_kl
    if not found.finite:
        yield f"{method}: its outputs, or the live model's, are not finite"
        return
    little = found.gain_kept is not None and found.gain_kept < _LITTLE
    # On the original base it is another model by itself, which may have gained less.
    if method == "merged_16bit" and options.base == "live" and little and least is None:
        yield (
            f"{method}: keeps {found.gain_kept:.1%} of what training gained; use dtype='float32', "
            "and if that keeps no more, report it"
        )
    if least is not None and found.gain_kept is None:
        yield (
            f"{method}: min_gain_kept cannot be met: on {found.rows} predictions training gained "
            "less than its own standard error, or there was one sequence alone; give more "
            "verification_data, or limit max_kl instead"
        )
    elif least is not None and found.gain_kept is not None and found.gain_kept < least:
        told.append(f"keeps {found.gain_kept:.1%} of the gain, min_gain_kept is {least:.1%}")
    if most is not None and found.kl is None:
        yield f"{method}: max_kl cannot be met: its outputs are no scores of classes"
    elif most is not None and found.kl is not None and not found.kl <= most:
        told.append(f"KL {found.kl:.4f} nats, max_kl is {most:g}")
    if not told:
        return
    values = {key: part.value for key, part in kept.items()}
    by_value = sorted((value, key) for key, value in values.items() if value is not None)
    names = ", ".join(f"{key} ({value:.2f})" for value, key in by_value[:_WORST])
    cure = "use rounding='tuned', more calibration_tokens, or save_method='merged_16bit'"
    if method == "merged_16bit":
        cure = "use dtype='float32'"
    yield f"{method}: {'; '.join(told)}; least retention: {names}; {cure}"


def _processor_problems(place: Path, processing_class: Any) -> Iterator[str]:
    """Whether the tokenizer that lies in a directory is the one that was given."""
    given = getattr(processing_class, "tokenizer", processing_class)
    if not hasattr(given, "get_vocab"):
        return
    try:
        loaded = type(processing_class).from_pretrained(place, local_files_only=True)
        found = getattr(loaded, "tokenizer", loaded)
        texts = (_PROBE_TEXT, given.decode([0, 1, 2]))
        same = found.get_vocab() == given.get_vocab()
        same = same and all(found.encode(text) == given.encode(text) for text in texts)
    except Exception as error:  # of code that is not ours, which may ask to be trusted
        logger.warning("%s: its tokenizer could not be loaded to compare it (%s)", place, error)
        return
    if not same:
        yield f"{place.name}: the tokenizer saved there is not the one of the training"
