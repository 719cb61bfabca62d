"""How much memory there is, and how the C library keeps what was freed. Knows nothing of tensors.

glibc keeps up to 64 MiB of freed blocks at the top of its heap, and holes below it, so the peak of
a merge varied from run to run until they were given back.

On the other hand it gives every block of more than 128 KiB back at once, and the next one costs a
page fault for each 4 KiB, until it has seen a larger block freed. Source: mallopt(3),
M_MMAP_THRESHOLD.
"""

from __future__ import annotations

import ctypes
import os

import psutil

_LARGEST = (1 << 25) - (1 << 16)  # bytes; it learns from blocks of up to 32 MiB


def free_memory() -> int:
    """Bytes that are free."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows; macOS
        return int(psutil.virtual_memory().available)


def return_freed_memory() -> None:
    """Ask the C library for it; where it has no such call (not glibc), do nothing."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_small_blocks() -> None:
    """Free a large block that was never touched, as most programs do sooner or later."""
    library = _c_library()
    if library is None:
        return
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.free(library.malloc(_LARGEST))


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except TypeError:  # Windows has one for each compiler
        return None
