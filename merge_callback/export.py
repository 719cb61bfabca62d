"""The story of a merge: check and plan, choose codes, make a version. Knows no trainer.

The live model is only read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from merge_callback.batches import Batch
from merge_callback.calibration.choice import choose, rounding_problems
from merge_callback.companions import cache_of_base, generation_problems
from merge_callback.data import Data, gather
from merge_callback.drafts import Beside, Clock, MergeResult, failed, publish
from merge_callback.errors import CorruptVersion, MergeError, MergeRefused
from merge_callback.exact_maths import exact_maths
from merge_callback.live import is_sharded_model, keep_cpu_weights_unpacked
from merge_callback.manifest import Training
from merge_callback.migration import FOR_MERGE_ADAPTER, refusing
from merge_callback.options import MergeOptions
from merge_callback.plan import Plan
from merge_callback.planning import make_plan
from merge_callback.processes import ALONE, BARRIER_TIMEOUT, Processes
from merge_callback.store import Draft, MergeStore, check_name
from merge_callback.verification.checks import (
    Kept,
    Verification,
    Written,
    broken_weights,
    verify_models,
)
from merge_callback.verification.rebuilt import loading_problems

logger = logging.getLogger(__name__)

_TOLD_BY_THE_LEADER = MergeResult("", {}, {})


@refusing(FOR_MERGE_ADAPTER)
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
    with closing(Processes(barrier_timeout) if is_sharded_model(model) else ALONE) as processes:
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
        with exact_maths(()):
            plan = make_plan(model, options, processes)
            needed = plan.nbytes * saves
            problems += generation_problems(plan)
            problems += rounding_problems(plan, options)
            if options.verify is True and plan.containers and processes.leads:
                problems += loading_problems(plan)
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
        MergeRefused: no version can be called so.
        MergeError, CorruptVersion: as `merge_adapter`.
    """
    check_name(name)
    training, data = training or Training(), data or Data()
    if training.settings is None:  # no callback has noted what a trainer changed
        training = replace(training, settings=cache_of_base(plan.model.config))
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
        raise failed(store, error) from error


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
    clock = Clock()
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
            Written(places, processing_class, training.settings or {}),
            kept,
            batches=batches,
            data=told,
            aimed=data.aims_at(batches) or options.min_gain_kept is not None,
        )

    beside = Beside(name, processing_class, training, data.datasets)
    result = publish(plan, store, options, beside, choice, clock, verify)
    plan.finish()
    return processes.from_leader(result)
