"""Merges behind the training: of what was trained then, to the same bytes, in nobody's way."""

import gc
import logging
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from models import adapt, load_base, qlora, same, save_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_adapters import tuned
from test_callback import listing, losses, sft, trainer
from transformers import PreTrainedModel, TrainerCallback

import merge_callback.behind
from merge_callback import MergeError, MergeOnSaveCallback, MergeRefused, MergeStore, merge_adapter
from merge_callback.background import Background
from merge_callback.behind import export_snapshot
from merge_callback.drafts import Beside
from merge_callback.errors import VerificationError
from merge_callback.exact_maths import beside_others, exact_maths, less_exact
from merge_callback.manifest import Training
from merge_callback.options import MergeOptions
from merge_callback.snapshot import snapshot

EVERY_2 = {"save_strategy": "steps", "save_steps": 2}
NOBODY = {"wide": frozenset(), "stop": threading.Event()}
LATER = {"merge_on_save": True, "blocking": False, "rounding": "stochastic"}


class Gate(TrainerCallback):
    """Holds merges behind the training back until a step, and says when it came."""

    def __init__(self, monkeypatch, step):
        self.opened, self.step, self.waited = threading.Event(), step, []
        export = merge_callback.behind.export_snapshot

        def gated(*args, **settings):
            self.waited.append(not self.opened.is_set())
            assert self.opened.wait(60)
            return export(*args, **settings)

        monkeypatch.setattr(merge_callback.behind, "export_snapshot", gated)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.opened.set()

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:  # the last one waits
            self.opened.set()

    def on_train_end(self, args, state, control, **kwargs):
        self.opened.set()


def weights(path):
    return load_file(path / "model.safetensors")


def test_a_merge_behind_the_training_is_of_what_was_trained_then(tmp_path, monkeypatch):
    waiting = sft(tmp_path / "a", MergeOnSaveCallback(**LATER | {"blocking": True}), **EVERY_2)
    waiting.train()
    gate = Gate(monkeypatch, 5)  # step 2 is merged after step 5
    callback = MergeOnSaveCallback(**LATER)
    going = sft(tmp_path / "b", gate, callback, **EVERY_2)
    going.train()
    assert gate.waited[0]
    assert losses(waiting) == losses(going) and len(set(losses(going))) > 1
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    versions = [result.version for result in callback.results]
    assert versions == ["step-00000002", "step-00000004", "step-00000006"]
    for version in versions:
        one, other = (tmp_path / run / "run/_merged" / version for run in "ab")
        assert same(weights(one), weights(other)), version
        names = {p.name for p in one.iterdir()}
        assert names == {p.name for p in other.iterdir()} and "tokenizer.json" in names
        assert (one / "config.json").read_text() == (other / "config.json").read_text()
        MergeStore(other.parent).verify(version)
    assert not same(weights(one), weights(other.parent / "step-00000002"))
    assert sorted(callback.stalls) == [2, 4]
    history = [e for e in going.state.log_history if "merge/seconds" in e]
    assert [entry["step"] for entry in history] == [2, 4, 6]
    waited = [e for e in waiting.state.log_history if "merge/seconds" in e]
    assert [e["epoch"] for e in history] == pytest.approx([e["epoch"] for e in waited])


def test_what_is_trained_whole_is_of_then_too(tmp_path, monkeypatch):
    runs = {}
    for run, blocking in (("a", True), ("b", False)):
        base = load_base(save_base(tmp_path / run / "base", tied=False), "nf4-nested")
        model = adapt(base, modules_to_save=["lm_head", "embed_tokens"], target_modules=["q_proj"])
        torch.manual_seed(3)
        callbacks = [MergeOnSaveCallback(**LATER | {"blocking": blocking})]
        if not blocking:
            callbacks.insert(0, Gate(monkeypatch, 4))
        runs[run] = trainer(tmp_path / run, *callbacks, model=model, **EVERY_2)
        runs[run].train()
    assert losses(runs["a"]) == losses(runs["b"])
    one, other = (weights(tmp_path / run / "run/_merged/step-00000002") for run in "ab")
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    last = weights(tmp_path / "b/run/_merged/step-00000004")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert not torch.equal(other[name], last[name])


