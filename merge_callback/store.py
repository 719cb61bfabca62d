"""Versions of a model in one directory: draft, publish, list, check, prune. Knows no models.

    <root>/step-00000500/                  a version: it has a manifest
    <root>/step-00000500-v2/               the next one of that name
    <root>/.step-00000500.<host>.<id>.draft/   a draft: its owner holds a lock on it

A draft is a sibling of what it becomes, so that publishing is one rename: first the target is
claimed by an exclusive mkdir, then the draft is renamed onto that empty directory; where that is
not possible its files are moved one by one, the manifest last. Nothing that exists is ever written
to; whatever stands at the target moves the number on. A process that dies
between the two leaves an empty directory, which is no version. POSIX only.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from merge_callback.errors import CorruptVersion, MergeRefused
from merge_callback.files import FileRecord, hash_file, sync, sync_directories
from merge_callback.locks import is_at, lock, unlock
from merge_callback.versions import MANIFEST, SCHEMA, Version, check_files, read_version

logger = logging.getLogger(__name__)

# What file systems say that do not rename onto an empty directory.
_NO_RENAME_ONTO = (
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EXDEV,
)
_DRAFT = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]*)\.(?P<id>[0-9a-f]{32})\.draft")


class Draft:
    """A version that is being written; `path` is its directory."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, FileRecord] = {}  # relative path -> what was written

    def files(self) -> list[Path]:
        """All files of the draft."""
        return sorted(path for path in self.path.rglob("*") if path.is_file())

    def seal(self) -> None:
        """Give every file the mode that the umask asks for, hash it and make it durable."""
        mode = self.path.stat().st_mode & 0o666  # mkdir has applied the umask
        for path in self.files():
            path.chmod(mode)
            name = path.relative_to(self.path).as_posix()
            if name not in self.records:
                self.records[name] = hash_file(path)
        sync_directories(self.path, self.files())

    def verify(self) -> None:
        """Read every file back and compare it with what was written.

        Raises:
            CorruptVersion: naming the file.
        """
        check_files(self.path, self.records)


