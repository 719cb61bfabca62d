"""Trainer events: when to merge, on which process, and what to do when it fails."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_utils import unwrap_model

from merge_callback import behind
from merge_callback.background import Outcome
from merge_callback.batches import Batch, Drawn, TrainingData, datasets_of, take
from merge_callback.calibration.choice import Choice, choose
from merge_callback.companions import (
    give_back_settings,
    note_settings,
    settings_to_restore,
    take_settings_again,
)
from merge_callback.data import Data, gather
from merge_callback.drafts import Beside, MergeResult
from merge_callback.errors import MergeError, MergeRefused
from merge_callback.exact_maths import exact_maths
from merge_callback.export import check_merge, export
from merge_callback.live import adapted, keep_cpu_weights_unpacked
from merge_callback.manifest import Training
from merge_callback.migration import FOR_CALLBACK, refusing
from merge_callback.moments import Moment, best_step, best_steps, interrupted, saves_to_come
from merge_callback.options import MergeOptions, positive
from merge_callback.plan import Plan
from merge_callback.planning import make_plan
from merge_callback.processes import ALONE, BARRIER_TIMEOUT, Processes
from merge_callback.publisher import Publisher
from merge_callback.push import Push
from merge_callback.recipe import keep_recipe
from merge_callback.report import metrics, summary
from merge_callback.rescue import rescue
from merge_callback.store import MergeStore
from merge_callback.versions import identity

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeFailure:
    """What failed while training went on: a merge, with `on_error="warn"`, or a push."""

    step: int
    error: Exception


class MergeOnSaveCallback(TrainerCallback):
    """Merges the adapter into its base when training ends, and at every save if asked.

    Give it to the trainer's constructor, so that it sees the model before the first evaluation.

    Args:
        output_dir: where versions go. None: `<args.output_dir>/_merged`, which neither checkpoint
            rotation nor the trainer's own push touches.
        save_method: `"merged_4bit"`, `"merged_16bit"`, `"lora"`, or several, made in one pass.
            None: `"merged_4bit"` on a bitsandbytes 4-bit base, else `"merged_16bit"`.
        merge_on_save: merge at every checkpoint too.
        blocking: False: at checkpoints before the end training goes on while a thread of low
            priority merges a copy of the adapter. What needs the live model waits for the end of
            training (the files are not loaded, outputs are not compared), or holds training up
            (`rounding="calibrated"` and `"tuned"`; `"auto"` does without data there).
        backlog: what becomes of such a merge when the one before is still under way.
            `"coalesce"`: it waits, in the place of one that did; `"skip"`: it is left out;
            `"wait"`: training waits.
        rounding: how 4-bit codes are chosen, see `MergeOptions`. Calibrated and tuned rounding look
            at the training data: batches drawn anew from the trainer's dataset, or, where that does
            not give what the model takes (streams, preference data, generated samples), the last
            ones that the model was trained on.
        base: what the adapter is added to, `"live"` or `"original"`, see `MergeOptions`.
        calibration_tokens: how many tokens of training data to look at.
        calibration_memory: bytes for their streams; None: a quarter of what is free.
        rounding_minutes: what calibrated and tuned rounding may take at each merge.
        dtype: dtype of the 16-bit output; None: that of the base.
        quantization_config: settings of 4-bit output on a base that is not 4-bit.
        max_shard_size: largest weight file, in bytes or as `"5GB"`.
        safe_serialization: None or True; False is refused.
        verify: compare weights and outputs of what was written with the live model before it is
            published, see `MergeOptions`.
        verification_data: batches to compare outputs on. None: the evaluation dataset, or some of
            the training data that calibration does not see.
        verify_tokens: how many tokens of it.
        min_gain_kept: share of the gain in loss that must be left. None: any.
        max_kl: largest KL(live || merged), in nats per token. None: any.
        card: write a model card, see `MergeOptions`.
        keep_last: how many of the versions that this callback publishes in a directory to keep;
            None: all. The best step's always stays, and so do those of other runs.
        on_error: `"raise"`, or `"warn"`: log the failure, keep it in `failures`, and train on.
        on_interrupt: what to do when SIGTERM ends a training under `enable_jit_checkpoint`, and the
            trainer has saved a checkpoint: `"skip"`; `"lora"`, save the adapter; or `"merge"`, if
            the time that is left is enough for it.
        barrier_timeout: seconds that the processes of a distributed training wait for the one that
            writes, whatever `ddp_timeout` is. What fails in one of them fails in all.
        push_to_hub: push each version in the background, see `push_version`, and wait for it when
            training ends. A push that fails is a warning and stays pending, whatever `on_error` is;
            the next run into the same directory goes on with it. Several save methods: one
            repository, with a directory for each.
        hub_model_id: repository, as it stands. None: `<args.hub_model_id, or name of the
            output_dir>-merged`.
        hub_token: None: `args.hub_token`, HF_TOKEN, or that of `hf auth login`.
        hub_private_repo: of a repository that has to be made; None: as its namespace has it.
        hub_revision: branch that holds the newest version; None: main.
        hub_preflight: see before training whether the repository can be written; it is made then.

    Attributes:
        results: one `MergeResult` for each version that was published.
        pushes: one `Push` for each version that arrived on the Hub.
        failures: one `MergeFailure` for each merge that failed under `on_error="warn"`, and for
            each push that failed.

    Raises:
        MergeRefused: an option that cannot be honoured; or, when training begins, all that stands
            against the merge, or (PushRefused) against the push.
        MergeError: a merge failed. The error says where the adapter is: in the checkpoint, or, at
            the end of training, where it has been saved by then. Of a merge that went on behind the
            training it is raised at the next step, with several processes at the next checkpoint.
    """

    @refusing(FOR_CALLBACK)
    def __init__(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        save_method: str | Sequence[str] | None = None,
        merge_on_save: bool = False,
        blocking: bool = True,
        backlog: str = "coalesce",
        rounding: str = "auto",
        base: str = "live",
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
        keep_last: int | None = None,
        on_error: str = "raise",
        on_interrupt: str = "skip",
        barrier_timeout: float = BARRIER_TIMEOUT,
        push_to_hub: bool = False,
        hub_model_id: str | None = None,
        hub_token: str | None = None,
        hub_private_repo: bool | None = True,
        hub_revision: str | None = None,
        hub_preflight: bool = True,
    ):
        problems = [*_problems(on_error, on_interrupt, keep_last, barrier_timeout)]
        limited = min_gain_kept is not None or max_kl is not None
        problems += behind.problems(blocking, backlog, merge_on_save, limited)
        try:
            self._options = MergeOptions(
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
            )
        except MergeRefused as error:
            problems += error.problems
        if problems:
            raise MergeRefused(problems)
        self.results: list[MergeResult] = []
        self.pushes: list[Push] = []
        self.failures: list[MergeFailure] = []
        self._behind = None if blocking else behind.Behind(backlog)
        self._output_dir = output_dir
        self._merge_on_save = merge_on_save
        self._keep_last = keep_last
        self._verification_data = verification_data
        self._datasets: tuple[str, ...] = ()
        self._trainer_log: Callable[[dict[str, float]], None] | None = None
        self._on_error = on_error
        self._publisher = (
            Publisher(hub_model_id, hub_token, hub_private_repo, hub_revision, hub_preflight)
            if push_to_hub
            else None
        )
        self._data: TrainingData | None = None
        self._on_interrupt = on_interrupt
        self._saved: int | None = None  # step of the last checkpoint
        self._began = 0.0  # when training did
        self._barrier_timeout = barrier_timeout
        self._processes = ALONE
        self._merged: tuple[int, int | None] | None = None  # step and best step of the last export
        self._run = uuid.uuid4().hex[:12]
        self._own: list[tuple[Path, str, str]] = []  # root, name and identity of what may be pruned

    @property
    def stalls(self) -> dict[int, float]:
        """Seconds that training was held up at each step whose merge went on behind it."""
        return {} if self._behind is None else dict(self._behind.stalls)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Note what the trainer is about to change in the config."""
        if model is not None:
            note_settings(model)
            keep_cpu_weights_unpacked(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Refuse now what would fail after hours of training."""
        if model is None or not _takes_part(state):
            return
        self._processes = Processes(self._barrier_timeout)
        with self._processes.alike():
            self._begin(args, state, model, train_dataloader)

    def _begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, train_dataloader: Any
    ) -> None:
        keep_cpu_weights_unpacked(model)
        self._merged = self._saved = None
        self._began = time.time() - 2  # some file systems know seconds alone
        if self._behind is not None:  # of a training that was cut off; what failed was said
            left = self._processes.from_leader(self._behind.outcomes(wait=True))
            for outcome in left:
                if outcome.result is not None:
                    self._keep(outcome.result)
            self._behind = behind.Behind(self._behind.backlog)
        saves = self._saves_to_come(args, state)
        store = self._store(args)
        plan = self._check(args, model, store, saves)
        take_settings_again(unwrap_model(model))
        if self._publisher is not None and self._processes.leads:
            self._publisher.resume(store)
        if self._data is not None:  # of a training that was cut off
            self._data.close()
        self._datasets = datasets_of(train_dataloader)
        rounds = plan.to_round() and self._options.wants_data
        if not plan.sharded and (self._options.verify or rounds):
            self._data = TrainingData(
                plan.model,
                train_dataloader,
                batch_size=args.per_device_train_batch_size,
                tokens=self._options.calibration_tokens + self._options.verify_tokens,
            )
            self._data.watch()
        logger.info(
            "merges to come: %d of %.2f GB each, into %s",
            saves,
            plan.nbytes / 1e9,
            store.root,
        )

    def _check(
        self, args: TrainingArguments, model: nn.Module, store: MergeStore, saves: int
    ) -> Plan:
        """All that stands against merging and pushing, in one error."""
        refused: list[MergeRefused] = []
        plan = None
        try:
            plan = check_merge(model, store, self._options, saves, self._processes)
            if self._behind is not None and (problems := behind.unfit(plan)):
                raise MergeRefused(problems)
        except MergeRefused as error:
            refused.append(error)
        try:
            if self._publisher is not None and self._processes.leads:
                self._publisher.check(args)
        except MergeRefused as error:
            refused.append(error)
        if len(refused) == 1:
            raise refused[0]
        if refused or plan is None:
            raise MergeRefused([problem for error in refused for problem in error.problems])
        return plan

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Note how the base was loaded, and merge, when asked to."""
        self._saved = state.global_step
        if model is not None and state.is_world_process_zero:
            keep_recipe(model, args, state)
        if model is None or not self._merge_on_save or not _takes_part(state):
            return
        last = control.should_training_stop or state.global_step >= state.max_steps
        moment = Moment(args, state, model, processing_class, eval_dataloader, None, last)
        failed = self._harvest(moment, wait=last)
        waits = self._behind is None or last
        try:
            self._try(moment, self._merge if waits else self._merge_behind)
        finally:
            self._tell(failed)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell of merges that went on behind the training."""
        if self._behind is None or not self._behind.has_news or model is None:
            return
        if self._processes.count == 1:  # others would have to be asked at every step
            self._tell(self._harvest(Moment(args, state, model, None, None, None, False)))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Merge what was trained, unless the last save has done so."""
        if model is None or not _takes_part(state):
            return
        if self._data is not None:
            self._data.close()
        try:
            with closing(self._processes):
                self._end(Moment(args, state, model, processing_class, eval_dataloader, None, True))
        finally:
            give_back_settings(unwrap_model(model))

    def _end(self, moment: Moment) -> None:
        args, state = moment.args, moment.state
        # Each process may have a file system of its own.
        best = self._processes.from_leader(best_step(args, state))
        stopped = self._processes.from_leader(interrupted(args, state, self._saved, self._began))
        moment = replace(moment, best_step=best)
        done = self._merged == (state.global_step, None) and best in (None, state.global_step)
        leaves = stopped and self._on_interrupt != "merge"
        try:
            failed = self._harvest(moment, wait=not leaves)
            try:
                if leaves:
                    self._leave(moment)
                elif not done:
                    self._try(moment, self._merge, rescue=True)
            finally:
                self._tell(failed)
        except MergeError:
            self._finish_pushes(moment)
            raise
        self._finish_pushes(moment)

    def _leave(self, moment: Moment) -> None:
        """SIGTERM leaves no time for a merge, and a checkpoint has what was trained."""
        if self._behind is not None:
            self._behind.stop()
        told = self._rescue(moment) if self._on_interrupt == "lora" else "resume to merge"
        logger.warning(
            "training was interrupted at step %d: not merged (on_interrupt=%r); %s",
            moment.state.global_step,
            self._on_interrupt,
            told,
        )

    def _try(
        self, moment: Moment, merge: Callable[[Moment], None], *, rescue: bool = False
    ) -> None:
        """Merge; on failure raise or warn, with what has the adapter: saved now, if `rescue`."""
        try:
            with self._processes.alike():
                merge(moment)
        except Exception as error:
            step = moment.state.global_step
            saved = self._rescue(moment) if rescue else f"the adapter is in checkpoint-{step}"
            self._fail(step, error, f"; {saved}")
        except BaseException:  # Ctrl-C, in a merge that takes minutes; others are not waited for
            if rescue and self._processes.count == 1:
                logger.warning("the merge was cut off; %s", self._rescue(moment))
            raise

    def _fail(self, step: int, error: Exception, saved: str = "") -> None:
        failure = MergeError(f"the merge at step {step} failed: {error}{saved}")
        if self._on_error == "raise":
            raise failure from error
        logger.warning("%s", failure, exc_info=error)
        self.failures.append(MergeFailure(step, error))

    def _merge(self, moment: Moment) -> None:
        args, state = moment.args, moment.state
        store = self._store(args)
        options = self._quiet(moment)
        plan = make_plan(moment.model, options, self._processes)
        result = export(
            plan,
            store,
            options,
            name=moment.name,
            processing_class=moment.processing_class,
            training=self._training(moment),
            data=self._data_for(moment, plan),
            last=moment.last,
            processes=self._processes,
        )
        # Before the end "auto" does less than it can, so the end of training merges once more.
        if moment.last or self._options.rounding != "auto":
            self._merged = (state.global_step, moment.best_step)
        if self._publisher is not None and self._processes.leads:
            self._publisher.add(store.version(result.version))
        self._published(moment, state.global_step, result)

    def _training(self, moment: Moment) -> Training:
        settings = settings_to_restore(unwrap_model(moment.model))
        return Training(moment.state.global_step, moment.best_step, settings, self._run)

    def _published(self, moment: Moment, step: int, result: MergeResult) -> None:
        """Keep, prune and log."""
        self._keep(result)
        if self._processes.leads and not logger.isEnabledFor(logging.INFO):  # else it was logged
            several = len(result.paths) > 1
            place = result.path.parent if several else result.path
            tqdm.write(summary(result.manifest, place))
        self._prune(self._store(moment.args), moment.state)
        try:
            self._log(moment, step, metrics(result.manifest))
        except Exception as error:  # of a logger that lost its connection
            logger.warning("the figures of %s could not be logged: %s", result.version, error)

    def _keep(self, result: MergeResult) -> None:
        """Note what was published, and where: names are used again, in this root and in others."""
        self.results.append(result)
        first = result.path.resolve()
        root = first.parent if len(result.paths) == 1 else first.parent.parent
        self._own.append((root, result.version, identity(result.manifest)))

    def _merge_behind(self, moment: Moment) -> None:
        """Merge a copy of what was trained, while training goes on."""
        assert self._behind is not None
        if self._processes.from_leader(self._behind.skips(moment.state.global_step)):
            return
        if not self._processes.leads:
            self._chosen_now(moment)
            return
        store = self._store(moment.args)
        training = self._training(moment)

        def done(result: MergeResult) -> None:
            if self._publisher is not None:  # now, for the process may end before it is asked
                self._publisher.add(store.version(result.version))

        self._behind.merge(
            adapted(moment.model),
            store,
            self._options,
            Beside(moment.name, moment.processing_class, training, self._datasets),
            partial(self._chosen_now, moment),
            done,
        )

    def _chosen_now(self, moment: Moment) -> Choice | None:
        """4-bit codes, where they were to be chosen with data: that takes the live model."""
        if not self._options.needs_data:
            return None
        options = self._quiet(moment)
        plan = make_plan(moment.model, options, self._processes)
        seen, *_ = gather(plan, options, self._data_for(moment, plan))
        with torch.no_grad(), exact_maths(w.stored.device.type for w in plan.weights.values()):
            return choose(plan, options, seen, last=False, processes=self._processes)

    def _quiet(self, moment: Moment) -> MergeOptions:
        """The options, with progress bars where the trainer has some."""
        return replace(
            self._options, progress=self._processes.leads and not moment.args.disable_tqdm
        )

    def _harvest(self, moment: Moment, *, wait: bool = False) -> list[Outcome[MergeResult]]:
        """Keep what merges behind the training have published; those that failed come back."""
        if self._behind is None:
            return []
        with self._processes.alike():
            found = self._processes.from_leader(self._behind.outcomes(wait=wait))
        for outcome in found:
            if outcome.result is not None:
                self._published(moment, outcome.step, outcome.result)
        return [outcome for outcome in found if outcome.error is not None]

    def _tell(self, failed: list[Outcome[MergeResult]]) -> None:
        for outcome in failed:
            assert outcome.error is not None
            self._fail(outcome.step, outcome.error)

    def _data_for(self, moment: Moment, plan: Plan) -> Data:
        if isinstance(self._verification_data, Iterator) and self._options.verify:
            # Every merge looks at it.
            self._verification_data = take(self._verification_data, self._options.verify_tokens)
        evaluation = self._verification_data
        if evaluation is None:
            size = moment.args.per_device_eval_batch_size
            evaluation = Drawn(plan.model, moment.eval_dataloader, size)
        training = None if self._data is None else self._data.batches()
        chosen = self._verification_data is not None
        return Data(
            training=training, evaluation=evaluation, datasets=self._datasets, chosen=chosen
        )

    def _log(self, moment: Moment, step: int, figures: dict[str, float]) -> None:
        """Into the trainer's history; to its loggers too, where `attach` gave us its `log`."""
        if self._trainer_log is not None:
            self._trainer_log({**figures, "merge/step": float(step)})
        else:
            state = moment.state  # of a later step, where the merge went on behind it
            epoch = (state.epoch or 0.0) * step / max(1, state.global_step)
            state.log_history.append({**figures, "epoch": epoch, "step": step})

    def _finish_pushes(self, moment: Moment) -> None:
        """Wait for pushes; one that failed is said, and stays pending."""
        if self._publisher is None:
            return
        with self._processes.alike():  # the others wait here, not in a collective of the trainer's
            if not self._processes.leads:
                return
            done, failed = self._publisher.finish(progress=not moment.args.disable_tqdm)
            self.pushes += done
            for failure in failed:
                logger.warning("%s", failure.error)
                step = failure.version.manifest["step"]
                self.failures.append(MergeFailure(step, failure.error))
            self._prune(self._store(moment.args), moment.state)  # what was pending has stayed

    def _prune(self, store: MergeStore, state: TrainerState) -> None:
        """Remove old versions of this run; that it fails is no failure of the merge."""
        if self._keep_last is None or not self._processes.leads:
            return
        keep = best_steps(state)
        root = store.root.resolve()
        names = {name: found for place, name, found in self._own if place == root}
        try:
            for name in store.prune(self._keep_last, names=names, keep_steps=keep):
                logger.info("pruned %s", store.root / name)
                self._own.remove((root, name, names[name]))
        except OSError as error:
            logger.warning("old versions in %s could not be removed: %s", store.root, error)

    def _rescue(self, moment: Moment) -> str:
        """Save the adapter alone; say where, or why not."""
        try:
            name = f"{moment.name}-adapter"
            store = self._store(moment.args)
            step = moment.state.global_step
            path = rescue(moment.model, store, name, step, self._processes, self._run)
        except Exception as error:
            return f"saving the adapter failed too ({error}); it is in the last checkpoint, if any"
        return f"the adapter is safe in {path}"

    def _store(self, args: TrainingArguments) -> MergeStore:
        default = Path(args.output_dir or ".") / "_merged"
        return MergeStore(self._output_dir if self._output_dir is not None else default)

    def _saves_to_come(self, args: TrainingArguments, state: TrainerState) -> int:
        """Versions that will lie on the disk together, from here to the end of training."""
        saves = 1 + (saves_to_come(args, state) if self._merge_on_save else 0)
        if self._keep_last is None:
            return saves
        # One above what is kept: pruning comes after publishing, and the best step's may stay too.
        # Behind a training two may be published between two prunings.
        return min(saves, self._keep_last + (2 if self._behind is None else 3))


def _problems(
    on_error: str, on_interrupt: str, keep_last: int | None, barrier_timeout: float
) -> Iterator[str]:
    """What is wrong with the options that a merge by itself does not have."""
    if on_error not in ("raise", "warn"):
        yield f"on_error={on_error!r} is not known; use 'raise' or 'warn'"
    if on_interrupt not in ("skip", "lora", "merge"):
        yield f"on_interrupt={on_interrupt!r} is not known; use 'skip', 'lora' or 'merge'"
    if keep_last is not None and not (isinstance(keep_last, int) and keep_last > 0):
        yield f"keep_last={keep_last!r} would keep nothing; use 1 or more, or None"
    if not positive(barrier_timeout):
        yield f"barrier_timeout={barrier_timeout!r} must be a positive number"


def attach(trainer: Trainer, callback: MergeOnSaveCallback) -> None:
    """Add the callback to a trainer, so that its figures reach the trainer's loggers.

    It is put ahead of the callbacks of W&B, TensorBoard and the like, which close their runs when
    training ends. Give it to the trainer's constructor as well: only there does it see what the
    trainer changes in the model's config. Without `attach` its figures are in `state.log_history`
    alone.
    """
    handler = trainer.callback_handler
    if callback not in handler.callbacks:
        trainer.add_callback(callback)
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)
    # Not trainer.log: TRL's would add its own running means to the entry, and begin them anew.
    callback._trainer_log = partial(Trainer.log, trainer)


def _takes_part(state: TrainerState) -> bool:
    """All processes that can talk do; trials of a hyper-parameter search write nothing."""
    one = bool(state.is_world_process_zero) or Processes.are_several()
    return one and not state.is_hyper_param_search
