"""How the base of a training was loaded: a file of JSON beside each checkpoint. No pickles.

Whoever merges the checkpoint later loads the base by it. The file may be anybody's: what is read is
checked.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, TrainerState, TrainingArguments
from transformers.modeling_utils import unwrap_model

from merge_callback.companions import RESTORED, live_config
from merge_callback.engines import class_of
from merge_callback.errors import MergeRefused
from merge_callback.foreign import read_json, refuse_layers

logger = logging.getLogger(__name__)

RECIPE = "merge_callback.json"
DTYPES = ("bfloat16", "float16", "float32")
QUANT_TYPES = ("nf4", "fp4")
_SCHEMA = 1
MOST_ROWS = 1 << 24  # of an embedding
# What another loading decides anew, or this file says elsewhere; and what trainers change.
_NOT_SETTINGS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "quantization_config",
    "transformers_version",
    *RESTORED,
}
_SETTINGS: Mapping[str, tuple[type, ...]] = {
    "load_in_4bit": (bool,),
    "load_in_8bit": (bool,),
    "bnb_4bit_quant_type": (str,),
    "bnb_4bit_use_double_quant": (bool,),
    "bnb_4bit_compute_dtype": (str,),
    "bnb_4bit_quant_storage": (str,),
    "llm_int8_threshold": (int, float),
    "llm_int8_skip_modules": (list, type(None)),
    "llm_int8_has_fp16_weight": (bool,),
}
_MODULES = re.compile(r"[\w.-]+")  # transformers takes them as patterns: these match in no time
_ALLOWED = {
    "bnb_4bit_quant_type": QUANT_TYPES,
    "bnb_4bit_compute_dtype": DTYPES,
    "bnb_4bit_quant_storage": ("uint8", "int8", "float64", *DTYPES),
}


@dataclass(frozen=True)
class Recipe:
    """How a base was loaded.

    Attributes:
        model_class: the name of its class.
        model_type: what transformers calls its architecture.
        dtype: that of its config; None: as its checkpoint has it.
        quantization: settings of BitsAndBytesConfig; empty: it was not quantised so.
        config: its config, without what another loading decides and what trainers change.
        num_embeddings: rows of its input embeddings; None: it has none, or an earlier version wrote
            the file.
    """

    model_class: str
    model_type: str
    dtype: str | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    num_embeddings: int | None = None


def keep_recipe(model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
    """Write it beside a checkpoint that was just saved; that it fails is no failure of training."""
    directory = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
    try:
        if directory.is_dir():
            write_recipe(model, directory)
    except Exception as error:  # of a full disk, or of a config that cannot be read
        logger.warning(
            "%s could not be written: %s; to merge this checkpoint later, say with options of "
            "merge-callback merge how the base was loaded",
            directory / RECIPE,
            error,
        )


def write_recipe(model: nn.Module, directory: Path) -> None:
    """Write how the base of a live model was loaded, beside its checkpoint."""
    inner: Any = unwrap_model(model)
    base = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    dtype = str(base.config.dtype).removeprefix("torch.")
    found = {
        "schema": _SCHEMA,
        "model_class": class_of(base).__name__,
        "model_type": base.config.model_type,
        "dtype": dtype if dtype in DTYPES else None,
        "quantization": _quantization(live_config(base)),
        "config": settings_of(base.config),
        "num_embeddings": _rows_of(input_embeddings(base)),
    }
    part = directory / f".{RECIPE}.part"
    try:
        part.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        part.replace(directory / RECIPE)
    finally:
        part.unlink(missing_ok=True)


def input_embeddings(model: Any) -> Any:
    """None: it has none, as a model of speech or of pictures."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def _rows_of(embeddings: Any) -> int | None:
    inner = getattr(embeddings, "get_base_layer", lambda: embeddings)()  # of an adapted one
    return getattr(inner, "num_embeddings", None)


def read_recipe(checkpoint: Path) -> Recipe | None:
    """What was written beside a checkpoint; None: nothing was.

    Raises:
        MergeRefused: what is there cannot be read.
    """
    path = checkpoint / RECIPE
    if not path.exists():
        return None
    try:
        return _checked(read_json(path))
    except (OSError, ValueError) as error:
        raise MergeRefused([f"{path} cannot be read: {error}; mend or remove it"]) from error


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says, as JSON has it, but for what is not a setting of the model."""
    found: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return _settings(found)


def refuse_hostile_settings(config: Mapping[str, Any]) -> None:
    """Look at values for a config, at any depth, before transformers is given them.

    Raises:
        ValueError: what is wrong.
    """
    for key, value in config.items():
        if not _is_setting(key):
            raise ValueError(f"{key} cannot be set")
        if isinstance(value, dict):
            refuse_hostile_settings(value)
        else:
            refuse_layers(key, value)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if _is_setting(key)
    }


def _is_setting(key: str) -> bool:
    return not (key in _NOT_SETTINGS or "implementation" in key or key.startswith("_"))


def _quantization(config: PretrainedConfig) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, BitsAndBytesConfig):
        return {}
    told = found.to_dict()
    return {key: told[key] for key in _SETTINGS if key in told}


def _checked(found: Any) -> Recipe:
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA:
        raise ValueError(f"it has no schema {_SCHEMA}")
    names = [found.get("model_class"), found.get("model_type")]
    parts: list[Any] = [found.get("quantization"), found.get("config")]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("its model_class or model_type is no text")
    if found.get("dtype") not in (None, *DTYPES):
        raise ValueError(f"its dtype is none: {found['dtype']!r}")
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("its quantization or config is no JSON object")
    rows = found.get("num_embeddings")
    if rows is not None and not (type(rows) is int and 0 < rows < MOST_ROWS):
        raise ValueError(f"its num_embeddings is none: {rows!r}")
    recipe = Recipe(str(names[0]), str(names[1]), found.get("dtype"), parts[0], parts[1], rows)
    _check_quantization(recipe.quantization)
    refuse_hostile_settings(recipe.config)
    return recipe


def _check_quantization(found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        if type(value) not in _SETTINGS.get(key, ()):
            raise ValueError(f"its quantization has a {key} that is none: {value!r}")
        if key in _ALLOWED and value not in _ALLOWED[key]:
            raise ValueError(f"its quantization has a {key} that is none: {value!r}")
        for name in value if isinstance(value, list) else ():
            if not isinstance(name, str):
                raise ValueError(f"its quantization has a {key} that is none: {value!r}")
            if not _MODULES.fullmatch(name):
                raise ValueError(
                    f"its quantization has a pattern in {key}, {name!r}; name the modules one by "
                    "one, by the ends of their names"
                )
