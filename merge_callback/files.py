"""Files on a disk: what they are known by, and that they stay. Knows nothing of tensors."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

_PART = 1 << 20  # bytes
# Windows opens no directory, and flushes what is open for writing.
_OPENS_DIRECTORIES = hasattr(os, "O_DIRECTORY")
_TO_SYNC = os.O_RDONLY if _OPENS_DIRECTORIES else os.O_RDWR
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


class FileRecord(NamedTuple):
    """What a file is known by."""

    size: int  # bytes
    sha256: str


def hash_file(path: Path) -> FileRecord:
    """Size and sha256 of a file, read once."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(_PART):
            digest.update(part)
    return FileRecord(path.stat().st_size, digest.hexdigest())


def sync_directories(top: Path, files: Iterable[Path]) -> None:
    """Make files, and the directories from theirs up to `top`, durable."""
    paths = list(files)
    directories = {
        parent for path in paths for parent in path.parents if parent.is_relative_to(top)
    }
    for path in [*paths, *sorted(directories, reverse=True)]:
        sync(path)


def sync(path: Path) -> None:
    """Make what lies at `path`, file or directory, durable.

    Some network file systems cannot do so for directories; they keep them in step by themselves. So
    does Windows.
    """
    if not _OPENS_DIRECTORIES and path.is_dir():
        return
    try:
        with ExitStack() as last, ExitStack() as undo:  # an interrupt may skip the exit of one
            last.callback(undo.close)
            undo.callback(os.close, descriptor := os.open(path, _TO_SYNC))
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
