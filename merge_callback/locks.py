"""Locks on directories, held by a process and let go when it ends.

A directory itself is locked, by flock: a process that is killed leaves no file of a lock, the lock
goes along when the directory is renamed, and a right to read is enough. Where there is no flock
(Windows), filelock locks a file in its place.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]


def lock(
    directory: Path,
    *,
    held: ExitStack,
    where_unsupported: bool = True,
    file: Path | None = None,
) -> bool:
    """Take an exclusive lock on a directory; it ends with the process. False: it is taken, or gone.

    On a file system without locks: `where_unsupported`, so that drafts are made there but never
    taken for stale.

    Args:
        held: lets go of it when it is closed, for forked processes too: workers of data loaders
            inherit it.
        file: what is locked where no directory can be; None: a file beside it.
    """
    if fcntl is None:
        taken = _lock_file(directory, file or directory.parent / f".{directory.name}.lock", held)
    else:
        taken = _lock_directory(directory, held)
    return where_unsupported if taken is None else taken


def _lock_directory(directory: Path, held: ExitStack) -> bool | None:
    """None: there are no locks."""
    own, unlocked = ExitStack(), ExitStack()
    unlocked.enter_context(suppress(OSError))
    held.callback(own.close)
    try:  # opened and kept in one line: an interrupt at the next must not lose it
        own.callback(os.close, descriptor := os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
    except FileNotFoundError:
        return False
    unlocked.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
    own.callback(unlocked.close)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        own.close()
        return False if isinstance(error, BlockingIOError) else None
    return _is_at(descriptor, directory)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether what was opened is still what lies there."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_file(directory: Path, file: Path, held: ExitStack) -> bool | None:
    """The same; a process that is killed leaves the file, without a lock on it."""
    from filelock import FileLock, Timeout

    if not directory.is_dir():  # the file's directory would be made
        return False
    own = FileLock(file, timeout=0, thread_local=False)
    held.callback(own.release, force=True)
    try:
        own.acquire()
    except Timeout:
        return False
    except OSError:
        return None
    return directory.is_dir()
