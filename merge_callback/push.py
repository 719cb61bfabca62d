"""One version onto the Hub: a branch of its own, checked, tagged, then the newest on main.

Every step looks at what is there before it acts, so that each can be repeated: by a retry, by
another process, after an answer that was lost. A version is known by the blob of its manifest,
which names every file with its sha256. Commits are guarded by their parent: of two that race one
wins, and the other looks again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    ModelCard,
)
from huggingface_hub.hf_api import RepoFile

from merge_callback.card import card_for_the_hub
from merge_callback.errors import CorruptVersion, PushError
from merge_callback.files import FileRecord
from merge_callback.foreign import parse_json, plain
from merge_callback.hub import Hub, Target, full_name, redacted
from merge_callback.store import numbered
from merge_callback.versions import MANIFEST, Version

logger = logging.getLogger(__name__)

CARD = "README.md"
_WEIGHTS = ".safetensors"
_ATTRIBUTES = ".gitattributes"  # the Hub's own
# What loaders look for first; one that is not ours would be loaded in place of ours.
_LOADED_FIRST = ("model.safetensors", "model.safetensors.index.json", "adapter_config.json")
_LARGEST_MANIFEST = 1 << 28  # bytes
_NEWEST = " is the newest version"  # ends the title of our commits to the branch of that name
_SKEW = timedelta(days=1)  # of a clock that is believed


@dataclass(frozen=True)
class Push:
    """A version on the Hub.

    Attributes:
        version: its name on the disk.
        repo_id: with its namespace.
        tag: its name on the Hub; what it points at never changes.
        commit: oid of the commit that the tag points at.
        newest: whether it is what the branch of the newest version holds now.
        url: where to look at it.
    """

    version: str
    repo_id: str
    tag: str
    commit: str
    newest: bool
    url: str


def push(hub: Hub, version: Version, target: Target) -> Push:
    """Upload a version, check it there, tag it, and make it the newest unless a newer one is there.

    Raises:
        HfHubHTTPError, ConnectionError, ...: what the client raises; see `hub.explain`.
        CorruptVersion: a file is not what was written.
        PushError: what is on the Hub is not what was sent.
        PushStopped: `hub` was stopped.
    """
    repo_id = full_name(hub, target.repo_id)
    remote = _Remote(hub, repo_id, version, hub.patiently(_files, version, repo_id))
    hub.patiently(hub.api.create_repo, repo_id, private=target.private, exist_ok=True)
    found = hub.patiently(remote.tagged)
    if found is None:
        commit = remote.upload()
        found = hub.patiently(remote.tag, commit), commit
    tag, commit = found
    newest = hub.patiently(remote.make_newest, target.revision, tag, commit)
    url = f"{hub.api.endpoint}/{repo_id}/tree/{tag}"
    return Push(version.name, repo_id, tag, commit, newest, url)


def weight_bytes(version: Version) -> int:
    """Bytes in the weight files of a version."""
    files = version.manifest["files"]
    return sum(file["size"] for name, file in files.items() if name.endswith(_WEIGHTS))


@dataclass(frozen=True)
class _File:
    """A file as it shall lie on the Hub."""

    content: Path | bytes
    record: FileRecord

    @classmethod
    def of_text(cls, text: str) -> _File:
        content = text.encode()
        return cls(content, FileRecord(len(content), hashlib.sha256(content).hexdigest()))

    def addition(self, path: str) -> CommitOperationAdd:
        """It, to be added at `path`; the client hashes it once, before anything is sent."""
        try:
            found = CommitOperationAdd(path, self.content)
        except (OSError, ValueError) as error:  # it is gone
            raise CorruptVersion(f"{path} cannot be read: {error}") from error
        if found.upload_info.sha256.hex() != self.record.sha256:
            raise CorruptVersion(f"{path} is not what was written; do not use it")
        return found

    def is_at(self, entry: RepoFile | None) -> bool:
        """Whether the Hub has this file there."""
        if entry is None:
            return False
        if entry.lfs is not None:
            return (entry.lfs.size, entry.lfs.sha256) == self.record
        return entry.size == self.record.size and entry.blob_id == _git_oid(self._read())

    def _read(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        content = self.content.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.record.sha256:
            raise CorruptVersion(f"{self.content} is not what was written; do not use it")
        return content


def _files(version: Version, repo_id: str) -> dict[str, _File]:
    """Path in the repository -> file. Cards are as they stand on the disk, links set right."""
    files = {name: _File(version.file(name), record) for name, record in version.records().items()}
    for name in filter(_is_card, list(files)):
        card = _card(version.path / name, repo_id)
        if card is None:
            del files[name]
        else:
            files[name] = _File.of_text(card)
    records = {name: file.record._asdict() for name, file in files.items()}
    manifest = {**version.manifest, "files": records}
    files[MANIFEST] = _File.of_text(json.dumps(manifest, indent=2) + "\n")
    return files


def _card(path: Path, repo_id: str) -> str | None:
    """A card for the Hub; None if there is none that the Hub takes: the model is worth more."""
    folder = path.parent.name if not (path.parent / MANIFEST).exists() else ""
    try:
        text = card_for_the_hub(path.read_text("utf-8"), repo_id, folder)
        ModelCard(text).validate()
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        told = plain(redacted(str(error)))
        logger.warning("%s is left out of the push, its header is not valid: %s", path, told)
        return None
    return text


class _Remote:
    """What is on the Hub of one version, and what is to come."""

    def __init__(self, hub: Hub, repo_id: str, version: Version, files: Mapping[str, _File]):
        self._hub = hub
        self._api = hub.api
        self._repo_id = repo_id
        self._version = version
        self._files = files
        self._additions = self._new_additions()

    def tagged(self) -> tuple[str, str] | None:
        """The tag of this version and its commit, when it was pushed before."""
        tags = self._tags()
        for name in numbered(self._version.name):
            if name not in tags:
                return None
            if self._is_ours(self._tree(name)):
                return name, tags[name]
        raise AssertionError("unreachable")

    def upload(self) -> str:
        """Put the files onto a branch of their own, nothing else beside them; its commit."""
        branch, _, _ = self._hub.patiently(self._own_branch)
        for path, addition in self._additions.items():
            if path.endswith(_WEIGHTS):
                self._hub.send(
                    self._files[path].record.size,
                    self._api.preupload_lfs_files,
                    self._repo_id,
                    additions=[addition],
                    revision=branch,
                )
        return self._hub.patiently(self._commit_files)

    def tag(self, commit: str) -> str:
        """Tag a commit, under the first name that is free."""
        tags = self._tags()
        for name in numbered(self._version.name):
            if name not in tags:
                self._api.create_tag(self._repo_id, tag=name, revision=commit, exist_ok=False)
                return name
            if self._is_ours(self._tree(name)):
                return name
        raise AssertionError("unreachable")

    def make_newest(self, branch: str, tag: str, commit: str) -> bool:
        """Let a branch hold this version, unless a newer one is there; whether it holds it now.

        Files that we did not write stay, and so does a card that was edited there.
        """
        head = self._head_of(branch)
        tree = self._tree(head)
        if self._is_ours(tree) and not self._missing(tree):
            return True
        if self._is_older_than(self._manifest_at(head, tree.get(MANIFEST)), branch, tag):
            return False
        ours = self._last_written(branch, tree)
        kept = {path for path in self._files if _is_card(path) and path in tree} - ours
        if kept:
            logger.info("%s of %s stays as it is", ", ".join(sorted(kept)), self._repo_id)
        stale = sorted(ours - set(self._files))
        source = self._tree(commit)
        changes: list[Any] = [CommitOperationDelete(path, is_folder=False) for path in stale]
        for path, file in self._files.items():
            if path in kept or file.is_at(tree.get(path)):
                continue
            if source[path].lfs is not None:  # on the server already
                changes.append(CommitOperationCopy(path, path, src_revision=commit))
            else:
                changes.append(CommitOperationAdd(path, file.content))
        done = self._commit(branch, head, changes, f"{tag}{_NEWEST}")
        if missing := self._missing(self._tree(done.oid)):
            raise PushError(
                f"{branch} lacks {', '.join(missing)}: does a .gitignore name it there?"
            )
        self._warn_of_others(branch, set(tree) - set(stale) - set(self._files))
        return True

    def _own_branch(self) -> tuple[str, str, dict[str, RepoFile]]:
        """A branch that holds this version, or nothing yet: its name, head and files."""
        branches = self._branches()
        for name in numbered(f"merge/{self._version.name}"):
            start = branches["main"]
            if name not in branches:
                self._api.create_branch(self._repo_id, branch=name, revision=start, exist_ok=True)
                branches = self._branches()
            head = branches[name]
            tree = self._tree(head)
            if (
                self._is_ours(tree)
                or head == start
                or head in (oid for _, oid in self._history("main"))
            ):
                return name, head, tree
        raise AssertionError("unreachable")

    def _commit_files(self) -> str:
        branch, head, tree = self._own_branch()
        if not self._differences(tree):
            return head
        others = set(tree) - set(self._files) - {_ATTRIBUTES}
        changes = [CommitOperationDelete(path, is_folder=False) for path in sorted(others)]
        done = self._commit(branch, head, [*changes, *self._additions.values()], branch)
        wrong = self._differences(self._tree(done.oid))
        if wrong:
            self._additions = self._new_additions()
            raise PushError(f"what is on the Hub is not what was sent: {'; '.join(wrong)}")
        return str(done.oid)

    def _commit(self, branch: str, head: str, changes: list[Any], message: str) -> CommitInfo:
        self._hub.go_on()  # a call before, of the same step, may have come back too late
        return self._api.create_commit(
            self._repo_id,
            changes,
            commit_message=message,
            revision=branch,
            parent_commit=head,
        )

    def _differences(self, tree: Mapping[str, RepoFile]) -> list[str]:
        wrong = []
        for path, file in self._files.items():
            if path not in tree:
                wrong.append(f"{path} is missing (does a .gitignore there name it?)")
            elif not file.is_at(tree[path]):
                wrong.append(f"{path} differs ({tree[path].size} bytes for {file.record.size})")
        others = set(tree) - set(self._files) - {_ATTRIBUTES}
        return [*wrong, *(f"{path} does not belong there" for path in sorted(others))]

    def _missing(self, tree: Mapping[str, RepoFile]) -> list[str]:
        """What a branch lacks of this version; cards may be others."""
        files = self._files.items()
        return [p for p, file in files if not _is_card(p) and not file.is_at(tree.get(p))]

    def _last_written(self, branch: str, tree: Mapping[str, RepoFile]) -> set[str]:
        """Files on a branch that we wrote: they are as the tag has them that was put there last.

        Not as its manifest says, which anybody may have edited there.
        """
        tags = self._tags()
        titles = (title for title, _ in self._history(branch) if title.endswith(_NEWEST))
        tag = next((t for title in titles if (t := title.removesuffix(_NEWEST)) in tags), None)
        if tag is None:
            return set()
        last = self._tree(tag)
        same = (path for path in tree if path in last and tree[path].blob_id == last[path].blob_id)
        return set(same) - {_ATTRIBUTES}

    def _is_older_than(self, there: Mapping[str, Any], branch: str, tag: str) -> bool:
        """Whether the version that a branch holds is newer than this one."""
        here = self._version.manifest
        place = f"{branch} of {self._repo_id}"
        order = _order(there), _order(here)
        if (
            there.get("run") is not None
            and there.get("run") == here.get("run")
            and None not in order
        ):
            newer = order[0] > order[1]  # type: ignore[operator]
        else:
            made = _moment(there.get("created"))
            if made > datetime.now(timezone.utc) + _SKEW:
                logger.warning(
                    "%s holds a version that says it was made at %s, which is still to come: it is "
                    "not taken for newer, and is replaced; its tag stays",
                    place,
                    made,
                )
                return False
            newer = made > _moment(here.get("created"))
        if newer:
            logger.warning(
                "%s holds a newer version, made at %s, which stays: load this one by its tag, %s, "
                "or delete %s on that branch and push %s again",
                place,
                plain(there.get("created")),
                tag,
                MANIFEST,
                self._version.name,
            )
        return newer

    def _warn_of_others(self, branch: str, others: set[str]) -> None:
        wrong = [name for name in _LOADED_FIRST if name in others]
        if wrong:
            logger.warning(
                "%s on %s of %s was not written by us and stays, but loaders take it in place of "
                "the merged model: delete it there, or load the tag",
                ", ".join(wrong),
                branch,
                self._repo_id,
            )

    def _is_ours(self, tree: Mapping[str, RepoFile]) -> bool:
        return self._files[MANIFEST].is_at(tree.get(MANIFEST))

    def _new_additions(self) -> dict[str, CommitOperationAdd]:
        return {path: file.addition(path) for path, file in self._files.items()}

    def _head_of(self, branch: str) -> str:
        if branch not in self._branches():
            self._api.create_branch(self._repo_id, branch=branch, exist_ok=True)
        return self._branches()[branch]

    def _branches(self) -> dict[str, str]:
        refs = self._api.list_repo_refs(self._repo_id)
        return {ref.name: ref.target_commit for ref in refs.branches}

    def _tags(self) -> dict[str, str]:
        refs = self._api.list_repo_refs(self._repo_id)
        return {ref.name: ref.target_commit for ref in refs.tags}

    def _history(self, branch: str) -> Iterator[tuple[str, str]]:
        """Title and oid of each commit, the newest first."""
        commits = self._api.list_repo_commits(self._repo_id, revision=branch)
        return ((commit.title, commit.commit_id) for commit in commits)

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        entries = self._api.list_repo_tree(self._repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _manifest_at(self, revision: str, entry: RepoFile | None) -> Mapping[str, Any]:
        """What stands in the manifest there; nothing if there is none that can be read."""
        if entry is None or entry.size > _LARGEST_MANIFEST:
            return {}
        try:
            found = parse_json(self._content(MANIFEST, revision))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _content(self, path: str, revision: str) -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            found = self._api.hf_hub_download(
                self._repo_id, path, revision=revision, local_dir=directory
            )
            return Path(found).read_bytes()


def _order(manifest: Mapping[str, Any]) -> int | None:
    """The place of a version among those of its run."""
    found = manifest.get("sequence")
    return found if type(found) is int else None


def _moment(created: Any) -> datetime:
    """When a version was made; what says nothing of it is older than all else."""
    try:
        found = datetime.fromisoformat(created)
    except (ValueError, TypeError):
        return datetime.min.replace(tzinfo=timezone.utc)
    return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)


def _is_card(path: str) -> bool:
    return PurePosixPath(path).name == CARD


def _git_oid(content: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
