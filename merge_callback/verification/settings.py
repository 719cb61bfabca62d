"""What stands beside the weights, against what was meant: configs, tokenizer or processor.

What lies in the directory is loaded by transformers' own classes and compared with the live
objects, field by field. What the trainer changed for itself counts as it was before; what
transformers itself loses when it saves and loads a live object counts as lost. Knows nothing of
weights.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from merge_callback.codecs.bnb4 import Bnb4
from merge_callback.companions import SavedProcessor, aligned, generation_config, live_config
from merge_callback.engines import class_of
from merge_callback.loading import asking_nobody
from merge_callback.plan import Plan

_PROBE_TEXT = "The 7 quick foxes' jump - über 3.14 日本語 🙂\n\tdef f(x): return x ** 2"
# Where a config came from, and what it is written with.
_ORIGINS = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
# Have their own checks.
_JUDGED_APART = frozenset({"architectures", "dtype", "torch_dtype", "quantization_config"})
_OF_TOKENIZERS = (
    "special_tokens_map",
    "all_special_ids",
    "chat_template",
    "padding_side",
    "truncation_side",
    "model_max_length",
    "model_input_names",
)
_PARTS = ("image_processor", "video_processor", "feature_extractor")


def config_problems(
    plan: Plan, method: str, place: Path, restored: Mapping[str, Any], given: Any = None
) -> Iterator[str]:
    """Fields of config.json that are not what was meant.

    Args:
        restored: values of the text config that the trainer has changed and the file has back.
        given: the tokenizer or processor that was saved with it, whose special tokens it has.
    """
    live, _ = aligned(  # of a copy: saving a config changes it
        live_config(plan.model), generation_config(plan), given
    )
    kind: Any = type(live)
    wanted = _fields(live)
    for name, value in restored.items():
        _set_in_text(wanted, live, name, value)
        if name in wanted:  # trainers set it around the text config, too
            wanted[name] = value
    if plan.ties_broken:
        wanted["tie_word_embeddings"] = False
        _set_in_text(wanted, live, "tie_word_embeddings", False)
    wanted["architectures"] = [class_of(plan.model).__name__]
    if method == "merged_16bit" or not plan.base_is_4bit:
        wanted["dtype"] = str(plan.dtype).removeprefix("torch.")
    expected = _quantization(plan, method, wanted.pop("quantization_config", None))
    if expected is None and hasattr(live, "quantization_config"):
        del live.quantization_config  # otherwise one in the file would be what saving leaves

    def differences(loaded: Any) -> Iterator[str]:
        found = _fields(loaded)
        quantised = found.pop("quantization_config", None)
        yield from _field_problems("config.json", wanted, found)
        if expected is None and quantised is not None:
            yield "config.json: it has a quantization_config, and 16 bits have none"
        elif expected is not None:
            shown = {name: (quantised or {}).get(name) for name in expected}
            yield from _field_problems("config.json: quantization_config", expected, shown)

    def load(directory: Path) -> Any:
        return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)

    yield from _unexplained(differences, load, load(place), live)


def _unexplained(
    differences: Callable[[Any], Iterable[str]],
    load: Callable[[Path], Any],
    loaded: Any,
    live: Any,
) -> list[str]:
    """How `loaded` differs, but for what transformers itself loses when it saves `live`."""
    found = list(differences(loaded))
    if not found:
        return []
    with tempfile.TemporaryDirectory() as again:
        live.save_pretrained(again)
        lost = set(differences(load(Path(again))))
    return [problem for problem in found if problem not in lost]


def _set_in_text(fields: dict[str, Any], config: Any, name: str, value: Any) -> None:
    """Set a field of the text config in the nested fields of a config."""
    text = config.get_text_config()
    if text is config:
        fields[name] = value
        return
    for part, inner in vars(config).items():
        if hasattr(inner, "get_text_config") and isinstance(fields.get(part), dict):
            if inner is text or inner.get_text_config() is text:
                _set_in_text(fields[part], inner, name, value)


def _fields(config: Any) -> dict[str, Any]:
    fields = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in _ORIGINS}


def _quantization(plan: Plan, method: str, live: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the quantization_config of an output has to say; None: there is none."""
    if method == "merged_16bit":
        return None
    if plan.base_is_4bit:
        settings = dict(live or {})
        settings["bnb_4bit_quant_storage"] = "uint8"
        if plan.ties_broken:
            settings["llm_int8_skip_modules"] = plan.unquantised_linears(method)
        return settings
    grid = next(c.grid for c in plan.containers[method].values() if isinstance(c, Bnb4))
    return {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
        "bnb_4bit_quant_type": grid.quant_type,
        "bnb_4bit_use_double_quant": grid.nested,
        "bnb_4bit_quant_storage": "uint8",
    }


