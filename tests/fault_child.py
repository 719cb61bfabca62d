"""Run by test_faults in a process of its own: merge, and fail at a given system call.

    python fault_child.py kill ROOT     die by SIGKILL at each call in turn, merge again after each
    python fault_child.py full ROOT     let the disk run full after some bytes

Needs OMP_NUM_THREADS=1: a process with no threads can be forked whole. Prints one JSON line.
"""

import json
import os
import signal
import sys
from pathlib import Path

from models import qlora, same, snapshot, tokenizer

from merge_callback import MergeError, MergeStore, merge_adapter

CALLS = ("mkdir", "write", "fsync", "rename", "chmod", "rmdir")


def merge(model, root):
    merge_adapter(
        model,
        root,
        processing_class=tokenizer(),
        save_method=["merged_4bit", "lora"],
        max_shard_size="100KB",
        progress=False,
    )


def watch(act):
    """Call `act(count, name, arguments)` before each system call of CALLS."""
    count = 0

    def watched(name, call):
        def wrapper(*args, **settings):
            nonlocal count
            count += 1
            act(count, name, args)
            return call(*args, **settings)

        return wrapper

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))


def in_child(work):
    """Exit status of `work` in a forked process; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(model, root):
    names = []

    def count_calls():
        merge(model, root / "counted")
        watch(lambda count, name, args: names.append(name))
        merge(model, root / "counted")
        (root / "names").write_text(json.dumps(names))

    assert in_child(count_calls) == 0
    names = json.loads((root / "names").read_text())
    rows = []
    for at in range(1, len(names) + 1):
        place = root / f"killed-{at}"

        def die(at=at, place=place):
            def act(count, name, args):
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            merge(model, place)  # a good version that must survive
            watch(act)
            merge(model, place)

        status = in_child(die)
        store = MergeStore(place)
        after = [version.name for version in store.versions()]
        for version in store.versions():
            store.verify(version)
        again = in_child(lambda place=place: merge(model, place))
        for version in store.versions():
            store.verify(version)
        rows.append(
            {
                "call": names[at - 1],
                "status": status,
                "after": len(after),
                "again": again,
                "then": len(store.versions()),
                "left": sum(path.name.endswith(".draft") for path in place.iterdir()),
            }
        )
    print(json.dumps(rows))


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


if __name__ == "__main__":
    mode, root = sys.argv[1], Path(sys.argv[2])
    {"kill": kill, "full": full}[mode](qlora(root), root)
