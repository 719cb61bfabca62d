"""Adapters from files, as they lie on a disk after training. Knows nothing of merging."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    FeatureExtractionMixin,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.hub import cached_file

from merge_callback.errors import MergeRefused
from merge_callback.foreign import pipes_in, read_json, slow_pattern, texts
from merge_callback.loading import asking_nobody
from merge_callback.manifest import Training
from merge_callback.recipe import Recipe, read_recipe, refuse_hostile_settings, settings_of
from merge_callback.verification.rebuilt import own_class, refuse_hostile

logger = logging.getLogger(__name__)

# What PEFT calls a task -> the class that transformers has for it.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_ADAPTER = "adapter_config.json"
_OF_PROCESSORS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "processor_config.json",
    "preprocessor_config.json",
)
# What AutoProcessor may make; a file may name any attribute of transformers.
_PROCESSORS = (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    FeatureExtractionMixin,
    ImageProcessingMixin,
)
_MOST_STEPS = 10**12
_MOST_ROWS = 1 << 24  # of an embedding
_ROOT = "base_model.model."  # of PEFT's names
_WRAPPED = re.compile(r"\.(modules_to_save|original_module|token_adapter|base_layer)\b")
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


def adapter_config(checkpoint: str | os.PathLike[str]) -> PeftConfig:
    """What a saved adapter says of itself.

    Raises:
        MergeRefused: there is none.
    """
    place = Path(checkpoint)
    if not place.is_dir():
        raise MergeRefused([f"{place} is no directory"])
    if (place / _ADAPTER).exists():
        try:
            _check_adapter(place)
            return PeftConfig.from_pretrained(str(place))
        except Exception as error:  # of any value, in any of PEFT's configs
            raise MergeRefused([f"{place / _ADAPTER} cannot be read: {error}"]) from error
    others = sorted(found.parent.name for found in place.glob(f"*/{_ADAPTER}"))
    there = f"; there is one in {', '.join(others)}" if others else ""
    raise MergeRefused([f"{place} has no {_ADAPTER}: it is no saved adapter{there}"])


def _check_adapter(place: Path) -> None:
    if pipes := pipes_in(place):
        raise ValueError(f"{', '.join(pipes)} in it is no file")
    found = read_json(place / _ADAPTER)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    if found.get("peft_type") == "XLORA":  # PEFT loads the adapters that it names
        raise ValueError("X-LoRA is made of other adapters, and does not merge")


def base_of(checkpoint: str | os.PathLike[str], given: str | None = None) -> str:
    """Directory or id of the base: the one that is given, or that an adapter names.

    Raises:
        MergeRefused: no adapter there, or it names none.
    """
    name = given or adapter_config(checkpoint).base_model_name_or_path
    if not name:
        raise MergeRefused([f"{checkpoint} does not name its base; give one"])
    if not isinstance(name, str) or not name.isprintable():
        raise MergeRefused(
            [f"{checkpoint} names as its base {name!r}, which cannot be one; give one"]
        )
    return name


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

    @property
    def of_4bit(self) -> dict[str, Any]:
        """What is said of 4 bits, as BitsAndBytesConfig calls it."""
        said = {
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": self.compute_dtype,
        }
        return {key: value for key, value in said.items() if value is not None}


def load_adapter(
    checkpoint: str | os.PathLike[str],
    base: str | None = None,
    loading: Loading | None = None,
    tokens: int | None = None,
) -> PeftModel:
    """A saved adapter on its base, as it was trained.

    What the callback has written beside the checkpoint says how the base was loaded, and the
    tensors of the adapter say how large its vocabulary and its head were. What neither says is
    guessed with a warning.

    Args:
        checkpoint: directory that PEFT or a Trainer has saved, with an adapter_config.json.
        base: directory or id of the base; None: the one that the adapter names.
        tokens: how many the tokenizer of the training has.

    Raises:
        MergeRefused: no adapter there, no such base or class, or not the one that was trained.
    """
    loading = loading or Loading()
    config = adapter_config(checkpoint)
    name = base_of(checkpoint, base)
    recipe = read_recipe(Path(checkpoint))
    shapes = _shapes(Path(checkpoint), name)
    try:
        refuse_hostile(_directory_of(name), trust_remote_code=loading.trust_remote_code)
        with asking_nobody():
            model = _load_base(name, config, loading, recipe, shapes)
    except MergeRefused:
        raise
    except Exception as error:  # each library has its own
        raise MergeRefused([f"the base {name} does not load: {_told(error)}"]) from error
    _resize(model, config, shapes, recipe, tokens)
    _check_patterns(checkpoint, config, model)
    try:
        # In the dtype that was trained: otherwise 16-bit factors would be cast to float32.
        with asking_nobody():
            found = PeftModel.from_pretrained(model, str(checkpoint), autocast_adapter_dtype=False)
            placed = found.load_adapter(str(checkpoint), "default", autocast_adapter_dtype=False)
    except Exception as error:
        raise MergeRefused(
            [f"{checkpoint} does not load on the base {name}: {_told(error)}"]
        ) from error
    missing = placed.missing_keys if config.peft_type == "LORA" else []  # some share what is not
    # PEFT saves embeddings once more, under names that it does not load.
    unplaced = [key for key in placed.unexpected_keys if not _WRAPPED.search(key[len(_ROOT) :])]
    if lost := sorted({*missing, *unplaced}):
        raise MergeRefused(
            [
                f"{checkpoint} does not fit the base {name}, loaded as {type(model).__name__}: "
                f"{lost[0]} and {len(lost) - 1} others have no counterpart; name the class that "
                "was trained with --model-class"
            ]
        )
    return found


def _load_base(
    name: str,
    adapter: PeftConfig,
    loading: Loading,
    recipe: Recipe | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> Any:
    cls = _class(adapter, loading, recipe)
    config = _config(name, cls, loading, recipe, _labels(adapter, shapes))
    settings: dict[str, Any] = {"config": config, "trust_remote_code": loading.trust_remote_code}
    settings["dtype"] = (recipe and recipe.dtype) or "auto"
    settings["device_map"] = loading.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if getattr(config, "quantization_config", None) is None:  # else its own hold
        quantization = _quantization(loading, recipe)
        if quantization:
            settings["quantization_config"] = BitsAndBytesConfig(**quantization)  # type: ignore[no-untyped-call]
    model, info = cls.from_pretrained(name, output_loading_info=True, **settings)
    absent = [key for key in info["missing_keys"] if not any(key in _plain(k) for k in shapes)]
    if absent:
        raise MergeRefused(
            [
                f"{absent[0]} and {len(absent) - 1} others are neither in the base {name} nor in "
                f"the adapter, so nobody knows how they were trained as {type(model).__name__}; "
                "name the class that was trained with --model-class"
            ]
        )
    return model


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
    if not (changes or loading.config):
        return own
    values = _over(own.to_dict(), changes)
    for key, value in loading.config.items():
        refuse_hostile_settings({name: value for name in key.split(".")})
        _put(values, key.split("."), value)
    changed: PretrainedConfig = type(own).from_dict(values)
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
        if guessed := [_OPTIONS[key] for key in _QLORA if key not in asked]:
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


def _shapes(checkpoint: Path, base: str) -> dict[str, tuple[int, ...]]:
    """Tensor of a saved adapter -> its shape."""
    file = checkpoint / SAFETENSORS_WEIGHTS_NAME
    try:
        if file.exists():
            with safe_open(file, "pt") as opened:
                return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
        found = torch.load(checkpoint / WEIGHTS_NAME, map_location="meta", weights_only=True)
        return {key: tuple(tensor.shape) for key, tensor in found.items()}
    except Exception as error:  # of a file that is cut off, or of a pickle that is more than data
        raise MergeRefused([f"{checkpoint} does not load on the base {base}: {error}"]) from error


def _plain(key: str) -> str:
    """The name of a saved tensor in the unadapted model."""
    return _WRAPPED.sub("", key.removeprefix(_ROOT))


def _labels(adapter: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many labels the head has that was saved with an adapter."""
    if adapter.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = (shape for key, shape in shapes.items() if _HEAD.search(_plain(key)))
    return next((shape[0] for shape in heads if len(shape) == 2), None)


