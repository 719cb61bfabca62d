"""The base of a saved adapter, as training loaded it. Knows nothing of merging.

Options say it, or what the callback has written beside the checkpoint, or the tensors of the
adapter; what none of them says is guessed with a warning.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, BitsAndBytesConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from merge_callback.errors import MergeRefused
from merge_callback.recipe import (
    MOST_ROWS,
    Recipe,
    input_embeddings,
    refuse_hostile_settings,
    settings_of,
)
from merge_callback.verification.rebuilt import own_class, refuse_hostile

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

# What PEFT calls a task -> the class that transformers has for it.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
ROOT = "base_model.model."  # of PEFT's names
WRAPPED = re.compile(r"\.(modules_to_save|original_module|token_adapter|base_layer)\b")
_POOLER = re.compile(r"(^|\.)pooler\.")  # many checkpoints have none, and few trainings use it
_HEAD = re.compile(r"(^|\.)(score|classifier)(\.out_proj)?\.weight$")
# How 4 bits are taken to be made where nothing says it, and the option that says otherwise.
_QLORA = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
_OPTIONS = {
    "bnb_4bit_quant_type": "--quant-type",
    "bnb_4bit_use_double_quant": "--no-double-quant",
    "bnb_4bit_compute_dtype": "--compute-dtype",
}


@dataclass(frozen=True)
class Loading:
    """How a base is to be loaded; None: as the checkpoint says, or else as it is guessed.

    Attributes:
        load_in_4bit: quantise a 16-bit base, as QLoRA does; False: do not, whatever training did.
        load_in_8bit: quantise it to 8 bits.
        quant_type: `"nf4"` or `"fp4"`, of 4 bits, as the next two.
        double_quant: whether scales are quantised too.
        compute_dtype: of products with 4-bit weights.
        model_class: name of a class of transformers, e.g. AutoModelForImageTextToText.
        config: values for the config of the base, as JSON has them; `a.b` is b within a.
        device: None: a CUDA device where there is one.
        trust_remote_code: run the Python that came with the base.
        as_trained: False: only the adapter is looked at, so that the base may have other weights.
    """

    load_in_4bit: bool | None = None
    load_in_8bit: bool = False
    quant_type: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None
    model_class: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    trust_remote_code: bool = False
    as_trained: bool = True

    @property
    def of_4bit(self) -> dict[str, Any]:
        """What is said of 4 bits, as BitsAndBytesConfig calls it."""
        said = {
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": self.compute_dtype,
        }
        return {key: value for key, value in said.items() if value is not None}


def load_base(
    name: str,
    adapter: PeftConfig,
    loading: Loading,
    recipe: Recipe | None,
    shapes: Shapes,
    tokens: int | None,
) -> Any:
    """The base of an adapter, as training loaded it, with as many embeddings.

    Args:
        shapes: of the tensors that were saved with the adapter.
        tokens: how many the tokenizer of the training has.
    """
    refuse_hostile(_directory_of(name), trust_remote_code=loading.trust_remote_code)
    if recipe is None and loading.as_trained and not loading.config:
        logger.warning(
            "nothing beside the adapter says whether training changed the config of the base; if "
            "it did (rope settings, say), merge with --config KEY=VALUE"
        )
    cls = _class(adapter, loading, recipe)
    config = _config(name, cls, loading, recipe, _labels(adapter, shapes))
    settings: dict[str, Any] = {"config": config, "trust_remote_code": loading.trust_remote_code}
    settings["dtype"] = (recipe and recipe.dtype) or "auto"
    settings["device_map"] = loading.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if getattr(config, "quantization_config", None) is None:  # else its own hold
        quantization = _quantization(loading, recipe)
        if quantization:
            settings["quantization_config"] = BitsAndBytesConfig(**quantization)  # type: ignore[no-untyped-call]
    model, info = cls.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )
    _check_whole(name, model, info, shapes)
    _resize(model, adapter, shapes, recipe, tokens)
    return model


def _check_whole(name: str, model: Any, info: Mapping[str, Any], shapes: Shapes) -> None:
    """Whether the base or the adapter has each tensor of a model, in the size that it has there."""
    held = [plain_name(key) for key in shapes]
    resized = sorted(found for found in info["mismatched_keys"] if found[0] not in held)
    if resized:
        key, there, here = resized[0]
        raise MergeRefused(
            [
                f"{key} and {len(resized) - 1} others have other sizes in the base {name}, "
                f"{list(there)} and not {list(here)}, and are not in the adapter; what training "
                "changed of the config is said with --config KEY=VALUE"
            ]
        )
    absent = sorted(key for key in info["missing_keys"] if not any(key in one for one in held))
    if absent and _is_bare(model) and all(map(_POOLER.search, absent)):
        logger.warning(
            "%s are neither in the base nor in the adapter: they are made anew, and say nothing",
            ", ".join(absent),
        )
    elif absent:
        raise MergeRefused(
            [
                f"{absent[0]} and {len(absent) - 1} others are neither in the base {name} nor in "
                f"the adapter, so nobody knows how they were trained as {type(model).__name__}; "
                "name the class that was trained with --model-class"
            ]
        )


def _is_bare(model: Any) -> bool:
    """Whether its class has no head, as those of AutoModel."""
    found = MODEL_MAPPING.get(type(model.config), ())
    return type(model) in (found if isinstance(found, tuple) else (found,))


def _class(adapter: PeftConfig, loading: Loading, recipe: Recipe | None) -> Any:
    """The class that was trained, as far as it is known."""
    if loading.model_class is not None:
        found = own_class(loading.model_class)
        if found is None:
            raise MergeRefused(
                [f"transformers has no class {loading.model_class} that makes models"]
            )
        return found
    mapped = adapter.auto_mapping if isinstance(adapter.auto_mapping, dict) else {}
    names = (recipe and recipe.model_class, mapped.get("base_model_class"))
    if found := next(filter(None, map(own_class, names)), None):
        return found
    if adapter.task_type not in _CLASSES:
        logger.warning(
            "nothing says what the adapter was trained for: taken to be causal language modelling; "
            "if it is not, name the class with --model-class"
        )
    return own_class(_CLASSES.get(adapter.task_type, _CLASSES["CAUSAL_LM"]))


def _config(
    name: str, cls: Any, loading: Loading, recipe: Recipe | None, labels: int | None
) -> PretrainedConfig:
    """The config of the base, with what training had changed of it."""
    kind = AutoConfig if getattr(cls, "config_class", None) is None else cls.config_class
    own: PretrainedConfig = kind.from_pretrained(name, trust_remote_code=loading.trust_remote_code)
    changes: dict[str, Any] = {}
    if recipe is not None and recipe.model_type == own.model_type:
        changes = _changes(settings_of(own), recipe.config)
    elif labels is not None and own.num_labels != labels:
        own.num_labels = labels
    asked = dict(loading.config)
    if not (changes or asked):
        return own
    labels = asked.pop("num_labels", None)  # which no config keeps
    values = _over(own.to_dict(), changes)
    for key, value in asked.items():
        refuse_hostile_settings({name: value for name in key.split(".")})
        _put(values, key.split("."), value)
    changed: PretrainedConfig = type(own).from_dict(values)
    if labels is not None:
        changed.num_labels = labels
    changed._name_or_path = own._name_or_path
    changed._commit_hash = getattr(own, "_commit_hash", None)
    return changed


def _changes(own: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """What is told otherwise, but for the vocabulary, to which embeddings are resized."""
    found: dict[str, Any] = {}
    for key, value in told.items():
        mine = own.get(key)
        if key == "vocab_size" or value == mine:
            continue
        # A mapping of ids is one value; so is what has no counterpart.
        nested = isinstance(value, dict) and isinstance(mine, dict) and key.endswith("config")
        found[key] = _changes(mine or {}, value) if nested else value
    return {key: value for key, value in found.items() if value != {}}


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a config, with others laid over them; those of nested configs one by one."""
    found = dict(lower)
    for key, value in upper.items():
        nested = key.endswith("config") and isinstance(lower.get(key), dict)
        found[key] = _over(lower[key], value) if nested else value
    return found


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    first, *rest = path
    if not rest:
        values[first] = value
        return
    inner = values.setdefault(first, {})
    if not isinstance(inner, dict):
        raise ValueError(f"{first} of the config has nothing in it that could be set")
    _put(inner, rest, value)


