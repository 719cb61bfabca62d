"""Run by test_reliability in a process of its own: a fault at each step of a version's life.

python store_child.py ROOT: prints one JSON list, a row for each fault and system call.
python store_child.py ROOT lines: a row for each error and line of the store.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from injection import FAULTS, in_child, watch

from merge_callback.codecs import TensorSpec
from merge_callback.shards import CheckpointWriter
from merge_callback.store import MergeStore

SPECS = [{f"weight.{i}": TensorSpec((64, 8), torch.float32)} for i in range(2)]
STAGE = [""]


def life(store, step):
    """Draft, write, seal, verify, publish, and prune what was before."""
    names = [version.name for version in store.versions()]
    STAGE[0] = "draft"
    with store.draft("v") as draft:
        STAGE[0] = "write"
        with CheckpointWriter(draft.path, SPECS, 2048) as writer:
            for specs in SPECS:
                for name, spec in specs.items():
                    writer.write(name, torch.full(spec.shape, float(step)))
        draft.records |= writer.records
        (draft.path / "config.json").write_text("{}")
        STAGE[0] = "seal"
        draft.seal()
        STAGE[0] = "verify"
        draft.verify()
        STAGE[0] = "publish"
        created = f"2026-01-01T00:00:{step:02}"
        manifest = {"kind": "merged", "created": created, "step": step, "best_step": None}
        version = store.publish(draft, "v", manifest)
        STAGE[0] = "leave the draft"
    STAGE[0] = "prune"
    store.prune(1, names=[*names, version.name], keep_steps=frozenset())


def calls_of_a_life(root):
    """(stage, call) for each system call of one."""

    def count():
        store = MergeStore(root)
        life(store, 1)
        found = []
        watch(lambda count, name: found.append((STAGE[0], name)))
        life(store, 2)
        (root / "found").write_text(json.dumps(found))

    root.mkdir(parents=True, exist_ok=True)
    assert in_child(count) == 0
    return json.loads((root / "found").read_text())


def state(root):
    """Names of the versions, all of which have to be whole, and how many drafts there are."""
    store = MergeStore(root)
    for version in store.versions():
        store.verify(version)
    drafts = sum(path.name.endswith(".draft") for path in root.iterdir())
    return sorted(v.manifest["step"] for v in store.versions()), drafts


def main(root):
    rows = []
    for fault, act in FAULTS.items():
        for at, (stage, call) in enumerate(calls_of_a_life(root / "counted" / fault), 1):
            if fault == "short write" and call != "write":
                continue
            place = root / fault / str(at)

            def fail(at=at, act=act, place=place):
                store = MergeStore(place)
                life(store, 1)
                watch(lambda count, name: act if count == at else None)
                life(store, 2)

            status = in_child(fail)
            versions, drafts = state(place)
            again = in_child(lambda place=place: life(MergeStore(place), 3))
            then, left = state(place)
            rows.append(
                {
                    "fault": fault,
                    "stage": stage,
                    "call": call,
                    "status": status,
                    "versions": versions,
                    "drafts": drafts,
                    "again": again,
                    "then": then,
                    "left": left,
                }
            )
    print(json.dumps(rows))


OWNERS = tuple(f"/merge_callback/{name}.py" for name in ("store", "versions", "files", "locks"))
ERRORS = {"KeyboardInterrupt": KeyboardInterrupt, "ENOSPC": lambda: OSError(28, "No space left")}


def at_each_line(act, work):
    """Call `act` before each line of the store that `work` runs."""

    def local(frame, event, argument):
        if event == "line":
            act(frame)
        return local

    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.endswith(OWNERS) else None)
    try:
        work()
    finally:
        sys.settrace(None)


def publish_and_prune(store, step):
    names = [version.name for version in store.versions()]
    with store.draft("v") as draft:
        (draft.path / "deep").mkdir()
        (draft.path / "deep" / "file").write_text(str(step))
        draft.seal()
        manifest = {"kind": "merged", "created": str(step), "step": step, "best_step": None}
        version = store.publish(draft, "v", manifest)
    store.prune(1, names=[*names, version.name], keep_steps=frozenset())


def lines(root):
    """What an error at each line leaves of a version that is published and one that is pruned."""
    os.fsync = lambda descriptor: None  # thousands of them; the lines around are run all the same
    store, met = MergeStore(root / "counted" / "0"), []  # as deep as the others: so are its lines
    publish_and_prune(store, 1)
    at_each_line(lambda frame: met.append(frame.f_lineno), lambda: publish_and_prune(store, 2))
    rows = []
    for kind, error in ERRORS.items():
        for at in range(len(met)):
            store, count = MergeStore(root / kind / str(at)), 0
            publish_and_prune(store, 1)
            held = len(os.listdir("/proc/self/fd"))

            def fail(frame, at=at, error=error, row=(row := {"error": kind})):
                nonlocal count
                count += 1
                if count == at + 1:
                    row["line"] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                    raise error()

            try:
                at_each_line(fail, lambda store=store: publish_and_prune(store, 2))
            except (KeyboardInterrupt, OSError):
                pass
            if len(os.listdir("/proc/self/fd")) > held:
                gc.collect()  # of a file that only the traceback held
            row["held"] = len(os.listdir("/proc/self/fd")) - held
            row["versions"], row["drafts"] = state(store.root)
            publish_and_prune(store, 3)
            row["then"], row["left"] = state(store.root)
            row["entries"] = len(os.listdir(store.root))
            shutil.rmtree(store.root)
            rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    (lines if "lines" in sys.argv else main)(Path(sys.argv[1]))