def test_codes_chosen_with_data_are_chosen_before_training_goes_on(tmp_path, monkeypatch):
    settings = LATER | {"rounding": "calibrated", "calibration_tokens": 96}
    waiting = sft(tmp_path / "a", MergeOnSaveCallback(**settings | {"blocking": True}), **EVERY_2)
    waiting.train()
    callback = MergeOnSaveCallback(**settings)
    going = sft(tmp_path / "b", Gate(monkeypatch, 5), callback, **EVERY_2)
    going.train()
    assert losses(waiting) == losses(going)
    one, other = (tmp_path / run / "run/_merged/step-00000002" for run in "ab")
    assert same(weights(one), weights(other))
    manifest = callback.results[0].manifest
    assert manifest["rounding"] == "calibrated" and manifest["calibration"]["tokens"] > 0
    assert 0 < manifest["seconds"]["round"] < callback.stalls[2]


def test_auto_holds_nobody_up_before_the_end(tmp_path):
    callback = MergeOnSaveCallback(**LATER | {"rounding": "auto", "calibration_tokens": 96})
    sft(tmp_path, callback, **EVERY_2).train()
    chosen = [result.manifest["rounding"] for result in callback.results]
    assert chosen == ["stochastic", "stochastic", "tuned"]


def failing(monkeypatch, step):
    export = merge_callback.behind.export_snapshot

    def fails(model, store, options, beside, *args, **settings):
        if beside.training.step == step:
            raise MergeError("the disk is full")
        return export(model, store, options, beside, *args, **settings)

    monkeypatch.setattr(merge_callback.behind, "export_snapshot", fails)


class Slow(TrainerCallback):
    """Steps that take so long that a merge behind them ends."""

    def on_step_begin(self, args, state, control, **kwargs):
        for thread in threading.enumerate():
            if thread.name.startswith("merge-behind"):
                thread.join(60)


def test_a_base_that_is_written_to_meanwhile_is_not_published(tmp_path, monkeypatch):
    model = adapt(load_base(save_base(tmp_path / "base"), "bfloat16"))

    class Generates(TrainerCallback):
        """As trainers do that hand the merged weights to another engine."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                model.merge_adapter()
                model.unmerge_adapter()
                gate.opened.set()

    gate = Gate(monkeypatch, None)
    training = trainer(
        tmp_path, Generates(), Slow(), MergeOnSaveCallback(**LATER), model=model, **EVERY_2
    )
    with pytest.raises(MergeError, match="at step 2 failed: the base was written to while"):
        training.train()
    assert listing(tmp_path) == []


def test_a_failure_behind_is_told_though_the_last_merge_fails_too(tmp_path, monkeypatch):
    failing(monkeypatch, 2)

    class Breaks(MergeOnSaveCallback):
        def _merge(self, moment):
            raise MergeError("no room for the last")

    callback = Breaks(**LATER)
    gate = Gate(monkeypatch, 4)
    training = trainer(tmp_path, gate, callback, max_steps=4, **EVERY_2)
    with pytest.raises(MergeError) as caught:
        training.train()
    told = f"{caught.value} {caught.value.__context__}"
    assert "the disk is full" in told and "no room for the last" in told


def test_a_failure_is_told_at_the_next_step(tmp_path, monkeypatch):
    failing(monkeypatch, 2)
    training = trainer(tmp_path, Slow(), MergeOnSaveCallback(**LATER), **EVERY_2)
    with pytest.raises(MergeError, match="the merge at step 2 failed: the disk is full"):
        training.train()
    assert training.state.global_step == 3


def test_a_failure_costs_neither_the_training_nor_the_last_merge(tmp_path, monkeypatch, caplog):
    failing(monkeypatch, 2)
    callback = MergeOnSaveCallback(**LATER, on_error="warn")
    trainer(tmp_path, callback, **EVERY_2).train()
    assert [f.step for f in callback.failures] == [2]
    assert listing(tmp_path) == ["step-00000004"]
    assert "the merge at step 2 failed" in caplog.text


def test_a_failure_that_is_told_at_the_end_comes_after_the_last_merge(tmp_path, monkeypatch):
    failing(monkeypatch, 3)
    gate = Gate(monkeypatch, None)
    settings = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(MergeError, match="the merge at step 3 failed: the disk is full"):
        trainer(tmp_path, gate, MergeOnSaveCallback(**LATER), **settings).train()
    assert listing(tmp_path) == ["step-00000004"]


def test_versions_behind_the_training_are_pruned(tmp_path):
    callback, seen = MergeOnSaveCallback(**LATER, keep_last=1), {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen[state.global_step] = listing(tmp_path) if state.global_step else []

    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, Slow(), callback, Look(), **settings).train()
    assert seen[3] == ["step-00000002", "step-00000003"]  # the newest was not told of yet
    assert listing(tmp_path) == ["step-00000004"]
    assert callback.results[-1].version == "step-00000004"


TRAINING_THAT_FAILS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_callback import trainer
from transformers import TrainerCallback
from merge_callback import MergeOnSaveCallback
import merge_callback.behind, merge_callback.weights, time

class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise RuntimeError("the loss is NaN")

write = merge_callback.weights._encode_group
def slowly(*args):
    time.sleep(0.05)  # 24 weights: it is under way when the interpreter ends
    return write(*args)
merge_callback.weights._encode_group = slowly
callback = MergeOnSaveCallback(merge_on_save=True, blocking=False, rounding="stochastic")
trainer(Path({root!r}), callback, Fails(), save_strategy="steps", save_steps=2).train()
"""


