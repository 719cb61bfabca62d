"""What differs between the versions of other libraries, each with the versions and the reason.

Nothing is patched: what an older version lacks is taken from elsewhere in it, or left out.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    core_model_loading,
    trainer_utils,
)

from merge_callback.undo import Undone, put


class _Unknown:
    """In place of a class that this version does not have: nothing is an instance of it."""


# transformers 5.6: the prefix of a class may change. By 5.14 several names are renamed at once.
PrefixChange: Any = getattr(core_model_loading, "PrefixChange", _Unknown)
GroupWeightRename: Any = getattr(core_model_loading, "GroupWeightRename", _Unknown)


def dtypes_kept(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Patterns of names -> the dtype that the class keeps them in when it is loaded in `dtype`.

    transformers 5.1 asks for the dtype; 5.0 keeps the same weights in float32 for all of them.
    """
    found: Any = getattr(model, "_get_dtype_plan", None)
    kept: Any = model.dtype_plan if found is None else found(dtype)
    return dict(kept)


def delta_factors(layer: ParamWrapper, adapter: str) -> tuple[Tensor, Tensor, float]:
    """Factors (experts, in, rank) and (experts, rank, out) of a fused parameter, and their scaling.

    PEFT 0.18 has no method for it, and knows no parameters that are stored as (out, in).
    """
    if hasattr(layer, "get_delta_factors"):
        found: tuple[Tensor, Tensor, float] = layer.get_delta_factors(adapter)
        return found
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    a = a.reshape(layer.num_experts, -1, a.shape[-1])
    b = b.reshape(len(b), -1, layer.num_experts).permute(2, 0, 1)
    return a.transpose(1, 2).float(), b.transpose(1, 2).float(), layer.scaling[adapter]


def install_capturing_hooks(model: PreTrainedModel) -> None:
    """Let a model look for the layers whose outputs it records, by their classes.

    transformers 5.2 looks once, at a first forward; before, at each.
    """
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:
        return
    maybe_install_capturing_hooks(model)


def align_special_tokens(
    config: PretrainedConfig, generation: GenerationConfig | None, tokenizer: Any
) -> None:
    """Give both configs, in place, the special tokens of a tokenizer, as a trainer does.

    transformers 5.2 made a function of a method of `Trainer`, which asks for these two attributes.
    """
    model = SimpleNamespace(config=config, generation_config=generation)
    align = getattr(trainer_utils, "align_special_tokens", None)
    with _quiet((trainer_utils if align else transformers.trainer).__name__):
        if align is not None:
            align(model, tokenizer)
        else:
            trainer: Any = SimpleNamespace(model=model, processing_class=tokenizer)
            transformers.Trainer._align_special_tokens(trainer)  # type: ignore[attr-defined]


def _quiet(name: str) -> Undone:
    """transformers warns of what it aligns, each time it does."""
    theirs = logging.getLogger(name)
    return Undone(lambda undo: put(undo, vars(theirs), "disabled", True))
