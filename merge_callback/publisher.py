"""Where on the Hub the versions of a training run go. Reads a trainer's arguments, no trainer."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import TrainingArguments

from merge_callback.errors import PushRefused
from merge_callback.hub import QUICK, Hub, Target, preflight, redacted, same_repository
from merge_callback.push import Push
from merge_callback.store import MergeStore
from merge_callback.uploads import PushFailure, Uploads, to_resume
from merge_callback.versions import Version

logger = logging.getLogger(__name__)


class Publisher:
    """Pushes the versions of a run.

    Args:
        model_id: as it stands; None: `<args.hub_model_id or name of args.output_dir>-merged`, so
            that the adapter's own repository is never written to.
        token: None: `args.hub_token`, then HF_TOKEN, then that of `hf auth login`.
        private: of a repository that has to be made; None: as its namespace has it.
        revision: branch that has the newest version; None: main.
        check: see before training whether the Hub will take them.
    """

    def __init__(
        self,
        model_id: str | None,
        token: str | None,
        private: bool | None,
        revision: str | None,
        check: bool,
    ):
        self._model_id = model_id
        self._token = token
        self._private = private
        self._revision = revision or "main"
        self._check = check
        self._target: Target | None = None
        self._uploads: Uploads | None = None

    def check(self, args: TrainingArguments) -> None:
        """Check what can be checked before training.

        Raises:
            PushRefused: what stands against pushing, and which setting to change.
        """
        token = self._token or args.hub_token
        if self._uploads is None or self._uploads.stopped:
            self._uploads = Uploads(Hub(token))
        adapter = args.hub_model_id or Path(args.output_dir or ".").absolute().name
        repo_id = self._model_id or f"{adapter}-merged"
        taken = adapter if args.push_to_hub else None
        if self._check:
            repo_id = preflight(Hub(token, QUICK), repo_id, self._private, taken)
        elif taken is not None and same_repository(repo_id, taken):
            raise PushRefused([f"the trainer pushes to {taken}: choose another hub_model_id"])
        self._target = Target(repo_id, self._private, self._revision)

    def resume(self, store: MergeStore) -> None:
        """Go on with pushes that an earlier run left."""
        assert self._uploads is not None and self._target is not None
        for version in store.pending():
            target = to_resume(version, self._target)
            if target is not None:
                logger.info("going on with the push of %s to %s", version.path, target.repo_id)
                self._uploads.add(version, target)

    def add(self, version: Version) -> None:
        """Push a version in the background; that it fails is no failure of the merge."""
        assert self._uploads is not None and self._target is not None
        try:
            self._uploads.add(version, self._target)
        except Exception as error:  # the disk is full, or there are too many threads
            logger.warning("%s is not pushed: %s", version.path, redacted(str(error)))

    def finish(self, *, progress: bool) -> tuple[list[Push], list[PushFailure]]:
        """Wait for what is under way; what arrived since the last call, and what is pending."""
        if self._uploads is None:
            return [], []
        self._uploads.join(progress=progress)
        done, failed = self._uploads.pushes, self._uploads.failures
        self._uploads.pushes, self._uploads.failures = [], []
        return done, failed
