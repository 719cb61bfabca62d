"""What others wrote: files that are none, JSON that nests too deep, control characters, patterns.

Knows nothing of models. Imports nothing that a command line would wait for.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_LARGEST = 1 << 28  # bytes of a JSON file
_MOST_LAYERS = 10_000  # each of them a module
_OF_LAYERS = re.compile("layer|depth|num_blocks")
_OF_ONE_LAYER = re.compile("size|theta")
_LONGEST_MATCH = 10.0  # seconds, for all patterns of an adapter
# Controls; direction and the like; halves of surrogates; separators of lines and paragraphs.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in (pattern, rf"(?:.*\\.)?(?:{pattern})(?:$|\\..*)"):
        match = re.compile(form).match
        for name in names:
            match(name)
    print(flush=True)
"""


def plain(text: object) -> str:
    """One line without control characters, in which nothing is hidden: they are escaped."""
    return "".join(map(_seen, str(text)))


def plain_lines(text: object) -> str:
    """The same of several lines, each kept."""
    return "\n".join(map(plain, str(text).split("\n")))


def _seen(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def parse_json(text: str | bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: whatever is wrong with it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file; a pipe is not waited for, and gigabytes are not read.

    Raises:
        OSError, ValueError: there is none.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no file")
    if found.st_size > _LARGEST:
        raise ValueError(f"it has {found.st_size} bytes")
    return parse_json(Path(path).read_bytes())


def pipes_in(place: str | os.PathLike[str]) -> list[str]:
    """What lies in a directory, or one below, that is neither: to open it may take for ever."""

    def is_one(path: Path) -> bool:
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing, which is no file for anybody
            return False
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))

    top = Path(place)
    found = sorted(path for depth in ("*", "*/*") for path in top.glob(depth) if is_one(path))
    return [path.relative_to(top).as_posix() for path in found]


def refuse_layers(key: str, value: Any) -> None:
    """Look at a value of a config: whether it asks for more layers than can be made.

    Raises:
        ValueError: it does.
    """
    if not _OF_LAYERS.search(key) or _OF_ONE_LAYER.search(key):
        return
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(one, int | float) and one > _MOST_LAYERS for one in numbers):
        raise ValueError(f"its {key} is {value}")


def slow_pattern(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first regular expression that cannot be matched against all names in time, or at all.

    It is tried in a process of its own, since a match under way cannot be stopped.
    """
    tried = [pattern for pattern in dict.fromkeys(patterns) if re.search(r"[^\w.-]", pattern)]
    if not tried:
        return None
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    told = json.dumps([tried, list(names)]).encode()
    try:
        done = subprocess.run(command, input=told, capture_output=True, timeout=_LONGEST_MATCH)
        matched = done.stdout.count(b"\n")
    except subprocess.TimeoutExpired as late:
        matched = (late.stdout or b"").count(b"\n")
    return tried[matched] if matched < len(tried) else None


def texts(value: Any) -> Iterator[str]:
    """All texts in a value as JSON has them, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from texts(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from texts(inner)
