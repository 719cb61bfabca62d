"""What models say to the same tokens: losses, divergence, agreement. Knows nothing of weights.

A row is what one prediction is made from: a token, or a sequence that is classified as a whole. All
figures are means over the rows that count: those whose label training looked at.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from merge_callback.batches import Batch, model_inputs, split_batch, token_mask
from merge_callback.errors import MergeError
from merge_callback.stand_ins import without_cache

_PIECE = 1024  # tokens that a model is given at once, or one sequence
_ROWS = 256  # compared at once, in float32
_IGNORED = -100
_ENDS_OF_ANSWERS = ("start_logits", "end_logits")  # of extractive question answering
_ENDS = ("start_positions", "end_positions")


@dataclass(frozen=True)
class Comparison:
    """How near a model comes to the live one.

    Attributes:
        rows: how many predictions were compared.
        loss_base: of the base without its adapter, in nats a row; squared error for one output.
        loss_live: of the live model.
        loss: of the model itself. All three are None without labels.
        gain_kept: (loss_base - loss) / (loss_base - loss_live); None where loss_base - loss_live is
            within its own standard error, taken over sequences. Above it, it is told as well where
            training raised the loss: then it is how much of that is left.
        kl: KL(live || model) in nats a row; None where outputs are no scores of classes.
        agreement: how often both have the same class in front.
        error: |live - model| / |live| of all outputs that are finite in both.
        finite: no output is NaN, of neither, and none infinite where the live model's is finite.
        gain_error: the standard error of gain_kept, over sequences, for what the model differs in
            from the live one.
        kl_base: KL(live || base), the base without its adapter.
        error_base: |live - base| / |live|.
    """

    rows: int
    loss_base: float | None
    loss_live: float | None
    loss: float | None
    gain_kept: float | None
    kl: float | None
    agreement: float | None
    error: float
    finite: bool
    gain_error: float | None = None
    kl_base: float | None = None
    error_base: float | None = None


@dataclass
class Speaker:
    """A model and the device it runs on.

    Attributes:
        model: it.
        device: where it computes.
        within: entered around each of its answers.
    """

    model: PreTrainedModel
    device: torch.device
    within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    @torch.no_grad()
    def outputs(self, batch: Batch) -> tuple[Tensor, bool]:
        """The logits of a batch; or its first outputs, and that they are no logits."""
        with self.within(), without_cache(self.model):
            found = self.model(**model_inputs(self.model, batch, self.device))
        logits = getattr(found, "logits", None)
        if isinstance(logits, Tensor):
            return logits, True
        ends = [getattr(found, name, None) for name in _ENDS_OF_ANSWERS]
        if all(isinstance(scores, Tensor) for scores in ends):  # each token is a class
            return torch.stack(ends, 1), True  # type: ignore[arg-type]
        values = found.values() if isinstance(found, Mapping) else found
        return next(v for v in values if _is_an_output(v)), False


def is_routed(model: PreTrainedModel) -> bool:
    """Whether it has experts, and a router that noise can turn."""
    fields = vars(model.config.get_text_config())
    return any("expert" in name and isinstance(n, int) and n > 1 for name, n in fields.items())


def _is_an_output(value: Any) -> bool:
    """Whether it has a row for each sequence, as a loss has not."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def compare_outputs(
    live: Speaker, base: Speaker | None, others: Mapping[str, Speaker], batches: Iterable[Batch]
) -> dict[str, Comparison]:
    """Compare models with the live one; each runs once over each batch.

    Raises:
        Silent: by name, models that did not answer; the figures of the others are in it.
        Unusable: the live model does not run on these data, or no answer counts.
    """
    sums = {name: _Sums() for name in others}
    ground = _Sums()  # the base's
    failed: dict[str, Exception] = {}
    for batch in batches:
        for piece in split_batch(batch, _PIECE):
            spoken, are_logits = _of_the_live(live, piece)
            targets = targets_of(live.model, piece, spoken)
            # Labels that are no targets are of several classes at once, or values.
            known = targets is not None or (spoken.dim() == 2 and "labels" not in piece)
            classes = are_logits and spoken.shape[-1] > 1 and known
            rows = _Rows(spoken, targets, token_mask(piece), scores_classes=classes)
            if base is not None:
                ground.add(rows, _of_the_live(base, piece)[0])
            for name, other in others.items():
                try:
                    if name not in failed:
                        sums[name].add(rows, other.outputs(piece)[0])
                except Exception as error:
                    failed[name] = error
    figures = {
        name: found.against(None if base is None else ground)
        for name, found in sums.items()
        if name not in failed
    }
    if failed:
        raise Silent(failed, figures)
    if not any(found.rows for found in figures.values()):
        raise Unusable("there is nothing to compare: in these data no token is predicted")
    return figures


class Unusable(MergeError):
    """Data that tell nothing of a model."""


def _of_the_live(live: Speaker, piece: Batch) -> tuple[Tensor, bool]:
    try:
        return live.outputs(piece)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # too long for it, or columns that are not its inputs
        raise Unusable(f"the live model does not run on these data: {error}") from error


class Silent(Exception):
    """Models did not answer where the live one did."""

    def __init__(self, errors: Mapping[str, Exception], figures: Mapping[str, Comparison]):
        self.errors, self.figures = errors, figures
        super().__init__("; ".join(f"{name}: {error}" for name, error in errors.items()))


