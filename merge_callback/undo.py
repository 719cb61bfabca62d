"""Changes for a while, which an interrupt at any point leaves undone. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing import Self

K = TypeVar("K")
V = TypeVar("V")


class Undone(ExitStack):
    """A context manager of a function that registers each undo before it makes the change.

    An undo is a function of C or of another library's, and idempotent: where it is interrupted, one
    that was registered twice still runs. Nothing of ours runs between the two ends of the context.

    Args:
        change: makes the changes; is given the stack for their undoing.
    """

    def __init__(self, change: Callable[[ExitStack], None]):
        super().__init__()
        self._change = change

    def __enter__(self) -> Self:
        try:
            self._change(self)
            return self
        except BaseException:
            self.close()
            raise


def put(undo: ExitStack, mapping: MutableMapping[K, V], key: K, value: V) -> None:
    """Set an entry of `mapping` until `undo` is closed."""
    if key in mapping:
        undo.callback(mapping.__setitem__, key, mapping[key])
    else:
        undo.callback(mapping.pop, key, None)
    mapping[key] = value


def hooked(undo: ExitStack, module: Any) -> None:
    """Let the hooks that a module is given from now on end when `undo` is closed."""
    for name, hooks in list(vars(module).items()):
        if name.startswith("_forward") and "hooks" in name:
            put(undo, vars(module), name, hooks.copy())
