"""Threads that compute on one core each. Knows nothing of what they compute.

A weight's rows are too few to be worth the cores of a machine: torch would wait for the slowest of
them after each operation. Whole weights are enough work to be given to one core each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Event, Semaphore
from typing import TypeVar

import torch

from merge_callback.errors import MergeError

S = TypeVar("S")
T = TypeVar("T")


def in_order(count: int, work: Callable[[S], T], items: Iterable[S]) -> Iterator[tuple[S, T]]:
    """Each item and what comes of it, in order; `count` of them are worked on at a time.

    Args:
        count: how many threads of one core; 1: none, but this one with all cores that it has.
    """
    if count == 1:
        for item in items:
            yield item, work(item)
        return
    with one_core_each(count) as threads:
        ahead: deque[tuple[S, Future[T]]] = deque()
        for item in items:
            ahead.append((item, threads.submit(work, item)))
            if len(ahead) > count:
                first, working = ahead.popleft()
                yield first, working.result()
        for item, working in ahead:
            yield item, working.result()


@contextmanager
def one_core_each(count: int) -> Iterator[Executor]:
    """Threads in which torch uses one core; in all others it goes on with those that it had."""
    with ExitStack() as undo:
        threads = undo.enter_context(threads_of_one_core(count, "merge"))
        undo.callback(threads.shutdown, cancel_futures=True)
        yield threads


def threads_of_one_core(
    count: int, name: str, begin: Callable[[], None] = lambda: None
) -> ThreadPoolExecutor:
    """The same, until they are shut down.

    Args:
        begin: what each thread does first.

    Raises:
        MergeError: the system allows no more threads.
    """

    def begin_and_wait() -> None:
        try:
            torch.get_num_threads()  # a thread that never asked takes those of the others later
            torch.set_num_threads(1)
            begin()
        finally:
            started.release()
        all_started.wait()  # so that each of these has a thread of its own

    before = torch.get_num_threads()
    started, all_started = Semaphore(0), Event()
    threads = ThreadPoolExecutor(count, name)
    with ExitStack() as undo:
        # What one thread sets holds for those that start later.
        undo.callback(torch.set_num_threads, before)
        stop = undo.enter_context(ExitStack())
        stop.callback(threads.shutdown, wait=False, cancel_futures=True)
        undo.callback(all_started.set)  # those that did start do not wait for ever
        begun = [_submit(threads, begin_and_wait) for _ in range(count)]
        for _ in range(count):
            started.acquire()
        stop.pop_all()
    for future in begun:
        future.result()
    return threads


def _submit(threads: Executor, task: Callable[[], None]) -> Future[None]:
    try:
        return threads.submit(task)
    except RuntimeError as error:
        raise MergeError(
            f"no thread can be started ({error}); raise the limit of processes (ulimit -u, or the "
            "container's pids limit)"
        ) from error
