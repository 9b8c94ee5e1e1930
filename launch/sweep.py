"""Trains a byte-level GPT once, then makes many averages of it: which width, and which merge, would have been best?

    python launch/sweep.py --out runs/sweep

One process on the CPU. Writes sweep.json and sweep.png; the snapshots stay.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent))  # for those who import this file instead of starting it

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist.", show_default=False)],
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps.")] = 4000,
    every: Annotated[int, typer.Option(min=1, help="Steps between two snapshots.")] = 50,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW, constant.")] = 4e-3,
    data: Annotated[str | None, typer.Option(help="Text; else Python's own sources.", show_default=False)] = None,
) -> None:
    """Trains once, then draws the validation loss over the width of the average and over merge schemes."""
    from demo.sweep import Sweep, table, write

    if out.exists():
        raise typer.BadParameter(f"{out}: exists already", param_hint="--out")
    found = Sweep(out, steps, every, lr, data).run()
    write(found, out, every)
    typer.echo("\n".join(table(found)))


if __name__ == "__main__":
    app()
