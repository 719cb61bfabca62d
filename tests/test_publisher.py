"""Runs that push: what is refused before the first step, and what a Hub can do to a training."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import HubServer
from huggingface_hub import HfApi
from models import qlora
from test_callback import listing, sft, trainer
from test_push import ONE, TWO, make, state, tree
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainingArguments,
)

import merge_callback.hub
from merge_callback import (
    MergeError,
    MergeOnSaveCallback,
    MergeRefused,
    MergeStore,
    PushError,
    PushRefused,
    push_version,
)
from merge_callback.files import hash_file
from merge_callback.publisher import Publisher
from merge_callback.store import push_marker

pytestmark = pytest.mark.usefixtures("hub_client")

CHILD = Path(__file__).with_name("push_child.py")


def pushing(**settings):
    settings = {"push_to_hub": True, "rounding": "nearest", "verify": False} | settings
    return MergeOnSaveCallback(**settings)


REFUSED = {
    "two dots": ({"hub_model_id": "me/a..b"}, "hub_model_id"),
    "two dashes": ({"hub_model_id": "me/a--b"}, "hub_model_id"),
    "long": ({"hub_model_id": "a" * 97}, "hub_model_id"),
    "long with its namespace": ({"hub_model_id": "me/" + "a" * 94}, "hub_model_id"),
    "space": ({"hub_model_id": "me/a b"}, "hub_model_id"),
    "unknown organisation": ({"hub_model_id": "nobody/a"}, "choose another hub_model_id"),
    "of others": ({"hub_model_id": "other/a"}, "choose another hub_model_id"),
    "read-only": ({"hub_token": "hf_reader"}, "read-only"),
    "unknown token": ({"hub_token": "hf_wrong"}, "hub_token"),
    "cannot create": ({"hub_token": "hf_fine"}, "a token that can write there"),
    "no token": ({"hub_token": None}, "hub_token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_would_refuse_is_refused_before_the_first_step(
    tmp_path, server, monkeypatch, case
):
    settings, cure = REFUSED[case]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    callback = pushing(**{"hub_token": "hf_writer"} | settings)
    run = trainer(tmp_path, callback)
    with pytest.raises(PushRefused, match=cure) as refusal:
        run.train()
    assert run.state.global_step == 0
    assert "hf_" not in str(refusal.value)
    assert server.state()["repos"] == {}
    assert listing(tmp_path) == []


def test_what_stands_against_merging_and_pushing_is_said_together(tmp_path, server):
    callback = pushing(
        hub_model_id="a/b/c", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    with pytest.raises(MergeRefused) as refusal:
        trainer(tmp_path, callback, model=qlora(tmp_path)).train()
    merging, hub = refusal.value.problems
    assert "4-bit already" in merging and hub.startswith("hub_model_id: ")


def test_a_repository_that_this_token_cannot_write_is_refused(tmp_path, server):
    HfApi(token="hf_other").create_repo("other/theirs")
    with pytest.raises(PushRefused, match="choose another hub_model_id"):
        trainer(tmp_path, pushing(hub_model_id="other/theirs")).train()


def test_a_hub_that_does_not_answer_is_refused_in_time(tmp_path, server, monkeypatch):
    monkeypatch.setattr(merge_callback.hub, "PREFLIGHT", 0.5)
    server.fault("whoami", "slow", times=-1)
    with pytest.raises(PushRefused, match="hub_preflight=False"):
        trainer(tmp_path, pushing()).train()


def test_a_machine_that_is_offline_is_told_of_the_setting(tmp_path, server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushRefused, match="hub_preflight=False"):
        trainer(tmp_path, pushing()).train()


def test_without_the_check_training_starts_and_the_push_is_left_for_later(
    tmp_path, server, monkeypatch, caplog
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    callback = pushing(hub_preflight=False)
    trainer(tmp_path, callback).train()
    (failure,) = callback.failures
    assert failure.step == 4 and "HF_HUB_OFFLINE" in str(failure.error)
    assert f"push_version('{callback.results[0].path}')" in caplog.text
    MergeStore(tmp_path / "run" / "_merged").verify("step-00000004")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    done = push_version(callback.results[0].path)
    assert (done.repo_id, done.tag) == ("me/run-merged", "step-00000004")


def test_a_token_with_a_line_break_works_and_one_that_no_header_takes_is_not_shown(
    tmp_path, server, caplog
):
    trainer(tmp_path, pushing(hub_token="hf_writer\n"), max_steps=1).train()
    assert "step-00000001" in state(server, "me/run-merged")["tags"]
    callback = pushing(hub_token="hf_wri\nter", hub_preflight=False)
    trainer(tmp_path, callback, max_steps=2).train()
    told = [str(callback.failures[0].error), caplog.text]
    told += [path.read_text() for path in (tmp_path / "run" / "_merged").glob(".*.push")]
    assert len(told) == 3 and not any("hf_wri" in text for text in told)
    with pytest.raises(PushRefused) as refusal:
        trainer(tmp_path, pushing(hub_token="hf_wri\nter")).train()
    assert "hf_wri" not in str(refusal.value)


def test_a_thread_that_cannot_be_started_costs_no_merge(tmp_path, server, monkeypatch):
    start, failed = threading.Thread.start, []

    def refuse_once(thread):
        if thread.name == "push" and not failed:
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    callback = pushing(merge_on_save=True)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=2).train()
    assert [push.tag for push in callback.pushes] == ["step-00000002", "step-00000004"]


def test_the_repository_of_the_adapter_is_never_written_to(tmp_path, server):
    HfApi().create_repo("me/adapter")
    args = {"push_to_hub": True, "hub_model_id": "me/adapter"}
    for check in (True, False):
        callback = pushing(hub_model_id="adapter", hub_preflight=check)
        with pytest.raises(PushRefused, match="choose another hub_model_id"):
            trainer(tmp_path, callback, **args).train()
    assert state(server, "me/adapter")["branches"].keys() == {"main"}


def test_names_come_from_the_arguments_unless_they_are_given(tmp_path, server):
    for name, settings, arguments in (
        ("me/run-merged", {}, {}),
        ("me/adapter-merged", {}, {"hub_model_id": "me/adapter"}),
        ("org/exact", {"hub_model_id": "org/exact"}, {"hub_model_id": "me/adapter"}),
    ):
        callback = pushing(**settings)
        trainer(tmp_path, callback, max_steps=1, **arguments).train()
        assert callback.pushes[0].repo_id == name
    assert {name: repo["private"] for name, repo in server.state()["repos"].items()} == {
        "me/run-merged": True,
        "me/adapter-merged": True,
        "org/exact": True,
    }


def test_what_a_user_should_know_of_a_repository_is_said_before_training(tmp_path, server, caplog):
    HfApi().create_repo("me/public", private=False)
    server.commit("me/public", "main", {"config.json": "{}"})
    trainer(tmp_path, pushing(hub_model_id="me/public"), max_steps=1).train()
    assert "me/public is public already" in caplog.text
    assert "me/public holds a model that merge_callback did not write" in caplog.text


@pytest.mark.parametrize("blocking", [True, False])
def test_each_save_arrives_under_its_tag_and_the_disk_keeps_what_was_asked(
    tmp_path, server, blocking
):
    callback = pushing(merge_on_save=True, keep_last=1, blocking=blocking, backlog="wait")
    trainer(tmp_path, callback, max_steps=6, save_strategy="steps", save_steps=2).train()
    tags = ["step-00000002", "step-00000004", "step-00000006"]
    assert [push.tag for push in callback.pushes] == tags and callback.failures == []
    assert sorted(state(server, "me/run-merged")["tags"]) == tags
    assert tree(server, "main", "me/run-merged") == tree(server, tags[-1], "me/run-merged")
    assert listing(tmp_path) == tags[-1:]


def test_a_hub_that_hangs_does_not_hold_training_and_the_next_run_pushes_all(
    tmp_path, server, monkeypatch, caplog
):
    monkeypatch.setattr(merge_callback.hub, "SILENCE", 1.0)
    monkeypatch.setattr(merge_callback.hub, "SLOWEST", 1e9)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    callback = pushing(merge_on_save=True, keep_last=1)
    run = trainer(tmp_path, callback, **settings)
    server.fault("preupload", "slow", times=-1)
    run.train()
    assert run.state.global_step == 4
    assert [result.version for result in callback.results] == ["step-00000002", "step-00000004"]
    assert [failure.step for failure in callback.failures] == [2, 4] and callback.pushes == []
    store = MergeStore(tmp_path / "run" / "_merged")
    assert [v.name for v in store.pending()] == ["step-00000002", "step-00000004"]
    for version in store.versions():  # what is pending is not pruned
        store.verify(version)
        assert "hf_" not in push_marker(version.path).read_text()
    server.clear()
    again = pushing(keep_last=1)
    trainer(tmp_path, again, max_steps=1).train()
    assert [push.tag for push in again.pushes] == [
        "step-00000002",
        "step-00000004",
        "step-00000001",
    ]
    assert again.failures == [] and store.pending() == []
    repo = "me/run-merged"
    assert tree(server, "main", repo) == tree(server, "step-00000001", repo)


def resumed(root, **settings):
    """What a run that pushes to me/run-merged goes on with."""
    publisher = Publisher(None, None, settings.pop("private", True), None, check=True)
    publisher.check(TrainingArguments(output_dir="run", report_to=[], use_cpu=True, **settings))
    publisher.resume(MergeStore(root))
    done, failed = publisher.finish(progress=False)
    assert failed == []
    return [push.repo_id for push in done]


def marked(root, repo_id, server):
    """A version whose push there was cut off."""
    version = make(root)
    server.fault("/repos/create", "status", status=403, times=1)
    with pytest.raises(PushError):
        push_version(version.path, repo_id, private=False, progress=False)
    return version


def test_a_run_resumes_what_was_marked_in_its_directory_and_private(tmp_path, server):
    marked(tmp_path, "me/elsewhere", server)
    assert resumed(tmp_path) == ["me/elsewhere"]
    assert state(server, "me/elsewhere")["private"] is True


def test_a_run_resumes_its_own_pushes_as_it_pushes_itself(tmp_path, server):
    marked(tmp_path, "run-merged", server)
    assert resumed(tmp_path, private=False) == ["me/run-merged"]
    assert state(server, "me/run-merged")["private"] is False


@pytest.mark.parametrize("repo_id", ["me/production", "other/run-merged", "me/run-merged", "a b"])
def test_a_mark_that_came_with_files_sends_them_where_the_run_itself_would(
    tmp_path, server, caplog, repo_id
):
    version = make(tmp_path)
    mark = {"push": "pending", "repo_id": repo_id, "private": False, "revision": "main"}
    push_marker(version.path).write_text(json.dumps(mark))
    ours = repo_id == "me/run-merged"
    assert resumed(tmp_path) == (["me/run-merged"] if ours else [])
    assert server.state()["repos"].keys() == {"me/run-merged"}
    assert state(server, "me/run-merged")["private"] is True
    told = f"merge-callback push {version.path} {shlex.quote(repo_id)}"
    assert (told in caplog.text) is not ours
    assert push_marker(version.path).exists() is not ours


def test_a_mark_that_cannot_be_read_is_said(tmp_path, server, caplog):
    version = make(tmp_path)
    push_marker(version.path).write_text("[" * 100_000)
    assert resumed(tmp_path) == [] and "cannot be read and is ignored" in caplog.text


def test_a_push_that_failed_is_tried_again_with_the_next(tmp_path, server):
    server.fault("/commit/merge", "status", status=403)
    callback = pushing(merge_on_save=True)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=2).train()
    assert [push.tag for push in callback.pushes] == ["step-00000002", "step-00000004"]
    assert callback.failures == []


def test_a_push_that_fails_is_a_warning_whatever_on_error_is(tmp_path, server, caplog):
    callback = pushing(on_error="raise")
    run = trainer(tmp_path, callback)
    server.fault("/commit/", "status", status=403, times=-1)
    run.train()
    assert run.state.global_step == 4 and callback.pushes == []
    (failure,) = callback.failures
    assert "give it write access" in str(failure.error)
    assert str(failure.error) in caplog.text


def test_pushes_are_waited_for_when_the_last_merge_fails(tmp_path, server, monkeypatch):
    callback = pushing(merge_on_save=True)
    run = trainer(tmp_path, callback, save_strategy="steps", save_steps=2, max_steps=3)
    merge, steps = callback._merge, []

    def failing(moment):
        steps.append(moment.state.global_step)
        if steps == [2]:
            return merge(moment)
        callback._on_error = "warn" if len(steps) == 2 else "raise"  # at the save, and at the end
        raise ZeroDivisionError("no")

    monkeypatch.setattr(callback, "_merge", failing)
    with pytest.raises(MergeError, match="the merge at step 3 failed: no"):
        run.train()
    assert [push.tag for push in callback.pushes] == ["step-00000002"]


def test_several_save_methods_lie_in_directories_of_one_repository(tmp_path, server):
    callback = MergeOnSaveCallback(
        save_method=["lora", "merged_4bit", "merged_16bit"], push_to_hub=True, rounding="nearest"
    )
    sft(tmp_path, callback).train()
    down = Path(HfApi().snapshot_download("me/run-merged", local_dir=tmp_path / "down"))
    for folder in ("merged_4bit", "merged_16bit"):
        _, info = AutoModelForCausalLM.from_pretrained(
            down, subfolder=folder, output_loading_info=True
        )
        assert not any(info.values())
        AutoTokenizer.from_pretrained(down, subfolder=folder)
    assert (down / "lora" / "adapter_model.safetensors").exists()
    card = (down / "README.md").read_text()
    assert "saved as `lora`, `merged_4bit`, `merged_16bit`, each in the directory" in card
    assert 'from_pretrained("me/run-merged", subfolder="merged_4bit", device_map="auto")' in card
    for path in down.rglob("README.md"):
        assert "path/to" not in path.read_text() and str(tmp_path) not in path.read_text()


def child(server, mode, *arguments, **environment):
    """A process that pushes, as a user's does: nothing in it is set but the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.Popen(
        [sys.executable, str(CHILD), mode, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | settings | environment,
        # Where the tests run in the background SIGINT is ignored, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("fault", [None, {"status": 403, "times": -1}, {"status": 502}])
def test_the_token_is_found_nowhere_but_in_requests(tmp_path, server, fault):
    if fault is not None:
        server.fault("/commit/", "status", **fault)
    process = child(server, "train", tmp_path, HF_DEBUG="1")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert ("0 pushed" if fault and fault["status"] == 403 else "1 pushed") in out
    assert "authenticated: True" in err  # so much was logged
    assert "Bearer hf_writer" in server.state()["authorizations"]
    written = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert any(path.endswith("merge_manifest.json") for path in written)
    for place, text in {"out": out.encode(), "err": err.encode(), **written}.items():
        assert b"hf_writer" not in text and b"Bearer" not in text, place
    for revision in server.state()["repos"]["me/run-merged"]["branches"]:
        for path in tree(server, revision, "me/run-merged"):
            text = server.file("me/run-merged", revision, path)
            assert b"hf_writer" not in text and b"Bearer" not in text, path


@pytest.mark.parametrize("where", ["PUT /lfs-up/", "/commit/merge", "/commit/main"])
def test_an_interrupted_push_ends_at_once_and_goes_on_in_the_next_process(tmp_path, server, where):
    version = make(tmp_path / "store", ONE)
    server.fault(where, "slow", times=-1)
    process = child(server, "push", version.path, "me/model", HF_TOKEN="hf_writer")
    while not any(path.find(where.split()[-1]) >= 0 for _, path, _ in server.state()["requests"]):
        time.sleep(5)  # a twentieth of a second: the client waits a hundredth
        assert process.poll() is None, process.communicate()
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert json.loads(push_marker(version.path).read_text())["push"] == "pending"
    server.clear()
    held = server.state()["stored"]
    before = len(server.state()["blobs"])
    process = child(server, "push", version.path, HF_TOKEN="hf_writer")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "step-1 newest" in out, err
    assert not {sha for _, sha, _ in server.state()["blobs"][before:]} & {*held}
    assert tree(server, "main").keys() == {*ONE, "merge_manifest.json"}


def test_the_default_way_of_uploading_sends_nothing_twice_either(tmp_path):
    server = HubServer(xet=tmp_path / "xet")
    try:
        version = make(tmp_path / "store", {**TWO, "model.safetensors": os.urandom(3_000_000)})
        settings = {"HF_HUB_DISABLE_XET": "0", "HF_XET_CACHE": str(tmp_path / "cache")}
        settings |= {"HF_TOKEN": "hf_writer", "HF_HOME": str(tmp_path / "home")}

        def run():
            process = child(server, "push", version.path, "me/model", **settings)
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0 and "step-1 newest" in out, err
            return sum(path.stat().st_size for path in (tmp_path / "xet").rglob("*.*"))

        server.fault("/commit/main", "status", status=502, times=1)
        first = run()
        requests = [path for _, path, _ in server.state()["requests"]]
        assert any("xet-write-token" in path for path in requests)
        assert not any("lfs" in path for path in requests)
        assert first > 3_000_000
        push_marker(version.path).write_text("{}")
        assert run() == first
        entry = state(server)["commits"][state(server)["branches"]["main"]]["tree"]
        assert (
            entry["model.safetensors"]["sha256"]
            == hash_file(version.path / "model.safetensors").sha256
        )
    finally:
        server.stop()
