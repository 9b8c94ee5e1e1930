"""Shows a manifest as JSON and as tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from dist_ema.cli.show import complain, line, many, print_table, size

if TYPE_CHECKING:
    from dist_ema.formats.manifest import Manifest


def describe(path: str, manifest: Manifest) -> dict[str, Any]:
    from dist_ema.formats.manifest import VERSION

    sizes = bytes_of(manifest)
    return {
        "path": path,
        "format_version": VERSION,
        "library": manifest.library,
        "started": manifest.started,
        "skipped": manifest.skipped,
        "updates": manifest.seen.updates,
        "progress": {moment: asdict(progress) for moment, progress in clocks(manifest).items()},
        "averages": {
            name: {
                "schedule": manifest.schedules[name].to_dict(),
                "tensors": len(tensors),
                "bytes": sizes[f"averages/{name}"],
            }
            for name, tensors in manifest.averages.items()
        },
        "tensors": tensor_rows(manifest),
        "files": {name: file.size for name, file in manifest.files.items()},
        "lacking": list(manifest.lacking),
        "totals": totals(manifest),
    }


def show_manifest(path: str, manifest: Manifest) -> None:
    sizes = bytes_of(manifest)
    rows = tensor_rows(manifest)
    averages = [
        (name, repr(manifest.schedules[name]), manifest.seen.updates, len(tensors), size(sizes[f"averages/{name}"]))
        for name, tensors in manifest.averages.items()
    ]
    print_table("Averages", ("name", "schedule", "updates:", "tensors:", "bytes:"), averages)
    moments = [
        (moment.replace("_", " "), *(f"{value:,}" for value in list(asdict(progress).values())[:4]))
        for moment, progress in clocks(manifest).items()
    ]
    print_table("Progress", ("", "batches:", "samples:", "tokens:", "epochs:"), moments)
    tensors = [
        (
            row["average"] or "not averaged",
            " = ".join((row["name"], *row["aliases"])),
            "x".join(map(str, row["shape"])) or "scalar",
            row["dtype"],
            size(row["bytes"]),
            row["file"],
        )
        for row in rows
    ]
    print_table("Tensors", ("average", "name", "shape", "dtype", "bytes:", "file"), tensors)
    typer.echo(
        line(
            f"{path}: {contents(totals(manifest))}; "
            f"written by dist_ema {manifest.library}; {manifest.skipped:,} elements that were not finite left out"
        )
    )
    if manifest.lacking:
        typer.echo(line(f"It lacks {lacks(manifest)}."))
    if not manifest.started:
        typer.echo("Saved before the first update: these are the live weights of that moment.")


def lacks(manifest: Manifest) -> str:
    """Returns in words what was left out of a checkpoint."""
    shown = ", ".join(manifest.lacking[:3]) + (", ..." if len(manifest.lacking) > 3 else "")
    return f"{many(len(manifest.lacking), 'tensor')} of what is not averaged ({shown})"


def complain_of_lacks(path: str, manifest: Manifest) -> None:
    if manifest.lacking:
        complain(f"{path} was saved without {lacks(manifest)}")


def contents(totals: dict[str, int]) -> str:
    return f"{many(totals['tensors'], 'tensor')}, {size(totals['bytes'])}, {many(totals['files'], 'file')}"


def totals(manifest: Manifest) -> dict[str, int]:
    return {
        "tensors": sum(len(tensors) for tensors in manifest.folders().values()),
        "bytes": sum(bytes_of(manifest).values()),
        "files": len(manifest.files),
        "file_bytes": sum(file.size for file in manifest.files.values()),
    }


def tensor_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Returns every tensor as it is described in JSON."""
    return [
        {
            "average": folder.removeprefix("averages/") if folder.startswith("averages/") else None,
            "name": name,
            "aliases": list(tensor.aliases),
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "bytes": tensor.nbytes,
            "file": tensor.file,
            "fingerprint": f"{tensor.digest:016x}",
        }
        for folder, tensors in manifest.folders().items()
        for name, tensor in tensors.items()
    ]


def bytes_of(manifest: Manifest) -> dict[str, int]:
    """Returns the bytes of the tensors of each folder."""
    return {folder: sum(tensor.nbytes for tensor in tensors.values()) for folder, tensors in manifest.folders().items()}


def clocks(manifest: Manifest) -> dict[str, Any]:
    """Returns the clock of the training, at the first copy, and between the first copy and the last update."""
    return {"training": manifest.clock, "first_copy": manifest.start, "averaged": manifest.seen}
