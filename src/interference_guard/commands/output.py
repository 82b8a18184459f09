"""What commands print: tables and progress for people, JSON for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from interference_guard.report.text import plain

# What interference is measured in, by the unit of a trust region.
UNITS = {"reward": "reward range", "nats": "nats per token"}
# Cells that a table leaves to the names in its first column, however narrow the terminal is.
NAME = 8
# Cells between two columns: a space, a line, a space.
BETWEEN = 3


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text and folds where it must, the others are numbers and stay whole."""
    console = Console()
    between = BETWEEN * (len(columns) - 1)
    widths = _widths(columns, rows, console.width - between)
    # A line that the terminal breaks can still be read, a number that lost its end cannot.
    console.width = max(console.width, sum(widths) + between)
    # Without a frame there is more room for names.
    made = Table(title=_text(title, "table.title"), title_justify="left", show_edge=False, pad_edge=False)
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold", width=width)
    for row in rows:
        made.add_row(*map(_text, row))
    console.print(made)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Cells of each column: the widest give way until all fit; only in the first column words are broken."""
    texts = [[plain(value) for value in column] for column in zip(columns, *rows, strict=True)]
    widths = [max(map(cell_len, column)) for column in texts]
    least = [max((cell_len(word) for text in column for word in text.split()), default=0) for column in texts]
    least[0] = min(NAME, widths[0])
    while sum(widths) > room:
        giving = [index for index, width in enumerate(widths) if width > least[index]]
        if not giving:
            break
        widths[max(giving, key=lambda index: widths[index])] -= 1
    return widths


def line(text: str) -> None:
    """Print a line."""
    Console().print(_text(text), soft_wrap=True)


def notes(sentences: Iterable[str]) -> None:
    """Print what there is to know of a run's files, a line each."""
    for sentence in sentences:
        line(sentence)


def _text(value: str, style: str = "") -> Text:
    # Text, not markup: a domain may be called [math]. Plain: or hold what moves the cursor.
    return Text(plain(value), style)


def as_json(value: Any) -> None:
    """Print JSON; NaN becomes null."""
    sys.stdout.write(json.dumps(_plain(value), indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the error stream while tensors are read; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda name: bar.advance(task)
