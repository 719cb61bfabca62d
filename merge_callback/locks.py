"""Locks on directories, held by a process and let go when it ends. POSIX only."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack, suppress
from pathlib import Path


def lock(
    directory: Path, *, held: ExitStack | None = None, where_unsupported: bool = True
) -> int | None:
    """An open descriptor with an exclusive lock on a directory; it ends with the process.

    None when it is taken, or gone. On a file system without locks: an unlocked descriptor, or None
    unless `where_unsupported`, so that drafts are made there but never taken for stale.

    Args:
        held: lets go of it when it is closed, for forked processes too: workers of data loaders
            inherit it. None: nothing lets go of it before the process ends.
    """
    own, unlocked = ExitStack(), ExitStack()
    unlocked.enter_context(suppress(OSError))
    if held is not None:
        held.callback(own.close)
    try:  # opened and kept in one line: an interrupt at the next must not lose it
        own.callback(os.close, descriptor := os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
    except FileNotFoundError:
        return None
    unlocked.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
    own.callback(unlocked.close)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if where_unsupported and not isinstance(error, BlockingIOError):
            return descriptor
        own.close()
        return None
    return descriptor


def is_at(descriptor: int, path: Path) -> bool:
    """Whether what was opened is still what lies there."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
