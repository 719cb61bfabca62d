"""Versions on their way to the Hub, one after the other, in a thread of their own.

What is to be pushed is written beside the version first, so that it can be done later by
`push_version` or by the next run, whatever happens to this process. Knows no models.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import tempfile
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from tqdm.auto import tqdm

from merge_callback.errors import CorruptVersion, MergeRefused, PushError, PushRefused, PushStopped
from merge_callback.foreign import plain, read_json
from merge_callback.hub import (
    Hub,
    Target,
    explain,
    name_problems,
    passes,
    redacted,
    same_repository,
)
from merge_callback.locks import lock
from merge_callback.push import Push, push, weight_bytes
from merge_callback.store import push_marker
from merge_callback.versions import Version, version_at

logger = logging.getLogger(__name__)

_GLANCE = 0.2  # seconds between two looks at the thread


def push_version(
    path: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    token: str | None = None,
    private: bool | None = True,
    revision: str = "main",
    progress: bool = True,
) -> Push:
    """Push a published version to the Hub, or finish a push that was cut off.

    The files go to a branch `merge/<version>` of their own, are compared there with their sha256,
    tagged `<version>` (or `<version>-v2`, ... where that is taken), and become what `revision`
    holds, unless a newer version is there. What is on the Hub already is not sent again.

    Args:
        path: directory of the version, the one that has a `merge_manifest.json`; or that of one of
            its methods.
        repo_id: with or without a namespace. None: where a push that was cut off was going to.
        token: None: HF_TOKEN, or that of `hf auth login`.
        private: whether a repository that has to be made is private; None: as its namespace has it.
        revision: branch that has the newest version; of a push that was cut off: its own.
        progress: show a progress bar.

    Raises:
        CorruptVersion: there is no version at `path`, or a file is not what was written.
        MergeRefused: there is no such directory; or no repo_id, and no push of this version is
            pending, or one that was marked elsewhere and came with copied files.
        PushRefused: no repository can be called so.
        PushError: with the cure; what was done is kept, and the next call goes on from there.
    """
    version = version_at(path)
    if repo_id is not None:
        target = Target(repo_id, private, revision)
    else:
        mark = pending(version)
        if mark is None:
            raise MergeRefused([f"no push of {version.path} is pending; give a repo_id"])
        if not mark.ours:
            raise MergeRefused([_not_ours(version, mark)])
        target = replace(mark.target, private=private)
    if problems := name_problems("repo_id", target.repo_id):
        raise PushRefused(problems)
    uploads = Uploads(Hub(token))
    uploads.add(version, target)
    uploads.join(progress=progress)
    if uploads.failures:
        error = uploads.failures[0].error
        raise error.__cause__ if isinstance(error.__cause__, CorruptVersion) else error
    return uploads.pushes[0]


@dataclass(frozen=True)
class Mark:
    """That a version still has to be pushed.

    Attributes:
        target: where to; private, whatever was asked for: no mark makes anything public.
        ours: whether it was made for this very directory; else it came with copied files.
    """

    target: Target
    ours: bool


def pending(version: Version) -> Mark | None:
    """What is marked beside a version."""
    try:
        found = read_json(push_marker(version.path))
        repo_id, revision = found["repo_id"], found["revision"]
        ours = found.get("directory") == _directory(version)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not (isinstance(repo_id, str) and isinstance(revision, str)):
        return None
    return Mark(Target(repo_id, True, revision), ours)


def to_resume(version: Version, own: Target) -> Target | None:
    """Where a run that pushes to `own` goes on with a push that is pending.

    A mark of another directory, which came with copied files, sends nothing elsewhere.
    """
    mark = pending(version)
    if mark is None:
        logger.warning("%s cannot be read and is ignored: push it again", push_marker(version.path))
        return None
    if same_repository(mark.target.repo_id, own.repo_id):
        return replace(own, revision=mark.target.revision) if mark.ours else own
    if mark.ours and not name_problems("repo_id", mark.target.repo_id):
        return mark.target
    logger.warning("%s", _not_ours(version, mark))
    return None


def _directory(version: Version) -> list[str | int]:
    """What a directory is known by; a copy has another."""
    path = version.path.resolve()
    return [str(path), path.stat().st_ino]


def _not_ours(version: Version, mark: Mark) -> str:
    return (
        f"the pending push of {version.path} to {plain(mark.target.repo_id)} was marked in another "
        "directory and is ignored; to push it there: merge-callback push "
        f"{shlex.quote(str(version.path))} {shlex.quote(plain(mark.target.repo_id))}"
    )


@dataclass(frozen=True)
class PushFailure:
    """A push that is pending still."""

    version: Version
    target: Target
    error: PushError


class Uploads:
    """Pushes versions in the background.

    Attributes:
        pushes: what arrived.
        failures: what did not, and is pending still.
    """

    def __init__(self, hub: Hub):
        self.pushes: list[Push] = []
        self.failures: list[PushFailure] = []
        self.hub = hub
        self._waiting: deque[tuple[Version, Target]] = deque()  # the first is under way
        self._nbytes = 0  # of weights, in all that was added; as Hub.sent counts
        self._change = threading.Lock()
        self._thread: threading.Thread | None = None
        self._hushed = False

    @property
    def stopped(self) -> bool:
        """Whether it pushes nothing any more."""
        return self.hub.stopped.is_set()

    def add(self, version: Version, target: Target) -> None:
        """Push a version when those before it are done; it is marked as pending at once.

        What failed before is tried once more, ahead of it.
        """
        if not _is_marked_elsewhere(version, target):  # what is pending there stays so
            _mark(version, target)
        with self._change:
            again = [(failure.version, failure.target) for failure in self.failures]
            self.failures = []
            for one, where in [*again, (version, target)]:
                if all(one.path != waiting.path for waiting, _ in self._waiting):
                    self._waiting.append((one, where))
                    self._nbytes += weight_bytes(one)
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="push", daemon=True)
                thread.start()
                self._thread = thread
                self._hush()

    def join(self, *, progress: bool) -> None:
        """Wait until all were pushed, or failed; never for a Hub that does not answer."""
        thread = self._thread
        if thread is None:
            return
        if progress:
            self._speak()
        try:
            with tqdm(
                total=self._nbytes, desc="push", unit="B", unit_scale=True, disable=not progress
            ) as bar:
                while thread.is_alive() and time.monotonic() < self.hub.deadline:
                    thread.join(_GLANCE)
                    bar.update(self.hub.sent - bar.n)
        except BaseException:  # what is pending stays so
            self.hub.stopped.set()
            raise
        if thread.is_alive():  # it takes no other step, and ends with the process at the latest
            self.hub.stopped.set()
            self._fail_all(PushError("the Hub has stopped answering"))

    def _work(self) -> None:
        while True:
            with self._change:
                if not self._waiting:
                    self._speak()
                    self._thread = None
                    return
                version, target = self._waiting[0]
            try:
                done = _push_alone(self.hub, version, target)
            except Exception as error:
                if passes(error):  # a Hub that is not there is not there for the others
                    self._fail_all(error)
                else:
                    self._fail(error)
            else:
                self.pushes.append(done)
                with self._change:
                    if self._waiting:
                        self._waiting.popleft()

    def _fail_all(self, error: Exception) -> None:
        while self._waiting:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Give up the version whose turn it is."""
        with self._change:
            if not self._waiting:  # given up already
                return
            version, target = self._waiting.popleft()
            # Without a cause: what the client raises holds the request, and with it the token.
            told = PushError(
                redacted(
                    f"{version.name} could not be pushed to {target.repo_id}: {explain(error)}"
                    + _what_remains(version, target, error)
                )
            )
            if isinstance(error, CorruptVersion):
                told.__cause__ = error
            self.failures.append(PushFailure(version, target, told))
        with suppress(OSError):
            if not version.path.is_dir():  # pruned as its push began
                push_marker(version.path).unlink(missing_ok=True)
            elif not _is_marked_elsewhere(version, target):
                _mark(version, target, told)

    def _hush(self) -> None:
        """No bars of the client's between those of the training, unless the user insists."""
        asked = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
        if not asked and not are_progress_bars_disabled():
            disable_progress_bars()
            self._hushed = True

    def _speak(self) -> None:
        if self._hushed:
            enable_progress_bars()
            self._hushed = False


