"""Read data in a forked process, as a worker of a data loader does. Knows nothing of models.

Whatever a dataset or a collator changes while it is read (random generators, files that it opens on
first use, caches) changes in that process and nowhere else.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from merge_callback.errors import MergeError

_OPEN_FILES = "/proc/self/fd"
_SILENCE = 600.0  # seconds without a batch; a fork can inherit a lock that nobody will release
# Without /proc no file can be opened anew, and a fork of macOS may crash in the system's libraries.
POSSIBLE = hasattr(os, "fork") and os.path.isdir(_OPEN_FILES)


def forked(draw: Callable[[], Iterable[Any]]) -> Iterator[Mapping[str, Any]]:
    """What `draw` gives in a forked process, which ends when nobody wants more of it.

    Files that are open for reading are opened anew there, so that no offset is shared.

    Raises:
        MergeError: the process could not be started, raised an error, or was silent for too long.
    """
    with ExitStack() as undo:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        undo.callback(receiver.close)
        undo.callback(sender.close)
        undo.callback(_end, _fork(receiver, sender, draw))
        sender.close()
        while (batch := _next(receiver)) is not None:
            yield batch


def _fork(receiver: Connection, sender: Connection, draw: Callable[[], Iterable[Any]]) -> int:
    """The number of a process that sends what `draw` gives; in that process it does not return."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12
            process = os.fork()
    except OSError as error:
        raise MergeError(f"no process can be started to read it: {error}") from error
    if not process:
        receiver.close()  # so that sending fails once nobody receives
        _serve(sender, draw)
    return process


def _next(receiver: Connection) -> Mapping[str, Any] | None:
    if not receiver.poll(_SILENCE):
        raise MergeError(f"no batch came in {_SILENCE:.0f} s")
    try:
        error, batch = pickle.loads(receiver.recv_bytes())  # our own process has written it
    except EOFError:
        raise MergeError("the process that read it died; is memory short?") from None
    if error is not None:
        raise MergeError(error)
    found: Mapping[str, Any] | None = batch
    return found


def _end(process: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _serve(sender: Connection, draw: Callable[[], Iterable[Any]]) -> None:
    """Send batches, then None; in a process of its own, which ends here."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in a fork their threads are gone
        torch.set_num_threads(1)  # as OpenMP's are
        _open_files_anew()
        try:
            for batch in draw():
                sender.send_bytes(pickle.dumps((None, _sendable(batch))))
            sender.send_bytes(pickle.dumps((None, None)))
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            sender.send_bytes(pickle.dumps((told, None)))
    finally:
        os._exit(0)


def _sendable(batch: Any) -> Mapping[str, Any]:
    """A batch with its tensors on the CPU, without what cannot be sent."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"the collator gives a {type(batch).__name__}, and a batch is a dict")
    values = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {key: value for key, value in values.items() if _is_sendable(value)}


def _is_sendable(value: Any) -> bool:
    with suppress(Exception):
        return isinstance(value, Tensor) or bool(pickle.dumps(value))
    return False


def _open_files_anew() -> None:
    """Give this process offsets of its own in the files that it inherited for reading."""
    import fcntl  # Windows has none

    with suppress(OSError):
        for descriptor in map(int, os.listdir(_OPEN_FILES)):
            with suppress(OSError):  # the listing itself is closed by now
                read_only = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
                if read_only and stat.S_ISREG(os.fstat(descriptor).st_mode):
                    anew = os.open(f"{_OPEN_FILES}/{descriptor}", os.O_RDONLY)
                    os.lseek(anew, os.lseek(descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
                    os.dup2(anew, descriptor)
                    os.close(anew)
