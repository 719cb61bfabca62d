"""Run by test_portability in processes of their own: as on Windows, see windows.py.

    python portability_child.py simulated|store|hold|race|merge ROOT

Prints one JSON line.
"""

import ctypes
import importlib
import json
import mmap
import os
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import windows

if sys.argv[1] == "merge":  # what libraries need, they find
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers.modelcard  # noqa: F401
    import trl  # noqa: F401

windows.become()


def listing(root):
    return sorted(path.name for path in root.iterdir())


def publish(store, content="weights"):
    with store.draft("m") as draft:
        (draft.path / "deep").mkdir()
        (draft.path / "deep" / "file").write_text(content)
        draft.seal()
        created = str(time.time_ns())
        manifest = {"kind": "merged", "created": created, "step": 1, "best_step": None}
        return store.publish(draft, "m", manifest)


def modules():
    import merge_callback

    found = pkgutil.walk_packages(merge_callback.__path__, "merge_callback.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    for name in names:
        importlib.import_module(name)
    return names


def simulated(root):
    """What fails, and how."""
    (root / "d").mkdir()
    (root / "empty").mkdir()
    file, other = root / "d" / "file", root / "other"
    file.write_bytes(b"x")
    other.write_bytes(b"x")
    rows = {}

    def row(what, call, *args):
        try:
            rows[what] = call(*args) and None
        except Exception as error:
            rows[what] = type(error).__name__

    row("import fcntl", importlib.import_module, "fcntl")
    row("import resource", importlib.import_module, "resource")
    row("the C library", ctypes.CDLL, None)
    rows["names"] = [n for m, names in windows.GONE.items() for n in names.split() if hasattr(m, n)]
    row("open a directory", os.open, root, os.O_RDONLY)
    with open(file, "rb+") as opened:
        row("flush what is open for writing", os.fsync, opened)
        row("rename a file that is open", os.rename, file, root / "new")
        row("rename a directory with an open file", os.rename, root / "d", root / "new")
        row("replace a file that is open", os.replace, other, file)
        mapped = mmap.mmap(opened.fileno(), 1)
    with open(file, "rb") as opened:
        row("flush what is open for reading", os.fsync, opened)
    row("remove a file that is mapped", os.unlink, file)
    mapped.close()
    row("rename onto an empty directory", os.rename, root / "d", root / "empty")
    row("replace a file", os.replace, other, file)
    row("rename a directory", os.rename, root / "d", root / "new")
    row("remove a file", os.unlink, root / "new" / "file")
    return rows


def store(root):
    """What is left of two versions, of a draft whose process is killed, and by two prunes."""
    from merge_callback.store import MergeStore

    store = MergeStore(root)
    rows = {"published": [publish(store).name for _ in range(2)]}
    command = [sys.executable, __file__, "hold", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        draft = json.loads(holder.stdout.readline())
        store.check(0)
        rows["draft of the living"] = draft in listing(root)
        holder.terminate()
    store.check(0)
    rows["draft of the dead"] = draft in listing(root)
    names = [version.name for version in store.versions()]
    with open(store.version("m").path / "deep" / "file"):
        rows["pruned while open"] = store.prune(1, names=names, keep_steps=frozenset())
    store.verify("m")
    rows["pruned"] = store.prune(1, names=names, keep_steps=frozenset())
    store.verify("m-v2")
    return rows | {"left": listing(root)}


def hold(root):
    """A draft, until somebody ends this process."""
    from merge_callback.store import MergeStore

    with MergeStore(root).draft("m") as draft:
        print(json.dumps(draft.path.name), flush=True)
        time.sleep(600)


def race(root):
    from merge_callback.store import MergeStore

    for i in range(10):
        publish(MergeStore(root), f"{os.getpid()} {i}")


def merge(root):
    """A training whose dataset cannot be read in a forked process, then a refusal, then a merge."""
    import torch
    from models import qlora, tokenizer
    from test_callback import trainer

    from merge_callback import MergeOnSaveCallback, MergeStore, VerificationError, merge_adapter

    rows = {"modules": modules()}
    model = qlora(root)
    callback = MergeOnSaveCallback(merge_on_save=True, keep_last=1, rounding="calibrated")
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(root, callback, model=model, **settings).train()
    versions = MergeStore(root / "run" / "_merged").versions()
    rows |= {"trained": {v.name: v.manifest["calibration"]["tokens"] for v in versions}}
    data = [{"input_ids": torch.randint(0, 300, (4, 32))} for _ in range(4)]
    settings = {"processing_class": tokenizer(), "calibration_data": data, "progress": False}
    try:
        merge_adapter(model, root / "merged", max_kl=1e-9, **settings)
    except VerificationError:
        rows["refused"] = True
    merge_adapter(model, root / "merged", save_method=["merged_4bit", "lora"], **settings)
    return rows | {"left": listing(root / "merged"), "files": listing(root / "merged" / "merged")}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
