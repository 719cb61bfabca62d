"""What a trainer's arguments and state say of the moment. Knows no merges."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments


@dataclass(frozen=True)
class Moment:
    """A trainer's event that a merge is made of.

    Attributes:
        best_step: the step whose weights are loaded; None: the last one's.
        last: training is over.
    """

    args: TrainingArguments
    state: TrainerState
    model: nn.Module
    processing_class: Any
    eval_dataloader: Any
    best_step: int | None
    last: bool

    @property
    def name(self) -> str:
        """What a version of this moment is called."""
        return f"step-{self.state.global_step:08d}"


def best_step(args: TrainingArguments, state: TrainerState) -> int | None:
    """The step whose weights the trainer has loaded at the end; None: the last one's."""
    best = state.best_model_checkpoint
    loaded = args.load_best_model_at_end and best is not None and os.path.isdir(best)
    return _checkpoint_step(best) if loaded else None


def best_steps(state: TrainerState) -> frozenset[int]:
    """Steps that the trainer holds to be the best so far."""
    best = {state.best_global_step, _checkpoint_step(state.best_model_checkpoint)}
    return frozenset(step for step in best if step is not None)


def saves_to_come(args: TrainingArguments, state: TrainerState) -> int:
    """How many checkpoints there will be, at the most, from here to the end of training."""
    left = max(0, state.max_steps - state.global_step)
    strategy, every = args.save_strategy, state.save_steps
    if strategy == "best":  # at the most, after each evaluation
        strategy, every = args.eval_strategy, state.eval_steps
    if strategy == "steps":
        return int(left // max(1, every or 1))
    return math.ceil(state.num_train_epochs or 1) if strategy == "epoch" else 0


def interrupted(
    args: TrainingArguments, state: TrainerState, saved: int | None, since: float
) -> bool:
    """Whether SIGTERM ends the training, and the trainer has just saved a checkpoint for it.

    It does so under `enable_jit_checkpoint`, without an event: such a checkpoint is one that no
    `on_save` has told of. Early stopping looks the same but for that.

    Args:
        saved: the step of the last `on_save`.
        since: when training began, as time.time() says: a checkpoint of before is another's.
    """
    if not args.enable_jit_checkpoint or state.global_step >= state.max_steps:
        return False
    steps = {state.global_step, state.global_step - 1} - {saved}  # saved ahead of the last step too
    root = Path(args.output_dir or ".")
    files = [file for step in steps for file in (root / f"checkpoint-{step}").glob("*")]
    return any(file.lstat().st_mtime >= since for file in files)


def _checkpoint_step(checkpoint: str | None) -> int | None:
    """The step of a checkpoint directory; `best_global_step` may be one that was never saved."""
    match = re.search(r"checkpoint-(\d+)$", checkpoint or "")
    return int(match[1]) if match else None
