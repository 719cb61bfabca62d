"""The processes of one training: what they do together, and that they end alike.

Each of them goes through the same story; one of them, the leader, writes. They talk in a group of
their own, on the CPU and with a time limit of its own, since a merge may take longer than
`ddp_timeout`. Before anything is exchanged each says whether it is well: what fails in one process
fails in all, at the next exchange at the latest. Knows no models.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from merge_callback.errors import MergeError

T = TypeVar("T")
BARRIER_TIMEOUT = 7200.0  # seconds


class PeerError(MergeError):
    """Another process of the training failed."""


class Processes:
    """This process, and the others of its training.

    Args:
        timeout: seconds that they wait for one another. All of them have to make this object at
            the same point.
        alone: there are no others, whatever torch.distributed says.
    """

    def __init__(self, timeout: float = BARRIER_TIMEOUT, *, alone: bool = False):
        together = not alone and self.are_several()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self._group: Any = None
        self._known: BaseException | None = None  # an error of this process that was told
        if self.count > 1:
            limit = datetime.timedelta(seconds=timeout)
            self._group = dist.new_group(backend="gloo", timeout=limit)

    @staticmethod
    def are_several() -> bool:
        """Whether torch.distributed knows of others."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def close(self) -> None:
        """The last word: none of them asks the others anything from here on.

        Gloo's threads free what was exchanged a little later, which takes Python's lock: one that
        waits for it when the interpreter ends would abort the process (SIGABRT).
        """
        if self._group is not None:
            dist.destroy_process_group(self._group)  # joins its threads
            self._group, self.count = None, 1

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Within it, what fails in one process fails in all; they leave it together.

        Raises:
            PeerError: another process failed, or is gone.
        """
        try:
            yield
        except BaseException as error:
            if self.count > 1 and not self._is_known(error):  # its frames hold models
                self._known = error
                with suppress(PeerError):  # it is this process's own error that counts here
                    self._exchange(f"{error}" or type(error).__name__)
            raise
        self._exchange(None)

    def agree(self) -> None:
        """Go on only if all processes are well.

        Raises:
            PeerError: one is not.
        """
        self._exchange(None)

    def add_up(self, *tensors: Tensor) -> None:
        """Sum tensors over all processes, in place."""
        if self.count == 1:
            return
        here = [tensor.cpu() for tensor in tensors]
        self._exchange(None)
        for tensor, summed in zip(tensors, here, strict=True):
            self._collective(dist.all_reduce, summed, group=self._group)
            tensor.copy_(summed)

    def from_leader(self, value: T) -> T:
        """What the leader has."""
        if self.count == 1:
            return value
        self._exchange(None)
        told = [value]
        self._collective(dist.broadcast_object_list, told, src=0, group=self._group)
        return told[0]

    def announce(self, what: str | None) -> None:
        """For the leader: what comes next, to those that are `listening`; None: no more."""
        self.from_leader(what)

    def listening(self) -> Iterator[str]:
        """For the others: what the leader announces, until there is no more."""
        while (what := self.from_leader(None)) is not None:
            yield what

    def _is_known(self, error: BaseException | None) -> bool:
        """Whether the other processes have heard of an error, or this one has it from them."""
        while error is not None:
            if isinstance(error, PeerError) or error is self._known:
                return True
            error = error.__cause__ or error.__context__
        return False

    def _exchange(self, failure: str | None) -> None:
        """Tell the others whether this process is well, and hear of them."""
        if self.count == 1:
            return
        ill = torch.tensor([failure is not None], dtype=torch.int32)
        self._collective(dist.all_reduce, ill, group=self._group)
        if not ill:
            return
        told: list[Any] = [None] * self.count
        self._collective(dist.all_gather_object, told, failure, group=self._group)
        first = next(rank for rank, said in enumerate(told) if said is not None)
        raise PeerError(f"process {first} failed: {told[first]}")

    def _collective(self, call: Any, *args: Any, **settings: Any) -> None:
        try:
            call(*args, **settings)
        except RuntimeError as error:  # one of them died, or kept the others waiting for too long
            raise PeerError(f"another process is gone, or does not answer: {error}") from error


ALONE = Processes(alone=True)
