"""Implements ``profile``: how much each past step weighs in an average."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_ema.cli.app import AsJSON, app
from dist_ema.cli.show import line, print_json, print_table


@app.command()
def profile(
    half_life: Annotated[list[str] | None, typer.Option(help="Such as 1000ba.", show_default=False)] = None,
    decay: Annotated[list[float] | None, typer.Option(help="Kept per batch.", show_default=False)] = None,
    sigma_rel: Annotated[
        list[float] | None, typer.Option(help="Of an EDM2 power function.", show_default=False)
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option(help="Such as 500ba, or 500ba/5000ba: the end of each 5000.", show_default=False),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help='Any, in JSON: \'{"kind": "Cosine", "start": 0.996, "end": 1, "over": "1dur"}\'.'),
    ] = None,
    at: Annotated[str, typer.Option(help="The moment: so much has been trained. It is the duration of 1dur.")] = (
        "10000ba"
    ),
    update_interval: Annotated[
        str | None, typer.Option(help="Between updates; without it one batch, sample or token.", show_default=False)
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw them into this file.", show_default=False)] = None,
    as_json: AsJSON = False,
) -> None:
    """Show how much each past step weighs in averages: half life, mean age, and the plain mean that is as smooth.

    Each option may be given several times. Averaging starts with the first update.
    """
    from dist_ema.cli.picture import draw, parse, profile_at

    found = {
        label: profile_at(given, label, at=at, update_interval=update_interval)
        for label, given in parse(half_life, decay, sigma_rel, window, schedule).items()
    }
    if png is not None:
        draw(found, png)
    rows = [
        {
            "schedule": label,
            "unit": one.unit,
            "half_life": one.half_life,
            "mean_age": one.mean_age,
            "effective_window": one.effective_window,
            "last_step": float(one.weights[-1]),
        }
        for label, one in found.items()
    ]
    if as_json:
        print_json({"at": at, "profiles": rows, "png": None if png is None else str(png)})
        return
    columns = ("schedule", "half life:", "mean age:", "effective window:", "weight of the last:")
    numbers = ("half_life", "mean_age", "effective_window")
    shown = [
        (row["schedule"], *(f"{row[key]:,.6g}{row['unit']}" for key in numbers), f"{row['last_step']:.4g}")
        for row in rows
    ]
    print_table(f"After {at}", columns, shown)
    if png is not None:
        typer.echo(line(f"drawn: {png}"))