def _resize(
    model: Any,
    adapter: PeftConfig,
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe | None,
    tokens: int | None,
) -> None:
    """Give a base as many embeddings as were trained with."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embeddings, nn.Embedding):
        return
    had = embeddings.num_embeddings
    saved = _saved_rows(model, shapes)
    rows = saved or _told_rows(recipe) or max(had, tokens or 0)
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


def _saved_rows(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many embeddings an adapter has saved."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {f"{name}.weight" for name, module in model.named_modules() if module in ends}
    found = (shape[0] for key, shape in shapes.items() if _plain(key) in names)
    return next(found, None)


def _told_rows(recipe: Recipe | None) -> int | None:
    """How many embeddings a training has noted."""
    if recipe is None:
        return None
    inner = recipe.config.get("text_config")
    found = (inner if isinstance(inner, dict) else recipe.config).get("vocab_size")
    return found if type(found) is int and 0 < found < _MOST_ROWS else None


def _check_patterns(checkpoint: str | os.PathLike[str], config: PeftConfig, model: Any) -> None:
    names = [module for module, _ in model.named_modules()]
    if slow := slow_pattern(_patterns(config), names):
        raise MergeRefused(
            [
                f"{checkpoint} has a pattern that is none, or takes for ever: {slow!r}; name the "
                "modules in its adapter_config.json one by one"
            ]
        )


def tokens_of(processor: Any) -> int | None:
    """How many tokens a tokenizer, or that of a processor, has; None: there is none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return len(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _is_about_code(error: Exception | None) -> bool:
    return "trust_remote_code" in str(error)


def _told(error: Exception | None) -> str:
    if _is_about_code(error):
        return f"{error}; read that code, then pass --trust-remote-code"
    if re.search("size mismatch|mismatched", str(error)):
        return f"{error}; what training changed of the config is said with --config KEY=VALUE"
    return str(error)


def _directory_of(name: str) -> Path:
    """Where a model lies; that of an id in the Hub's cache."""
    found = None if os.path.isdir(name) else cached_file(name, "config.json")
    return Path(name) if found is None else Path(found).parent


def _patterns(config: PeftConfig) -> list[str]:
    """What PEFT may match against the names of modules."""
    fields = [
        value for key, value in vars(config).items() if re.search("module|param|pattern", key)
    ]
    return list(texts(fields))


def load_processor(*places: str | os.PathLike[str] | None, trust_remote_code: bool = False) -> Any:
    """The processor, or else the tokenizer, of the first place that has one; None: none has.

    Args:
        trust_remote_code: run the Python that came with one.

    Raises:
        MergeRefused: a place has one that does not load.
    """
    for place in [place for place in places if place]:
        told: Exception | None = None
        for cls in (AutoProcessor, AutoTokenizer):
            try:
                if Path(place).is_dir() and (pipes := pipes_in(place)):
                    raise ValueError(f"{', '.join(pipes)} in it is no file")
                with asking_nobody():
                    found = cls.from_pretrained(place, trust_remote_code=trust_remote_code)
                _check_processor(found)
                return found
            except Exception as error:  # of whatever lies there
                told = error
                if _is_about_code(error):  # a tokenizer in place of the processor would be less
                    break
        if any((Path(place) / file).exists() for file in _OF_PROCESSORS):
            raise MergeRefused(
                [
                    f"the tokenizer in {place} does not load: {_told(told)}; mend it, or remove it "
                    "to have the base's"
                ]
            ) from told
    return None


def _check_processor(found: Any) -> None:
    if not isinstance(found, _PROCESSORS):
        raise ValueError(f"{type(found).__name__} is no tokenizer and no processor")


def training_of(checkpoint: str | os.PathLike[str]) -> Training:
    """What a Trainer has noted in a checkpoint; nothing if it made none.

    Raises:
        MergeRefused: what is there cannot be read.
    """
    path = Path(checkpoint) / "trainer_state.json"
    if not path.exists():
        return Training()
    try:
        state = read_json(path)
        step = state["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeRefused([f"{path} cannot be read: {error}; mend or remove it"]) from error
    if type(step) is not int or not 0 <= step < _MOST_STEPS:
        raise MergeRefused([f"{path} has a global_step that is none; mend or remove it"])
    return Training(step=step)
