"""Adapters from files, as they lie on a disk after training. Knows nothing of merging."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_base import ImageProcessingMixin

from merge_callback.bases import ROOT, WRAPPED, Loading, load_base, shapes_of, trained_in_float32
from merge_callback.errors import MergeRefused
from merge_callback.foreign import pipes_in, read_json, slow_pattern, texts
from merge_callback.loading import asking_nobody
from merge_callback.manifest import Training
from merge_callback.recipe import read_recipe

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
# Initial factors that are random, or made of data, and not of the base only.
_NOT_MADE_AGAIN = ("pissa_niter", "corda", "lora_ga")


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
    _check_init(checkpoint, config, loading)
    try:
        shapes = shapes_of(Path(checkpoint))
        wide = trained_in_float32(Path(checkpoint))
    except Exception as error:  # of a file that is cut off, or of a pickle that is more than data
        raise MergeRefused([f"{checkpoint} does not load on the base {name}: {error}"]) from error
    try:
        with asking_nobody():
            model = load_base(name, config, loading, recipe, shapes, tokens)
    except MergeRefused:
        raise
    except Exception as error:  # each library has its own
        raise MergeRefused([f"the base {name} does not load: {_told(error)}"]) from error
    _check_patterns(checkpoint, config, model)
    try:
        # In the dtype that was trained: PEFT casts all factors to float32, or all to the base's.
        with asking_nobody():
            found = PeftModel.from_pretrained(
                model, str(checkpoint), config=config, autocast_adapter_dtype=wide
            )
            placed = found.load_adapter(str(checkpoint), "default", autocast_adapter_dtype=wide)
    except Exception as error:
        raise MergeRefused(
            [f"{checkpoint} does not load on the base {name}: {_told(error)}"]
        ) from error
    missing = placed.missing_keys if config.peft_type == "LORA" else []  # some share what is not
    # PEFT saves embeddings once more, under names that it does not load.
    unplaced = [key for key in placed.unexpected_keys if not WRAPPED.search(key.removeprefix(ROOT))]
    if lost := sorted({*missing, *unplaced}):
        raise MergeRefused(
            [
                f"{checkpoint} does not fit the base {name}, loaded as {type(model).__name__}: "
                f"{lost[0]} and {len(lost) - 1} others have no counterpart; name the class that "
                "was trained with --model-class"
            ]
        )
    return found


def _check_init(checkpoint: str | os.PathLike[str], config: PeftConfig, loading: Loading) -> None:
    """Whether the base that was trained can be made again.

    Some ways to begin subtract the initial factors from the base. PEFT does so again when it loads
    the adapter, which gives the same base where the factors are a function of it.
    """
    init = str(getattr(config, "init_lora_weights", None))
    if not init.startswith(_NOT_MADE_AGAIN):
        return
    if loading.as_trained:
        raise MergeRefused(
            [
                f"{checkpoint} was trained with init_lora_weights={init!r}, which changed the base "
                "by what no file tells, so its merge would be another model; merge in training, "
                "with MergeOnSaveCallback, or save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion"
            ]
        )
    config.init_lora_weights = True


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
