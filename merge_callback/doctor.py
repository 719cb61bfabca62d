"""What matters to a merge on this machine. Knows nothing of how it is shown."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import get_token

from merge_callback.manifest import libraries

_BF16 = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")  # as x86 and Arm call it


def examine() -> Iterator[dict[str, str | None]]:
    """What was looked at (`check`), what was `found`, and what to do about it (`advice`)."""
    for check, found, advice in _checks():
        yield {"check": check, "found": found, "advice": advice}


def _checks() -> Iterator[tuple[str, str, str | None]]:
    yield "python", platform.python_version(), None
    for name, version in libraries().items():
        advice = None if version else "pip install 'merge-callback[bnb]', for 4-bit bases"
        yield name, version or "missing", advice
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            memory = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
            yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {memory}", None
    else:
        yield "device", f"cpu, {os.cpu_count()} cores", None
        slow = "comparing outputs is slow here: lower verify_tokens"
        yield "bfloat16 products", *(("native", None) if _has_bf16() else ("emulated", slow))
    yield "disk, here", f"{shutil.disk_usage(os.curdir).free / 1e9:.1f} GB free", None
    if (offline := os.environ.get("HF_HUB_OFFLINE", "0")) not in ("", "0"):
        yield "HF_HUB_OFFLINE", offline, "unset it to push"
    yield "Hub token", *(("found", None) if get_token() else ("none", "hf auth login, to push"))
    if find_spec("matplotlib") is None:
        yield "matplotlib", "missing", "pip install 'merge-callback[plot]', for plots in reports"


def _has_bf16() -> bool:
    try:
        return _BF16.search(Path("/proc/cpuinfo").read_text("utf-8")) is not None
    except OSError:  # not on Linux
        return True
