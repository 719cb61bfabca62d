"""Versions: nothing that exists is written to, a version is whole or not there."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from merge_callback import CorruptVersion, MergeError, MergeRefused, MergeStore
from merge_callback.locks import lock
from merge_callback.store import push_marker
from merge_callback.versions import MANIFEST


def manifest(step=1, kind="merged", best_step=None, created=None, run=None):
    created = created or time.strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.monotonic_ns():020d}"
    return {"kind": kind, "run": run, "created": created, "step": step, "best_step": best_step}


def rewrite(version, **changes):
    """Change what stands in a manifest; None: take it away."""
    found = {**version.manifest, **changes}
    found = {key: found[key] for key in found if changes.get(key, "") is not None}
    (version.path / MANIFEST).write_text(json.dumps(found))


def publish(store, name="step-00000001", content="weights", **settings):
    with store.draft(name) as draft:
        (draft.path / "deep").mkdir()
        (draft.path / "deep" / "file").write_text(content)
        draft.seal()
        return store.publish(draft, name, manifest(**settings))


def listing(root):
    return sorted(path.name for path in root.iterdir())


def test_versions_of_one_name_are_numbered(tmp_path):
    store = MergeStore(tmp_path / "a" / "b")
    assert store.versions() == [] and store.latest() is None
    names = [publish(store).name for _ in range(3)]
    assert names == ["step-00000001", "step-00000001-v2", "step-00000001-v3"]
    assert [v.name for v in store.versions()] == names
    assert store.latest().name == names[-1]
    assert listing(store.root) == sorted(names)


def test_whatever_stands_at_the_target_is_left_alone(tmp_path):
    (tmp_path / "m").write_text("a file")
    (tmp_path / "m-v2").symlink_to(tmp_path / "nowhere")
    (tmp_path / "m-v3").mkdir()
    (tmp_path / "m-v4").mkdir()
    (tmp_path / "m-v4" / "foreign").write_text("x")
    (tmp_path / "m-v5").symlink_to(tmp_path / "m-v4")
    store = MergeStore(tmp_path)
    assert publish(store, "m").name == "m-v6"
    assert (tmp_path / "m").read_text() == "a file"
    assert os.readlink(tmp_path / "m-v2") == str(tmp_path / "nowhere")
    assert listing(tmp_path / "m-v3") == []
    assert listing(tmp_path / "m-v4") == ["foreign"]
    assert [v.name for v in store.versions()] == ["m-v6"]


def test_a_target_that_somebody_fills_while_it_is_claimed_is_theirs(tmp_path, monkeypatch):
    rename = Path.rename

    def fill(self, target):
        monkeypatch.setattr(Path, "rename", rename)
        (target / "theirs").write_text("x")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fill)
    assert publish(MergeStore(tmp_path), "m").name == "m-v2"
    assert listing(tmp_path / "m") == ["theirs"]


def test_a_rename_that_fails_leaves_no_claim(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        publish(MergeStore(tmp_path), "m")
    assert listing(tmp_path) == []


def test_a_failed_draft_leaves_nothing(tmp_path):
    store = MergeStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.draft("m") as draft:
        (draft.path / "file").write_text("x")
        raise KeyboardInterrupt
    assert listing(tmp_path) == []


def test_readers_see_only_directories_with_a_whole_manifest(tmp_path, caplog):
    store = MergeStore(tmp_path)
    publish(store, "good")
    for name, text in [
        ("empty", ""),
        ("list", "[]"),
        ("other", '{"schema": 1}'),
        ("newer", json.dumps({"schema": 99, **manifest(), "files": {}})),
        (".hidden", json.dumps({"schema": 1, **manifest(), "files": {}})),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "good")
    assert [v.name for v in store.versions()] == ["good"]
    told = {record.args[0].name: record.getMessage() for record in caplog.records}
    assert told.keys() == {"empty", "list", "other", "newer"}
    assert "newer merge_callback" in told.pop("newer")
    assert all("has a damaged merge_manifest.json" in message for message in told.values())


def test_latest_skips_rescued_adapters(tmp_path):
    store = MergeStore(tmp_path)
    publish(store, "step-00000001")
    publish(store, "step-00000002-adapter", kind="adapter")
    assert store.latest().name == "step-00000001"
    assert len(store.versions()) == 2


def test_the_newest_is_the_one_made_last_whatever_its_step(tmp_path):
    store = MergeStore(tmp_path)
    publish(store, "step-00000900", step=900)
    publish(store, "step-00000005", step=5)
    assert store.latest().name == "step-00000005"


def test_verify_names_the_file_that_changed(tmp_path):
    store = MergeStore(tmp_path)
    version = publish(store, "m")
    store.verify(version)
    store.verify("m")
    file = version.path / "deep" / "file"
    file.write_text("weightz")
    with pytest.raises(CorruptVersion, match="deep/file is not what was written"):
        store.verify("m")
    file.unlink()
    with pytest.raises(CorruptVersion, match="deep/file cannot be read"):
        store.verify(version)
    with pytest.raises(CorruptVersion, match="not a published version"):
        store.verify("nothing")


def test_threads_that_race_get_a_version_each(tmp_path):
    store, barrier, names = MergeStore(tmp_path), threading.Barrier(8), []

    def work(content):
        barrier.wait()
        names.append((publish(store, "m", content=content).name, content))

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(name for name, _ in names) == sorted(["m", *(f"m-v{i}" for i in range(2, 9))])
    for name, content in names:
        assert (tmp_path / name / "deep" / "file").read_text() == content


def _publish_some(root, count):
    for i in range(count):
        publish(MergeStore(root), "m", content=f"{os.getpid()} {i}")


def test_processes_that_race_get_a_version_each(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_publish_some, args=(tmp_path, 10)) for _ in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert [worker.exitcode for worker in workers] == [0] * 4
    store = MergeStore(tmp_path)
    versions = store.versions()
    assert len(versions) == 40
    assert len({(v.path / "deep" / "file").read_text() for v in versions}) == 40
    assert [version.sequence for version in versions] == list(range(1, 41))
    made = [(v.path / "deep" / "file").read_text().split() for v in versions]
    for process in {process for process, _ in made}:  # in the order in which each made its own
        assert [int(i) for whose, i in made if whose == process] == list(range(10))
    [store.verify(version) for version in versions]
    assert len(listing(tmp_path)) == 40


def test_drafts_of_the_dead_are_removed_and_those_of_the_living_left(tmp_path, caplog):
    store = MergeStore(tmp_path)
    with store.draft("alive") as alive:
        name = alive.path.name.replace("alive", "dead")
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
        (tmp_path / ".elsewhere.another-host.0123456789abcdef0123456789abcdef.draft").mkdir()
        (tmp_path / ".mine").mkdir()
        publish(store, "m")
        left = listing(tmp_path)
        assert name not in left and alive.path.name in left and ".mine" in left
        assert any("another-host" in entry for entry in left)
        assert f"removing {tmp_path / name}" in caplog.text


HOSTILE = {
    "../other/config.json": {"size": 1, "sha256": ""},
    "/etc/passwd": {"size": 1, "sha256": ""},
    "a/../../b": {"size": 1, "sha256": ""},
    ".": {"size": 1, "sha256": ""},
    "": {"size": 1, "sha256": ""},
    "a//b": {"size": 1, "sha256": ""},
    "a\0b": {"size": 1, "sha256": ""},
    "no size": {"sha256": ""},
    "no hash": {"size": 1},
    "words": {"size": "1", "sha256": ""},
    "a list": [],
    "nothing": None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_that_names_what_is_no_file_of_its_version_makes_no_version(tmp_path, name):
    version = publish(MergeStore(tmp_path))
    manifest = json.loads((version.path / MANIFEST).read_text())
    manifest["files"][name] = HOSTILE[name]
    (version.path / MANIFEST).write_text(json.dumps(manifest))
    assert MergeStore(tmp_path).versions() == []


def test_a_link_that_leads_out_of_a_version_is_not_followed(tmp_path):
    store = MergeStore(tmp_path / "store")
    version = publish(store)
    name = next(iter(version.records()))
    content = (version.path / name).read_bytes()
    (tmp_path / "secret").write_bytes(content)
    (version.path / name).unlink()
    (version.path / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptVersion, match="leads out of the version"):
        store.verify(version)


def test_a_draft_that_was_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    import merge_callback.store as module

    lock, calls = module.lock, []

    def swept(directory, **settings):
        calls.append(directory)
        if len(calls) == 1:
            directory.rmdir()  # the sweep of another process came first
        return lock(directory, **settings)

    monkeypatch.setattr(module, "lock", swept)
    assert publish(MergeStore(tmp_path), "m").name == "m"
    assert listing(tmp_path) == ["m"]


def test_a_file_system_without_locks_still_takes_versions(tmp_path, monkeypatch):
    import fcntl

    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    store = MergeStore(tmp_path)
    with store.draft("open") as draft:
        publish(store, "m")
        assert draft.path.is_dir()  # nobody can tell whether it is stale
    assert listing(tmp_path) == ["m"]


def test_prune_keeps_the_newest_the_best_and_what_is_not_ours(tmp_path):
    store = MergeStore(tmp_path)
    for step in range(1, 7):
        publish(store, f"step-{step:08d}", step=step)
    publish(store, "step-00000007", step=7, best_step=3)
    publish(store, "merged")
    publish(store, "step-00000001-adapter", kind="adapter")
    push_marker(tmp_path / "step-00000004").write_text("")
    (tmp_path / "step-00000000").mkdir()
    names = [f"step-{step:08d}" for step in range(8)]
    removed = store.prune(1, names=names, keep_steps=frozenset({3}))
    assert removed == [f"step-{step:08d}" for step in (1, 2, 5, 6)]
    assert listing(tmp_path) == [
        ".step-00000004.push",
        "merged",
        "step-00000000",
        "step-00000001-adapter",
        "step-00000003",
        "step-00000004",
        "step-00000007",
    ]
    assert store.prune(5, names=names, keep_steps=frozenset()) == []


def test_check_names_a_root_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MergeRefused, match="a file; choose another output_dir"):
            MergeStore(root).check(0)
    with pytest.raises(MergeRefused, match="GB free and 1000000000"):
        MergeStore(tmp_path / "new").check(10**18)
    assert listing(tmp_path / "new") == []
    with pytest.raises(MergeRefused, match="cannot be used"):
        MergeStore("/proc/self/none").check(0)


def test_a_root_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(self, *args, **settings):
        raise PermissionError(13, "Permission denied")  # root may write anywhere, so ask nobody

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(MergeRefused, match="not writable; choose another output_dir"):
        MergeStore(tmp_path / "x").check(0)


@pytest.mark.parametrize(
    "name", ["", ".hidden", "a/b", "..", "a b", "x" * 152, "é" * 121, "模" * 81, "a\n"]
)
def test_names_that_are_no_directory_names_are_refused(tmp_path, name):
    with pytest.raises(MergeError, match="cannot name a version"), MergeStore(tmp_path).draft(name):
        pass
    assert listing(tmp_path) == []


def test_a_manifest_of_the_store_lists_every_file(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    version = publish(MergeStore(tmp_path), "m", content="abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert version.manifest["files"] == {"deep/file": {"size": 3, "sha256": digest}}
    assert json.loads((version.path / MANIFEST).read_text()) == version.manifest


def test_no_draft_is_left_when_descriptors_run_out(tmp_path, monkeypatch):
    import merge_callback.store as module

    def refuse(path, *flags):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(OSError, match="Too many open files"), MergeStore(tmp_path).draft("m"):
        pass
    monkeypatch.undo()
    assert listing(tmp_path) == []


# Which is the newest


def test_what_was_published_last_is_the_newest_whatever_the_clock_says(tmp_path):
    store = MergeStore(tmp_path)
    made = [publish(store, created=f"{year}-01-01T00:00:00") for year in (2027, 2026, 2025)]
    assert [version.sequence for version in made] == [1, 2, 3]
    assert store.versions() == made and store.latest() == made[-1]
    names = [version.name for version in made]
    assert store.prune(1, names=names, keep_steps=frozenset()) == names[:-1]
    assert store.versions() == made[-1:]
    assert publish(store, created="2024-01-01T00:00:00").sequence == 4


def test_versions_of_0_1_come_before_those_that_have_a_sequence_by_their_time(tmp_path):
    store = MergeStore(tmp_path)
    late, early, one, other = [publish(store, f"v{i}") for i in range(4)]
    rewrite(late, sequence=None, run=None, created="2027")
    rewrite(early, sequence=None, run=None, created="2026")
    rewrite(one, created="2025")
    assert [v.name for v in store.versions()] == [v.name for v in (early, late, one, other)]
    assert [v.sequence for v in store.versions()] == [0, 0, 3, 4]
    assert {v.run for v in store.versions()} == {None}
    assert publish(store, "v4").sequence == 5


def test_of_one_sequence_the_time_and_then_the_number_decide(tmp_path):
    store = MergeStore(tmp_path)
    late, early, same = [publish(store, created=t) for t in ("2027", "2026", "2027")]
    for version in (late, early, same):
        rewrite(version, sequence=7)
    assert [v.name for v in store.versions()] == [early.name, late.name, same.name]


@pytest.mark.parametrize(
    "changes",
    [{"sequence": s} for s in (-1, 1.5, "1", [1], 2**53 + 1)]
    + [{"run": run} for run in (1, ["a"], True)]
    + [{"created": created} for created in (2026, ["2026"], 1.5)],
    ids=str,
)
def test_an_order_or_a_run_of_another_kind_makes_no_version(tmp_path, changes):
    store = MergeStore(tmp_path)
    rewrite(publish(store, "odd"), **changes)
    assert store.versions() == []
    assert publish(store, "m").sequence == 1


def test_no_manifest_can_use_up_the_order(tmp_path):
    store = MergeStore(tmp_path)
    rewrite(publish(store, "odd", created="2025"), sequence=2**53)
    last = publish(store, "m", created="2026")
    assert last.sequence == 2**53 and store.latest() == last


def test_a_root_whose_lock_is_not_given_back_still_takes_versions(tmp_path, monkeypatch):
    import merge_callback.store as module

    store = MergeStore(tmp_path)
    publish(store)
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    with contextlib.ExitStack() as held:
        assert lock(tmp_path, held=held)
        assert publish(store).sequence == 2


# Pruned by what they are


def test_a_version_whose_name_is_used_again_is_not_pruned(tmp_path):
    store = MergeStore(tmp_path)
    first, last = publish(store, "step-1"), publish(store, "step-2")
    ours = {version.name: version.identity for version in (first, last)}
    shutil.rmtree(first.path)
    again = publish(store, "step-1", run="another")
    assert store.prune(1, names=ours, keep_steps=frozenset()) == []
    third = publish(store, "step-3")
    ours |= {third.name: third.identity}
    assert store.prune(1, names=ours, keep_steps=frozenset()) == ["step-2"]
    assert [v.name for v in store.versions()] == [again.name, third.name]


@contextlib.contextmanager
def before_removal(monkeypatch, act):
    """Another process acts between the choice of a version and its removal."""
    remove = MergeStore._remove

    def late(self, version):
        act(version)
        return remove(self, version)

    with monkeypatch.context() as patch, contextlib.ExitStack() as held:
        patch.setattr(MergeStore, "_remove", late)
        yield held


def test_a_version_whose_push_begins_meanwhile_is_not_pruned(tmp_path, monkeypatch):
    store = MergeStore(tmp_path)
    first, last = publish(store, "step-1"), publish(store, "step-2")
    names = [first.name, last.name]
    acts = [
        lambda version: push_marker(version.path).write_text("{}"),
        lambda version: lock(version.path, held=held),
    ]
    for act in acts:
        with before_removal(monkeypatch, act) as held:
            assert store.prune(1, names=names, keep_steps=frozenset()) == []
        push_marker(first.path).unlink(missing_ok=True)
        assert store.versions() == [first, last]
    assert store.prune(1, names=names, keep_steps=frozenset()) == ["step-1"]


def test_a_version_that_is_marked_while_it_is_taken_away_comes_back(tmp_path, monkeypatch):
    store = MergeStore(tmp_path)
    first, last = publish(store, "step-1"), publish(store, "step-2")
    rename = Path.rename

    def mark(self, target):
        monkeypatch.setattr(Path, "rename", rename)
        push_marker(first.path).write_text("{}")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", mark)
    assert store.prune(1, names=[first.name, last.name], keep_steps=frozenset()) == []
    assert store.versions() == [first, last] and store.pending() == [first]
    store.verify(first)
    assert listing(tmp_path) == [".step-1.push", "step-1", "step-2"]


def test_a_version_that_is_replaced_meanwhile_is_not_pruned(tmp_path, monkeypatch):
    store = MergeStore(tmp_path)
    first, last = publish(store, "step-1"), publish(store, "step-2")

    def replace(version):
        shutil.rmtree(version.path)
        publish(store, "step-1", run="another")

    with before_removal(monkeypatch, replace):
        assert store.prune(1, names=[first.name, last.name], keep_steps=frozenset()) == []
    assert [v.name for v in store.versions()] == ["step-2", "step-1"]


# What the check accepts can be published


@pytest.mark.parametrize("name", ["a" * 151, "é" * 120, "模" * 80], ids=["ascii", "é", "模"])
def test_the_longest_names_leave_room_for_all_that_is_derived(tmp_path, monkeypatch, name):
    from merge_callback.hub import Target
    from merge_callback.uploads import _mark  # not above: processes that race import this module

    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 64)
    store = MergeStore(tmp_path)
    for number in range(2, 999):
        (tmp_path / f"{name}-v{number}").symlink_to("nowhere")
    first, last = publish(store, name), publish(store, name)
    assert (first.name, last.name) == (name, f"{name}-v999")
    _mark(last, Target("me/model", None, "main"))
    assert store.pending() == [last]
    assert store.prune(1, names=[first.name, last.name], keep_steps=frozenset()) == [name]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("draft")] == []


@pytest.mark.parametrize("host", ["x" * 200, "é" * 64, "a.b c"])
def test_a_draft_of_any_host_is_known_again(tmp_path, monkeypatch, host):
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    store = MergeStore(tmp_path)
    with store.draft("m") as draft:
        name = draft.path.name
    (tmp_path / name).mkdir()
    publish(store, "m")
    assert listing(tmp_path) == ["m"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_refuses_chmod_takes_versions_and_it_is_said_once(
    tmp_path, monkeypatch, caplog, code
):
    import merge_callback.store as module

    def refuse(self, mode):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "_TOLD", set())
    monkeypatch.setattr(Path, "chmod", refuse)
    store = MergeStore(tmp_path)
    store.check(1)
    for _ in range(2):
        store.verify(publish(store))
    assert len(caplog.records) == 1
    assert f"refuses chmod ([Errno {code}]" in caplog.records[0].getMessage()


def test_a_disk_that_fails_at_chmod_publishes_nothing(tmp_path, monkeypatch):
    def fail(self, mode):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "chmod", fail)
    with pytest.raises(OSError, match="Input/output"):
        publish(MergeStore(tmp_path))
    assert listing(tmp_path) == []


# Drafts of those that cannot be asked


def left_draft(root, host):
    path = root / f".step-1.{host}.{'0' * 32}.draft"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"0" * 20_000_000)
    return path


def test_a_draft_of_another_host_is_said_once_and_where_the_disk_is_full(
    tmp_path, monkeypatch, caplog
):
    import merge_callback.store as module

    monkeypatch.setattr(module, "_TOLD", set())
    path = left_draft(tmp_path, "pod-1")
    three = time.time() - 3 * 3600
    os.utime(path / "model.safetensors", (three, three))
    os.utime(path, (three, three))
    store = MergeStore(tmp_path)
    publish(store)
    store.check(1)
    told = (
        f"{path} (0.02 GB, last written 3.0 hours ago) is a draft of host pod-1; if no process "
        "there is merging, remove it"
    )
    assert [record.getMessage() for record in caplog.records] == [told]
    with pytest.raises(MergeRefused) as caught:
        store.check(1 << 60)
    assert caught.value.problems[0].endswith(f"choose another output_dir; {told}")
    assert path.is_dir()


def test_a_draft_of_another_host_that_holds_its_lock_is_not_said(tmp_path, monkeypatch, caplog):
    import merge_callback.store as module

    monkeypatch.setattr(module, "_TOLD", set())
    with contextlib.ExitStack() as held:  # of a container on this machine
        lock(left_draft(tmp_path, "pod-1"), held=held)
        publish(MergeStore(tmp_path))
    assert caplog.records == []


def test_where_no_locks_tell_a_draft_of_this_host_is_said_and_left(tmp_path, monkeypatch, caplog):
    import fcntl

    import merge_callback.store as module

    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module, "_TOLD", set())
    monkeypatch.setattr(fcntl, "flock", refuse)
    path = left_draft(tmp_path, module._host())
    publish(MergeStore(tmp_path))
    assert path.is_dir() and [str(path) in r.getMessage() for r in caplog.records] == [True]
