"""Adapters and data from files, as they lie on a disk after training. Knows nothing of merging."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.hub import cached_file

from merge_callback.batches import Batch
from merge_callback.errors import MergeRefused
from merge_callback.foreign import parse_json, pipes_in, read_json, slow_pattern, texts
from merge_callback.loading import asking_nobody
from merge_callback.manifest import Training
from merge_callback.verification.rebuilt import own_class, refuse_hostile

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
_LONGEST = 2048  # tokens of a row


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
    *,
    load_in_4bit: bool = False,
    model_class: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> PeftModel:
    """A saved adapter on its base, as it was trained.

    Args:
        checkpoint: directory that PEFT or a Trainer has saved, with an adapter_config.json.
        base: directory or id of the base; None: the one that the adapter names.
        load_in_4bit: quantise a 16-bit base to NF4 with double quantisation, as QLoRA does. One
            that was saved in 4 bits is loaded so anyhow.
        model_class: name of a class of transformers, e.g. AutoModelForImageTextToText; None: that
            of the adapter's task.
        device: None: a CUDA device where there is one.
        trust_remote_code: run the Python that came with the base.

    Raises:
        MergeRefused: no adapter there, no such base, or no such class.
    """
    config = adapter_config(checkpoint)
    name = base_of(checkpoint, base)
    cls = own_class(model_class or _CLASSES.get(config.task_type, _CLASSES["CAUSAL_LM"]))
    if cls is None:
        raise MergeRefused([f"transformers has no class {model_class} that makes models"])
    settings: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code}
    settings["device_map"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        refuse_hostile(_directory_of(name), trust_remote_code=trust_remote_code)
        with asking_nobody():
            model = cls.from_pretrained(name, **settings)
    except Exception as error:  # each library has its own
        raise MergeRefused([f"the base {name} does not load: {_told(error)}"]) from error
    names = [module for module, _ in model.named_modules()]
    if slow := slow_pattern(_patterns(config), names):
        raise MergeRefused(
            [
                f"{checkpoint} has a pattern that is none, or takes for ever: {slow!r}; name the "
                "modules in its adapter_config.json one by one"
            ]
        )
    try:
        # In the dtype that was trained: otherwise 16-bit factors would be cast to float32.
        with asking_nobody():
            return PeftModel.from_pretrained(model, str(checkpoint), autocast_adapter_dtype=False)
    except Exception as error:
        raise MergeRefused([f"{checkpoint} does not load on the base {name}: {error}"]) from error


def _is_about_code(error: Exception | None) -> bool:
    return "trust_remote_code" in str(error)


def _told(error: Exception | None) -> str:
    hint = "; read that code, then pass --trust-remote-code" if _is_about_code(error) else ""
    return f"{error}{hint}"


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


def read_batches(
    path: str | os.PathLike[str], processor: Any, tokens: int | None = None
) -> Iterator[Batch]:
    """One batch a row of a JSON Lines file.

    Args:
        path: rows have `input_ids`; or `text`, `messages`, or `prompt` and `completion`, which
            `processor` makes tokens of, 2048 at most. What a prompt says does not count as label.
        processor: tokenizer, or processor with one.
        tokens: how many are enough; rows are drawn then, the same ones each time. None: all rows.

    Raises:
        MergeRefused: the file or a row cannot be read.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    try:
        lines = Path(path).read_text("utf-8").split("\n")  # splitlines would split within strings
    except (OSError, UnicodeDecodeError) as error:
        raise MergeRefused([f"{path} cannot be read: {error}"]) from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise MergeRefused([f"{path} has no rows"])
    if tokens is not None:
        random.Random(0).shuffle(rows)
    read = 0
    for number, line in rows:
        try:
            found, prompt = _tokens(parse_json(line), tokenizer)
            ids = torch.tensor([found[:_LONGEST]], dtype=torch.long)
        except Exception as error:  # of a tokenizer or its template, too
            raise MergeRefused([f"{path}, line {number}: {error}"]) from error
        if not ids.numel():
            raise MergeRefused([f"{path}, line {number}: there is nothing in it"])
        labels = ids.clone()
        labels[:, :prompt] = -100
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        read += ids.numel()
        if tokens is not None and read >= tokens:
            return


def _tokens(row: Any, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of a row, and how many of them are prompt."""
    if not isinstance(row, dict):
        raise ValueError("a row is a JSON object")
    if "input_ids" in row:
        ids = list(row["input_ids"])
        if any(type(number) is not int for number in ids):
            raise ValueError("input_ids are whole numbers")
        return ids, 0
    if tokenizer is None:
        raise ValueError("there is no tokenizer; give rows of input_ids")
    if "messages" in row:
        return _chat(tokenizer, row["messages"]), 0
    if "text" in row:
        return tokenizer(row["text"])["input_ids"], 0
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return tokenizer(prompt + completion)["input_ids"], len(tokenizer(prompt)["input_ids"])
        whole = _chat(tokenizer, [*prompt, *completion])
        return whole, len(_chat(tokenizer, prompt, add_generation_prompt=True))
    raise ValueError("a row needs input_ids, text, messages, or prompt and completion")


def _chat(tokenizer: Any, messages: Any, **settings: Any) -> list[int]:
    found = tokenizer.apply_chat_template(messages, return_dict=True, **settings)
    return list(found["input_ids"])