def test_a_training_that_fails_does_not_take_a_merge_with_it(tmp_path):
    code = TRAINING_THAT_FAILS.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 1 and "the loss is NaN" in done.stderr, done.stderr[-2000:]
    assert listing(tmp_path) == ["step-00000002"]
    MergeStore(tmp_path / "run/_merged").verify("step-00000002")


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"blocking": False}, "is for merge_on_save=True"),
        ({"merge_on_save": True, "blocking": False, "max_kl": 0.1}, "need the live model"),
        ({"merge_on_save": True, "backlog": "queue"}, "backlog='queue' is not known"),
    ],
)
def test_options_that_do_not_go_together_are_refused(settings, told):
    with pytest.raises(MergeRefused, match=told):
        MergeOnSaveCallback(**settings)


def test_all_that_is_wrong_with_options_is_said_at_once():
    wrong = {"rounding": "q", "on_error": "x", "on_interrupt": "y", "keep_last": 0, "backlog": "z"}
    wrong |= {"barrier_timeout": -1, "save_method": "gguf"}
    with pytest.raises(MergeRefused) as caught:
        MergeOnSaveCallback(**wrong)
    told = sorted(problem.split("=")[0].split()[0] for problem in caught.value.problems)
    assert told == sorted(wrong)


class Jobs:
    """Jobs that end when they are told to."""

    def __init__(self, backlog):
        self.background, self.gates, self.done = Background(backlog), {}, []

    def submit(self, step):
        self.gates[step] = threading.Event()
        return self.background.submit(step, lambda: self._run(step))

    def _run(self, step):
        assert self.gates[step].wait(30)
        self.done.append(step)
        if step == 13:
            raise ValueError("unlucky")
        return -step


def test_of_merges_that_wait_the_newest_is_made():
    jobs = Jobs("coalesce")
    assert [jobs.submit(step) for step in (1, 2, 3)] == [None, None, 2]
    for step in (3, 1):
        jobs.gates[step].set()
    jobs.background.join()
    assert jobs.done == [1, 3]
    assert [(o.step, o.result) for o in jobs.background.outcomes()] == [(1, -1), (3, -3)]
    assert not jobs.background.has_news


def test_a_merge_that_comes_too_early_is_skipped():
    jobs = Jobs("skip")
    assert not jobs.background.skips
    jobs.submit(1)
    assert jobs.background.skips
    jobs.gates[1].set()
    jobs.background.join()
    assert not jobs.background.skips


def test_a_merge_waits_for_the_one_before():
    jobs = Jobs("wait")
    jobs.submit(1)
    threading.Timer(0.3, jobs.gates[1].set).start()
    assert jobs.submit(2) is None
    assert jobs.done == [1]
    jobs.gates[2].set()
    jobs.background.join()


