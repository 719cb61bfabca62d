"""Versions of a model in one directory: draft, publish, list, check, prune. Knows no models.

    <root>/step-00000500/                  a version: it has a manifest
    <root>/step-00000500-v2/               the next one of that name
    <root>/.step-00000500.<host>.<id>.draft/   a draft: its owner holds a lock on it

A draft is a sibling of what it becomes, so that publishing is one rename: first the target is
claimed by an exclusive mkdir, then the draft is renamed onto that empty directory; where that is
not possible its files are moved one by one, the manifest last. Nothing that exists is ever written
to; whatever stands at the target moves the number on. A process that dies
between the two leaves an empty directory, which is no version.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from merge_callback.errors import CorruptVersion, MergeRefused
from merge_callback.files import FileRecord, hash_file, sync, sync_directories
from merge_callback.locks import lock
from merge_callback.versions import LAST, MANIFEST, SCHEMA, Version, check_files, read_version

logger = logging.getLogger(__name__)

# What file systems say that do not rename onto an empty directory, or one that holds open files.
_NO_RENAME_ONTO = (
    errno.EACCES,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EXDEV,
)
_NO_CHMOD = (errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
# Bytes. File systems take 255, and of a version's name there are ".<name>-v<number>.push" too;
# of a draft's name the host takes up to 64, and the rest 41.
_LONGEST_NAME = 240
_DRAFT_NAME = 100
_DRAFT = re.compile(r"\..+\.(?P<host>[^.]*)\.[0-9a-f]{32}\.draft", re.DOTALL)
_PATIENCE = 30.0  # seconds to wait for others to publish; it takes them a fraction of one
_GLANCE = 0.01  # seconds between two tries
_TOLD: set[object] = set()  # what is said once in a process


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
            _set_mode(path, mode)
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
        root: made when the first draft is; `~` is the home directory.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(os.path.expanduser(root))

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
            left = "".join(f"; {told}" for _, told in self._left())
            raise MergeRefused(
                [
                    f"{self.root} has {free / 1e9:.2f} GB free and {nbytes / 1e9:.2f} GB are "
                    f"needed; free some, set keep_last=, or choose another output_dir{left}"
                ]
            )

    @contextmanager
    def draft(self, name: str) -> Iterator[Draft]:
        """A new directory that becomes version `name` by `publish`, and is removed otherwise."""
        check_name(name)
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        with ExitStack() as last, ExitStack() as undo:  # an interrupt may skip the exit of one
            last.callback(undo.close)
            yield Draft(self._claim_draft(name, undo))

    def publish(self, draft: Draft, name: str, manifest: Mapping[str, Any]) -> Version:
        """Make a sealed draft version `name`, or `name-v2`, ...; durable when this returns."""
        files = {file: record._asdict() for file, record in sorted(draft.records.items())}
        with ExitStack() as last, ExitStack() as undo:
            last.callback(undo.close)
            place = {"sequence": self._next(undo), "files": files}
            text = json.dumps({"schema": SCHEMA, "run": None, **manifest, **place}, indent=2) + "\n"
            (draft.path / MANIFEST).write_text(text, "utf-8")
            sync_directories(draft.path, [draft.path / MANIFEST])
            target = self._rename(draft.path, name, undo)
        try:
            sync(self.root)
        except OSError as error:  # it is there, whole, all the same
            logger.warning("%s may be gone after a power failure: %s", target, error)
        return Version(target.name, target, json.loads(text))

    def prune(
        self, keep_last: int, *, names: Collection[str], keep_steps: frozenset[int]
    ) -> list[str]:
        """Remove the versions that are `prunable`; the names of those that are gone now."""
        found = self.prunable(keep_last, names=names, keep_steps=keep_steps)
        return [version.name for version in found if self._remove(version)]

    def prunable(
        self, keep_last: int, *, names: Collection[str], keep_steps: frozenset[int]
    ) -> list[Version]:
        """All but the newest of the versions called `names`, and but those still to be pushed.

        Args:
            keep_last: how many to leave, at least 1.
            names: versions of other names are left. As a mapping, name -> `Version.identity`: so
                are those that have another manifest now.
            keep_steps: steps, or best steps, whose versions are left.
        """
        ours = [v for v in self.versions() if v.name in names]
        if isinstance(names, Mapping):
            ours = [v for v in ours if v.identity == names[v.name]]
        found = []
        for version in ours[:-keep_last]:
            steps = {version.manifest["step"], version.manifest["best_step"]}
            if not steps & keep_steps and not push_marker(version.path).exists():
                found.append(version)
        return found

    def _claim_draft(self, name: str, undo: ExitStack) -> Path:
        """A draft of our own, under a lock that says so; `undo` removes it, and lets go."""
        while True:
            path, held, empty = self._draft_path(name), ExitStack(), ExitStack()
            undo.callback(held.close)
            empty.enter_context(suppress(OSError))
            empty.callback(os.rmdir, path)
            undo.callback(empty.close)  # where there is no descriptor left for rmtree
            for step in _removal(path):  # one may be interrupted; it is gone when it was published
                undo.callback(step)
            path.mkdir()
            if lock(path, held=held):
                return path
            held.close()  # another process took it for stale before the lock was ours

    def _draft_path(self, name: str) -> Path:
        start = os.fsencode(name)[:_DRAFT_NAME].decode(errors="ignore")
        return self.root / f".{start}.{_host()}.{uuid.uuid4().hex}.draft"

    def _drafts(self) -> Iterator[tuple[Path, str]]:
        """All drafts, and the hosts that they are of."""
        for path in self.root.iterdir():
            if (match := _DRAFT.fullmatch(path.name)) is not None:
                yield path, match["host"]

    def _sweep(self) -> None:
        """Remove drafts whose process died: on this host, the kernel has let go of their locks.

        What cannot be told from the draft of a process that lives is said, once in a process.
        """
        for path, host in self._drafts():
            with ExitStack() as last, ExitStack() as undo, suppress(OSError):  # not ours to open
                last.callback(undo.close)
                if host == _host() and lock(path, held=undo, where_unsupported=False):
                    logger.warning("removing %s, left by a process that died", path)
                    for step in _removal(path):
                        step()
        for path, told in self._left():
            _say_once(path.absolute(), told)

    def _left(self) -> Iterator[tuple[Path, str]]:
        """Drafts that may be of processes that died, and what is to be said of them."""
        for path, host in self._drafts():
            with ExitStack() as last, ExitStack() as undo, suppress(OSError):
                last.callback(undo.close)
                if path.is_dir() and not _is_locked(path, undo):
                    yield path, _told_of_draft(path, host)

    def _next(self, undo: ExitStack) -> int:
        """The sequence of the next version; nobody else publishes before `undo` lets them.

        Where locks do not work, or are not to be had, two versions may have the same.
        """
        patience, file = time.monotonic() + _PATIENCE, self.root / ".lock"
        while not lock(self.root, held=undo, file=file) and time.monotonic() < patience:
            time.sleep(_GLANCE)
        return min(LAST, 1 + max((version.sequence for version in self.versions()), default=0))

    def _rename(self, draft: Path, name: str, undo: ExitStack) -> Path:
        claim = ExitStack()
        undo.callback(claim.close)
        for candidate in numbered(name):
            target = self.root / candidate
            if not _claimed(target, claim):
                continue
            push_marker(target).unlink(missing_ok=True)  # of a version that is gone
            try:
                draft.rename(target)
            except OSError as error:
                if target.is_dir() and any(target.iterdir()):  # somebody moved in: let them have it
                    claim.pop_all()
                    continue
                if error.errno not in _NO_RENAME_ONTO:
                    raise
                _let_go_of(draft)
                _move(draft, target, claim)
            claim.pop_all()
            return target
        raise AssertionError("unreachable")

    def _remove(self, version: Version) -> bool:
        """One rename takes the version away whole; the rest is a stale draft's business.

        Not one that is being pushed, or has to be by now; nor another one of its name.
        """
        gone = self._draft_path(version.name)
        with ExitStack() as last, ExitStack() as undo:
            last.callback(undo.close)
            if not lock(version.path, held=undo) or push_marker(version.path).exists():
                return False
            found = read_version(version.path)
            if found is None or found.identity != version.identity:
                return False
            if not _renamed(version.path, gone):
                return False
            if push_marker(version.path).exists():  # whoever marks it does not ask for the lock
                gone.rename(version.path)
                return False
            shutil.rmtree(gone)
        return True


def _renamed(version: Path, gone: Path) -> bool:
    """Whether a version could be taken away; on Windows not while a file of it is open."""
    try:
        version.rename(gone)
    except PermissionError as error:
        _say_once(version, f"{version} is left, to be pruned later: {error}")
        return False
    return True


def _claimed(target: Path, claim: ExitStack) -> bool:
    """Whether a new, empty directory is ours now; `claim` takes it away while it is empty."""
    if os.path.lexists(target):
        return False
    claim.enter_context(suppress(OSError))
    claim.callback(os.rmdir, target)
    try:
        target.mkdir()
    except FileExistsError:
        claim.pop_all()
        return False
    return True


def _move(draft: Path, target: Path, claim: ExitStack) -> None:
    """Move the files of a draft into a directory of ours; last the manifest: now it is whole."""
    moved = [path for path in sorted(draft.rglob("*")) if path.is_file() and path.name != MANIFEST]
    claim.callback(shutil.rmtree, target, ignore_errors=True)
    for path in [*moved, draft / MANIFEST]:
        place = target / path.relative_to(draft)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.name == MANIFEST:
            sync_directories(target, [target / other.relative_to(draft) for other in moved])
        path.rename(place)


def _removal(path: Path) -> list[Callable[[], None]]:
    remove = partial(shutil.rmtree, path, ignore_errors=True)
    return [remove, partial(_let_go_of, path), remove]


def _let_go_of(path: Path) -> None:
    """Windows moves and removes no file that is mapped, say by a model that nobody has any more."""
    if path.exists():
        gc.collect()


def _say_once(what: object, told: str) -> None:
    if what not in _TOLD:
        _TOLD.add(what)
        logger.warning("%s", told)


def _set_mode(path: Path, mode: int) -> None:
    """Where the file system lets us: on some mounts all files have one mode."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in _NO_CHMOD:
            raise
        _say_once("chmod", f"{path.parent} refuses chmod ({error}); files have the modes it gives")


