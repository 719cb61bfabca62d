"""Faults at system calls, for children of tests. Patches `os` and `io` of its process for good.

Needs OMP_NUM_THREADS=1: a process with no threads can be forked whole.
"""

import errno
import io
import os
import signal

CALLS = ("mkdir", "write", "fsync", "rename", "chmod", "rmdir", "unlink")


def watch(act):
    """Call `act(count, name)` before each system call; what it returns is called in its place."""
    count = 0

    def watched(name, call):
        def wrapper(*args, **settings):
            nonlocal count
            count += 1
            return (act(count, name) or call)(*args, **settings)

        return wrapper

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    opened = io.open
    writing = watched("open", opened)
    io.open = lambda file, mode="r", *args, **settings: (writing if "w" in mode else opened)(
        file, mode, *args, **settings
    )
    return watched


def in_child(work):
    """Exit status of `work` in a forked process; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os._exit(3 if isinstance(error, OSError | KeyboardInterrupt) else 4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _refuse(code):
    def call(*args, **settings):
        raise OSError(code, os.strerror(code))

    return call


def _interrupt(*args, **settings):
    raise KeyboardInterrupt


def _killed_by(number):
    def call(*args, **settings):
        os.kill(os.getpid(), number)

    return call


def _half(descriptor, data):
    """Write half of it, as write(2) may."""
    part = bytes(data)[: max(1, len(data) // 2)]
    os.pwrite(descriptor, part, os.lseek(descriptor, 0, os.SEEK_CUR))
    os.lseek(descriptor, len(part), os.SEEK_CUR)
    return len(part)


FAULTS = {
    "SIGKILL": _killed_by(signal.SIGKILL),
    "SIGTERM": _killed_by(signal.SIGTERM),
    "KeyboardInterrupt": _interrupt,
    "ENOSPC": _refuse(errno.ENOSPC),
    "EIO": _refuse(errno.EIO),
    "short write": _half,
}
