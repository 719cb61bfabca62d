"""From a plan to a version: draft, files, verification, report, card, and one rename.

Nothing is published unless every step went well. Knows nothing of trainers, nor of how 4-bit codes
are chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from merge_callback.base_files import with_limits_of_base
from merge_callback.calibration.choice import Choice
from merge_callback.card import write_card
from merge_callback.companions import processor_name, save_adapter, save_companions
from merge_callback.errors import MergeError
from merge_callback.manifest import Training, merge_manifest, overall, tensor_figures
from merge_callback.options import MergeOptions
from merge_callback.plan import Plan
from merge_callback.report import summary, write_report
from merge_callback.retention import Retention
from merge_callback.store import Draft, MergeStore
from merge_callback.verification.checks import Kept, Verification
from merge_callback.verification.limits import keeps_little
from merge_callback.versions import Version
from merge_callback.weights import write_weights

logger = logging.getLogger(__name__)

_NAMED = 5
_LITTLE = 0.5  # retention below which most of what was trained is lost


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


class Clock:
    """Seconds by stage."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = dict(seconds or {})

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


def publish(
    plan: Plan,
    store: MergeStore,
    options: MergeOptions,
    beside: Beside,
    choice: Choice,
    clock: Clock,
    verify: Callable[[Draft, Mapping[str, Path], Kept], Verification],
    stop: Event | None = None,
) -> MergeResult:
    """Write a draft, verify it, and make it a version."""
    processing_class = with_limits_of_base(plan.model.config, beside.processing_class)
    training = beside.training
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
        figures = tensor_figures(kept, verification)
        # Of matplotlib, or a user's template: the model is worth more.
        _try("the report", partial(write_report, draft.path, manifest, figures))
        cards = partial(_write_cards, plan, options, draft.path, places, manifest, beside)
        _try("the model card", cards)
        draft.seal()
        version = store.publish(draft, beside.name, manifest)
    if plan.carried:
        logger.info(
            "%s: %d tensors that transformers does not load are those of the base's files: %s",
            version.path,
            len(plan.carried),
            ", ".join(tensor.name for tensor in plan.carried[:_NAMED]),
        )
    _report(version, kept, choice.method)
    return MergeResult(version.name, _places(plan, version.path), version.manifest)


def _try(what: str, write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as error:
        logger.warning("%s failed: %s", what, error, exc_info=error)


def failed(store: MergeStore, error: Exception) -> MergeError:
    told = f"merging into {store.root} failed: {error}; nothing was published and no draft is left"
    if isinstance(error, OSError | MemoryError) or "memory" in str(error):
        told += ": if the disk is full free space, if memory ran out free some, then merge again"
    return MergeError(told)


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


def _report(
    version: Version, kept: Mapping[str, Mapping[str, Retention]], rounding: str | None
) -> None:
    for method, found in ((version.manifest["verification"] or {}).get("models") or {}).items():
        if keeps_little(found):
            logger.warning(
                "%s: %s keeps %.1f %% of what training gained; the report tells where it was lost",
                version.path,
                method,
                100 * found["gain_kept"],
            )
    logger.info("%s", summary(version.manifest, version.path))
    lost = overall(kept["merged_4bit"]).value if "merged_4bit" in kept else None
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
