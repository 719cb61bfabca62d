"""The errors that users see. Knows nothing of tensors or files."""

from collections.abc import Sequence
from typing import Any


class MergeError(Exception):
    """A merge that cannot be done, or that failed.

    Never a RuntimeError: accelerate restarts training with a smaller batch when a RuntimeError
    speaks of memory, and a merge that ran out of memory is no reason to train again.
    """


class MergeRefused(MergeError):
    """What was asked for cannot be exported; every problem that was found is listed at once."""

    headline = "the merge is refused"

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{self.headline}:{lines}")

    def __reduce__(self) -> tuple[Any, ...]:  # processes tell one another
        return type(self), (self.problems,)


class PushRefused(MergeRefused):
    """What was asked for cannot be pushed; found before training."""

    headline = "the merged model cannot be pushed"


class PushError(MergeError):
    """A push that failed. The version is whole on the disk, and the push can be resumed."""


class PushStopped(PushError):
    """A push that was stopped before its next step."""


class CorruptVersion(MergeError):
    """A file of a version is missing, or differs from what the manifest says."""


class VerificationError(MergeError):
    """What was written is not what was trained, or further from it than was allowed.

    Nothing was published. `problems`: each with the tensors that it is about, or the cure.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"the merged model is not published:{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)
