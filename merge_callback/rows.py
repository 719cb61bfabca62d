"""Rows of data from files of the kinds that people train on, as batches. Knows nothing of merging.

JSON is read here, a line at a time. All else is read by the library `datasets`, which comes with
trl.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from merge_callback.batches import Batch
from merge_callback.errors import MergeRefused
from merge_callback.foreign import parse_json, pipes_in

_LONGEST = 2048  # tokens of a row
_COLUMNS = (
    "input_ids, text, messages, conversations, prompt and completion, or instruction and output"
)
_FORMS = (
    "give JSON Lines or a JSON array, either of them as .gz too, CSV, Parquet, a directory that "
    "datasets has saved, or the id of a dataset on the Hub"
)
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_JSON = re.compile(r"\.jsonl?(\.gz)?$")
_ROLES = {"human": "user", "gpt": "assistant"}
_BOM = b"\xef\xbb\xbf"

# How many there are; of each where it stands, and the row, which may be JSON still.
_Rows = tuple[int, Callable[[int], tuple[str, Any]]]


def read_batches(
    path: str | os.PathLike[str], processor: Any, tokens: int | None = None
) -> Iterator[Batch]:
    """One batch a row of a file, of a directory that `datasets` has saved, or of the Hub.

    Args:
        path: rows have `input_ids`; or `text`, `messages`, `conversations`, `prompt` and
            `completion`, or `instruction` and `output`, which `processor` makes tokens of, 2048 at
            most. What a prompt or an instruction says does not count as label.
        processor: tokenizer, or processor with one.
        tokens: how many are enough; rows are drawn then, the same ones each time. None: all rows.

    Raises:
        MergeRefused: the file or a row cannot be read.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    with ExitStack() as open_files:
        try:
            count, row = _rows(os.fspath(path), open_files)
        except MergeRefused:
            raise
        except Exception as error:  # of a file system, or of datasets and what it reads with
            raise MergeRefused([f"{path} cannot be read: {error}; {_FORMS}"]) from error
        if not count:
            raise MergeRefused([f"{path} has no rows"])
        numbers = array("q", range(count))
        if tokens is not None:
            random.Random(0).shuffle(numbers)
        read = 0
        for number in numbers:
            batch = _batch(path, row, number, tokenizer)
            yield batch
            read += batch["input_ids"].numel()
            if tokens is not None and read >= tokens:
                return


def _batch(
    path: str | os.PathLike[str],
    row: Callable[[int], tuple[str, Any]],
    number: int,
    tokenizer: Any,
) -> Batch:
    where = f"row {number + 1}"
    try:
        where, value = row(number)
        found, prompt = _tokens(parse_json(value) if isinstance(value, bytes) else value, tokenizer)
        ids = torch.tensor([found[:_LONGEST]], dtype=torch.long)
    except Exception as error:  # of a tokenizer or its template, too
        raise MergeRefused([f"{path}, {where}: {error}"]) from error
    if not ids.numel():
        raise MergeRefused([f"{path}, {where}: there is nothing in it"])
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _rows(path: str, open_files: ExitStack) -> _Rows:
    place = Path(path)
    if place.is_dir():
        return _of_datasets(path, open_files)
    if not place.exists() and _may_be_id(path):
        return _of_hub(path, open_files)
    if place.suffix in _BUILDERS:
        return _of_datasets(path, open_files, _BUILDERS[place.suffix])
    return _of_json(_seekable(place, open_files))


def _may_be_id(path: str) -> bool:
    if path.count("/") != 1 or Path(path).suffix in _BUILDERS or _JSON.search(path):
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def _of_hub(path: str, open_files: ExitStack) -> _Rows:
    try:
        return _of_datasets(path, open_files)
    except MergeRefused:
        raise
    except Exception as error:
        raise ValueError(
            f"no such file or directory, and as the id of a dataset on the Hub: {error}"
        ) from error


def _seekable(place: Path, open_files: ExitStack) -> IO[bytes]:
    """A file to read here and there; a copy of one that is compressed, or of a pipe."""
    opened = open_files.enter_context(place.open("rb"))
    compressed = place.suffix == ".gz"
    if opened.seekable() and not compressed:
        return opened
    source: Any = gzip.GzipFile(fileobj=opened) if compressed else opened
    copy = open_files.enter_context(tempfile.TemporaryFile())
    shutil.copyfileobj(source, copy)
    copy.seek(0)
    return copy


