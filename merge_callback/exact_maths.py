"""Float32 arithmetic in float32. Knows nothing of what is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_maths(devices: Iterable[str]) -> Iterator[None]:
    """Neither autocast, on devices of these types, nor TF32 anywhere."""
    backends: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    )
    before = [backend.fp32_precision for backend in backends]
    with contextlib.ExitStack() as stack:
        for device in set(devices) - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = "none"  # inherit again, where that gives what was there
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision
