"""What a manifest says of a merge. Knows nothing of trainers or of how weights are written."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from merge_callback.plan import Plan
from merge_callback.retention import Retention
from merge_callback.sharding import storage
from merge_callback.shards import host_bytes
from merge_callback.verification.checks import Verification

_LIBRARIES = ("merge_callback", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass(frozen=True)
class Training:
    """What a trainer knows of the moment of the merge.

    Attributes:
        step: global step; None outside a trainer.
        best_step: the step that the weights come from, when the best model was loaded at the end.
        settings: config values to restore, which the trainer had changed.
        run: id of the callback that merges; None outside one.
    """

    step: int | None = None
    best_step: int | None = None
    settings: Mapping[str, Any] | None = None
    run: str | None = None


def merge_manifest(
    plan: Plan,
    rounding: str | None,
    training: Training,
    kept: Mapping[str, Mapping[str, Retention]],
    calibration: Mapping[str, Any] | None,
    verification: Verification | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The manifest of a merged version, but for its files."""
    return {
        "kind": "merged",
        "run": training.run,
        "created": now(),
        "step": training.step,
        "best_step": training.best_step,
        "base": _base(plan),
        "merged_into": "original" if plan.from_original else "live",
        "carried": [tensor.name for tensor in plan.carried],
        "adapters": list(plan.adapters),
        "adapter_sha256": adapter_hash(plan),
        "save_methods": list(plan.methods),
        "rounding": rounding,
        "calibration": calibration,
        "verification": verification and _verified(verification),
        "maths_dtype": "float32",
        "retention": {
            method: {
                "overall": overall(tensors).value,
                "tensors": {key: part.value for key, part in tensors.items()},
            }
            for method, tensors in kept.items()
        },
        "libraries": libraries(),
        "seconds": dict(seconds),
    }


def tensor_figures(
    kept: Mapping[str, Mapping[str, Retention]], verification: Verification | None
) -> dict[str, dict[str, dict[str, float | None]]]:
    """method -> weight -> retention, and how far the file is from what was to be written."""
    found = verification.deviations if verification else {}
    return {
        method: {
            key: {
                "retention": tensors[key].value if key in tensors else None,
                "error": found[method][key].error if method in found else None,
            }
            for key in found.get(method, tensors)
        }
        for method, tensors in kept.items()
    }


def _verified(found: Verification) -> dict[str, Any]:
    return {
        "data": found.data,
        "problems": found.problems,
        "checks": found.checks,
        "models": {
            method: {
                "weights": len(tensors),
                "largest_error": max(part.error for part in tensors.values()),
                **(asdict(found.comparisons[method]) if method in found.comparisons else {}),
            }
            for method, tensors in found.deviations.items()
        },
    }


def overall(tensors: Mapping[str, Retention]) -> Retention:
    """Retention over several weights."""
    return sum(tensors.values(), Retention())


def _base(plan: Plan) -> dict[str, str | None]:
    """Id and revision; of a local directory its name alone, of a base made in memory nothing."""
    name = getattr(plan.model.config, "_name_or_path", None) or None
    if name is not None and os.path.isabs(name):
        name = os.path.basename(os.path.normpath(name))
    return {"id": name, "revision": getattr(plan.model.config, "_commit_hash", None)}


def adapter_hash(plan: Plan) -> str:
    """sha256 of all that was trained: names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    seen: set[int] = set()  # banks that many layers share count once
    for key, weight in sorted(plan.weights.items()):
        if not (weight.updates or weight.replaced):
            continue
        for tensor, here in zip(plan.whole(weight).trained, weight.trained, strict=True):
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if storage(here) not in seen or not tensor.dim():
                digest.update(host_bytes(tensor))
            seen.add(storage(here))
    return digest.hexdigest()


def libraries() -> dict[str, str | None]:
    """Versions of all that takes part."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in _LIBRARIES}


def now() -> str:
    """UTC, to the microsecond."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