def _push_alone(hub: Hub, version: Version, target: Target) -> Push:
    """Push, unless another process is at it."""
    with ExitStack() as held:
        if not lock(version.path, held=held):
            raise PushStopped(
                f"another process is pushing {version.path}, or a call of this one that was given "
                "up has not ended yet, or it is gone"
            )
        done = push(hub, version, target)
        if not _is_marked_elsewhere(version, target):
            push_marker(version.path).unlink(missing_ok=True)
    logger.info("pushed %s to %s", version.name, done.url)
    return done


def _what_remains(version: Version, target: Target, error: Exception) -> str:
    if isinstance(error, CorruptVersion):
        return ". Nothing was sent"
    if not version.path.is_dir():
        return ". It was removed meanwhile, and no push is pending"
    if _is_marked_elsewhere(version, target):
        return f". It is whole in {version.path}, and still to be pushed elsewhere: push it again"
    return (
        f". It is whole in {version.path}, and the push is pending: the next run into the same "
        f"directory, or merge_callback.push_version({str(version.path)!r}), goes on from where it "
        "stopped"
    )


def _is_marked_elsewhere(version: Version, target: Target) -> bool:
    """Whether another push of a version is pending, which was marked here."""
    mark = pending(version)
    where = (target.repo_id, target.revision)
    return mark is not None and mark.ours and (mark.target.repo_id, mark.target.revision) != where


def _mark(version: Version, target: Target, error: Exception | None = None) -> None:
    """Note, beside a version, that it is to be pushed, where to, and what went wrong."""
    marker = push_marker(version.path)
    told = {
        "push": "pending",
        "repo_id": target.repo_id,
        "revision": target.revision,
        "directory": _directory(version),
        "error": error and redacted(str(error)),
    }
    # A new file: what lies there under a name that can be guessed may be a link.
    descriptor, draft = tempfile.mkstemp(
        ".push-draft", ".", marker.parent
    )  # names may be at their longest
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(told, indent=2) + "\n")
        Path(draft).replace(marker)
    except OSError:
        Path(draft).unlink(missing_ok=True)
        raise
