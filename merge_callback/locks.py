"""Locks on directories, held by a process and let go when it ends. POSIX only."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def lock(directory: Path, *, where_unsupported: bool = True) -> int | None:
    """An open descriptor with an exclusive lock on a directory; it ends with the process.

    None when it is taken, or gone. On a file system without locks: an unlocked descriptor, or None
    unless `where_unsupported`, so that drafts are made there but never taken for stale.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if where_unsupported and not isinstance(error, BlockingIOError):
            return descriptor
        os.close(descriptor)
        return None
    return descriptor


def unlock(descriptor: int) -> None:
    """Let go of a lock, for forked processes too: workers of data loaders inherit it."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether what was opened is still what lies there."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
