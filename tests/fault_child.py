"""Run by test_faults in a process of its own: a fault at each step of a real merge.

    python fault_child.py full ROOT     let the disk run full after some bytes
    python fault_child.py train ROOT    every fault within a training that merges at each save

Prints one JSON line.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from injection import FAULTS, in_child, watch
from models import qlora, same, snapshot, tokenizer
from test_callback import trainer
from transformers import TrainerCallback

import merge_callback.drafts
import merge_callback.verification.checks
from merge_callback import MergeError, MergeOnSaveCallback, MergeStore, merge_adapter
from merge_callback.store import Draft


def merge(model, root):
    merge_adapter(
        model,
        root,
        processing_class=tokenizer(),
        save_method=["merged_4bit", "lora"],
        max_shard_size="100KB",
        progress=False,
    )


def full(model, root):
    before = snapshot(model)
    rows = []
    for room in (0, 1000, 50_000, 150_000, 200_000):
        written = 0
        write = os.write

        def short(descriptor, data, room=room, write=write):
            nonlocal written
            left = room - written
            if left <= 0:
                raise OSError(28, "No space left on device")
            done = write(descriptor, bytes(data)[:left])
            written += done
            return done

        os.write = short
        try:
            merge(model, root / "full")
            told = ""
        except MergeError as error:
            told = str(error)
        finally:
            os.write = write
        rows.append({"told": told, "left": sorted(os.listdir(root / "full"))})
    merge(model, root / "full")
    rows.append({"same": same(before, snapshot(model)), "left": sorted(os.listdir(root / "full"))})
    print(json.dumps(rows))


def whole_versions(root):
    """Steps of the versions in `root`, after their sha256 were looked at."""
    store = MergeStore(root)
    for version in store.versions():
        store.verify(version)
    return sorted(version.manifest["step"] or 0 for version in store.versions())


def drafts(root):
    return sum(path.name.endswith(".draft") for path in root.iterdir())


# Within a training

STAGE = [""]
STAGES = (  # what is called when a stage of a merge begins
    (merge_callback.drafts, "write_weights", "write"),
    (merge_callback.drafts, "save_companions", "companions"),
    (Draft, "seal", "seal"),
    (Draft, "verify", "verify"),
    (merge_callback.verification.checks, "rebuild", "verify"),
    (merge_callback.verification.checks, "compare_outputs", "verify"),
    (merge_callback.drafts, "write_report", "report"),
    (MergeStore, "publish", "publish"),
    (MergeStore, "prune", "prune"),
)


class Watch(TrainerCallback):
    """From the second checkpoint on, until its merge is over."""

    def __init__(self, root, act):
        self.root, self.act = root, act

    def on_save(self, args, state, control, **kwargs):
        if state.global_step != 2:
            return
        (self.root / "checkpoints").write_text(json.dumps(checkpoints(self.root)))
        STAGE[0] = "draft"
        watched = watch(lambda count, name: self.act(count, name) if STAGE[0] else None)
        for owner, name, stage in STAGES:
            setattr(owner, name, staged(stage, watched(name, getattr(owner, name))))

    def on_step_begin(self, args, state, control, **kwargs):
        STAGE[0] = ""


def staged(stage, call):
    def wrapper(*args, **settings):
        STAGE[0] = STAGE[0] and stage
        return call(*args, **settings)

    return wrapper


def checkpoints(root):
    """sha256 of the files of the first two, but for the callback's own."""
    files = [path for n in (1, 2) for path in (root / "run" / f"checkpoint-{n}").rglob("*.*")]
    files = [path for path in files if "merge_callback.json" not in path.name]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def training(model, root, act):
    """Three steps, with a merge at each; `act` at each step of the second of these."""
    callback = MergeOnSaveCallback(
        save_method=["merged_4bit", "lora"],
        merge_on_save=True,
        rounding="nearest",
        max_shard_size="100KB",
        keep_last=1,
    )
    settings = {"model": model, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    return trainer(root, Watch(root, act), callback, **settings)


def train(model, root):
    steps = []

    def count_calls():
        training(model, root, lambda count, name: steps.append((STAGE[0], name))).train()
        (root / "steps").write_text(json.dumps(steps))

    assert in_child(count_calls) == 0
    steps = json.loads((root / "steps").read_text())
    first = dict(zip(map(tuple, reversed(steps)), range(len(steps), 0, -1), strict=True))
    last = dict(zip(map(tuple, steps), range(1, len(steps) + 1), strict=True))
    chosen = sorted({*first.values(), *last.values()})
    cases = [
        (fault, at)
        for fault in FAULTS
        for at in chosen
        if fault != "short write" or steps[at - 1][1] == "write"
    ]
    halves = [cases[::2], cases[1::2]]
    workers = [os.fork() or work(model, root, half, steps, n) for n, half in enumerate(halves)]
    assert not any(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers)
    print(json.dumps([row for n in (0, 1) for row in json.loads((root / f"rows-{n}").read_text())]))


def work(model, root, cases, steps, number):
    """Some of the cases, in a process of their own."""
    try:
        rows = [case(model, root, fault, at, *steps[at - 1]) for fault, at in cases]
        (root / f"rows-{number}").write_text(json.dumps(rows))
    finally:
        os._exit(0 if (root / f"rows-{number}").exists() else 1)


def case(model, root, fault, at, stage, call):
    """What one fault leaves, and how it goes on: in the same process if that lives."""
    place = root / f"{fault}-{at}"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place.mkdir()

    def fail():
        run = training(model, place, lambda count, name: FAULTS[fault] if count == at else None)
        try:
            run.train()
        except (KeyboardInterrupt, MergeError) as error:
            STAGE[0] = ""
            (place / "said").write_text(json.dumps([type(error).__name__, *looks(place)]))
            run.train(resume_from_checkpoint=str(place / "run" / "checkpoint-2"))

    def go_on():
        training(model, place, lambda count, name: None).train(resume_from_checkpoint=True)

    status = in_child(fail)
    said, versions, left = [None, *looks(place)]
    if (place / "said").exists():
        said, versions, left = json.loads((place / "said").read_text())
    again = in_child(go_on) if status else 0
    trained = (place / "run" / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
    expected = (root / "run" / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
    return {
        "fault": fault,
        "stage": stage,
        "call": call,
        "status": status,
        "said": said,
        "versions": versions,
        "drafts": left,
        "again": again,
        "then": whole_versions(place / "run" / "_merged"),
        "left": drafts(place / "run" / "_merged"),
        "checkpoints kept": json.loads((place / "checkpoints").read_text()) == checkpoints(place),
        "trained alike": trained == expected,
    }


def looks(place):
    return whole_versions(place / "run" / "_merged"), drafts(place / "run" / "_merged")


if __name__ == "__main__":
    mode, root = sys.argv[1], Path(sys.argv[2])
    {"full": full, "train": train}[mode](qlora(root), root)