def generation_problems(plan: Plan, place: Path, given: Any = None) -> Iterator[str]:
    """Fields of generation_config.json that are not the live ones; `given` as for the config."""
    _, live = aligned(live_config(plan.model), generation_config(plan), given)
    if live is None:
        return
    wanted = _generation_fields(live)

    def differences(loaded: Any) -> Iterator[str]:
        yield from _field_problems("generation_config.json", wanted, _generation_fields(loaded))

    def load(directory: Path) -> Any:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)

    yield from _unexplained(differences, load, load(place), live)


def _generation_fields(config: Any) -> dict[str, Any]:
    return {k: v for k, v in _fields(config).items() if k != "_from_model_config"}


def processor_problems(
    place: Path, given: Any, limits: Callable[[], Mapping[str, Any]] = dict
) -> Iterator[str]:
    """Whether the tokenizer or processor that lies in a directory is the one that was given.

    Args:
        limits: attributes of the tokenizer that are the base's, and not those of training.
    """
    if given is None:
        return
    if isinstance(given, SavedProcessor):
        for name in given.differing(place):
            yield f"{name}: it is not what the tokenizer saved"
        return
    if not hasattr(type(given), "from_pretrained"):
        return
    given = copy.deepcopy(given)  # encoding sets truncation and padding of a fast tokenizer
    for name, value in limits().items():
        setattr(getattr(given, "tokenizer", given), name, value)
    kind: Any = type(given)

    def load(directory: Path) -> Any:
        with asking_nobody():
            trusted = _is_custom(given)
            return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)

    loaded = load(place)
    yield from _vocabulary_problems(given, loaded)
    yield from _unexplained(partial(_processor_differences, given), load, loaded, given)


def _vocabulary_problems(given: Any, loaded: Any) -> Iterator[str]:
    """Whether both make the same tokens of a text. What is lost there is lost to everybody."""
    given, loaded = (getattr(p, "tokenizer", p) for p in (given, loaded))
    if not hasattr(given, "get_vocab"):
        return
    texts = (_PROBE_TEXT, given.decode(list(range(min(3, len(given))))))
    same = loaded.get_vocab() == given.get_vocab()
    if not same or any(loaded.encode(text) != given.encode(text) for text in texts):
        yield "the tokenizer saved there is not the one of the training"


def _processor_differences(given: Any, loaded: Any) -> Iterator[str]:
    pairs = [getattr(p, "tokenizer", p) for p in (given, loaded)]
    if hasattr(pairs[0], "get_vocab"):
        yield from _tokenizer_problems(*pairs)
    for part in _PARTS:
        parts = [getattr(p, part, None) for p in (given, loaded)]
        if parts[0] is not None and hasattr(parts[0], "to_dict"):
            wanted, found = (_plain(p.to_dict()) if p is not None else {} for p in parts)
            yield from _field_problems(part, wanted, found)
    if given is not pairs[0]:
        wanted, found = ({"chat_template": _template(p)} for p in (given, loaded))
        yield from _field_problems("processor", wanted, found)


def _is_custom(processor: Any) -> bool:
    """Whether a part of it came with code of its own, which its user has trusted."""
    parts = [processor, *(getattr(processor, name, None) for name in ("tokenizer", *_PARTS))]
    return any(type(part).__module__.startswith("transformers_modules.") for part in parts)


def _template(processor: Any) -> Any:
    """The chat template of a processor; one that has none takes its tokenizer's."""
    own = getattr(processor, "chat_template", None)
    return own or getattr(getattr(processor, "tokenizer", None), "chat_template", None)


def _tokenizer_problems(given: Any, loaded: Any) -> Iterator[str]:
    wanted, found = (
        {name: _plain(getattr(t, name, None)) for name in _OF_TOKENIZERS}
        | {"added_tokens": {str(i): str(token) for i, token in t.added_tokens_decoder.items()}}
        | {"added_token_flags": _flags(t)}
        for t in (given, loaded)
    )
    yield from _field_problems("tokenizer", wanted, found)


def _flags(tokenizer: Any) -> dict[str, Any]:
    """How added tokens are cut out of a text."""
    return {
        str(index): [getattr(t, f, None) for f in ("special", "lstrip", "rstrip", "normalized")]
        for index, t in tokenizer.added_tokens_decoder.items()
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if key not in _ORIGINS}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _field_problems(where: str, wanted: Any, found: Any, name: str = "") -> Iterator[str]:
    """Leaves that differ; a field that is missing counts as null."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in [*wanted, *(k for k in found if k not in wanted)]:
            inner = f"{name}.{key}" if name else str(key)
            yield from _field_problems(where, wanted.get(key), found.get(key), inner)
    elif wanted != found and not (wanted != wanted and found != found):  # NaN
        yield f"{where}: {name} is {_short(found)}, and {_short(wanted)} in the live model"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
