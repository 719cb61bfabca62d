"""What a published version is, and reading one: its manifest may say anything. Knows no models."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from merge_callback.errors import CorruptVersion, MergeRefused
from merge_callback.files import FileRecord, hash_file

logger = logging.getLogger(__name__)

MANIFEST = "merge_manifest.json"
SCHEMA = 1
LAST = 2**53  # the largest `sequence`: what readers of JSON keep exactly
_LARGEST_MANIFEST = 1 << 28  # bytes; some hundred for each weight


@dataclass(frozen=True)
class Version:
    """A published version."""

    name: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def run(self) -> str | None:
        """Id of the callback that published it; None: another way, or before 0.2."""
        run: str | None = self.manifest.get("run")
        return run

    @property
    def sequence(self) -> int:
        """Its place among the versions of its root; 0: of 0.1, before all that have one."""
        sequence: int = self.manifest.get("sequence", 0)
        return sequence

    @property
    def order(self) -> tuple[int, str, int]:
        """What versions are sorted by, the oldest first. No clock: one may go back."""
        return self.sequence, self.manifest["created"], _number(self.name)

    @property
    def identity(self) -> str:
        """sha256 of its manifest: names are used again."""
        return identity(self.manifest)

    def records(self) -> dict[str, FileRecord]:
        """What each file is known by, by its path below the version."""
        files = self.manifest["files"]
        return {name: FileRecord(found["size"], found["sha256"]) for name, found in files.items()}

    def others(self) -> list[str]:
        """Files below the version that are none of it."""
        own = {MANIFEST, *self.records()}
        files = (p for p in sorted(self.path.rglob("*")) if p.is_symlink() or not p.is_dir())
        return [name for p in files if (name := p.relative_to(self.path).as_posix()) not in own]

    def read(self, name: str) -> str:
        """The text of a file.

        Raises:
            CorruptVersion: it is missing, or not as it was written.
        """
        check_files(self.path, {name: self.records()[name]})
        return self.file(name).read_text("utf-8")

    def file(self, name: str) -> Path:
        """Where a file lies.

        Raises:
            CorruptVersion: a link leads out of the version, or it is a pipe or the like.
        """
        path = self.path / name
        if path.exists() and not path.is_file():
            raise CorruptVersion(f"{path} is no file; do not use it")
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise CorruptVersion(f"{path} leads out of the version; do not use it")
        return path


def identity(manifest: Mapping[str, Any]) -> str:
    """sha256 of what a manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def version_at(path: str | os.PathLike[str]) -> Version:
    """The version in a directory, or the one of which it holds what a single method has written.

    Raises:
        MergeRefused: there is no such directory.
        CorruptVersion: it is no version.
    """
    place = Path(path).resolve()
    if not place.is_dir():
        raise MergeRefused([f"{path} is no directory"])
    found = read_version(place)
    if found is None and (above := read_version(place.parent)) is not None:
        parts = {PurePosixPath(name).parts[0] for name in above.records() if "/" in name}
        found = above if place.name in parts else None
    if found is None:
        raise CorruptVersion(f"{path} has no readable {MANIFEST}: it is not a published version")
    return found


def read_version(path: Path) -> Version | None:
    """The version at `path`; None when there is none, whatever else lies there."""
    if path.name.startswith(".") or path.is_symlink():
        return None
    try:
        found = (path / MANIFEST).lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_MANIFEST:
            return None
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        if manifest["schema"] > SCHEMA:
            logger.warning("%s was written by a newer merge_callback and is left alone", path)
            return None
        if _is_sound(manifest):
            return Version(path.name, path, manifest)
    except OSError:  # there is none, or it was pruned just now
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    logger.warning("%s has a damaged %s and is left alone", path, MANIFEST)
    return None


def _is_sound(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has what a version is known by, of the right kinds."""
    verification = manifest.get("verification") or {}
    models = verification.get("models") or {}
    return (
        all(isinstance(manifest[key], str) for key in ("kind", "created"))
        and all(isinstance(manifest[key], int | None) for key in ("step", "best_step"))
        and isinstance(manifest.get("run"), str | None)
        and 0 <= operator.index(manifest.get("sequence", 0)) <= LAST
        and all(isinstance(method, str) for method in manifest.get("save_methods", ()))
        and all(isinstance(figures, dict) for figures in models.values())
        and all(map(_is_record, manifest["files"].items()))
    )


def _is_record(item: tuple[Any, Any]) -> bool:
    """Whether a manifest's entry names a file below its version, and says what it is known by."""
    name, record = item
    path = Path(name)  # of Windows, a backslash and a drive lead elsewhere too
    below = name == path.as_posix() and not path.anchor and "\0" not in name
    return (
        below
        and not {"..", "."} & set(name.split("/"))
        and isinstance(record["size"], int)
        and isinstance(record["sha256"], str)
    )


def check_files(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """Read files back and compare them with what was written.

    Raises:
        CorruptVersion: naming the file.
    """
    for name, record in records.items():
        try:
            found = hash_file(directory / name)
        except OSError as error:
            raise CorruptVersion(f"{directory / name} cannot be read: {error}") from error
        if found != record:
            raise CorruptVersion(
                f"{directory / name} is not what was written ({found.size} bytes, sha256 "
                f"{found.sha256[:12]}…; expected {record.size} bytes, {record.sha256[:12]}…); "
                "do not use it, and check the disk"
            )


def _number(name: str) -> int:
    match = re.search(r"-v(\d+)$", name)
    return int(match[1]) if match else 1
