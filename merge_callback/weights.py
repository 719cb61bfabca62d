"""Weight by weight: decode, add the adapter, round, write. Knows nothing of versions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from merge_callback.codecs import runs
from merge_callback.errors import MergeError
from merge_callback.host_memory import return_freed_memory
from merge_callback.live import Weight
from merge_callback.options import MergeOptions
from merge_callback.plan import Group, Plan
from merge_callback.retention import Retention, retention
from merge_callback.shards import CheckpointWriter
from merge_callback.store import Draft

_FREED = 1 << 28  # bytes of float32 weights between two times that memory is given back

logger = logging.getLogger(__name__)


def write_weights(
    plan: Plan, options: MergeOptions, draft: Draft, places: Mapping[str, Path]
) -> dict[str, dict[str, Retention]]:
    """All weight files; returns method -> weight -> how much of the adapter arrived."""
    kept: dict[str, dict[str, Retention]] = {method: {} for method in plan.containers}
    for place in places.values():
        place.mkdir(exist_ok=True)
    with ExitStack() as stack:
        writers = {
            method: stack.enter_context(
                CheckpointWriter(
                    places[method], [g.specs[method] for g in plan.groups], options.max_shard_size
                )
            )
            for method in plan.containers
        }
        total = sum(len(group.weights) for group in plan.groups)
        with tqdm(total=total, desc="merge", unit="tensor", disable=not options.progress) as bar:
            freed = 0
            for group in plan.groups:
                _write_group(plan, group, writers, kept, bar)
                freed += sum(4 * prod(weight.stored.shape) for weight in group.weights)
                if freed > _FREED:
                    return_freed_memory()
                    freed = 0
    for method, writer in writers.items():
        prefix = places[method].relative_to(draft.path)
        draft.records |= {(prefix / file).as_posix(): r for file, r in writer.records.items()}
    return kept


def _write_group(
    plan: Plan,
    group: Group,
    writers: Mapping[str, CheckpointWriter],
    kept: Mapping[str, dict[str, Retention]],
    bar: Any,
) -> None:
    encoded: dict[str, dict[str, Tensor]] = {method: {} for method in writers}
    for weight in group.weights:
        bar.set_postfix_str(weight.key, refresh=False)
        for method, tensors, arrived in _encode(plan, plan.whole(weight)):
            encoded[method] |= tensors
            if weight.updates:
                kept[method][weight.key] = arrived
        bar.update()
    for method, writer in writers.items():
        reverted = plan.names.revert(encoded.pop(method))
        for name in group.specs[method]:
            writer.write(name, reverted.pop(name))


def _encode(plan: Plan, weight: Weight) -> Iterator[tuple[str, dict[str, Tensor], Retention]]:
    """One weight in every container; on the CPU when its device has no memory left."""
    try:
        yield from _encode_on(plan, weight, weight.stored.device)
        return
    except torch.OutOfMemoryError:
        logger.warning(
            "%s: out of memory on %s, merged on the CPU", weight.key, weight.stored.device
        )
    yield from _encode_on(plan, weight, torch.device("cpu"))


def _encode_on(
    plan: Plan, weight: Weight, device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor], Retention]]:
    if not weight.updates:
        for method, containers in plan.containers.items():
            container = containers[weight.key]
            if weight.replaced or container.dtype != weight.stored.dtype:
                limit = torch.finfo(container.dtype).max
                _check_finite(weight, weight.decoded(device), limit)
            yield method, container.copy(weight.key, weight.source, device), Retention()
        return
    base = weight.decoded(device)
    merged = weight.merged(base)
    largest = min(torch.finfo(c[weight.key].dtype).max for c in plan.containers.values())
    _check_finite(weight, merged, largest)
    for method, containers in plan.containers.items():
        container = containers[weight.key]
        tensors = container.encode(weight.key, merged)
        written = container.values(weight.key, tensors, merged.numel())
        triples = ((b, m, w) for (b, m), w in zip(runs(base, merged), written, strict=True))
        yield method, tensors, retention(triples)


def _check_finite(weight: Weight, merged: Tensor, largest: float) -> None:
    low, high = (float(end) for end in torch.aminmax(merged))
    if not (abs(low) <= largest and abs(high) <= largest):  # false for NaN
        raise MergeError(
            f"{weight.key}: the merged weight is not finite, or too large for the output dtype "
            f"(from {low:g} to {high:g}, {largest:g} fits); if the training diverged, export an "
            "earlier checkpoint; if it did not, use dtype='bfloat16'"
        )