def _quantization(loading: Loading, recipe: Recipe | None) -> dict[str, Any]:
    """Settings of BitsAndBytesConfig; empty: the base stays as it is."""
    told = dict(recipe.quantization) if recipe else {}
    if loading.load_in_8bit:
        return told if told.get("load_in_8bit") else {"load_in_8bit": True}
    asked = loading.of_4bit
    if loading.load_in_4bit is False:
        return {}
    if not (loading.load_in_4bit or asked):
        if recipe is None:
            logger.warning(
                "the base is not quantised, and nothing beside the adapter says how it was in "
                "training; if it was, merge with --load-in-4bit or --load-in-8bit"
            )
        return told
    if not told.get("load_in_4bit"):
        told = {"load_in_4bit": True, **_QLORA}
        if recipe is not None:
            logger.warning(
                "the base was not in 4 bits in training: the merged model is another than the one "
                "that was trained; leave out --load-in-4bit and what goes with it"
            )
        elif guessed := [_OPTIONS[key] for key in _QLORA if key not in asked]:
            logger.warning(
                "nothing beside the adapter says how its 4-bit base was quantised: taken to be "
                "NF4 with double quantisation, computing in bfloat16, but for what options say; "
                "if it was not, the merged model is another than the one that was trained: "
                "say so with %s",
                ", ".join(guessed),
            )
    for key, value in asked.items():
        if recipe and recipe.quantization.get(key, value) != value:
            logger.warning("%s is %s, and was %s in training", key, value, told[key])
    return told | asked


