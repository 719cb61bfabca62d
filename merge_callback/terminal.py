"""Printing: tables on a terminal, tab-separated lines elsewhere. Knows nothing of what is said.

What is printed may be the words of others: no control character of theirs reaches a terminal, and
nothing in a cell is markup.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from merge_callback.foreign import plain, plain_lines


@contextmanager
def _as_long_as_somebody_reads() -> Iterator[None]:
    """A pager that was left is no failure: what it would have shown goes nowhere."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@_as_long_as_somebody_reads()
def print_json(value: Any) -> None:
    """One JSON value; what is not finite, and has no place there, as null."""
    text = json.dumps(_finite(value), indent=2)
    print(text.replace("\x7f", "\\u007f"))  # the one control character that json leaves


@_as_long_as_somebody_reads()
def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys. On a terminal columns with nothing in them are left out."""
    if not rows:
        return
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    if not sys.stdout.isatty():
        for line in (columns, *cells):
            print("\t".join(line))
        return
    told = [index for index in range(len(columns)) if any(line[index] for line in cells)]
    table = Table(*(Column(Text(columns[index])) for index in told), header_style="bold")
    for line in cells:
        table.add_row(*(Text(line[index]) for index in told))
    Console().print(_Plain(table))


@_as_long_as_somebody_reads()
def print_markdown(text: str) -> None:
    """As it is, or rendered on a terminal."""
    if not sys.stdout.isatty():
        print(plain_lines(text), end="")
        return
    Console().print(_Plain(Markdown(plain_lines(text), hyperlinks=False)))


def say(text: object) -> None:
    """To stderr, what was said on the way."""
    print(_indented(text), file=sys.stderr)


@contextmanager
def plain_logs() -> Iterator[None]:
    """What any library logs meanwhile, or warns of, goes to stderr as `say` says it."""
    factory = logging.getLogRecordFactory()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.setLogRecordFactory(_PlainRecord)  # some libraries have handlers of their own
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        logging.captureWarnings(False)


class _PlainRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return plain_lines(super().getMessage())


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:  # with the traceback
        return _indented(super().format(record))


class _Plain:
    """What rich makes of something, without the control characters that its text may hold.

    Markdown has other ways to write them, as entities.
    """

    def __init__(self, inner: RenderableType):
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield Segment(plain_lines(segment.text), segment.style)


def _indented(text: object) -> str:
    """Lines of which none but the first looks like one of ours."""
    return plain_lines(text).replace("\n", "\n  ")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else plain(value)
