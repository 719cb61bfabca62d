"""Versions on their way to the Hub, one after the other, in a thread of their own.

What is to be pushed is written beside the version first, so that it can be done later by
`push_version` or by the next run, whatever happens to this process. Knows no models.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass

from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from tqdm.auto import tqdm

from merge_callback.errors import CorruptVersion, MergeRefused, PushError, PushRefused, PushStopped
from merge_callback.hub import Hub, Target, explain, name_problems, passes
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
        revision: branch that has the newest version.
        progress: show a progress bar.

    Raises:
        CorruptVersion: there is no version at `path`, or a file is not what was written.
        MergeRefused: there is no such directory; or no repo_id, and no push of this version is
            pending.
        PushRefused: no repository can be called so.
        PushError: with the cure; what was done is kept, and the next call goes on from there.
    """
    version = version_at(path)
    target = Target(repo_id, private, revision) if repo_id is not None else pending(version)
    if target is not None and (problems := name_problems("repo_id", target.repo_id)):
        raise PushRefused(problems)
    if target is None:
        raise MergeRefused([f"no push of {version.path} is pending; give a repo_id"])
    uploads = Uploads(Hub(token))
    uploads.add(version, target)
    uploads.join(progress=progress)
    if uploads.failures:
        error = uploads.failures[0].error
        raise error.__cause__ if isinstance(error.__cause__, CorruptVersion) else error
    return uploads.pushes[0]


def pending(version: Version) -> Target | None:
    """Where a version still has to be pushed to."""
    try:
        found = json.loads(push_marker(version.path).read_text())
        return Target(found["repo_id"], found["private"], found["revision"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
        if pending(version) is None:  # what is pending elsewhere stays so
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
            told = PushError(
                f"{version.name} could not be pushed to {target.repo_id}: {explain(error)}"
                + _what_remains(version, target, error)
            )
            told.__cause__ = error
            self.failures.append(PushFailure(version, target, told))
        with suppress(OSError):
            if not version.path.is_dir():  # pruned as its push began
                push_marker(version.path).unlink(missing_ok=True)
            elif pending(version) in (None, target):
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
        if lock(version.path, held=held) is None:
            raise PushStopped(
                f"another process is pushing {version.path}, or a call of this one that was given "
                "up has not ended yet, or it is gone"
            )
        done = push(hub, version, target)
        if pending(version) in (None, target):
            push_marker(version.path).unlink(missing_ok=True)
    logger.info("pushed %s to %s", version.name, done.url)
    return done


def _what_remains(version: Version, target: Target, error: Exception) -> str:
    if isinstance(error, CorruptVersion):
        return ". Nothing was sent"
    if not version.path.is_dir():
        return ". It was removed meanwhile, and no push is pending"
    if pending(version) not in (None, target):
        return f". It is whole in {version.path}, and still to be pushed elsewhere: push it again"
    return (
        f". It is whole in {version.path}, and the push is pending: the next run into the same "
        f"directory, or merge_callback.push_version({str(version.path)!r}), goes on from where it "
        "stopped"
    )


def _mark(version: Version, target: Target, error: Exception | None = None) -> None:
    """Note, beside a version, that it is to be pushed, where to, and what went wrong."""
    marker = push_marker(version.path)
    draft = marker.with_name(f".{uuid.uuid4().hex}.push-draft")  # the name may be at its longest
    told = {"push": "pending", **asdict(target), "error": error and str(error)}
    draft.write_text(json.dumps(told, indent=2) + "\n")
    draft.replace(marker)
