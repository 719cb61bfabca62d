"""The merge: plan, then weight by weight decode, add the adapter, round, write; then publish.

The live model is only read. One group of weights is in flight at a time, and nothing is published
unless every step went well.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.modeling_utils import unwrap_model

from merge_callback.batches import Batch
from merge_callback.calibration.choice import Choice, choose
from merge_callback.card import write_card
from merge_callback.companions import (
    generation_problems,
    processor_name,
    save_adapter,
    save_companions,
)
from merge_callback.data import Data, gather
from merge_callback.engines import WholeView
from merge_callback.errors import CorruptVersion, MergeError, MergeRefused
from merge_callback.exact_maths import beside_others, exact_maths
from merge_callback.live import (
    active_adapters,
    is_sharded_model,
    keep_cpu_weights_unpacked,
    trained_state,
)
from merge_callback.manifest import (
    Training,
    libraries,
    merge_manifest,
    now,
    overall,
    tensor_figures,
)
from merge_callback.options import MergeOptions
from merge_callback.plan import Plan, make_plan
from merge_callback.processes import ALONE, BARRIER_TIMEOUT, Processes
from merge_callback.report import write_report
from merge_callback.retention import Retention
from merge_callback.store import Draft, MergeStore, Version
from merge_callback.verification.checks import (
    Kept,
    Verification,
    broken_weights,
    verify_arithmetic,
    verify_models,
)
from merge_callback.weights import write_weights

logger = logging.getLogger(__name__)

_NAMES = {"gain_kept": "gain kept", "kl": "KL"}
_LITTLE = 0.5  # retention below which a 4-bit export has lost most of what was trained


@dataclass(frozen=True)
class MergeResult:
    """A published version.

    Attributes:
        version: its name, e.g. `step-00000500-v2`.
        paths: save method -> directory to load from.
        manifest: what stands in its `merge_manifest.json`.
    """

    version: str
    paths: Mapping[str, Path]
    manifest: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Directory of the first save method."""
        return next(iter(self.paths.values()))


@dataclass(frozen=True)
class Beside:
    """What a version has beside its weights.

    Attributes:
        name: of the version.
        processing_class: tokenizer or processor, or a `SavedProcessor`.
        training: what its manifest says of the training.
        datasets: ids on the Hub, where they are known.
    """

    name: str
    processing_class: Any
    training: Training
    datasets: Sequence[str] = ()


_TOLD_BY_THE_LEADER = MergeResult("", {}, {})


def merge_adapter(
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    name: str = "merged",
    save_method: str | list[str] | tuple[str, ...] | None = None,
    rounding: str = "auto",
    base: str = "live",
    calibration_data: Iterable[Batch] | None = None,
    calibration_tokens: int = 65536,
    calibration_memory: int | None = None,
    rounding_minutes: float | None = None,
    dtype: torch.dtype | str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool | None = None,
    verify: bool | str = True,
    verification_data: Iterable[Batch] | None = None,
    verify_tokens: int = 8192,
    min_gain_kept: float | None = None,
    max_kl: float | None = None,
    card: bool | str | os.PathLike[str] = True,
    progress: bool = True,
    barrier_timeout: float = BARRIER_TIMEOUT,
) -> MergeResult:
    """Merge the active adapters of `model` out of place, and publish the result as a new version.

    The model is only read: it can go on training afterwards as if nothing had happened. A model
    that FSDP or DeepSpeed ZeRO-3 has sharded is merged by all processes together: each of them has
    to call this.

    Args:
        model: a PeftModel on a bitsandbytes 4-bit or 8-bit base, or on one of 16 or 32 bits, as it
            is or as DDP, FSDP or DeepSpeed have wrapped it.
        output_dir: where versions go; the model is written to `<output_dir>/<name>`, or, when that
            exists, to `<name>-v2` and so on. With several save methods, to one subdirectory each.
        processing_class: tokenizer or processor to write beside the model.
        name: name of the version.
        save_method: see `MergeOptions`, as for all that follow.
        calibration_data: batches of training data, dicts of tensors as the model's forward takes
            them, for calibrated and tuned rounding. Iterated once, as far as it is needed.
        verification_data: batches that were not trained on, to compare outputs on. None: an eighth
            of `calibration_data`, at most, is kept apart for it.
        barrier_timeout: seconds that processes wait for one another, where the model is sharded.

    Raises:
        MergeRefused: what was asked for cannot be done; all reasons at once, nothing was written.
        MergeError: the merge failed; nothing was published.
        VerificationError: what was written is not what was trained; nothing was published.
        CorruptVersion: what was written does not read back; nothing was published.
    """
    options = MergeOptions(
        save_method=save_method,
        rounding=rounding,
        base=base,
        calibration_tokens=calibration_tokens,
        calibration_memory=calibration_memory,
        rounding_minutes=rounding_minutes,
        dtype=dtype,
        quantization_config=quantization_config,
        max_shard_size=max_shard_size,
        safe_serialization=safe_serialization,
        verify=verify,
        verify_tokens=verify_tokens,
        min_gain_kept=min_gain_kept,
        max_kl=max_kl,
        card=card,
        progress=progress,
    )
    if options.needs_data and calibration_data is None:
        raise MergeRefused([f"rounding={rounding!r} needs calibration_data"])
    store = MergeStore(output_dir)
    processes = Processes(barrier_timeout) if is_sharded_model(model) else ALONE
    with processes.alike():
        plan = check_merge(model, store, options, processes=processes)
    return export(
        plan,
        store,
        options,
        name=name,
        processing_class=processing_class,
        data=Data(training=calibration_data, evaluation=verification_data),
        processes=processes,
    )