class MergeStore:
    """The versions below `root`.

    Args:
        root: made when the first draft is.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)

    def versions(self) -> list[Version]:
        """All published versions, the oldest first."""
        if not self.root.is_dir():
            return []
        found = [
            version for path in self.root.iterdir() if (version := read_version(path)) is not None
        ]
        return sorted(found, key=lambda version: version.order)

    def latest(self) -> Version | None:
        """The newest merged version; adapters that were rescued from a failed merge are skipped."""
        merged = [v for v in self.versions() if v.manifest["kind"] == "merged"]
        return merged[-1] if merged else None

    def version(self, name: str) -> Version:
        """The version of a name.

        Raises:
            CorruptVersion: there is none.
        """
        found = read_version(self.root / name)
        if found is None:
            raise CorruptVersion(
                f"{self.root / name} has no readable {MANIFEST}: it is not a published version"
            )
        return found

    def pending(self) -> list[Version]:
        """Those that still have to be pushed, the oldest first."""
        return [version for version in self.versions() if push_marker(version.path).exists()]

    def verify(self, version: Version | str) -> None:
        """Compare every file of a version with its sha256 in the manifest; warn of other files.

        Raises:
            CorruptVersion: a file is missing or differs; or there is no such version.
        """
        found = self.version(version.name if isinstance(version, Version) else version)
        for name in found.records():
            found.file(name)
        check_files(found.path, found.records())
        if others := ", ".join(found.others()):
            logger.warning("%s has files that are none of this version: %s", found.path, others)

    def check(self, nbytes: int) -> None:
        """Make sure that `nbytes` can be written below the root, by writing a little.

        Raises:
            MergeRefused: not a directory, not writable, or too full.
        """
        try:
            with self.draft("check") as draft:
                (draft.path / "probe").write_bytes(b"0")
                free = shutil.disk_usage(draft.path).free
        except OSError as error:
            raise MergeRefused([_unusable(self.root, error)]) from error
        if free < nbytes:
            raise MergeRefused(
                [
                    f"{self.root} has {free / 1e9:.2f} GB free and {nbytes / 1e9:.2f} GB are "
                    "needed; free some, set keep_last=, or choose another output_dir"
                ]
            )

    @contextmanager
    def draft(self, name: str) -> Iterator[Draft]:
        """A new directory that becomes version `name` by `publish`, and is removed otherwise."""
        check_name(name)
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        path, held = self._claim_draft(name)
        try:
            yield Draft(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)  # gone already when it was published
            unlock(held)

    def publish(self, draft: Draft, name: str, manifest: Mapping[str, Any]) -> Version:
        """Make a sealed draft version `name`, or `name-v2`, ...; durable when this returns."""
        files = {file: record._asdict() for file, record in sorted(draft.records.items())}
        manifest = {"schema": SCHEMA, **manifest, "files": files}
        text = json.dumps(manifest, indent=2) + "\n"
        (draft.path / MANIFEST).write_text(text)
        sync_directories(draft.path, [draft.path / MANIFEST])
        target = self._rename(draft.path, name)
        try:
            sync(self.root)
        except OSError as error:  # it is there, whole, all the same
            logger.warning("%s may be gone after a power failure: %s", target, error)
        return Version(target.name, target, json.loads(text))

    def prune(
        self, keep_last: int, *, names: Collection[str], keep_steps: frozenset[int]
    ) -> list[str]:
        """Remove the versions that are `prunable`; their names."""
        found = self.prunable(keep_last, names=names, keep_steps=keep_steps)
        for version in found:
            self._remove(version)
        return [version.name for version in found]

    def prunable(
        self, keep_last: int, *, names: Collection[str], keep_steps: frozenset[int]
    ) -> list[Version]:
        """All but the newest of the versions called `names`, and but those still to be pushed.

        Args:
            keep_last: how many to leave, at least 1.
            names: versions of other names are left.
            keep_steps: steps, or best steps, whose versions are left.
        """
        found = []
        for version in [v for v in self.versions() if v.name in names][:-keep_last]:
            steps = {version.manifest["step"], version.manifest["best_step"]}
            if not steps & keep_steps and not push_marker(version.path).exists():
                found.append(version)
        return found

    def _claim_draft(self, name: str) -> tuple[Path, int]:
        """A draft of our own, and the open lock that says so."""
        while True:
            path = self._draft_path(name)
            path.mkdir()
            try:
                held = lock(path)
            except OSError:
                path.rmdir()
                raise
            if held is not None:
                if is_at(held, path):
                    return path, held
                unlock(held)  # another process took it for stale before the lock was ours

    def _draft_path(self, name: str) -> Path:
        return self.root / f".{name}.{_host()}.{uuid.uuid4().hex}.draft"

    def _sweep(self) -> None:
        """Remove drafts whose process died: on this host, the kernel has let go of their locks."""
        for path in self.root.iterdir():
            match = _DRAFT.fullmatch(path.name)
            if match is None or match["host"] != _host():
                continue
            try:
                held = lock(path, where_unsupported=False)
            except OSError:  # not a directory, or not ours to open
                continue
            if held is not None:
                logger.warning("removing %s, left by a process that died", path)
                shutil.rmtree(path, ignore_errors=True)
                unlock(held)

    def _rename(self, draft: Path, name: str) -> Path:
        for candidate in numbered(name):
            target = self.root / candidate
            try:
                target.mkdir()
            except FileExistsError:
                continue
            push_marker(target).unlink(missing_ok=True)  # of a version that is gone
            try:
                draft.rename(target)
            except OSError as error:
                if target.is_dir() and any(target.iterdir()):  # somebody moved in: let them have it
                    continue
                if error.errno not in _NO_RENAME_ONTO:
                    target.rmdir()
                    raise
                _move(draft, target)
            return target
        raise AssertionError("unreachable")

    def _remove(self, version: Version) -> None:
        """One rename takes the version away whole; the rest is a stale draft's business."""
        gone = self._draft_path(version.name)
        held = lock(version.path)
        version.path.rename(gone)
        shutil.rmtree(gone)
        if held is not None:
            unlock(held)


def _move(draft: Path, target: Path) -> None:
    """Move the files of a draft into a directory of ours; last the manifest: now it is whole."""
    moved = [path for path in sorted(draft.rglob("*")) if path.is_file() and path.name != MANIFEST]
    try:
        for path in [*moved, draft / MANIFEST]:
            place = target / path.relative_to(draft)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.name == MANIFEST:
                sync_directories(target, [target / other.relative_to(draft) for other in moved])
            path.rename(place)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def check_name(name: str) -> None:
    """Make sure that a version can be called so.

    Raises:
        MergeRefused: it cannot.
    """
    if not re.fullmatch(r"[\w][\w.=+-]{0,150}", name):
        raise MergeRefused(
            [f"name={name!r} cannot name a version; use letters, digits, '-', '_' and '.'"]
        )


def numbered(name: str) -> Iterator[str]:
    """`name`, `name-v2`, `name-v3` and so on."""
    yield name
    for number in count(2):
        yield f"{name}-v{number}"


def push_marker(version: Path) -> Path:
    """The sidecar of a version that still has to be pushed; it is none of the version's files."""
    return version.parent / f".{version.name}.push"


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _unusable(root: Path, error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{root} is, or lies below, a file; choose another output_dir"
    if isinstance(error, PermissionError):
        return f"{root} is not writable; choose another output_dir or change its permissions"
    return f"{root} cannot be used ({error}); choose another output_dir"