def targets_of(model: PreTrainedModel, batch: Batch, outputs: Tensor) -> Tensor | None:
    """What each row of the outputs should have said, -100 for those that do not count."""
    labels = batch.get("labels")
    if labels is None and all(isinstance(batch.get(name), Tensor) for name in _ENDS):
        labels = torch.stack([batch[name].flatten() for name in _ENDS], 1)
        labels = labels.masked_fill(labels >= outputs.shape[-1], _IGNORED)  # the answer is cut off
    generates = model.can_generate() and not model.config.is_encoder_decoder
    if labels is None and generates and isinstance(batch.get("input_ids"), Tensor):
        mask = token_mask(batch)
        ids: Tensor = batch["input_ids"]
        labels = ids if mask is None else ids.masked_fill(~mask, _IGNORED)
    if not isinstance(labels, Tensor):
        return None
    if generates:
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    return labels if labels.numel() * outputs.shape[-1] == outputs.numel() else None


class _Rows:
    """The live model's answers that count, and what they should have been."""

    def __init__(
        self,
        outputs: Tensor,
        targets: Tensor | None,
        mask: Tensor | None,
        *,
        scores_classes: bool,
    ):
        self._device = outputs.device
        count = outputs.numel() // outputs.shape[-1]
        counted = torch.ones(count, dtype=torch.bool)
        if targets is not None:
            counted = targets.flatten().cpu() != _IGNORED
        elif mask is not None and mask.numel() == count:
            counted = mask.flatten().cpu()
        self._counted = counted.nonzero()[:, 0]
        sequence = torch.arange(count) // max(1, count // len(outputs))
        self.sequence = sequence[self._counted]
        self.scores_classes = scores_classes
        self.targets = None if targets is None else targets.flatten().cpu()[self._counted]
        self.live = outputs

    def __len__(self) -> int:
        return len(self._counted)

    def parts(self, other: Tensor) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
        """Matching rows (live, other, target), a few at a time in float32."""
        mine, theirs = (o.reshape(-1, o.shape[-1]) for o in (self.live, other))
        for index in torch.split(torch.arange(len(self)), _ROWS):
            where = self._counted[index]
            target = None if self.targets is None else self.targets[index].to(self._device)
            yield (
                mine[where.to(mine.device)].float(),
                theirs[where.to(theirs.device)].float().to(self._device),
                target,
            )


@dataclass
class _Sums:
    """Sums over rows for one model."""

    rows: int = 0
    kl: float = 0.0
    agreed: float = 0.0
    apart: float = 0.0
    size: float = 0.0
    classes: bool = True
    finite: bool = True
    # One for each sequence: summed losses of the live model and of this one, and their rows.
    losses: list[tuple[float, float, int]] = field(default_factory=list)

    def add(self, rows: _Rows, outputs: Tensor) -> None:
        """Add what a model makes of the rows."""
        self.rows += len(rows)
        self.classes = self.classes and rows.scores_classes
        mine, theirs = [], []
        for live, other, target in rows.parts(outputs):
            both = live.isfinite() & other.isfinite()
            broken = live.isnan() | other.isnan() | (live.isfinite() & other.isinf())
            self.finite = self.finite and not bool(broken.any())
            self.apart += float((live - other)[both].pow(2).sum())
            self.size += float(live[both].pow(2).sum())
            if target is not None:
                mine.append(_loss(live, target))
                theirs.append(_loss(other, target))
            if rows.scores_classes:
                logs = [torch.log_softmax(scores, -1) for scores in (live, other)]
                terms = logs[0].exp() * (logs[0] - logs[1])
                self.kl += float(terms[logs[0] > -math.inf].sum())  # what cannot be said adds none
                self.agreed += float((live.argmax(-1) == other.argmax(-1)).sum())
        if mine:
            first, second = (torch.cat(losses) for losses in (mine, theirs))
            for sequence in sorted(set(rows.sequence.tolist())):
                of = rows.sequence == sequence
                self.losses.append((float(first[of].sum()), float(second[of].sum()), int(of.sum())))

    def against(self, base: _Sums | None) -> Comparison:
        """The figures, with `base` for the model that nothing was added to."""
        rows = max(1, self.rows)  # no figures come of none
        live = loss = ground = gain = gain_error = None
        if self.losses:
            live, loss = (sum(part[i] for part in self.losses) / rows for i in (0, 1))
        if base is not None and base.losses and live is not None and loss is not None:
            ground = sum(part[1] for part in base.losses) / rows
            if abs(ground - live) > base.error_of_the_difference():
                gain = (ground - loss) / (ground - live)
                gain_error = self.error_of_the_difference() / abs(ground - live)
        told = base is not None and base.rows > 0
        return Comparison(
            rows=self.rows,
            loss_base=ground,
            loss_live=live,
            loss=loss,
            gain_kept=gain,
            kl=self.kl / rows if self.classes else None,
            agreement=self.agreed / rows if self.classes else None,
            error=self._error(),
            finite=self.finite,
            gain_error=gain_error,
            kl_base=base.kl / rows if base is not None and told and base.classes else None,
            error_base=base._error() if base is not None and told else None,
        )

    def _error(self) -> float:
        return math.sqrt(self.apart / self.size) if self.size else 0.0

    def error_of_the_difference(self) -> float:
        """The standard error of the difference of both mean losses, over sequences."""
        count, rows = len(self.losses), self.rows
        if count < 2:
            return math.inf
        mean = sum(other - live for live, other, _ in self.losses) / rows
        spread = sum((other - live - mean * n) ** 2 for live, other, n in self.losses)
        return math.sqrt(spread * count / (count - 1)) / rows


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """One for each row, float64 on the CPU."""
    if outputs.shape[-1] == 1:
        loss = (outputs[:, 0] - targets.to(outputs.dtype)).pow(2)
    else:
        loss = nn.functional.cross_entropy(outputs, targets.long(), reduction="none")
    return loss.double().cpu()
