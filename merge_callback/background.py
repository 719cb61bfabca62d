"""One job at a time, behind the back of whoever asks for it. Knows nothing of what the jobs do.

They run in a thread of low priority, on one core. A process that ends waits for the job that is
under way, and for the one that waits for it.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from merge_callback.cores import threads_of_one_core

T = TypeVar("T")
BACKLOGS = ("coalesce", "skip", "wait")
_LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of a job: a result, or an error."""

    step: int
    result: T | None = None
    error: Exception | None = None


class Background(Generic[T]):
    """Jobs of which at most one runs, and at most one waits.

    Args:
        backlog: what becomes of a job that comes while another one runs. `"coalesce"`: it waits, in
            the place of one that did; `"skip"`: it is not done, and better not prepared (`skips`);
            `"wait"`: the caller waits.
    """

    def __init__(self, backlog: str):
        self._backlog = backlog
        self._lock = threading.Lock()
        self._process: int | None = None
        self._running: Future[None] | None = None
        self._waiting: tuple[int, Callable[[], T]] | None = None
        self._outcomes: list[Outcome[T]] = []

    def submit(self, step: int, job: Callable[[], T]) -> int | None:
        """Have a job done; the step of one that will not be, or None.

        Args:
            step: what the job is called.
        """
        if self._process is None:
            self._process = os.getpid()
            # Before concurrent.futures forbids new work to the threads that a job has of its own.
            threading._register_atexit(self.join)  # type: ignore[attr-defined]
        if self._backlog == "wait":
            self.join()
        with self._lock:
            if self._is_busy():
                dropped, self._waiting = self._waiting, (step, job)
                return None if dropped is None else dropped[0]
            threads = threads_of_one_core(1, "merge-behind", _lower_priority)
            self._running = threads.submit(self._run, step, job)
            threads.shutdown(wait=False)  # once it has nothing left to do
        return None

    @property
    def skips(self) -> bool:
        """Whether a job that came now would not be done."""
        return self._backlog == "skip" and self._is_busy()

    def _is_busy(self) -> bool:
        return self._running is not None and not self._running.done()

    def _run(self, step: int, job: Callable[[], T]) -> None:
        while True:
            try:
                outcome: Outcome[T] = Outcome(step, job())
            except Exception as error:
                _forget_frames(error)
                outcome = Outcome(step, error=error)
            with self._lock:
                self._outcomes.append(outcome)
                if self._waiting is None:
                    self._running = None
                    return
                (step, job), self._waiting = self._waiting, None

    def outcomes(self) -> list[Outcome[T]]:
        """Those since the last call."""
        with self._lock:
            found, self._outcomes = self._outcomes, []
        return found

    @property
    def has_news(self) -> bool:
        """Whether there are outcomes."""
        return bool(self._outcomes)

    def drop_waiting(self) -> None:
        """Forget the job that waits."""
        with self._lock:
            self._waiting = None

    def join(self) -> None:
        """Wait for all jobs; a process that was forked from theirs has none to wait for."""
        running = self._running
        if running is not None and os.getpid() == self._process:
            running.result()


def _forget_frames(error: BaseException | None) -> None:
    """What an error's frames hold, which is a copy of all that was trained."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _lower_priority() -> None:
    """Of this thread, and of those that it starts; where a thread has a priority of its own."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
