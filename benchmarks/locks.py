"""What an interrupt at each line of filelock loses: why directories are locked by flock.

    python benchmarks/locks.py

A KeyboardInterrupt is put into each line that an acquire and a release run, one at a time. Other
versions of filelock: `pip install --target DIR filelock==3.16.1`, and DIR in PYTHONPATH.
"""

import fcntl
import gc
import os
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import filelock

HERE = os.path.dirname(filelock.__file__)


def at_each_line(act, file):
    """Lock a file and let go of it; call `act` before each line of filelock's."""

    def local(frame, event, argument):
        if event == "line":
            act()
        return local

    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(HERE) else None)
    try:
        with ExitStack() as last, ExitStack() as undo:
            last.callback(undo.close)
            own = filelock.FileLock(file, timeout=0, thread_local=False)
            undo.callback(own.release, force=True)
            own.acquire()
    finally:
        sys.settrace(None)


def interrupt(at, file):
    """Interrupt line number `at`."""
    count = 0

    def act():
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        at_each_line(act, file)
    gc.collect()


def is_held(file):
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def main(root):
    sys.unraisablehook = lambda error: None  # of locks that are collected half-made
    lines, lost, held = 0, 0, 0

    def count():
        nonlocal lines
        lines += 1

    for _ in range(2):  # what is done once in a process is not counted
        lines = 0
        at_each_line(count, root / "counted")
    for at in range(1, lines + 1):
        before, file = len(os.listdir("/proc/self/fd")), root / str(at)
        interrupt(at, file)
        lost += len(os.listdir("/proc/self/fd")) > before
        held += is_held(file)
    print(
        f"filelock {filelock.__version__}: {lines} lines, {lost} lose a descriptor, {held} a lock"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(Path(directory))
