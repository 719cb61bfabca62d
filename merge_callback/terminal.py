"""Printing: tables on a terminal, tab-separated lines elsewhere. Knows nothing of what is said."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table


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
    print(json.dumps(_finite(value), indent=2))


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
    table = Table(*(columns[index] for index in told), header_style="bold")
    for line in cells:
        table.add_row(*(line[index] for index in told))
    Console().print(table)


@_as_long_as_somebody_reads()
def print_markdown(text: str) -> None:
    """As it is, or rendered on a terminal."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    Console().print(Markdown(text))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