def check_merge(
    model: nn.Module,
    store: MergeStore,
    options: MergeOptions,
    saves: int = 1,
    processes: Processes = ALONE,
) -> Plan:
    """Find out whether `model` can be merged `saves` times into `store`, before it has to be.

    Raises:
        MergeRefused: all that stands against it, in one error.
    """
    problems: list[str] = []
    plan: Plan | None = None
    needed = 0
    try:
        plan = make_plan(model, options, processes)
        needed = plan.nbytes * saves
        problems += generation_problems(plan)
    except MergeRefused as error:
        problems += error.problems
    except Exception as error:
        raise MergeError(f"the merge cannot be planned: {error}") from error
    try:
        if processes.leads:
            store.check(needed)
    except MergeRefused as error:
        problems += error.problems
    if problems or plan is None:
        raise MergeRefused(problems)
    misread = [key for key, w in plan.weights.items() if getattr(w.stored, "misread_on_cpu", False)]
    if misread:
        logger.warning(
            "%s and %d others have rows that are no whole blocks: on the CPU bitsandbytes computes "
            "with other values than on a GPU, and what is trained here holds here alone",
            misread[0],
            len(misread) - 1,
        )
    return plan


@torch.no_grad()
def export(
    plan: Plan,
    store: MergeStore,
    options: MergeOptions,
    *,
    name: str,
    processing_class: Any = None,
    training: Training | None = None,
    data: Data | None = None,
    last: bool = True,
    processes: Processes = ALONE,
) -> MergeResult:
    """Write what was planned and publish it as version `name`.

    Args:
        data: what the model may be run on.
        last: training is over, so that `rounding="auto"` may take its time.
        processes: those of the training, all of which have to be here. Their leader writes.

    Raises:
        MergeError, CorruptVersion: as `merge_adapter`.
    """
    training, data = training or Training(), data or Data()
    keep_cpu_weights_unpacked(plan.model)
    try:
        with exact_maths(weight.stored.device.type for weight in plan.weights.values()):
            with processes.alike():
                return _export(
                    plan, store, options, name, processing_class, training, data, last, processes
                )
    except MergeError:
        raise
    except Exception as error:  # of torch, of the file system, of the libraries that write to it
        raise _failed(store, error) from error


