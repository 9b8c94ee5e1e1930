"""Implements ``inspect``, ``verify`` and ``diff``: read checkpoints and report what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dist_ema.cli.app import AsJSON, Checkpoint, Name, app
from dist_ema.cli.contents import complain_of_lacks, contents, describe, lacks, show_manifest, totals
from dist_ema.cli.show import (
    finite,
    line,
    many,
    one_thread_an_operation,
    print_json,
    print_table,
    progress,
)

if TYPE_CHECKING:
    from dist_ema.offline.compare import Difference


@app.command()
def inspect(path: Checkpoint, as_json: AsJSON = False) -> None:
    """Show what a checkpoint consists of. Reads its manifest alone; `verify` reads the rest."""
    from dist_ema.checkpoints.versions import read_manifest

    manifest = read_manifest(path)
    if as_json:
        print_json(describe(path, manifest))
    else:
        show_manifest(path, manifest)


@app.command()
def verify(
    path: Checkpoint,
    threads: Annotated[int, typer.Option(min=1, help="Read and check with so many threads.")] = 4,
    as_json: AsJSON = False,
) -> None:
    """Read every byte of a checkpoint and name all that is damaged. Status: 0 whole, 1 damaged, 2 no checkpoint."""
    from dist_ema.offline.verify import audit

    with progress("verify") as begin, one_thread_an_operation():
        manifest, findings = audit(path, threads=threads, begin=lambda manifest: begin(totals(manifest)["bytes"]))
    found = totals(manifest) if manifest else None
    if as_json:
        damage = [asdict(finding) for finding in findings]
        lacking = list(manifest.lacking) if manifest else None
        print_json({"path": path, "whole": not findings, "findings": damage, "lacking": lacking, "totals": found})
    else:
        for finding in findings:
            where = finding.file if finding.tensor is None else f"{finding.file}: {finding.tensor}"
            typer.echo(line(f"{where}: {finding.problem}"))
        summary = f"damaged: {many(len(findings), 'finding')}"
        if found and not findings:
            summary = f"whole: {contents(found)}"
            if manifest and manifest.lacking:
                summary += f"; it was saved without {lacks(manifest)}"
        typer.echo(line(f"{path} is {summary}"))
    if findings:
        raise typer.Exit(1)


@app.command()
def diff(a: Checkpoint, b: Checkpoint, name: Name = None, as_json: AsJSON = False) -> None:
    """Compare the tensors of two checkpoints, or of a checkpoint and its export, bit by bit.

    Status: 0 equal, 1 different, 2 not comparable. Without --name, all averages; the only one where the other side is
    no checkpoint of this library. In JSON, numbers that are not finite are the strings "nan" and "inf".
    """
    from dist_ema.checkpoints.versions import read_manifest
    from dist_ema.offline.compare import compare, is_checkpoint

    with progress("diff") as begin, one_thread_an_operation():
        found = compare(a, b, name=name, begin=begin)
    for path in (a, b):
        if is_checkpoint(path):
            complain_of_lacks(path, read_manifest(path))
    differing = sum(not one.equal for one in found)
    if as_json:
        rows = [
            {key: finite(value) for key, value in (asdict(one) | {"relative": one.relative}).items()} for one in found
        ]
        print_json({"a": str(a), "b": str(b), "equal": not differing, "differing": differing, "tensors": rows})
    else:
        _show_differences(found)
        typer.echo(f"{differing} of {many(len(found), 'tensor')} differ" if differing else "all tensors are equal")
    if differing:
        raise typer.Exit(1)


def _show_differences(found: Sequence[Difference]) -> None:
    rows = [
        (
            one.average or "not averaged",
            one.name,
            f"{one.norm:.6g}",
            f"{one.distance:.6g}",
            f"{one.largest:.6g}",
            "equal" if one.equal else f"{one.relative:.3g}",
        )
        for one in found
    ]
    columns = ("average", "name", "norm of A:", "norm of A - B:", "largest difference:", "relative:")
    print_table("Differences", columns, rows)
