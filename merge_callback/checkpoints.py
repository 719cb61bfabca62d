"""Adapters and data from files, as they lie on a disk after training. Knows nothing of merging."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import AutoProcessor, AutoTokenizer, BitsAndBytesConfig

from merge_callback.batches import Batch
from merge_callback.errors import MergeRefused
from merge_callback.manifest import Training

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
_OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_LONGEST = 2048  # tokens of a row


def adapter_config(checkpoint: str | os.PathLike[str]) -> PeftConfig:
    """What a saved adapter says of itself.

    Raises:
        MergeRefused: there is none.
    """
    place = Path(checkpoint)
    if not place.is_dir():
        raise MergeRefused([f"{place} is no directory"])
    if (place / _ADAPTER).is_file():
        try:
            return PeftConfig.from_pretrained(str(place))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MergeRefused([f"{place / _ADAPTER} cannot be read: {error}"]) from error
    others = sorted(found.parent.name for found in place.glob(f"*/{_ADAPTER}"))
    there = f"; there is one in {', '.join(others)}" if others else ""
    raise MergeRefused([f"{place} has no {_ADAPTER}: it is no saved adapter{there}"])


def load_adapter(
    checkpoint: str | os.PathLike[str],
    base: str | None = None,
    *,
    load_in_4bit: bool = False,
    model_class: str | None = None,
    device: str | None = None,
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

    Raises:
        MergeRefused: no adapter there, no such base, or no such class.
    """
    config = adapter_config(checkpoint)
    name = base or config.base_model_name_or_path
    if not name:
        raise MergeRefused([f"{checkpoint} does not name its base; give one"])
    cls: Any = getattr(
        transformers, model_class or _CLASSES.get(config.task_type, _CLASSES["CAUSAL_LM"]), None
    )
    if not hasattr(cls, "from_pretrained"):
        raise MergeRefused([f"transformers has no class {model_class}"])
    settings: dict[str, Any] = {"dtype": "auto"}
    settings["device_map"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        model = cls.from_pretrained(name, **settings)
    except Exception as error:  # each library has its own
        raise MergeRefused([f"the base {name} does not load: {error}"]) from error
    try:
        # In the dtype that was trained: otherwise 16-bit factors would be cast to float32.
        return PeftModel.from_pretrained(model, str(checkpoint), autocast_adapter_dtype=False)
    except Exception as error:
        raise MergeRefused([f"{checkpoint} does not load on the base {name}: {error}"]) from error


def load_processor(*places: str | os.PathLike[str] | None) -> Any:
    """The processor, or else the tokenizer, of the first place that has one; None: none has.

    Raises:
        MergeRefused: a place has one that does not load.
    """
    for place in [place for place in places if place]:
        told: Exception | None = None
        for cls in (AutoProcessor, AutoTokenizer):
            try:
                return cls.from_pretrained(place)
            except Exception as error:  # of whatever lies there
                told = error
        if any((Path(place) / file).exists() for file in _OF_TOKENIZERS):
            raise MergeRefused(
                [
                    f"the tokenizer in {place} does not load: {told}; mend it, or remove it to "
                    "have the base's"
                ]
            ) from told
    return None


def training_of(checkpoint: str | os.PathLike[str]) -> Training:
    """What a Trainer has noted in a checkpoint."""
    try:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        return Training(step=int(state["global_step"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Training()


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
            found, prompt = _tokens(json.loads(line), tokenizer)
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
        return list(row["input_ids"]), 0
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
