"""Two models and some data: how near are they?"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from merge_callback.batches import Batch, input_device
from merge_callback.errors import MergeError
from merge_callback.exact_maths import exact_maths
from merge_callback.live import adapted, keep_cpu_weights_unpacked
from merge_callback.stand_ins import evaluating, generators_kept, without_adapters
from merge_callback.verification.kernels import base_of, way
from merge_callback.verification.outputs import Comparison, Speaker, compare_outputs
from merge_callback.verification.rebuilt import computing_on, rebuild


def compare(
    live: nn.Module | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    batches: Iterable[Batch],
    trust_remote_code: bool = False,
) -> Comparison:
    """Compare what a directory says with what a model, or another directory, says.

    Args:
        live: a model, which is left as it was; with an adapter, its base is compared too. Or a
            directory.
        directory: one that `from_pretrained` loads, as those that a merge writes. It is loaded on
            the CPU, and computes where `live` does.
        batches: dicts of tensors as the models' forward takes them; labels of -100 do not count.
        trust_remote_code: run the Python that lies in a directory.

    Raises:
        CorruptVersion: a directory does not load whole.
        MergeError: a model does not run on these data, or nothing is predicted in them.
    """
    model: Any
    if isinstance(live, nn.Module):
        model = adapted(live)
        keep_cpu_weights_unpacked(model)
    else:
        model = rebuild(live, trust_remote_code=trust_remote_code)
    device = input_device(base_of(model))
    other = rebuild(directory, type(base_of(model)), trust_remote_code=trust_remote_code)
    batches = iter(batches)
    first = list(islice(batches, 1))
    with torch.no_grad(), generators_kept(), evaluating(model), exact_maths([device.type]):
        if first and isinstance(live, nn.Module):
            found = way(model, first[0])
            model, other = found.of(model), found.of_loaded(other)
        base = None
        if isinstance(model, PeftModel):
            base = Speaker(base_of(model), device, partial(without_adapters, model))
        with computing_on(other, device):
            speakers = Speaker(base_of(model), device), base, Speaker(other, device)
            return _compared(*speakers, chain(first, batches))


def _compared(
    live: Speaker, base: Speaker | None, other: Speaker, batches: Iterable[Batch]
) -> Comparison:
    try:
        return compare_outputs(live, base, {"other": other}, batches)["other"]
    except Exception as error:  # whatever the models make of it
        if isinstance(error, MergeError) and error.__cause__ is None:
            raise
        told = error.__cause__ if isinstance(error, MergeError) else error
        raise MergeError(f"the models do not run on these data: {told}") from error