def _export(
    plan: Plan,
    store: MergeStore,
    options: MergeOptions,
    name: str,
    processing_class: Any,
    training: Training,
    data: Data,
    last: bool,
    processes: Processes,
) -> MergeResult:
    clock = _Clock()
    seen, unseen, told = gather(plan, options, data)
    choice = choose(plan, options, seen, last=last, processes=processes)
    clock.lap("round")
    processes.agree()
    if not processes.leads:
        plan.giving()
        return processes.from_leader(_TOLD_BY_THE_LEADER)
    plan = plan.with_rounded(choice.rounded)

    def verify(draft: Draft, places: Mapping[str, Path], kept: Kept) -> Verification:
        try:
            draft.verify()
        except CorruptVersion as error:
            broken = broken_weights(plan, places)
            raise CorruptVersion(f"{error}; wrong: {broken}" if broken else str(error)) from None
        batches = () if plan.sharded else unseen
        return verify_models(
            plan,
            options,
            places,
            kept,
            processing_class=processing_class,
            batches=batches,
            data=told,
        )

    beside = Beside(name, processing_class, training, data.datasets)
    result = _publish(plan, store, options, beside, choice, clock, verify)
    plan.finish()
    return processes.from_leader(result)


@torch.no_grad()
def export_snapshot(
    model: PeftModel,
    store: MergeStore,
    options: MergeOptions,
    beside: Beside,
    choice: Choice | None,
    seconds: float,
    *,
    wide: frozenset[str],
    stop: Event,
) -> MergeResult:
    """Export a `snapshot`, in a thread of its own, while the live model is being trained.

    It leaves alone all that holds for the whole process: random generators, precision, the default
    dtype that transformers sets while it loads a model. So the files are read back, and the
    adapter's arithmetic is compared with PEFT's own; but they are not loaded, and outputs are not
    compared.

    Args:
        choice: 4-bit codes that have been chosen with data; None: they are chosen without.
        seconds: what that took.
        wide: what has to be computed in float64, see `exact_maths.less_exact`.
        stop: ends the merge, if it is set while weights are written.

    Raises:
        MergeError, CorruptVersion: as `merge_adapter`.
    """
    clock = _Clock({"round": round(seconds, 3)})
    try:
        with beside_others(wide), exact_maths(p.device.type for p in model.parameters()):
            plan = make_plan(model, options)
            choice = choice or choose(plan, options, None, last=False)
            plan = plan.with_rounded(choice.rounded)

            def verify(draft: Draft, places: Mapping[str, Path], kept: Kept) -> Verification:
                draft.verify()
                return verify_arithmetic(plan, options)

            return _publish(plan, store, options, beside, choice, clock, verify, stop)
    except MergeError:
        raise
    except Exception as error:
        raise _failed(store, error) from error


def _failed(store: MergeStore, error: Exception) -> MergeError:
    return MergeError(
        f"merging into {store.root} failed: {error}; nothing was published and no draft is "
        "left: if the disk is full free space, if memory ran out free some, then merge again"
    )


def _publish(
    plan: Plan,
    store: MergeStore,
    options: MergeOptions,
    beside: Beside,
    choice: Choice,
    clock: _Clock,
    verify: Callable[[Draft, Mapping[str, Path], Kept], Verification],
    stop: Event | None = None,
) -> MergeResult:
    """Write a draft, verify it, and make it a version."""
    processing_class, training = beside.processing_class, beside.training
    with store.draft(beside.name) as draft:
        places = _places(plan, draft.path)
        kept = write_weights(plan, options, draft, places, stop)
        for method, place in places.items():
            if method == "lora":
                state = plan.adapter_state()
                with plan.view.shown():
                    save_adapter(plan.peft_model, plan.adapters, place, state)
                if processing_class is not None:
                    processing_class.save_pretrained(place)
            else:
                save_companions(plan, method, place, processing_class, training.settings or {})
        draft.seal()
        clock.lap("write")
        verification = None
        if options.verify:
            verification = verify(draft, places, kept)
            clock.lap("verify")
        manifest = merge_manifest(
            plan, choice.method, training, kept, choice.report, verification, clock.seconds
        )
        try:
            write_report(draft.path, manifest, tensor_figures(kept, verification))
        except Exception as error:  # of matplotlib, mostly: the model is worth more
            logger.warning("the report failed: %s", error, exc_info=error)
        try:
            _write_cards(plan, options, draft.path, places, manifest, beside)
        except Exception as error:  # of a template, mostly
            logger.warning("the model card failed: %s", error, exc_info=error)
        draft.seal()
        version = store.publish(draft, beside.name, manifest)
    _report(plan, version, kept, clock, choice.method)
    return MergeResult(version.name, _places(plan, version.path), version.manifest)


