"""Merges of checkpoints that go on behind the training, each of a snapshot. Knows no trainer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from merge_callback.background import BACKLOGS, Background, Outcome
from merge_callback.calibration.choice import Choice, choose
from merge_callback.companions import SavedProcessor
from merge_callback.drafts import Beside, Clock, MergeResult, failed, publish
from merge_callback.errors import MergeError
from merge_callback.exact_maths import beside_others, exact_maths, less_exact
from merge_callback.options import MergeOptions
from merge_callback.plan import Plan
from merge_callback.planning import make_plan
from merge_callback.snapshot import marks, snapshot
from merge_callback.store import Draft, MergeStore
from merge_callback.verification.checks import (
    Kept,
    Verification,
    Written,
    verify_beside_training,
)

logger = logging.getLogger(__name__)


class Behind:
    """At most one merge is under way, and at most one waits.

    Args:
        backlog: see `Background`.

    Attributes:
        stalls: step -> seconds that training was held up there.
    """

    def __init__(self, backlog: str):
        self.stalls: dict[int, float] = {}
        self.backlog = backlog
        self._background: Background[MergeResult] = Background(backlog)
        self._stop = threading.Event()

    def skips(self, step: int) -> bool:
        """Whether a merge of this step is left out; if so, say it."""
        skips = self._background.skips
        if skips:
            _say_left_out(step)
        return skips

    def merge(
        self,
        model: PeftModel,
        store: MergeStore,
        options: MergeOptions,
        beside: Beside,
        choose: Callable[[], Choice | None],
        done: Callable[[MergeResult], None],
    ) -> None:
        """Take what a merge needs of the live model, and leave the rest to a thread.

        Args:
            choose: 4-bit codes that are chosen with the live model and data, or None.
            done: called in the thread with what was published.
        """
        began = time.monotonic()
        step = beside.training.step
        assert step is not None
        choice = choose()
        seconds = time.monotonic() - began
        if beside.processing_class is not None:
            config: Any = model.config
            saved = SavedProcessor(beside.processing_class, config)
            beside = replace(beside, processing_class=saved)
        quiet = replace(options, progress=False)
        wide = less_exact(p.device.type for p in model.parameters())
        taken = snapshot(model)
        as_taken = marks(taken)

        def merge() -> MergeResult:
            try:
                result = export_snapshot(
                    taken, store, quiet, beside, choice, seconds,
                    as_taken=as_taken, wide=wide, stop=self._stop,
                )  # fmt: skip
                done(result)
            except Exception as error:  # now, for nobody may be there to ask what became of it
                logger.warning("step %d, merged behind the training: %s", step, error)
                raise
            return result

        dropped = self._background.submit(step, merge)
        self.stalls[step] = time.monotonic() - began
        logger.info("step %d: training was held up for %.3f s", step, self.stalls[step])
        if dropped is not None:
            _say_left_out(dropped)

    @property
    def has_news(self) -> bool:
        """Whether there are outcomes."""
        return self._background.has_news

    def outcomes(self, *, wait: bool) -> list[Outcome[MergeResult]]:
        """What became of merges since the last call."""
        if wait:
            self._background.join()
        return self._background.outcomes()

    def stop(self) -> None:
        """End the merge that is under way before its next weight; forget the one that waits."""
        self._background.drop_waiting()
        self._stop.set()


@torch.no_grad()
def export_snapshot(
    model: PeftModel,
    store: MergeStore,
    options: MergeOptions,
    beside: Beside,
    choice: Choice | None,
    seconds: float,
    *,
    as_taken: Sequence[Tensor] = (),
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
        as_taken: the `marks` of the model when it was taken; none: it is nobody else's.
        wide: what has to be computed in float64, see `exact_maths.less_exact`.
        stop: ends the merge, if it is set while weights are written.

    Raises:
        MergeError, CorruptVersion: as `merge_adapter`.
    """
    clock = Clock({"round": round(seconds, 3)})
    try:
        with beside_others(wide), exact_maths(p.device.type for p in model.parameters()):
            plan = make_plan(model, options)
            choice = choice or choose(plan, options, None, last=False)
            plan = plan.with_rounded(choice.rounded)

            def verify(draft: Draft, places: Mapping[str, Path], kept: Kept) -> Verification:
                draft.verify()
                if not all(map(torch.equal, marks(model), as_taken)):
                    raise MergeError(
                        "the base was written to while it was merged behind the training, as "
                        "merge_adapter() does, of PEFT and of trainers that generate; leave out "
                        "blocking=False"
                    )
                given, settings = beside.processing_class, beside.training.settings
                return verify_beside_training(plan, options, Written(places, given, settings or {}))

            return publish(plan, store, options, beside, choice, clock, verify, stop)
    except MergeError:
        raise
    except Exception as error:
        raise failed(store, error) from error


def _say_left_out(step: int) -> None:
    logger.warning(
        "the merge of step %d is left out: an earlier one is still under way; save less often, or "
        "use backlog='wait'",
        step,
    )


def problems(blocking: bool, backlog: str, merge_on_save: bool, limited: bool) -> list[str]:
    """Why options do not go together."""
    found = []
    if backlog not in BACKLOGS:
        names = ", ".join(map(repr, BACKLOGS))
        found.append(f"backlog={backlog!r} is not known; use one of {names}")
    if blocking:
        return found
    if not merge_on_save:
        found.append("blocking=False is for merge_on_save=True: the end of training waits")
    if limited:
        found.append(
            "min_gain_kept and max_kl need the live model, which a merge behind the training does "
            "not have; leave them out, or blocking=False"
        )
    return found


def unfit(plan: Plan) -> list[str]:
    """Why the model, or its process, cannot have merges behind its training; all at once."""
    found = []
    if plan.sharded:
        found.append("blocking=False needs the whole model in each process; leave it out")
    if (default := torch.get_default_dtype()) != torch.float32:
        found.append(
            f"blocking=False: the default dtype is {default}, which bitsandbytes computes in, and "
            "which cannot be changed while training goes on; call "
            "torch.set_default_dtype(torch.float32) once the model is loaded, or leave it out"
        )
    return found
