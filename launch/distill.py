"""Self-distillation: a sharded student learns from a teacher that is its own average.

    torchrun --nproc-per-node 2 launch/distill.py --out runs/distill

Writes distill.json and distill.png, and says whether the teacher was ahead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent))  # for those who import this file instead of starting it

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist.", show_default=False)],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    every: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 50,
    gaps: Annotated[float, typer.Option(min=0, max=1, help="Part of the student's input that is hidden.")] = 0.1,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the teacher in the loss.")] = 0.5,
    half_life: Annotated[str, typer.Option(help="Of the teacher.")] = "10ba",
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW, constant.")] = 4e-3,
    data: Annotated[str | None, typer.Option(help="Text; else Python's own sources.", show_default=False)] = None,
) -> None:
    """Trains a student with gaps in its input by a teacher without; evaluates both."""
    from demo.distill import Distillation, verdict, write

    if out.exists():
        raise typer.BadParameter(f"{out}: exists already", param_hint="--out")
    found = Distillation(steps, every, gaps, share, half_life, lr).run(data)
    if os.environ.get("RANK", "0") == "0":
        write(found, out)
        typer.echo(verdict(found))


if __name__ == "__main__":
    app()
