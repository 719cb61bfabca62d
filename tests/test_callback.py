"""The callback in real trainers: when it merges, what it leaves alone, what it does on failure."""

import logging
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import adapt, load_base, qlora, same, save_base, snapshot, tokenizer
from peft import LoraConfig
from safetensors.torch import load_file
from test_store import publish
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import merge_callback.weights
from merge_callback import MergeError, MergeOnSaveCallback, MergeRefused, MergeResult, MergeStore

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1}
TEXTS = [" ".join(f"w{(i * 7 + j) % 50}" for j in range(12)) for i in range(16)]
COMMON = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "seed": 4,
}


def data():
    rows = [[3 + (i * 7 + j) % 50 for j in range(12)] for i in range(16)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def trainer(tmp_path, *callbacks, model=None, words=None, **settings):
    settings = COMMON | {"max_steps": 4, "save_strategy": "no"} | settings
    args = TrainingArguments(output_dir=str(tmp_path / "run"), **settings)
    model = model or qlora(tmp_path, lora_dropout=0.1)
    return Trainer(
        model=model,
        args=args,
        train_dataset=data(),
        eval_dataset=data().select(range(4)),
        processing_class=words or tokenizer(),
        callbacks=list(callbacks),
    )


def listing(tmp_path, root="run/_merged"):
    root = tmp_path / root
    return sorted(p.name for p in root.iterdir()) if root.exists() else []


def sft(tmp_path, *callbacks, kind="nf4-nested", **settings):
    settings = COMMON | {"max_steps": 6, "max_length": 16} | settings
    args = SFTConfig(output_dir=str(tmp_path / "run"), **settings)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
    torch.manual_seed(0)
    return SFTTrainer(
        model=load_base(save_base(tmp_path / "base"), kind),
        args=args,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        peft_config=lora,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_losses_of_a_run_are_those_without_the_callback(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    plain = sft(tmp_path / "a", **settings)
    plain.train()
    callback = MergeOnSaveCallback(merge_on_save=True)
    merging = sft(tmp_path / "b", callback, **settings)
    merging.train()
    assert len(losses(plain)) == 6 and len(set(losses(plain))) > 1
    assert losses(plain) == losses(merging)
    for (name, one), other in zip(
        plain.model.named_parameters(), merging.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert listing(tmp_path / "b") == ["step-00000002", "step-00000004", "step-00000006"]
    assert [r.version for r in callback.results] == listing(tmp_path / "b")


def test_an_sft_run_ends_with_a_model_that_anybody_can_load(tmp_path):
    callback = MergeOnSaveCallback(save_method=["merged_4bit", "merged_16bit", "lora"])
    run = sft(tmp_path, callback)
    run.train()
    (result,) = callback.results
    assert result.version == "step-00000006"
    assert result.manifest["step"] == 6 and result.manifest["best_step"] is None
    for method in ("merged_4bit", "merged_16bit"):
        path = result.paths[method]
        _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info.values())
        assert (path / "chat_template.jinja").exists() and (path / "tokenizer.json").exists()
        config = AutoModelForCausalLM.from_pretrained(path).config
        assert config.use_cache is True  # the trainer has turned it off in the live config
    assert run.model.config.use_cache is True  # there too, once training is over
    MergeStore(tmp_path / "run" / "_merged").verify(result.version)


def test_the_live_model_is_the_same_after_train_end(tmp_path):
    seen = {}

    class Before(MergeOnSaveCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            seen["before"] = snapshot(model)
            super().on_train_end(args, state, control, model=model, **kwargs)
            seen["after"] = snapshot(model)

    trainer(tmp_path, Before()).train()
    caches = [seen[moment]["config"].pop("use_cache") for moment in ("before", "after")]
    assert caches == [False, True]  # what the trainer has turned off is given back
    assert same(seen["before"], seen["after"])
    assert listing(tmp_path) == ["step-00000004"]


def test_the_last_step_is_exported_once(tmp_path):
    callback = MergeOnSaveCallback(merge_on_save=True)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=2).train()
    assert listing(tmp_path) == ["step-00000002", "step-00000004"]


def test_without_merge_on_save_only_the_end_is_exported(tmp_path):
    trainer(tmp_path, MergeOnSaveCallback(), save_strategy="steps", save_steps=2).train()
    assert listing(tmp_path) == ["step-00000004"]


def test_training_twice_exports_twice(tmp_path):
    run = trainer(tmp_path, MergeOnSaveCallback())
    run.train()
    run.train()
    assert listing(tmp_path) == ["step-00000004", "step-00000004-v2"]


def test_saves_are_calibrated_and_the_end_is_tuned(tmp_path):
    callback = MergeOnSaveCallback(merge_on_save=True, calibration_tokens=100)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=2).train()
    assert [r.manifest["rounding"] for r in callback.results] == ["calibrated", "tuned"]
    tokens = [r.manifest["calibration"]["tokens"] for r in callback.results]
    assert tokens == [120, 96]  # five batches of two rows of twelve; one is kept to judge by


def test_what_a_cut_off_training_left_behind_is_taken_away(tmp_path):
    class Cut(MergeOnSaveCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    callback = Cut()
    run = trainer(tmp_path, callback)
    run.train_dataset = run.train_dataset.to_iterable_dataset()  # whose batches must be caught
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.train()
    assert len(run.model.get_base_model()._forward_pre_hooks) == 1


def test_the_best_model_is_exported_under_its_own_step(tmp_path):
    class Worse(MergeOnSaveCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)  # step 2 is the best

    callback = Worse(merge_on_save=True, keep_last=1, rounding="nearest")
    run = trainer(
        tmp_path,
        callback,
        max_steps=6,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
    )
    run.train()
    # By train end the versions of steps 4 and 6 are pruned; that of the best step stays.
    assert listing(tmp_path) == ["step-00000002", "step-00000006-v2"]
    last = callback.results[-1].manifest
    assert (last["step"], last["best_step"]) == (6, 2)
    store = MergeStore(tmp_path / "run" / "_merged")
    first, final = store.versions()
    name = "model.safetensors"
    assert first.manifest["adapter_sha256"] == final.manifest["adapter_sha256"]
    assert (first.path / name).read_bytes() == (final.path / name).read_bytes()


def test_other_processes_and_search_trials_write_nothing(tmp_path):
    for flag, value in [("is_world_process_zero", False), ("is_hyper_param_search", True)]:

        class Elsewhere(MergeOnSaveCallback):
            def on_train_end(self, args, state, control, flag=flag, value=value, **kwargs):
                setattr(state, flag, value)
                super().on_train_end(args, state, control, **kwargs)

        callback = Elsewhere()
        trainer(tmp_path, callback).train()
        assert callback.results == []
    assert listing(tmp_path) == []


def test_an_output_dir_of_its_own_is_used(tmp_path):
    callback = MergeOnSaveCallback(tmp_path / "elsewhere")
    trainer(tmp_path, callback).train()
    assert listing(tmp_path, "elsewhere") == ["step-00000004"]
    assert listing(tmp_path) == []


def test_a_callback_added_later_still_exports(tmp_path):
    run = trainer(tmp_path)
    run.add_callback(MergeOnSaveCallback())
    run.train()
    assert listing(tmp_path) == ["step-00000004"]


def test_an_evaluation_before_training_repacks_nothing(tmp_path):
    callback = MergeOnSaveCallback()
    model = qlora(tmp_path)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    run = trainer(tmp_path, callback, model=model)
    run.evaluate()
    run.train()
    assert len(callback.results) == 1
    flags = {getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules()}
    assert flags == {False}  # what cures it, on a CPU that would not repack too


def refused(run):
    with pytest.raises(MergeRefused) as caught:
        run.train()
    assert run.state.global_step == 0
    return str(caught.value)


def test_everything_is_checked_before_the_first_step(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    model = qlora(tmp_path)
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.3
    told = refused(trainer(tmp_path, MergeOnSaveCallback(tmp_path / "file"), model=model))
    assert "generation_config" in told and "choose another output_dir" in told


def test_a_model_without_adapter_is_refused_before_the_first_step(tmp_path):
    model = load_base(save_base(tmp_path / "base"), "bfloat16")
    assert "get_peft_model" in refused(trainer(tmp_path, MergeOnSaveCallback(), model=model))


def test_a_disk_too_small_for_all_saves_is_refused(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    settings = {"save_strategy": "steps", "save_steps": 1}
    told = refused(trainer(tmp_path, MergeOnSaveCallback(merge_on_save=True), **settings))
    assert "0.00 GB free" in told and "keep_last=" in told
    callback = MergeOnSaveCallback(merge_on_save=True, keep_last=1)
    trainer(tmp_path, callback, **settings).train()
    assert listing(tmp_path) == ["step-00000004"]


@pytest.mark.parametrize(
    ("settings", "saves"),
    [
        ({"save_strategy": "no"}, 1),
        ({"save_strategy": "steps", "save_steps": 2}, 3),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, 3),
        ({"save_strategy": "best", "metric_for_best_model": "loss", **EACH_STEP}, 5),
    ],
)
def test_the_saves_to_come_are_counted_and_told(tmp_path, caplog, settings, saves):
    caplog.set_level(logging.INFO)
    trainer(tmp_path, MergeOnSaveCallback(merge_on_save=True), **settings).train()
    assert f"merges to come: {saves} of" in caplog.text
    assert 1 <= len(listing(tmp_path)) <= saves


def test_the_best_step_is_that_of_the_checkpoint_which_was_loaded(tmp_path):
    class Best(MergeOnSaveCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = abs(state.global_step - 3.4)  # 3 is best, but never saved

    callback = Best(merge_on_save=True, keep_last=1)
    settings = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    run = trainer(tmp_path, callback, max_steps=4, **settings, **EACH_STEP)
    run.train()
    loaded = int(run.state.best_model_checkpoint.rpartition("-")[2])
    manifests = {r.version: r.manifest for r in callback.results}
    assert f"step-{loaded:08d}" in listing(tmp_path)
    if loaded != 4:
        assert manifests["step-00000004-v2"]["best_step"] == loaded


def test_versions_of_another_run_are_not_pruned(tmp_path):
    trainer(tmp_path, MergeOnSaveCallback()).train()
    callback = MergeOnSaveCallback(merge_on_save=True, keep_last=1)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=2).train()
    assert listing(tmp_path) == ["step-00000004", "step-00000004-v2"]


def test_two_runs_in_one_root_keep_the_newest_of_each(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    one, other = [MergeOnSaveCallback(merge_on_save=True, keep_last=1) for _ in range(2)]
    for callback in (one, other, one):
        trainer(tmp_path, callback, **settings).train()
    store = MergeStore(tmp_path / "run" / "_merged")
    assert [version.run for version in store.versions()] == [other._run, one._run]
    assert one._run != other._run
    assert [version.sequence for version in store.versions()] == [4, 6]


def in_roots(callback, *published):
    """Publish and prune as a run does, into directories of several runs."""
    state = SimpleNamespace(best_global_step=None, best_model_checkpoint=None)
    for place, step in published:
        store = callback._store(SimpleNamespace(output_dir=place))
        version = publish(store, f"step-{step}", step=step, run=callback._run)
        callback._keep(MergeResult(version.name, {"lora": version.path}, version.manifest))
        callback._prune(store, state)


def test_one_callback_prunes_in_each_directory_what_it_has_published_there(tmp_path):
    last_week = publish(MergeStore(tmp_path / "b/_merged"), "step-2", step=2)
    a, b = tmp_path / "a", tmp_path / "b"
    callback = MergeOnSaveCallback(keep_last=1)
    in_roots(callback, (a, 2), (a, 4), (b, 4), (b, 6))
    assert listing(a, "_merged") == ["step-4"]
    assert listing(b, "_merged") == ["step-2", "step-6"]
    MergeStore(b / "_merged").verify(last_week)


def test_a_directory_is_the_same_by_every_path(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    callback = MergeOnSaveCallback(keep_last=1)
    in_roots(callback, (tmp_path / "a", 2), (tmp_path / "link", 4), (tmp_path / "a/../link", 6))
    assert listing(tmp_path / "a", "_merged") == ["step-6"]


def test_what_was_pruned_is_forgotten(tmp_path):
    callback = MergeOnSaveCallback(keep_last=1)
    in_roots(callback, (tmp_path, 2), (tmp_path, 4), (tmp_path, 2))
    theirs = publish(MergeStore(tmp_path / "_merged"), "step-4", step=4)
    in_roots(callback, (tmp_path, 6))
    assert listing(tmp_path, "_merged") == ["step-4", "step-6"]
    assert [name for _, name, _ in callback._own] == ["step-6"]
    MergeStore(tmp_path / "_merged").verify(theirs)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_clock_that_goes_back_costs_no_version(tmp_path, monkeypatch, blocking):
    times = iter(range(9, 0, -1))
    monkeypatch.setattr("merge_callback.manifest.now", lambda: f"2026-01-0{next(times)}")
    callback = MergeOnSaveCallback(merge_on_save=True, keep_last=1, blocking=blocking)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=2).train()
    store = MergeStore(tmp_path / "run" / "_merged")
    assert len(callback.results) == 2
    assert [version.name for version in store.versions()] == [callback.results[-1].version]
    assert store.latest().path == callback.results[-1].path


def test_a_rescued_adapter_says_which_run_it_is_of(tmp_path, monkeypatch):
    def fail(*args, **settings):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("merge_callback.callback.export", fail)
    callback = MergeOnSaveCallback(on_error="warn")
    trainer(tmp_path, callback).train()
    (version,) = MergeStore(tmp_path / "run" / "_merged").versions()
    assert (version.manifest["kind"], version.run) == ("adapter", callback._run)


def test_a_prune_that_fails_is_no_failed_merge(tmp_path, monkeypatch, caplog):
    def refuse(self, version):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(MergeStore, "_remove", refuse)
    callback = MergeOnSaveCallback(merge_on_save=True, keep_last=1)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=2).train()
    assert len(callback.results) == 2
    assert "could not be removed" in caplog.text


def test_memory_that_runs_out_while_planning_does_not_restart_training(tmp_path, monkeypatch):
    import merge_callback.export as module

    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "make_plan", exhausted)
    with pytest.raises(MergeError, match="cannot be planned"):
        trainer(tmp_path, MergeOnSaveCallback(), auto_find_batch_size=True).train()


def break_adapter(model):
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.lora_B["default"].weight.data[0, 0] = torch.nan


class Breaks(MergeOnSaveCallback):
    """Lets the adapter diverge just before a merge."""

    def on_save(self, args, state, control, model=None, **kwargs):
        break_adapter(model)
        super().on_save(args, state, control, model=model, **kwargs)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        break_adapter(model)
        super().on_train_end(args, state, control, model=model, **kwargs)


def test_a_failed_merge_at_the_end_saves_the_adapter_first(tmp_path):
    run = trainer(tmp_path, Breaks())
    with pytest.raises(MergeError, match=r"up_proj\.weight.*the adapter is safe in"):
        run.train()
    assert listing(tmp_path) == ["step-00000004-adapter"]
    store = MergeStore(tmp_path / "run" / "_merged")
    assert store.latest() is None
    store.verify("step-00000004-adapter")
    path = tmp_path / "run/_merged/step-00000004-adapter/adapter_model.safetensors"
    saved = load_file(path)
    for name, tensor in run.model.named_parameters():
        if ".lora_" in name:
            assert torch.equal(
                saved[name.replace(".default", "")].nan_to_num(), tensor.nan_to_num()
            )


def test_warn_logs_the_failure_keeps_it_and_trains_on(tmp_path, caplog):
    callback = Breaks(merge_on_save=True, on_error="warn")
    run = trainer(tmp_path, callback, save_strategy="steps", save_steps=2)
    run.train()
    assert run.state.global_step == 4
    assert [failure.step for failure in callback.failures] == [2, 4, 4]
    assert "not finite" in caplog.text and "Traceback" in caplog.text
    assert listing(tmp_path) == ["step-00000004-adapter"]  # only at the end, and once
    assert (tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors").exists()


def test_a_failed_merge_on_save_raises_and_leaves_the_checkpoint(tmp_path):
    run = trainer(tmp_path, Breaks(merge_on_save=True), save_strategy="steps", save_steps=2)
    with pytest.raises(MergeError, match=r"at step 2 failed: .*; the adapter is in checkpoint-2"):
        run.train()
    assert listing(tmp_path) == []
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_a_rescue_that_fails_too_says_so(tmp_path, monkeypatch):
    import merge_callback.rescue as module

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_adapter", full)
    with pytest.raises(MergeError, match=r"not finite.*saving the adapter failed too"):
        trainer(tmp_path, Breaks()).train()
    assert listing(tmp_path) == []


def test_memory_that_runs_out_does_not_restart_training(tmp_path, monkeypatch):
    from merge_callback.adapters.lora import LowRank

    def exhausted(self, merged, base, rows):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LowRank, "add_to", exhausted)
    run = trainer(tmp_path, MergeOnSaveCallback(), auto_find_batch_size=True)
    with pytest.raises(MergeError, match=r"out of memory.*the adapter is safe in"):
        run.train()
    assert run.state.global_step == 4
    assert len(losses(run)) == 4


def test_an_interrupt_during_the_last_merge_leaves_the_adapter_and_no_draft(tmp_path, monkeypatch):
    from merge_callback.adapters.lora import LowRank

    def interrupted(self, merged, base, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(LowRank, "add_to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, MergeOnSaveCallback()).train()
    assert listing(tmp_path) == ["step-00000004-adapter"]


def test_rotation_and_versions_leave_each_other_alone(tmp_path):
    callback = MergeOnSaveCallback(merge_on_save=True)
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer(tmp_path, callback, **settings).train()
    assert listing(tmp_path) == [f"step-{step:08d}" for step in range(1, 5)]
    assert listing(tmp_path, "run") == ["_merged", "checkpoint-4"]


def test_a_run_that_resumes_goes_on_with_its_numbers(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **settings).train()  # without the callback
    callback = MergeOnSaveCallback(merge_on_save=True)
    run = trainer(tmp_path, callback, max_steps=6, **settings)
    run.train(resume_from_checkpoint=True)
    assert listing(tmp_path) == ["step-00000006"]


def test_progress_follows_the_trainer(tmp_path, capsys):
    trainer(tmp_path, MergeOnSaveCallback(), disable_tqdm=True).train()
    assert "merge:" not in capsys.readouterr().err
    trainer(tmp_path, MergeOnSaveCallback(), disable_tqdm=False).train()
    shown = capsys.readouterr().err
    assert "merge: 100%" in shown and "model.norm.weight" in shown


def test_one_closing_line_tells_what_was_made(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="merge_callback")
    trainer(tmp_path, MergeOnSaveCallback()).train()
    (line,) = [
        r.getMessage() for r in caplog.records if "merged merged_4bit into" in r.getMessage()
    ]
    for part in ("step-00000004", "GB in", " s;", "retention"):
        assert part in line


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"on_error": "ignore"}, "on_error"),
        ({"keep_last": 0}, "keep_last"),
        ({"dtype": "x"}, "dtype"),
    ],
)
def test_options_are_checked_when_the_callback_is_made(settings, told):
    with pytest.raises(MergeRefused, match=told):
        MergeOnSaveCallback(**settings)


def test_a_16bit_base_gives_a_16bit_export(tmp_path):
    model = adapt(load_base(save_base(tmp_path / "base"), "bfloat16"))
    callback = MergeOnSaveCallback()
    trainer(tmp_path, callback, model=model).train()
    assert list(callback.results[0].paths) == ["merged_16bit"]


@pytest.mark.parametrize(
    ("choice", "left"),
    [("skip", []), ("lora", ["step-{:08d}-adapter"]), ("merge", ["step-{:08d}"])],
)
def test_a_training_that_sigterm_ends_is_merged_if_there_is_time(tmp_path, choice, left):
    class Terminate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    callback = MergeOnSaveCallback(on_interrupt=choice, rounding="nearest", verify=False)
    settings = {"enable_jit_checkpoint": True, "max_steps": 100_000, "logging_steps": 1000}
    run = trainer(tmp_path, callback, Terminate(), **settings)
    run.train()
    step = run.state.global_step
    assert 2 < step < 100_000
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert listing(tmp_path) == [name.format(step) for name in left]
    run = trainer(tmp_path, MergeOnSaveCallback(rounding="nearest"), max_steps=step + 1)
    run.train(resume_from_checkpoint=True)
    assert f"step-{step + 1:08d}" in listing(tmp_path)


def test_early_stopping_merges_under_jit_checkpoints_too(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    stale = tmp_path / "run/checkpoint-3/trainer_state.json"  # of a run of long ago
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    os.utime(stale, (1e9, 1e9))
    callback = MergeOnSaveCallback(rounding="nearest", verify=False)
    trainer(tmp_path, callback, Stop(), enable_jit_checkpoint=True, max_steps=9).train()
    assert listing(tmp_path) == ["step-00000003"]


def test_an_interrupt_during_a_merge_leaves_no_draft_and_training_can_go_on(tmp_path, monkeypatch):
    callback = MergeOnSaveCallback(merge_on_save=True, rounding="nearest", verify=False)
    run = trainer(tmp_path, callback, save_strategy="steps", save_steps=2)
    encode = merge_callback.weights._encode
    met = []

    def interrupt(plan, weight):
        met.append(weight.key)
        if len(met) == 5:
            raise KeyboardInterrupt
        return encode(plan, weight)

    monkeypatch.setattr(merge_callback.weights, "_encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert list((tmp_path / "run" / "_merged").iterdir()) == []
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4 and listing(tmp_path) == ["step-00000004"]
