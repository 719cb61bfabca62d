"""A fault at each step of a version's life, file systems that can do less, and many exports."""

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from models import qlora
from test_callback import trainer
from test_store import manifest, publish
from transformers import TrainerCallback

import merge_callback.store
from merge_callback import MergeOnSaveCallback, MergeResult, MergeStore
from merge_callback.cli import main
from merge_callback.versions import MANIFEST

pytestmark = pytest.mark.faults

CHILD = Path(__file__).with_name("store_child.py")
FAULTS = ("SIGKILL", "SIGTERM", "KeyboardInterrupt", "ENOSPC", "EIO", "short write")
STAGES = ("draft", "write", "seal", "publish", "prune")
DEADLY = {"SIGKILL": -9, "SIGTERM": -15}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path_factory.mktemp("faults"))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_whole_versions_and_the_next_run_goes_on(rows, fault, stage, support):
    support("A fault at each system call of a step", fault, stage)
    met = [row for row in rows if (row["fault"], row["stage"]) == (fault, stage)]
    if not met:
        assert fault == "short write" and stage != "write"
        return support.found("")
    outcomes = set()
    for row in met:
        # What was there before: 1. The version that the fault met: 2. Pruning takes 1 away.
        assert row["versions"] in ([1], [1, 2], [2]), row
        if stage not in ("publish", "prune") and row["status"]:
            assert row["versions"] == [1], row
        if row["status"] not in DEADLY.values() and stage != "prune":
            assert row["drafts"] == 0, row
        assert (row["again"], row["then"], row["left"]) == (0, [3], 0), row
        if fault in DEADLY:
            assert row["status"] == DEADLY[fault], row
        outcomes.add(tuple(row["versions"]))
    told = {(1,): "the version before", (1, 2): "both", (2,): "the new one"}
    support.found(" or ".join(told[versions] for versions in sorted(outcomes)))


def test_the_steps_are_met(rows):
    met = {(row["stage"], row["call"]) for row in rows}
    assert {
        ("draft", "mkdir"),
        ("write", "write"),
        ("write", "fsync"),
        ("seal", "chmod"),
        ("seal", "fsync"),
        ("publish", "mkdir"),
        ("publish", "rename"),
        ("publish", "fsync"),
        ("prune", "rename"),
        ("prune", "unlink"),
        ("prune", "rmdir"),
    } <= met


@pytest.fixture(scope="module")
def line_rows(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path_factory.mktemp("lines")), "lines"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ENOSPC"])
def test_an_error_at_any_line_leaves_whole_versions_and_nothing_else(line_rows, error, support):
    support("An error at each line of the store", error, "left")
    met = [row for row in line_rows if row["error"] == error]
    for row in met:
        assert row["versions"] in ([1], [1, 2], [2]), row
        pruned = row["versions"] == [2]  # it is taken away by one rename, and removed then
        assert row["drafts"] in ((0, 1) if pruned else (0,)), row
        assert (row["held"], row["then"], row["left"]) == (0, [3], 0), row
        assert row["entries"] == 1, row  # no directory that was claimed, either
    assert {row["line"].split(":")[0] for row in met} == {
        "store.py",
        "versions.py",
        "files.py",
        "locks.py",
    }
    support.found(f"of {len(met)} lines: whole versions, no draft of them, no descriptor")


# File systems that can do less


def refusing(monkeypatch, name, code, when):
    call = getattr(os, name)

    def refuse(*args, **settings):
        if when(*args):
            raise OSError(code, os.strerror(code))
        return call(*args, **settings)

    monkeypatch.setattr(os, name, refuse)


def is_directory(path, *_):
    return os.path.isdir(f"/proc/self/fd/{path}" if isinstance(path, int) else path)


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EEXIST, errno.EPERM, errno.EXDEV])
def test_where_no_directory_can_be_renamed_onto_another_files_are_moved(
    tmp_path, monkeypatch, code, support
):
    support("File systems", "rename onto an empty directory refused", errno.errorcode[code])
    refusing(monkeypatch, "rename", code, is_directory)
    store = MergeStore(tmp_path)
    for name in ("step-1", "step-1-v2"):
        with store.draft("step-1") as draft:
            (draft.path / "lora").mkdir()
            (draft.path / "lora" / "weights").write_text("weights")
            (draft.path / "config.json").write_text("{}")
            draft.seal()
            assert store.publish(draft, "step-1", manifest()).name == name
        store.verify(name)
        files = {p.relative_to(tmp_path / name).as_posix() for p in (tmp_path / name).rglob("*.*")}
        assert files == {"config.json", MANIFEST}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-1-v2"]


