"""What Windows lacks and does otherwise, for children of tests. Patches its process for good.

Gone: fcntl, resource, and names of `os` and `signal`. Otherwise: no directory is opened, what is
open for reading is not flushed, nothing is renamed onto what exists, and neither what is open or
mapped in this process nor a directory around it is renamed, replaced or removed. `sys.platform`,
paths, and libraries that were imported before stay those of the machine.
"""

import ctypes
import errno
import os
import pathlib
import shutil
import signal
import sys
import warnings
from pathlib import Path

import filelock

_CALLS = {name: getattr(os, name) for name in ("open", "fsync", "rename", "replace", "unlink")}
MISSING = ("fcntl", "resource", "pwd", "grp", "termios")
GONE = {
    os: (
        "O_DIRECTORY O_NOFOLLOW PRIO_PROCESS fork forkpty getpriority nice pread pwrite "
        "register_at_fork sched_getaffinity setpriority sync sysconf"
    ),
    signal: "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2",
}


class _Library(ctypes.CDLL):
    def __init__(self, name, *args, **settings):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        super().__init__(name, *args, **settings)


def _open_here(path):
    """Whether something at a path, or below it, is open or mapped in this process."""
    top = os.path.realpath(path)
    maps = Path("/proc/self/maps").read_text().splitlines()
    found = {line.split(maxsplit=5)[-1] for line in maps}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the listing itself
            pass
    return any(place == top or place.startswith(f"{top}/") for place in found)


def _refuse_if_open(*paths):
    for path in paths:
        if os.path.lexists(path) and _open_here(path):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))


class _FileLock(filelock.FileLock):
    """Removes its file when it is released, as filelock does on Windows."""

    def _acquire(self):
        super()._acquire()
        if self.is_locked and not self._is_there():  # another one has removed it: there it cannot
            super()._release()

    def _is_there(self):
        try:
            opened = os.fstat(self._context.lock_file_fd)
            return os.path.samestat(opened, os.stat(self.lock_file))
        except FileNotFoundError:
            return False

    def _release(self):
        _CALLS["unlink"](self.lock_file)
        super()._release()


def become():
    """Make this process such a one."""
    filelock.FileLock = _FileLock

    def opened(path, flags, *args, **settings):
        if os.path.isdir(path) and not flags & os.O_TMPFILE == os.O_TMPFILE:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return _CALLS["open"](path, flags, *args, **settings)

    def fsync(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        lines = Path(f"/proc/self/fdinfo/{number}").read_text().splitlines()
        told = dict(line.split(":", 1) for line in lines)
        if int(told["flags"], 8) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        _CALLS["fsync"](descriptor)

    def rename(source, target, **settings):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file", str(source), 183, target)
        _refuse_if_open(source)
        _CALLS["rename"](source, target, **settings)

    def replace(source, target, **settings):
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "Access is denied", str(source), 5, target)
        _refuse_if_open(source, target)
        _CALLS["replace"](source, target, **settings)

    def unlink(path, **settings):
        _refuse_if_open(path)
        _CALLS["unlink"](path, **settings)

    os.open, os.fsync, os.rename, os.replace = opened, fsync, rename, replace
    os.unlink = os.remove = unlink
    if accessor := getattr(pathlib, "_NormalAccessor", None):  # Python 3.10 keeps what it imported
        for name in ("rename", "replace", "unlink"):
            setattr(accessor, name, staticmethod(getattr(os, name)))
    shutil._use_fd_functions = False
    ctypes.CDLL = _Library
    for module, names in GONE.items():
        for name in names.split():
            delattr(module, name)
    sys.modules.update(dict.fromkeys(MISSING))  # to import them fails
    warnings.filterwarnings("error", category=EncodingWarning, module="merge_callback")