def shapes_of(checkpoint: Path) -> Shapes:
    """Tensor of a saved adapter -> its shape."""
    file = checkpoint / SAFETENSORS_WEIGHTS_NAME
    if file.exists():
        with safe_open(file, "pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    found = torch.load(checkpoint / WEIGHTS_NAME, map_location="meta", weights_only=True)
    return {key: tuple(tensor.shape) for key, tensor in found.items()}


def trained_in_float32(checkpoint: Path) -> bool:
    """Whether what was trained is saved in float32, as PEFT trains it on a base of 16 bits."""
    file = checkpoint / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        found = torch.load(checkpoint / WEIGHTS_NAME, map_location="meta", weights_only=True)
        return any(tensor.dtype == torch.float32 for tensor in found.values())
    with safe_open(file, "pt") as opened:
        return any(opened.get_slice(key).get_dtype() == "F32" for key in opened.keys())


def plain_name(key: str) -> str:
    """The name of a saved tensor in the unadapted model."""
    return WRAPPED.sub("", key.removeprefix(ROOT))


def _labels(adapter: PeftConfig, shapes: Shapes) -> int | None:
    """How many labels the head has that was saved with an adapter."""
    if adapter.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = (shape for key, shape in shapes.items() if _HEAD.search(plain_name(key)))
    return next((shape[0] for shape in heads if len(shape) == 2), None)


def _resize(
    model: Any,
    adapter: PeftConfig,
    shapes: Shapes,
    recipe: Recipe | None,
    tokens: int | None,
) -> None:
    """Give a base as many embeddings as were trained with."""
    embeddings = input_embeddings(model)
    if not isinstance(embeddings, nn.Embedding):
        return
    had = embeddings.num_embeddings
    saved = _saved_rows(model, shapes)
    rows = saved or _told_rows(recipe, model.config, had) or max(had, tokens or 0)
    if rows == had:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    trained = getattr(adapter, "trainable_token_indices", None) or []
    listed = trained if isinstance(trained, list) else [i for one in trained.values() for i in one]
    lost = set(range(had, rows)) - set(listed)
    if saved is None and lost:
        logger.warning(
            "the tokenizer of the training has %d tokens that the base has no embeddings for, and "
            "%d of these embeddings are not saved with the adapter: they are made anew, and say "
            "nothing; save the adapter with save_embedding_layers=True",
            rows - had,
            len(lost),
        )


def _saved_rows(model: Any, shapes: Shapes) -> int | None:
    """How many embeddings the model had whose input or output embeddings an adapter has saved."""
    inputs, outputs = input_embeddings(model), model.get_output_embeddings()
    # Some models have more rows of the one than of the other.
    more = inputs.num_embeddings - getattr(outputs, "out_features", inputs.num_embeddings)
    rows = {plain_name(key): shape[0] for key, shape in shapes.items() if shape}
    found: list[int] = [
        rows[f"{name}.weight"] + (0 if module is inputs else more)
        for name, module in model.named_modules()
        if module in (inputs, outputs) and f"{name}.weight" in rows
    ]
    return next(iter(found), None)


def _told_rows(recipe: Recipe | None, own: PretrainedConfig, had: int) -> int | None:
    """How many embeddings a training has noted; None: nothing of them.

    Earlier versions noted the vocabulary only, of which some models have fewer entries than rows.
    """
    if recipe is None:
        return None
    if recipe.num_embeddings is not None:
        return recipe.num_embeddings
    noted, mine = _vocabulary(recipe.config), _vocabulary(settings_of(own))
    if noted is None or mine is None:
        return None
    found = had + noted - mine
    return found if 0 < found < MOST_ROWS else None


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    inner = config.get("text_config")
    found = (inner if isinstance(inner, dict) else config).get("vocab_size")
    return found if type(found) is int else None


def _directory_of(name: str) -> Path:
    """Where a model lies; that of an id in the Hub's cache."""
    found = None if os.path.isdir(name) else cached_file(name, "config.json")
    return Path(name) if found is None else Path(found).parent
