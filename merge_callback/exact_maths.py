"""Float32 arithmetic in float32. Knows nothing of what is computed."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from merge_callback.undo import Undone, put

_EXACT = ("ieee", "none")
_MATMUL = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv"})
_CONVOLUTION = frozenset({"convolution"})
_this_thread = threading.local()


def exact_maths(devices: Iterable[str]) -> Undone:
    """Neither autocast, on devices of these types, nor TF32 anywhere; new tensors are float32.

    The latter for bitsandbytes, which makes the tables of its formats in the default dtype. They
    are on the CPU unless a device is named, and normal ones, since scales are learned.
    """
    backends: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    )

    def change(undo: ExitStack) -> None:
        undo.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":  # the context slows every call down
            undo.enter_context(torch.device("cpu"))
        for device in set(devices) - {"meta"}:
            undo.enter_context(torch.autocast(device, enabled=False))
        if (wide := getattr(_this_thread, "wide", None)) is not None:
            if wide:  # it costs each operation some time of the interpreter's
                undo.enter_context(InFloat64(wide))
            return
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        for backend in backends:
            for _ in range(2):  # Ctrl-C may cut off the first
                undo.callback(_put_back, backend, backend.fp32_precision)
            backend.fp32_precision = "ieee"

    return Undone(change)


def _put_back(backend: Any, precision: str) -> None:
    backend.fp32_precision = "none"  # inherit again, where that gives what was there
    if backend.fp32_precision != precision:
        backend.fp32_precision = precision


def beside_others(wide: frozenset[str]) -> Undone:
    """In this thread leave settings that hold for all threads as they are; others compute too.

    Args:
        wide: what is computed in float64, since those settings allow less than float32 for it.
    """

    def change(undo: ExitStack) -> None:
        put(undo, vars(_this_thread), "wide", wide)

    return Undone(change)


def less_exact(devices: Iterable[str]) -> frozenset[str]:
    """Operations that may take less than float32 on some of these devices now.

    To be asked where nobody holds `exact_maths`.
    """
    found: frozenset[str] = frozenset()
    for device in set(devices):
        backend: Any = torch.backends.mkldnn if device == "cpu" else torch.backends.cuda
        convolution: Any = torch.backends.mkldnn if device == "cpu" else torch.backends.cudnn
        found |= _MATMUL if backend.matmul.fp32_precision not in _EXACT else frozenset()
        found |= _CONVOLUTION if convolution.conv.fp32_precision not in _EXACT else frozenset()
    return found


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Some operations on float32, in this thread, computed in float64.

    Args:
        operations: names of those, of aten's.
    """

    def __init__(self, operations: frozenset[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in self._operations or not _is_float32(args[0]):
            return func(*args, **kwargs)
        wide = [part.double() if _is_float32(part) else part for part in args]
        product = func(*wide, **kwargs)
        return args[0].copy_(product) if name.endswith("_") else product.float()


def _is_float32(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.float32
