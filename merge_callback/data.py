"""What a merge may run the model on: which batches calibrate, and which verify."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from merge_callback.batches import Batch, hold_out, take
from merge_callback.options import MergeOptions
from merge_callback.plan import Plan
from merge_callback.stand_ins import generators_kept

logger = logging.getLogger(__name__)

_LABELS = frozenset({"labels", "label", "start_positions"})
_KEPT_APART = 1 / 8  # of the training data, at most, to verify with


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a merge may run the model on.

    Attributes:
        training: to calibrate with.
        evaluation: to verify with; None: some of `training` is kept apart for it.
        datasets: ids on the Hub, where they are known.
        chosen: somebody chose them to measure with. False: they are what a trainer gives its
            model; without labels its loss is another than that of the next token.
    """

    training: Iterable[Batch] | None = None
    evaluation: Iterable[Batch] | None = None
    datasets: tuple[str, ...] = ()
    chosen: bool = True

    def aims_at(self, batches: Sequence[Batch]) -> bool:
        """Whether what training lowered is the loss on these batches."""
        return self.chosen or any(not _LABELS.isdisjoint(batch) for batch in batches)


def gather(
    plan: Plan, options: MergeOptions, data: Data
) -> tuple[Sequence[Batch] | None, Sequence[Batch], str | None]:
    """Batches to calibrate with, or None; others to verify with; and what those are, in words.

    Where a method was not asked for by name, data that cannot be had is done without.
    """
    with generators_kept():
        return _gather(plan, options, data)


def _gather(
    plan: Plan, options: MergeOptions, data: Data
) -> tuple[Sequence[Batch] | None, Sequence[Batch], str | None]:
    calibrate = options.calibration_tokens if plan.to_round() and options.wants_data else 0
    verify = options.verify_tokens if options.verify else 0
    unseen: Sequence[Batch] = ()
    if verify and data.evaluation is not None:
        try:
            unseen = take(data.evaluation, verify)
        except Exception as error:
            logger.warning("the evaluation data cannot be used (%s)", error)
    if data.training is None or not (calibrate or verify):
        return None, unseen, "held-out data" if unseen else None
    try:
        seen: Sequence[Batch] = take(data.training, calibrate + (0 if unseen else verify))
    except Exception as error:
        if options.needs_data:
            raise
        logger.warning("the training data cannot be used (%s)", error)
        return None, unseen, "held-out data" if unseen else None
    if unseen:
        return seen, unseen, "held-out data"
    if not calibrate:
        return None, seen, "training data"
    if verify:
        seen, unseen = hold_out(seen, _KEPT_APART, verify)
    return seen, unseen, "training data that calibration did not see" if unseen else None