def _write_cards(
    plan: Plan,
    options: MergeOptions,
    top: Path,
    places: Mapping[str, Path],
    manifest: Mapping[str, Any],
    beside: Beside,
) -> None:
    """A card beside each model, and one above them if there are several."""
    if not options.card:
        return
    cards = [(place, (method,)) for method, place in places.items()]
    for place, methods in [*cards, (top, plan.methods)]:
        write_card(
            place,
            plan.model,
            manifest,
            methods,
            processor=processor_name(beside.processing_class),
            datasets=beside.datasets,
            template=None if options.card is True else options.card,
        )


def _places(plan: Plan, top: Path) -> dict[str, Path]:
    """Where each method's model lies in a version: alone at its top, else in a directory each."""
    return {method: top / method if len(plan.methods) > 1 else top for method in plan.methods}


def rescue(
    model: nn.Module, store: MergeStore, name: str, step: int, processes: Processes = ALONE
) -> Path:
    """Save the adapter alone as version `name`: what is left to do when a merge has failed."""
    adapted = unwrap_model(model)
    adapters = active_adapters(adapted)
    with processes.alike():
        view = WholeView(model)
        with view.shown():
            state = trained_state(adapted) if is_sharded_model(adapted) else None
        if not processes.leads:
            return processes.from_leader(Path())
        with view.shown():
            path = _save_alone(adapted, adapters, store, name, step, state)
        return processes.from_leader(path)


def _save_alone(
    adapted: PeftModel,
    adapters: tuple[str, ...],
    store: MergeStore,
    name: str,
    step: int,
    state: Mapping[str, torch.Tensor] | None,
) -> Path:
    with store.draft(name) as draft:
        save_adapter(adapted, adapters, draft.path, state)
        draft.seal()
        manifest = {
            "kind": "adapter",
            "created": now(),
            "step": step,
            "best_step": None,
            "adapters": list(adapters),
            "libraries": libraries(),
        }
        return store.publish(draft, name, manifest).path


class _Clock:
    """Seconds by stage."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self._last = self._start = time.monotonic()
        self.seconds: dict[str, float] = dict(seconds or {})

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now

    @property
    def total(self) -> float:
        return time.monotonic() - self._start


def _report(
    plan: Plan,
    version: Version,
    kept: Mapping[str, Mapping[str, Retention]],
    clock: _Clock,
    rounding: str | None,
) -> None:
    values = {method: overall(tensors).value for method, tensors in kept.items()}
    parts = [f"{m} retention {v:.3f}" for m, v in values.items() if v is not None]
    for method, found in ((version.manifest["verification"] or {}).get("models") or {}).items():
        for name, spec in (("gain_kept", ".1%"), ("kl", ".5f")):
            if found.get(name) is not None:
                parts.append(f"{method} {_NAMES[name]} {found[name]:{spec}}")
    told = ", ".join(parts)
    size = sum(file["size"] for file in version.manifest["files"].values())
    logger.info(
        "merged %s into %s: %.2f GB in %.1f s%s",
        ", ".join(plan.methods),
        version.path,
        size / 1e9,
        clock.total,
        f"; {told}" if told else "",
    )
    lost = values.get("merged_4bit")
    if rounding == "nearest" and lost is not None and lost < _LITTLE:
        logger.warning(
            "%s: rounding to 4 bits kept %.1f %% of what the adapter adds to the weights; the "
            "model will behave almost like its base. rounding='auto' keeps far more of it",
            version.path,
            100 * lost,
        )
    if rounding == "stochastic":
        logger.warning(
            "%s: codes were chosen by chance, without data. rounding='calibrated' came ten times "
            "closer to the live model on our benchmark; it needs training data: the callback takes "
            "the trainer's, merge_adapter takes calibration_data",
            version.path,
        )
    if all(part.trained == 0 for tensors in kept.values() for part in tensors.values()) and kept:
        logger.warning("%s: the adapter changes nothing; was it trained?", version.path)