def _is_locked(path: Path, undo: ExitStack) -> bool:
    """Whether a process that lives has a lock on a draft, as far as can be seen from here."""
    try:
        return not lock(path, held=undo)
    except PermissionError:
        return False


def _told_of_draft(path: Path, host: str) -> str:
    files = [path, *path.rglob("*")]
    stats = [found.lstat() for found in files]
    size = sum(found.st_size for found in stats)
    hours = (time.time() - max(found.st_mtime for found in stats)) / 3600
    return (
        f"{path} ({size / 1e9:.2f} GB, last written {hours:.1f} hours ago) is a draft of host "
        f"{host}; if no process there is merging, remove it"
    )


def check_name(name: str) -> None:
    """Make sure that a version can be called so.

    Raises:
        MergeRefused: it cannot.
    """
    named = re.fullmatch(r"[\w][\w.=+-]{0,150}", name)
    if not named or len(os.fsencode(name)) > _LONGEST_NAME:
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
    host = re.sub(r"[^\w-]", "-", socket.gethostname())
    return host if len(os.fsencode(host)) <= 64 else hashlib.sha256(os.fsencode(host)).hexdigest()


def _unusable(root: Path, error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{root} is, or lies below, a file; choose another output_dir"
    if isinstance(error, PermissionError):
        return f"{root} is not writable; choose another output_dir or change its permissions"
    return f"{root} cannot be used ({error}); choose another output_dir"
