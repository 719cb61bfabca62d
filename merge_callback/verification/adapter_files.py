"""Adapter files, against what was trained: byte for byte, and in their effect.

The entries that are compared are those that PEFT itself takes from the live model. A loaded
adapter's scaling follows from its config, so that of each live layer has to.
"""

from __future__ import annotations

import json
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

_WEIGHTS = "adapter_model.safetensors"
# Where an adapter came from, and what it is written with.
_ORIGINS = frozenset({"peft_version", "inference_mode", "auto_mapping", "revision"})


def adapter_file_problems(
    model: PeftModel, adapters: tuple[str, ...], place: Path
) -> Iterator[str]:
    """What a `lora` output has that the live model has not, or the reverse."""
    for name in adapters:
        directory = place if len(adapters) == 1 or name == "default" else place / name
        yield from _tensor_problems(model, name, directory)
        yield from _config_problems(model, name, directory)
        yield from _scaling_problems(model, name)


def _tensor_problems(model: PeftModel, name: str, directory: Path) -> Iterator[str]:
    ours = threading.current_thread() is threading.main_thread()
    with warnings.catch_warnings() if ours else nullcontext():
        if ours:  # what is caught is caught for all threads
            warnings.simplefilter("ignore")  # of embeddings, and of a Hub that cannot be asked
        trained = get_peft_model_state_dict(model, adapter_name=name)
    saved = load_file(directory / _WEIGHTS)
    if odd := sorted(trained.keys() ^ saved.keys()):
        yield f"{_WEIGHTS} and the live adapter differ in {', '.join(odd[:5])}"
    for key in sorted(trained.keys() & saved.keys()):
        if not _same_bytes(trained[key].detach().cpu(), saved[key]):
            yield f"{key} in {_WEIGHTS} is not what was trained"


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (one, other)))


def _config_problems(model: PeftModel, name: str, directory: Path) -> Iterator[str]:
    live, saved = (
        json.loads(json.dumps(config.to_dict(), default=_sorted))
        for config in (model.peft_config[name], PeftConfig.from_pretrained(str(directory)))
    )
    for field in sorted((live.keys() | saved.keys()) - _ORIGINS):
        if _canonical(live.get(field)) != _canonical(saved.get(field)):
            yield (
                f"adapter_config.json has {field}={saved.get(field)!r}, and the live adapter "
                f"{live.get(field)!r}"
            )


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _canonical(value: Any) -> Any:
    """A list that may have been a set, in one order."""
    return sorted(map(str, value)) if isinstance(value, list) else value


def _scaling_problems(model: PeftModel, name: str) -> Iterator[str]:
    config: Any = model.peft_config[name]
    if (
        config.peft_type != PeftType.LORA
    ):  # AdaLoRA's layers are LoRA's, with a scaling of their own
        return
    for path, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.scaling:
            continue
        rank = layer.r[name]
        loaded = layer.lora_alpha[name] / (math.sqrt(rank) if config.use_rslora else rank)
        if not math.isclose(layer.scaling[name], loaded, rel_tol=1e-6):
            yield (
                f"{path} computes with a scaling of {layer.scaling[name]:g}, and an adapter "
                f"that is loaded has {loaded:g}, from its config; was set_scale called? Set it "
                "back, or use a merged save_method"
            )
            return
