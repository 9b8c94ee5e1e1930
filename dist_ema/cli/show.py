"""Shows results: tables, progress, sizes, times and JSON. rich is imported where it is needed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console


def console(error: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    # Into a file or a pipe, lines as long as they need to be: nothing is cut or wrapped.
    return Console(stderr=error, width=None if stream.isatty() else 1 << 14, highlight=False, markup=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table. A column whose title ends with a colon contains numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(column.rstrip(":"), justify="right" if column.endswith(":") else "left", overflow="fold")
    for row in rows:
        # Text, so that brackets in names are no markup; names may come from anywhere.
        table.add_row(*(Text(line(str(cell))) for cell in row))
    console().print(table)


@contextmanager
def progress(operation: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Shows a progress bar on stderr, if stderr is a terminal.

    Yields a function that is called with the total bytes, and returns a function that is called with the bytes done.
    """
    if not sys.stderr.isatty():
        yield lambda _: lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(operation), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(error=True), transient=True) as bar:

        def begin(total: int) -> Callable[[int], None]:
            task = bar.add_task(operation, total=total)
            return lambda done: bar.advance(task, done)

        yield begin


@contextmanager
def one_thread_an_operation() -> Iterator[None]:
    """Limits torch to one thread: on small chunks its threads wait for each other, and slow down the threads of
    ``verify``.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def finite(value: object) -> object:
    """Returns the value, or a string for a number that JSON does not have: NaN or infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def complain(what: object) -> None:
    typer.echo(line(f"dist-ema: {what}"), err=True)


def line(text: str) -> str:
    """Returns the text on one line, with control characters escaped: paths and names may come from anywhere."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def many(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def time(seconds: float) -> str:
    """Formats seconds as ``"1.5 ms"``."""
    value = seconds * 1e6
    unit = "us"
    for larger, factor in (("ms", 1000), ("s", 1000), ("min", 60)):
        if value < factor:
            break
        value = value / factor
        unit = larger
    return f"{value:.3g} {unit}"


def size(nbytes: int) -> str:
    """Formats bytes as ``"1.5 MB"``, decimal."""
    from rich.filesize import decimal

    return decimal(nbytes)
