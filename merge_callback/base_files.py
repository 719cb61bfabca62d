"""The directory that a base was loaded from, where it is at hand. Only read.

A base's config names it: a directory, or a repository in the Hub's cache. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from merge_callback.foreign import pipes_in
from merge_callback.loading import asking_nobody

# What a processor is made of beside its tokenizer.
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# What tokenizer.json was converted from: converters to other formats read these.
_VOCABULARY = ("*.model", "vocab.json", "merges.txt", "vocab.txt")
_TEMPLATE, _OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"  # a processor's, the old
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", _TEMPLATE)
_LARGEST = 1 << 28  # bytes of a file that is carried along
_LIMITS = ("padding_side", "truncation_side", "model_max_length")


def base_file(config: PretrainedConfig, name: str) -> Path | None:
    """Where a file of the base lies; None: it is not at hand."""
    source = getattr(config, "_name_or_path", None)
    if not source:
        return None
    try:
        found = cached_file(
            source,
            name,
            revision=getattr(config, "_commit_hash", None),
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # a directory that is gone, or no name that a base could have
        return None
    return None if found is None else Path(found)


def base_directory(config: PretrainedConfig) -> Path | None:
    """Where the base lies, absolute; None: it is not at hand."""
    found = base_file(config, "config.json")
    return None if found is None else found.parent.resolve()


def is_of_the_base(path: Path, place: Path) -> bool:
    """Whether a file is in a base's directory, links followed: it may be in the Hub's blobs.

    Others' files, which a link or a name with dots reaches, are not to be published.
    """
    real, tops = path.resolve(), [place.resolve()]
    if place.parent.name == "snapshots":
        tops.append((place.parent.parent / "blobs").resolve())
    return real.is_file() and any(real.is_relative_to(top) for top in tops)


def base_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The config that the base came with; None: it is not at hand."""
    place = base_directory(config)
    try:
        with asking_nobody():
            return None if place is None else type(config).from_pretrained(place)
    except Exception:  # of another kind of model, whose part this one is
        return None


def tokenizer_limits(config: PretrainedConfig, processing_class: Any) -> dict[str, Any]:
    """Padding and truncation of the base's tokenizer, which training sets for itself.

    Empty where the base is not at hand.
    """
    base = _base_of(config, processing_class)
    return {} if base is None else {name: getattr(base, name) for name in _LIMITS}


def with_limits_of_base(config: PretrainedConfig, processing_class: Any) -> Any:
    """A tokenizer or processor that pads and truncates as the base's does: a copy if it has to be.

    One that cannot be copied is given back as it is.
    """
    base, tokenizer = _base_of(config, processing_class), _tokenizer(processing_class)
    if base is None or _limits(tokenizer) == _limits(base):
        return processing_class
    try:
        made = copy.deepcopy(processing_class)
    except Exception:  # of a custom one, which may hold anything
        return processing_class
    for name in _LIMITS:
        setattr(_tokenizer(made), name, getattr(base, name))
    backends = [getattr(part, "_tokenizer", None) for part in (_tokenizer(made), base)]
    if None not in backends:
        _copy_limits(*backends)
    return made


def _limits(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "_tokenizer", None)
    last = [getattr(backend, name, None) for name in ("truncation", "padding")]
    return [*(getattr(tokenizer, name, None) for name in _LIMITS), *last]


def _copy_limits(backend: Any, base: Any) -> None:
    """Of the Rust tokenizers, which keep what they were last called with, and save it."""
    if base.truncation is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(**base.truncation)
    if base.padding is None:
        backend.no_padding()
    else:
        backend.enable_padding(**base.padding)


def companions_of_base(
    config: PretrainedConfig, processing_class: Any, there: Iterable[str]
) -> Iterator[Path]:
    """Files of the base that a merged model needs, and that nothing newer replaces.

    Args:
        config: the live model's.
        processing_class: what was saved beside the model; None: nothing.
        there: names of the files that it saved.
    """
    place, there = base_directory(config), set(there)
    if place is None:
        return
    patterns = list(_PROCESSOR)
    if _TEMPLATE not in there:
        patterns.append(_OLD_TEMPLATE)
    if processing_class is None:
        patterns += (*_TOKENIZER, *_VOCABULARY) if _has_rows_of_base(config) else ()
    elif _base_of(config, processing_class) is not None:
        patterns += _VOCABULARY
    hidden = set(pipes_in(place))
    for path in sorted({path for pattern in patterns for path in place.glob(pattern)}):
        if path.name not in there | hidden and is_of_the_base(path, place):
            if path.stat().st_size <= _LARGEST:
                yield path


def _has_rows_of_base(config: PretrainedConfig) -> bool:
    """Whether the vocabulary has not been resized."""
    base = base_config(config)
    sizes = [getattr(c and c.get_text_config(), "vocab_size", None) for c in (config, base)]
    return sizes[0] is not None and sizes[0] == sizes[1]


def _base_of(config: PretrainedConfig, processing_class: Any) -> Any:
    """The base's tokenizer, if each of its tokens still has its number; else None."""
    base = _base_tokenizer(config, processing_class)
    if base is None:
        return None
    now: dict[str, int] = _tokenizer(processing_class).get_vocab()
    kept = all(now.get(token) == index for token, index in base.get_vocab().items())
    return base if kept else None


def _tokenizer(processing_class: Any) -> Any:
    return getattr(processing_class, "tokenizer", processing_class)


def _base_tokenizer(config: PretrainedConfig, processing_class: Any) -> Any:
    tokenizer = _tokenizer(processing_class)
    place = base_directory(config)
    if place is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    kind: Any = type(tokenizer)
    try:
        return _load_tokenizer(kind, place)
    except Exception:  # the base has none, or one of another class
        return None


@functools.lru_cache(maxsize=1)
def _load_tokenizer(kind: Any, place: Path) -> Any:
    with asking_nobody():
        return kind.from_pretrained(place, local_files_only=True)
