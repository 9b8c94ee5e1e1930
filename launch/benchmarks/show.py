"""Tables and JSON on standard output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is text, the others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Into a file or a pipe, lines as long as they need to be.
    Console(width=None if sys.stdout.isatty() else 1 << 14, highlight=False, markup=False).print(table)


def cell(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def print_json(value: object) -> None:
    """For programs that read it."""
    print(json.dumps(value, indent=1))
