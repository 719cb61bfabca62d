"""Weight by weight: decode, add the adapter, round, write. Knows nothing of versions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from threading import Event
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from merge_callback.codecs.bnb4 import Bnb4
from merge_callback.cores import in_order
from merge_callback.errors import MergeError
from merge_callback.host_memory import keep_small_blocks, return_freed_memory
from merge_callback.live import Weight
from merge_callback.merging import Merging, check_finite
from merge_callback.options import MergeOptions
from merge_callback.plan import Group, Plan
from merge_callback.retention import Retention, retention
from merge_callback.shards import CheckpointWriter, check_written
from merge_callback.store import Draft

_FREED = 1 << 28  # bytes of float32 weights between two times that memory is given back

# weight -> what each method writes of it, and how much of the adapter is in that
_Encoded: TypeAlias = dict[str, list[tuple[str, dict[str, Tensor], Retention]]]

logger = logging.getLogger(__name__)


def write_weights(
    plan: Plan,
    options: MergeOptions,
    draft: Draft,
    places: Mapping[str, Path],
    stop: Event | None = None,
) -> dict[str, dict[str, Retention]]:
    """All weight files; returns method -> weight -> how much of the adapter arrived.

    Args:
        stop: ends a merge behind a training. None: nothing else computes in this process, so
            that freed memory is given back on the way. A training would have to take it anew.

    Raises:
        MergeError: it was stopped.
        CorruptVersion: the files do not read back.
    """
    kept: dict[str, dict[str, Retention]] = {method: {} for method in plan.containers}
    for place in places.values():
        place.mkdir(exist_ok=True)
    keep_small_blocks()
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
            for group, encoded in in_order(plan.threads, partial(_encode_group, plan), plan.groups):
                _write_group(plan, group, encoded, writers, kept)
                bar.set_postfix_str(group.name, refresh=False)
                bar.update(len(group.weights))
                if stop is not None and stop.is_set():
                    raise MergeError("it was stopped, for the training was interrupted")
                freed += sum(4 * prod(weight.stored.shape) for weight in group.weights)
                if stop is None and freed > _FREED:
                    return_freed_memory()
                    freed = 0
    for method, writer in writers.items():
        check_written(places[method], [group.specs[method] for group in plan.groups])
        prefix = places[method].relative_to(draft.path)
        draft.records |= {(prefix / file).as_posix(): r for file, r in writer.records.items()}
    return kept


@torch.no_grad()
def _encode_group(plan: Plan, group: Group) -> _Encoded:
    return {weight.key: list(_encode(plan, plan.whole(weight))) for weight in group.weights}


def _write_group(
    plan: Plan,
    group: Group,
    encoded: _Encoded,
    writers: Mapping[str, CheckpointWriter],
    kept: Mapping[str, dict[str, Retention]],
) -> None:
    tensors: dict[str, dict[str, Tensor]] = {method: {} for method in writers}
    for weight in group.weights:
        for method, found, arrived in encoded.pop(weight.key):
            tensors[method] |= found
            if weight.updates:
                kept[method][weight.key] = arrived
    for method, writer in writers.items():
        packed = any(isinstance(plan.containers[method][w.key], Bnb4) for w in group.weights)
        reverted = plan.names.revert(tensors.pop(method), packed=packed)
        if group.carried is not None:
            reverted = {group.carried.name: group.carried.read()}
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
                limit, values = torch.finfo(container.dtype).max, weight.decoded(device)
                if not weight.replaced:  # infinite values of the base are its own
                    values = values.nan_to_num(0, 0, 0)
                check_finite(weight, values, limit)
            yield method, container.copy(weight.key, weight.source, device), Retention()
        return
    containers = {method: by_key[weight.key] for method, by_key in plan.containers.items()}
    merging = Merging(weight, containers, device)
    arrived = dict.fromkeys(containers, Retention())
    for base, merged, written in merging:
        for method, values in written.items():
            arrived[method] += retention(base, merged, values)
    for method in containers:
        yield method, merging.tensors(method), arrived[method]
