"""Tensors of which each process holds a part: FSDP2's, and those that an engine hides.

Knows nothing of what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Unit:
    """What an engine gathers at once; all processes have to enter the context together."""

    gathered: Callable[[], AbstractContextManager[Any]]


class Hidden(Tensor):
    """Stands for a tensor that an engine keeps in parts: its shape, dtype and device, no values.

    Args:
        like: the tensor, if it is gathered.
        shape: of the whole tensor.
        unit: within whose context it is whole.
        read: gives it then.
        identity: equal for tensors that are one in memory.
    """

    unit: Unit
    read: Callable[[], Tensor]
    identity: Any
    quant_state: Any

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        shape: torch.Size,
        unit: Unit,
        read: Callable[[], Tensor],
        identity: Any,
    ) -> Hidden:
        made: Hidden = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        made.unit, made.read, made.identity = unit, read, identity
        made.quant_state = getattr(like, "quant_state", None)
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Hidden({tuple(self.shape)}, {self.dtype})"

    def detach(self) -> Tensor:
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{func} needs the values of a tensor that is kept in parts: {args[0]}")


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of it alone."""
    return isinstance(tensor, DTensor | Hidden)


def storage(tensor: Tensor) -> Any:
    """Equal for tensors that are one in memory."""
    if isinstance(tensor, Hidden):
        return tensor.identity
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).data_ptr()


def unit_of(tensor: Any) -> Unit | None:
    """What is gathered when this tensor is; None: the tensor alone, or nothing."""
    return tensor.unit if isinstance(tensor, Hidden) else None


def whole(value: T) -> T:
    """A tensor, or what is made of tensors, with all that other processes hold of it.

    They all have to ask, in the same order. What is not sharded is given back as it is.

    Args:
        value: a tensor, a tuple, or a dataclass; others are left alone.
    """
    with ExitStack() as stack:
        for unit in dict.fromkeys(unit_of(tensor) for tensor in _tensors(value)):
            if unit is not None:
                stack.enter_context(unit.gathered())
        gathered: Any = _whole(value)
    return gathered  # type: ignore[no-any-return]


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Hidden):
        return value.read().detach().clone()
    if isinstance(value, tuple):
        return tuple(map(_whole, value))
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        gathered = {name: _whole(part) for name, part in parts.items()}
        changed = {name: part for name, part in gathered.items() if part is not parts[name]}
        return replace(value, **changed) if changed else value
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    parts: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, field.name) for field in fields(value))
    for part in parts:
        yield from _tensors(part)