def test_a_job_that_fails_is_an_outcome_and_the_next_one_runs():
    jobs = Jobs("coalesce")
    jobs.submit(13)
    jobs.submit(14)
    jobs.gates[14].set()
    jobs.gates[13].set()
    jobs.background.join()
    one, other = jobs.background.outcomes()
    assert (one.step, str(one.error), other.result) == (13, "unlucky", -14)


def test_a_job_that_waits_can_be_dropped():
    jobs = Jobs("coalesce")
    jobs.submit(1)
    jobs.submit(2)
    jobs.background.drop_waiting()
    jobs.gates[1].set()
    jobs.background.join()
    assert jobs.done == [1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have no priority there")
def test_jobs_run_on_one_core_and_give_way_to_all_others():
    torch.set_num_threads(2)
    try:
        background = Background("wait")
        background.submit(
            1,
            lambda: (
                os.getpriority(os.PRIO_PROCESS, threading.get_native_id()),
                torch.get_num_threads(),
            ),
        )
        background.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert background.outcomes()[0].result == (19, 1)
    assert os.getpriority(os.PRIO_PROCESS, 0) == 0


ADAPTERS = {
    "LORA": {"r": 4, "target_modules": "all-linear"},
    "DORA": {"r": 4, "target_modules": "all-linear", "use_dora": True},
    "embeddings": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 300]},
    "whole": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "biases": {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
}
TUNERS = ["ADALORA", "IA3", "LN_TUNING", "LOHA", "OFT", "VBLORA", "VERA"]


@pytest.mark.parametrize("kind", [*ADAPTERS, *TUNERS])
def test_a_snapshot_stays_while_everything_trained_moves(tmp_path, kind):
    base = load_base(save_base(tmp_path / "base", tied=kind == "tokens"), "bfloat16")
    if kind in ADAPTERS:
        model = get_peft_model(base, LoraConfig(**ADAPTERS[kind], init_lora_weights=False))
    else:
        model = tuned(base, kind)
    kept = [p for n, p in base.named_parameters() if not p.requires_grad and "base_layer" in n]
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {"save_method": ["merged_16bit", "lora"], "dtype": "float32", "verify": False}
    before = merge_adapter(model, tmp_path / "out", name="before", **settings)
    taken = snapshot(model)
    assert type(taken) is type(model) and taken is not model
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.rand_like(parameter))
    model.get_base_model().config.use_cache ^= True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trained biases stay
        model.base_model.disable_adapter_layers()  # what is active is of then as well
    beside = Beside("then", None, Training())
    store, options = MergeStore(tmp_path / "out"), MergeOptions(**settings)
    then = export_snapshot(taken, store, options, beside, None, 0.0, **NOBODY)
    for method, file in (("merged_16bit", "model"), ("lora", "adapter_model")):
        one, other = (load_file(r.paths[method] / f"{file}.safetensors") for r in (before, then))
        assert same(one, other), method
    model.base_model.enable_adapter_layers()
    after = merge_adapter(model, tmp_path / "out", name="after", **settings)
    moved = load_file(after.paths["merged_16bit"] / "model.safetensors")
    assert not same(moved, load_file(before.paths["merged_16bit"] / "model.safetensors"))
    shared = {p.data_ptr() for p in taken.parameters()}
    assert all(parameter.data_ptr() in shared for parameter in kept)
    own = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert not own & shared


def test_a_snapshot_is_tied_as_its_model_is(tmp_path):
    taken = snapshot(qlora(tmp_path))
    base = taken.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.model.layers[0] is not None and len(list(taken.modules())) == len(
        list(qlora(tmp_path / "again").modules())
    )


