"""Tensors of which each process holds a part (FSDP2's). Knows nothing of what they are."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of it alone."""
    return isinstance(tensor, DTensor)


def storage(tensor: Tensor) -> int:
    """Equal for tensors that are one in memory."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).data_ptr()


def whole(value: T) -> T:
    """A tensor, or what is made of tensors, with all that other processes hold of it.

    They all have to ask, in the same order. What is not sharded is given back as it is.

    Args:
        value: a tensor, a tuple, or a dataclass; others are left alone.
    """
    gathered: Any = _whole(value)
    return gathered  # type: ignore[no-any-return]


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, tuple):
        return tuple(map(_whole, value))
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        gathered = {name: _whole(part) for name, part in parts.items()}
        changed = {name: part for name, part in gathered.items() if part is not parts[name]}
        return replace(value, **changed) if changed else value
    return value