def test_a_move_that_fails_leaves_no_half_version(tmp_path, monkeypatch):
    refusing(monkeypatch, "rename", errno.EPERM, is_directory)
    refusing(monkeypatch, "rename", errno.EIO, lambda path, *_: str(path).endswith(MANIFEST))
    store = MergeStore(tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        publish(store)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_directories_that_cannot_be_synced_are_no_reason_to_fail(
    tmp_path, monkeypatch, code, support
):
    support("File systems", "fsync of a directory refused", errno.errorcode[code])
    refusing(monkeypatch, "fsync", code, is_directory)
    version = publish(MergeStore(tmp_path))
    MergeStore(tmp_path).verify(version)
    refusing(monkeypatch, "fsync", code, lambda *_: True)
    with pytest.raises(OSError, match=os.strerror(code)):  # of a file it is
        publish(MergeStore(tmp_path))


def test_two_hosts_do_not_take_each_others_drafts(tmp_path, monkeypatch, support):
    support("File systems", "two hosts, one root", "drafts")
    with MergeStore(tmp_path).draft("step-1") as ours:
        monkeypatch.setattr(merge_callback.store, "_host", lambda: "elsewhere")
        monkeypatch.setattr(merge_callback.store, "lock", lambda path, **_: os.open(path, 0))
        publish(MergeStore(tmp_path))  # on a host that sees no locks of ours
        assert ours.path.is_dir()


# Many of them


def resident():
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "count", [40, pytest.param(200, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_many_exports_leave_nothing_behind(tmp_path, monkeypatch, count, support):
    support("A merge at each save of one training", f"{count} saves", "left")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    memory, held = [], []

    class Sample(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            gc.collect()
            memory.append(resident())
            held.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))

    callback = MergeOnSaveCallback(merge_on_save=True, rounding="nearest", card=False)
    settings = {"max_steps": count, "save_strategy": "steps", "save_steps": 1}
    settings |= {"save_total_limit": 1, "model": qlora(tmp_path)}
    trainer(tmp_path, callback, Sample(), **settings).train()
    assert len(set(held[5:])) == 1
    slope = numpy.polyfit(range(count - 10), memory[10:], 1)[0]
    store = MergeStore(tmp_path / "run" / "_merged")
    assert len(store.versions()) == count
    for version in store.versions():
        store.verify(version)
    assert not (tmp_path / "tmp").exists() or not list((tmp_path / "tmp").iterdir())
    assert slope < 64 * 1024, f"{slope / 1024:.1f} KiB an export"
    support.found(f"{slope / 1024:.1f} KiB a save, no thread, file or descriptor")


def _publish_for(root, seconds, counts, index):
    store = MergeStore(root)
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        publish(store, content=f"{index} {done}")
        done += 1
    counts[index] = done


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(60, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_eight_processes_share_a_root_and_lose_no_version(tmp_path, seconds, support):
    support("Eight processes, one root", f"{seconds} s", "versions lost or shared")
    context = multiprocessing.get_context("fork")
    counts = context.Array("i", 8)
    processes = [
        context.Process(target=_publish_for, args=(tmp_path, seconds, counts, i)) for i in range(8)
    ]
    [process.start() for process in processes]
    [process.join() for process in processes]
    assert [process.exitcode for process in processes] == [0] * 8
    store = MergeStore(tmp_path)
    contents = set()
    for version in store.versions():
        store.verify(version)
        (name,) = version.records()
        contents.add((version.path / name).read_text())
    assert [v.sequence for v in store.versions()] == [*range(1, sum(counts) + 1)]
    expected = {f"{i} {j}" for i in range(8) for j in range(counts[i])}
    assert contents == expected and len(store.versions()) == sum(counts) > 8
    support.found(f"0 of {sum(counts)}")


def _merge_for(root, seconds, counts, index):
    """A run that publishes and prunes, by a clock of its own; it may see other roots too."""
    callback = MergeOnSaveCallback(root, merge_on_save=True, keep_last=1)
    store = callback._store(SimpleNamespace(output_dir="unused"))
    state = SimpleNamespace(best_global_step=None, best_model_checkpoint=None)
    clock = random.Random(index)
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        created = f"2026-01-01T00:00:00.{clock.randrange(10**6):06}"
        version = publish(
            store, f"step-{done % 3}", f"{index} {done}", created=created, run=callback._run
        )
        callback._keep(MergeResult(version.name, {"lora": version.path}, version.manifest))
        callback._prune(store, state)
        store.verify(version)
        assert store.version(version.name) == version
        done += 1
    counts[index] = done


def _prune_for(root, seconds):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert main(["prune", str(root), "--keep", "1", "--yes"]) == 0


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(60, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_runs_that_prune_one_root_keep_the_newest_of_each(tmp_path, seconds, support):
    support("Four runs and a prune, one root, keep_last=1", f"{seconds} s", "newest versions lost")
    context = multiprocessing.get_context("fork")
    counts = context.Array("i", 4)
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to("root")
    roots = [tmp_path / "root", tmp_path / "link", tmp_path / "root/../link", tmp_path / "root"]
    processes = [
        context.Process(target=_merge_for, args=(root, seconds, counts, i))
        for i, root in enumerate(roots)
    ]
    processes.append(context.Process(target=_prune_for, args=(roots[0], seconds)))
    [process.start() for process in processes]
    [process.join() for process in processes]
    assert [process.exitcode for process in processes] == [0] * 5
    store = MergeStore(roots[0])
    left = {(v.path / "deep" / "file").read_text() for v in store.versions()}
    assert left == {f"{i} {count - 1}" for i, count in enumerate(counts)} and sum(counts) > 8
    assert len(list(roots[0].iterdir())) == 4
    support.found(f"0 of {sum(counts)}")