def _of_json(file: IO[bytes]) -> _Rows:
    """Rows of JSON Lines, of which only the places are kept, or of a JSON array."""
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    if _is_array(file, start):
        values = parse_json(file.read())
        return len(values), lambda number: (f"row {number + 1}", values[number])
    places, lines = array("q"), array("q")
    at = start
    for line, content in enumerate(file, 1):
        if content.strip():
            places.append(at)
            lines.append(line)
        at += len(content)

    def row(number: int) -> tuple[str, bytes]:
        file.seek(places[number])
        return f"line {lines[number]}", file.readline()

    return len(places), row


def _is_array(file: IO[bytes], start: int) -> bool:
    """Whether the file is one JSON array; JSON Lines may begin with a row that is an array."""
    first = next((line for line in file if line.strip()), b"").strip()
    is_one = first.startswith(b"[") and (
        not first.endswith(b"]") or not any(line.strip() for line in file)
    )
    file.seek(start)
    return is_one


def _of_datasets(path: str, open_files: ExitStack, builder: str | None = None) -> _Rows:
    try:
        import datasets
    except ImportError as error:
        raise MergeRefused(
            [f"{path} is read by datasets, which is not installed: pip install datasets"]
        ) from error
    if not sys.stderr.isatty() and not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
        open_files.callback(datasets.enable_progress_bars)
    if pipes := pipes_in(path):
        raise ValueError(f"{', '.join(pipes)} in it is no file")
    if builder is not None:
        if not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        cache = open_files.enter_context(tempfile.TemporaryDirectory())
        settings = {"sep": "\t"} if path.endswith(".tsv") else {}
        found: Any = datasets.load_dataset(builder, data_files=path, cache_dir=cache, **settings)
    elif any(Path(path, name).exists() for name in ("state.json", "dataset_dict.json")):
        found = datasets.load_from_disk(path)
    else:
        found = datasets.load_dataset(path)
    rows = _split(path, found) if isinstance(found, dict) else found
    return len(rows), lambda number: (f"row {number + 1}", rows[number])


def _split(path: str, found: Mapping[str, Any]) -> Any:
    """The rows to train on."""
    name = "train" if "train" in found else next(iter(found))
    if name == "train" or len(found) == 1:
        return found[name]
    raise MergeRefused([f"{path} has no split called train, but {', '.join(sorted(found))}"])


def _tokens(row: Any, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of a row, and how many of them are prompt."""
    if not isinstance(row, dict):
        raise ValueError("a row is a JSON object")
    has = {key for key, value in row.items() if value is not None}
    if "input_ids" in has:
        ids = list(row["input_ids"])
        if any(type(number) is not int for number in ids):
            raise ValueError("input_ids are whole numbers")
        return ids, 0
    if tokenizer is None:
        raise ValueError("there is no tokenizer; give rows of input_ids")
    for column in ("messages", "conversations"):
        if column in has:
            return _chat(tokenizer, [_message(message) for message in row[column]]), 0
    if "text" in has:
        return tokenizer(row["text"])["input_ids"], 0
    if {"prompt", "completion"} <= has:
        return _answered(tokenizer, row["prompt"], row["completion"])
    if {"instruction", "output"} <= has:
        return _instructed(tokenizer, row["instruction"], row.get("input"), row["output"])
    found = ", ".join(map(str, row)) or "no columns"
    raise ValueError(f"a row needs {_COLUMNS}; this one has {found}")


def _instructed(
    tokenizer: Any, asked: str, given: str | None, answer: str
) -> tuple[list[int], int]:
    """A row of alpaca's: as a chat, where the tokenizer has a template for one."""
    prompt = f"{asked}\n{given}" if given else asked
    if not getattr(tokenizer, "chat_template", None):
        return _answered(tokenizer, f"{prompt}\n", answer)
    asking, answering = (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    )
    return _answered(tokenizer, [asking], [answering])


def _answered(tokenizer: Any, prompt: Any, completion: Any) -> tuple[list[int], int]:
    if isinstance(prompt, str):
        return tokenizer(prompt + completion)["input_ids"], len(tokenizer(prompt)["input_ids"])
    whole = _chat(tokenizer, [*prompt, *completion])
    return whole, len(_chat(tokenizer, prompt, add_generation_prompt=True))


def _message(message: Any) -> Any:
    """A message as templates take it; ShareGPT calls its parts otherwise."""
    if isinstance(message, dict) and "from" in message:
        role = message["from"]
        return {"role": _ROLES.get(role, role), "content": message["value"]}
    if isinstance(message, dict):  # datasets gives each row the keys of all
        return {k: v for k, v in message.items() if v is not None or k == "content"}
    return message


def _chat(tokenizer: Any, messages: Sequence[Any], **settings: Any) -> list[int]:
    found = tokenizer.apply_chat_template(messages, return_dict=True, **settings)
    return list(found["input_ids"])
