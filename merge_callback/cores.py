"""Threads that compute on one core each. Knows nothing of what they compute.

A weight's rows are too few to be worth the cores of a machine: torch would wait for the slowest of
them after each operation. Whole weights are enough work to be given to one core each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch


@contextmanager
def one_core_each(count: int) -> Iterator[Executor]:
    """Threads in which torch uses one core; in all others it goes on with those that it had."""
    with threads_of_one_core(count, "merge") as threads:
        try:
            yield threads
        finally:
            threads.shutdown(cancel_futures=True)


def threads_of_one_core(
    count: int, name: str, begin: Callable[[], None] = lambda: None
) -> ThreadPoolExecutor:
    """The same, until they are shut down.

    Args:
        begin: what each thread does first.
    """

    def take_one_core() -> None:
        torch.get_num_threads()  # a thread that never asked would take those of the others later
        torch.set_num_threads(1)
        begin()

    before = torch.get_num_threads()
    started = Barrier(count + 1)
    threads = ThreadPoolExecutor(count, name, take_one_core)
    for _ in range(count):
        threads.submit(started.wait)
    started.wait()
    torch.set_num_threads(before)  # what one thread sets holds for those that start later
    return threads