def test_nothing_that_other_threads_share_is_touched(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("this holds for all threads")

    model = qlora(tmp_path)
    for name in ("set_default_dtype", "manual_seed", "set_num_threads", "set_rng_state"):
        monkeypatch.setattr(torch, name, forbidden)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", forbidden)
    monkeypatch.setattr(random, "setstate", forbidden)
    monkeypatch.setattr(numpy.random, "set_state", forbidden)
    monkeypatch.setattr(warnings.catch_warnings, "__enter__", forbidden)
    before, results = torch.get_rng_state(), []
    arguments = (
        snapshot(model),
        MergeStore(tmp_path / "out"),
        MergeOptions(progress=False, save_method=["merged_4bit", "lora"]),
        Beside("then", None, Training()),
        None,
        0.0,
    )
    thread = threading.Thread(target=lambda: results.append(export_snapshot(*arguments, **NOBODY)))
    thread.start()
    thread.join()
    monkeypatch.undo()
    assert torch.equal(before, torch.get_rng_state())
    assert results[0].manifest["verification"]["problems"] == []


def test_an_adapter_that_merges_wrongly_is_not_published_behind_the_training(tmp_path, monkeypatch):
    from merge_callback.adapters import lora

    model = qlora(tmp_path)
    monkeypatch.setattr(lora, "updates", lambda layer: ())
    with pytest.raises(VerificationError, match="differs from PEFT's own"):
        export_snapshot(
            snapshot(model),
            MergeStore(tmp_path / "out"),
            MergeOptions(progress=False),
            Beside("then", None, Training()),
            None,
            0.0,
            **NOBODY,
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_products_are_exact_beside_threads_that_allow_less():
    matmul = torch.backends.mkldnn.matmul
    a, b = torch.randn(40, 50), torch.randn(50, 60)
    exact = (a.double() @ b.double()).float()
    other: list = []
    matmul.fp32_precision = "bf16"
    try:
        plain = a @ b
        with beside_others(less_exact(["cpu"])), exact_maths(["cpu"]):
            assert matmul.fp32_precision == "bf16"
            assert torch.equal(a @ b, exact)
            summed = torch.ones(40, 60).addmm_(a, b, alpha=2.0)
            assert torch.equal(summed, (1 + 2 * (a.double() @ b.double())).float())
            assert torch.equal(torch.nn.functional.linear(a, b.t()), exact)
            assert (a.half() @ b.half()).dtype == torch.float16
            thread = threading.Thread(target=lambda: other.append(a @ b))
            thread.start()
            thread.join()
        with exact_maths(["cpu"]):
            assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = "none"
    assert torch.equal(other[0], plain) and not torch.equal(plain, exact)
    plain = a @ b
    with (
        beside_others(less_exact(["cpu"])),
        exact_maths(["cpu"]),
    ):  # nothing to mend: the same bits as elsewhere
        assert torch.equal(a @ b, plain)


def test_a_dropped_merge_is_said(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    callback = MergeOnSaveCallback(**LATER, backlog="skip")
    gate = Gate(monkeypatch, 4)
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, gate, callback, **settings).train()
    assert listing(tmp_path) == ["step-00000001", "step-00000004"]
    for step in (2, 3):
        assert f"the merge of step {step} is left out" in caplog.text
    assert sorted(callback.stalls) == [1]  # nothing was prepared for those that were left out


def test_a_process_that_is_forked_does_not_wait_for_merges_of_its_parent():
    jobs = Jobs("coalesce")
    jobs.submit(1)
    child = multiprocessing.get_context("fork").Process(target=lambda: None)
    child.start()
    child.join(20)
    ended = child.exitcode
    child.kill()
    jobs.gates[1].set()
    jobs.background.join()
    assert ended == 0


def test_room_is_asked_for_what_lies_on_the_disk_together(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for blocking, versions in ((True, 3), (False, 4)):
        callback = MergeOnSaveCallback(**LATER | {"blocking": blocking}, keep_last=1)
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
        trainer(tmp_path / str(blocking), callback, **settings).train()
        assert f"merges to come: {versions} of" in caplog.text


def test_a_failed_job_holds_nothing_of_what_it_worked_on():
    class Heavy:
        pass

    background = Background("coalesce")
    held = []

    def job():
        heavy = Heavy()
        held.append(weakref.ref(heavy))
        try:
            raise ValueError("within")
        except ValueError as error:
            raise MergeError("without") from error

    background.submit(1, job)
    background.join()
    (outcome,) = background.outcomes()
    gc.collect()
    assert str(outcome.error) == "without" and str(outcome.error.__cause__) == "within"
    assert held[0]() is None


def test_an_interrupted_training_does_not_wait_for_a_merge(tmp_path, monkeypatch, caplog):
    model, stop = qlora(tmp_path), threading.Event()
    written = []
    group = merge_callback.weights._write_group

    def write(*args):
        written.append(args)
        stop.set()
        return group(*args)

    monkeypatch.setattr(merge_callback.weights, "_write_group", write)
    store, beside = MergeStore(tmp_path / "out"), Beside("then", None, Training())
    arguments = (snapshot(model), store, MergeOptions(progress=False), beside, None, 0.0)
    with pytest.raises(MergeError, match="it was stopped, for the training was interrupted"):
        export_snapshot(*arguments, wide=frozenset(), stop=stop)
    assert len(written) == 1 and list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="there is no SIGTERM")
def test_sigterm_ends_the_merge_that_is_under_way(tmp_path, monkeypatch):
    begun, group = threading.Event(), merge_callback.weights._encode_group

    def slowly(*args):
        begun.set()
        threading.Event().wait(1.0)  # 24 weights: longer than a training goes on after SIGTERM
        return group(*args)

    class Interrupts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 1
            if state.global_step == 2:
                assert begun.wait(30)
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(merge_callback.weights, "_encode_group", slowly)
    callback, before = MergeOnSaveCallback(**LATER), signal.getsignal(signal.SIGTERM)
    settings = {"enable_jit_checkpoint": True, "max_steps": 100_000, "logging_steps": 1000}
    try:
        trainer(tmp_path, callback, Interrupts(), **settings).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    callback._behind.outcomes(wait=True)
    assert listing(tmp_path) == []
    monkeypatch.undo()
    trainer(tmp_path / "again", callback, **EVERY_2).train()
    assert [r.version for r in callback.results] == ["step-00000002", "step-00000004"]


def test_a_second_training_has_nothing_to_do_with_merges_of_the_first(
    tmp_path, monkeypatch, caplog
):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    failing(monkeypatch, 2)
    callback = MergeOnSaveCallback(**LATER)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "a", Fails(), callback, **EVERY_2).train()
    callback._behind._background.join()  # it may not have begun yet
    monkeypatch.undo()
    trainer(tmp_path / "b", callback, **EVERY_2).train()
    assert listing(tmp_path / "b") == ["step-00000002", "step-00000004"]
    assert [result.version for result in callback.results] == ["step-00000002", "step-00000004"]
    assert "step 2, merged behind the training: the disk is full" in caplog.text


def test_precision_is_that_of_the_training_not_of_a_choice_of_codes(tmp_path, monkeypatch):
    matmul, found = torch.backends.mkldnn.matmul, []

    def export(*args, wide, **settings):
        found.append((wide, matmul.fp32_precision))
        raise MergeError("enough")

    monkeypatch.setattr(merge_callback.behind, "export_snapshot", export)
    behind = merge_callback.behind.Behind("coalesce")
    beside = Beside("then", None, Training(step=1))
    gate = threading.Event()
    behind._background.submit(0, gate.wait)  # so that the merge waits
    matmul.fp32_precision = "bf16"
    try:
        behind.merge(
            qlora(tmp_path), MergeStore(tmp_path / "out"), MergeOptions(), beside, list, print
        )
        with exact_maths(["cpu"]):  # as while the codes of a later step are chosen
            gate.set()
            behind.outcomes(wait=True)
    finally:
        matmul.fp32_precision = "none"
    assert "mm" in found[0][0]


@pytest.mark.parametrize("kind", [MergeRefused, VerificationError])
def test_errors_can_be_told_to_other_processes(kind):
    told = pickle.loads(pickle.dumps(kind(["one", "two"])))
    assert type(told) is kind and told.problems == ("one", "two")
    assert str(told) == str(kind(["one", "two"]))


def test_another_default_dtype_is_refused_when_training_begins(tmp_path):
    """bitsandbytes computes in it, and it is one for all threads."""
    run = trainer(tmp_path, MergeOnSaveCallback(**LATER), **EVERY_2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(MergeRefused, match=r"torch\.set_default_dtype\(torch\.float32\)"):
            run.train()
    finally:
        torch.set_default_dtype(torch.float32)
    assert run.state.global_step == 0
