"""``dist-ema``: looks at checkpoints, checks, exports, compares and imports them; plans. One process, no accelerator.

Exit status: 0 good; 1 a finding (damage, a difference); 2 it could not be done (bad usage, no checkpoint, a full
disk), with one line on stderr. What is asked for goes to stdout, progress and complaints to stderr. torch and rich are
imported by the commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_ema import __version__
from dist_ema.errors import CheckpointCorruptError, EMAConfigError, EMAError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from dist_ema.checkpoints.manifest import Manifest
    from dist_ema.offline.compare import Difference
    from dist_ema.planning.architecture import Architecture
    from dist_ema.planning.layouts import Layout
    from dist_ema.planning.plan import Prediction, RankCost, Speeds

app = typer.Typer(
    help="Checkpoints of averages written by dist_ema. Status: 0 good, 1 a finding, 2 it could not be done.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Dtype(str, Enum):
    """What ``export`` may write."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    fp64 = "fp64"


class AverageDtype(str, Enum):
    """What averages may be kept in."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp64 = "fp64"
    own = "own"


_OF_AVERAGES = {choice: None if choice == AverageDtype.own else Dtype(choice.value) for choice in AverageDtype}
_TORCH_NAMES = {Dtype.bf16: "bfloat16", Dtype.fp16: "float16", Dtype.fp32: "float32", Dtype.fp64: "float64"}
Checkpoint = Annotated[str, typer.Argument(help="Directory of a checkpoint, or a URL.", show_default=False)]
AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Name = Annotated[str | None, typer.Option(help="Which average.", show_default=False)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status.

    Args:
        arguments: of the command line; None means those of this process.
    """
    try:
        status = app(args=arguments, prog_name="dist-ema", standalone_mode=False)
    except typer.Abort:
        return 130
    except CheckpointCorruptError as error:
        _complain(error)
        return 1
    except EMAError as error:
        _complain(error)
        return 2
    except OSError as error:
        _complain(_sentence(error))
        return 2
    except Exception as error:
        # What typer raises for a wrong option; the class has different homes in different versions of it.
        if not hasattr(error, "format_message"):
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "dist-ema")
        _complain(f"{error.format_message()} (see {where} --help)")
        return 2
    return status if isinstance(status, int) else 0


def _sentence(error: OSError) -> str:
    """What Python says as ``[Errno 20] Not a directory: 'x'``."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


@app.command()
def inspect(path: Checkpoint, as_json: AsJSON = False) -> None:
    """Show what a checkpoint consists of. Reads its manifest alone; `verify` reads the rest."""
    from dist_ema.checkpoints.versions import read_manifest

    manifest = read_manifest(path)
    if as_json:
        _print_json(_describe(path, manifest))
    else:
        _show(path, manifest)


@app.command()
def verify(
    path: Checkpoint,
    threads: Annotated[int, typer.Option(min=1, help="Read and check with so many threads.")] = 4,
    as_json: AsJSON = False,
) -> None:
    """Read every byte of a checkpoint and name all that is damaged. Status: 0 whole, 1 damaged, 2 no checkpoint."""
    from dist_ema.offline.verify import audit

    with _progress("verify") as begin, _one_thread_an_operation():
        manifest, findings = audit(path, threads=threads, begin=lambda manifest: begin(_totals(manifest)["bytes"]))
    totals = _totals(manifest) if manifest else None
    if as_json:
        found = [asdict(finding) for finding in findings]
        lacking = list(manifest.lacking) if manifest else None
        _print_json({"path": path, "whole": not findings, "findings": found, "lacking": lacking, "totals": totals})
    else:
        for finding in findings:
            where = finding.file if finding.tensor is None else f"{finding.file}: {finding.tensor}"
            typer.echo(_line(f"{where}: {finding.problem}"))
        summary = f"damaged: {_many(len(findings), 'finding')}"
        if totals and not findings:
            summary = f"whole: {_contents(totals)}"
            if manifest and manifest.lacking:
                summary += f"; it was saved without {_lacks(manifest)}"
        typer.echo(_line(f"{path} is {summary}"))
    if findings:
        raise typer.Exit(1)


@app.command()
def export(
    path: Checkpoint,
    out: Annotated[str, typer.Argument(help="Directory to make; must not exist.", show_default=False)],
    name: Name = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of floating-point tensors; else that of the checkpoint.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of one file at most, such as 5GB or 512MiB.")] = "5GB",
    config_from: Annotated[
        str | None,
        typer.Option(help="File, or directory whose configuration files are copied.", show_default=False),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Names of the files: transformers (as without) or diffusers.", show_default=False),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Write an average, and all that is not averaged, as a Hugging Face directory of safetensors files.

    Tensors have the names that they have in the module: a checkpoint does not know its class.
    """
    import torch

    from dist_ema.offline.export import export_checkpoint

    with _progress("export") as begin, _one_thread_an_operation():
        manifest = export_checkpoint(
            path,
            out,
            name=name,
            dtype=getattr(torch, _TORCH_NAMES[dtype]) if dtype else None,
            max_shard_size=max_shard_size,
            config_from=config_from,
            layout=layout,
            begin=lambda _, size: begin(size),
        )
    files = {file.name: file.stat().st_size for file in sorted(Path(out).iterdir()) if file.is_file()}
    if as_json:
        _print_json({"path": path, "out": str(out), "started": manifest.started, "files": files})
        return
    _complain_of_lacks(path, manifest)
    if not manifest.started:
        _complain(f"{path} was saved before the first update: these are the live weights of that moment")
    weights = {file: size for file, size in files.items() if file.endswith(".safetensors")}
    others = [file for file in files if file not in weights]
    typer.echo(
        _line(f"{out}: {_size(sum(weights.values()))} in {_many(len(weights), 'file')}, {', '.join([*weights][:2])}")
        + (", ..." if len(weights) > 2 else "")
        + (f"; and {', '.join(others[:8])}" if others else "")
    )


@app.command()
def diff(a: Checkpoint, b: Checkpoint, name: Name = None, as_json: AsJSON = False) -> None:
    """Compare the tensors of two checkpoints bit by bit. Status: 0 equal, 1 different, 2 not comparable.

    Without --name, all averages. In JSON, numbers that are not finite are the strings "nan" and "inf".
    """
    from dist_ema.checkpoints.versions import read_manifest
    from dist_ema.offline.compare import compare

    with _progress("diff") as begin, _one_thread_an_operation():
        found = compare(a, b, name=name, begin=begin)
    for path in (a, b):
        _complain_of_lacks(path, read_manifest(path))
    differing = sum(not one.equal for one in found)
    if as_json:
        rows = [
            {key: _finite(value) for key, value in (asdict(one) | {"relative": one.relative}).items()} for one in found
        ]
        _print_json({"a": str(a), "b": str(b), "equal": not differing, "differing": differing, "tensors": rows})
    else:
        _show_differences(found)
        typer.echo(f"{differing} of {_many(len(found), 'tensor')} differ" if differing else "all tensors are equal")
    if differing:
        raise typer.Exit(1)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="File or directory of another library.", show_default=False)],
    path: Annotated[str, typer.Argument(help="The checkpoint to write: a directory, or a URL.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(help="auto, composer, diffusers, timm, ema-pytorch, lightning, nemo or torchtitan."),
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="State dict of the same model, for names and buffers that SOURCE lacks.", show_default=False),
    ] = None,
    frozen: Annotated[
        str | None, typer.Option(help="Regular expression: parameters that are not trained.", show_default=False)
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Import this module of a larger one: 'net' takes net.*", show_default=False)
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="Kept per batch, where SOURCE does not say.", show_default=False)
    ] = None,
    half_life: Annotated[str | None, typer.Option(help="In its place, such as 1000ba.", show_default=False)] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of floating-point tensors; else that of SOURCE.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is at PATH.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Make a checkpoint of an average that another library saved. Runs no code of the file.

    `load` then reads it under any engine. Few files tell frozen parameters from trained ones: see --frozen.
    """
    import torch

    from dist_ema.checkpoints.versions import read_manifest
    from dist_ema.importers.convert import import_checkpoint

    with _progress("import") as begin, _one_thread_an_operation():
        imported = import_checkpoint(
            source,
            path,
            format=format,
            model=model,
            frozen=frozen,
            prefix=prefix,
            decay=decay,
            half_life=half_life,
            dtype=getattr(torch, _TORCH_NAMES[dtype]) if dtype else None,
            overwrite=overwrite,
            begin=begin,
        )
    manifest = read_manifest(path)
    if as_json:
        _print_json(_describe(path, manifest) | {"format": imported.format, "notes": list(imported.notes)})
        return
    for note in imported.notes:
        _complain(note)
    typer.echo(_line(f"{path}: {_contents(_totals(manifest))}; from {imported.format}"))


@app.command()
def plan(
    model: Annotated[
        Path | None,
        typer.Argument(help="A config.json of Hugging Face, or its directory; needs transformers.", show_default=False),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="plain, ddp, fsdp1, fsdp2, hsdp, tp, fsdp2+tp or zero0 to zero3.")
    ] = "fsdp2",
    world_size: Annotated[int, typer.Option(help="Ranks in all.")] = 8,
    replicate: Annotated[int, typer.Option(help="Copies of the model (hsdp, fsdp1), each sharded.")] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share each layer (tp, fsdp2+tp).")] = 1,
    parameters: Annotated[
        str | None, typer.Option(help="Their number in place of MODEL, such as 70B.", show_default=False)
    ] = None,
    param_dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; else that of MODEL, or bf16.", show_default=False)
    ] = None,
    averages: Annotated[int, typer.Option(help="How many.")] = 1,
    dtype: Annotated[
        AverageDtype, typer.Option(help="Of the averages; own is that of the weights.")
    ] = AverageDtype.fp32,
    offload: Annotated[
        str | None, typer.Option(help="cpu keeps the averages in host memory.", show_default=False)
    ] = None,
    shard_replicas: Annotated[bool, typer.Option(help="Spread them where ranks hold the same weights.")] = True,
    memory_bandwidth: Annotated[
        float | None,
        typer.Option(help="GB/s of one rank's memory, or host memory [3000; 50 with --offload].", show_default=False),
    ] = None,
    link_bandwidth: Annotated[float, typer.Option(help="GB/s of one rank to the host, for --offload.")] = 50,
    disk_bandwidth: Annotated[float, typer.Option(help="GB/s of the file system, for all ranks together.")] = 5,
    as_json: AsJSON = False,
) -> None:
    """Predict what averages cost in a run: memory and bytes moved per rank, time, size of a checkpoint.

    Computed by the library's own sharding for imagined ranks on accelerators: all of them, or 64 of a larger run.
    GB are 10^9 bytes. Times are bytes over bandwidth.
    """
    from dist_ema.planning.layouts import Layout
    from dist_ema.planning.plan import Speeds, make_options, predict

    layout = Layout(engine, world_size, replicate, tensor_parallel)
    options = make_options(averages=averages, dtype=_torch(_OF_AVERAGES[dtype]), offload=offload, shard=shard_replicas)
    if memory_bandwidth is None:
        memory_bandwidth = 50 if offload else 3000
    speeds = Speeds(*(_positive(rate) * 1e9 for rate in (memory_bandwidth, link_bandwidth, disk_bandwidth)))
    architecture = _architecture(model, parameters, param_dtype)
    found = _describe_plan(architecture, layout, predict(architecture, layout, options), speeds)
    if as_json:
        _print_json(found)
    else:
        _show_plan(found)


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
    from dist_ema.schedules.picture import draw, parse, profile_at

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
        _print_json({"at": at, "profiles": rows, "png": None if png is None else str(png)})
        return
    columns = ("schedule", "half life:", "mean age:", "effective window:", "weight of the last:")
    numbers = ("half_life", "mean_age", "effective_window")
    shown = [
        (row["schedule"], *(f"{row[key]:,.6g}{row['unit']}" for key in numbers), f"{row['last_step']:.4g}")
        for row in rows
    ]
    _print_table(_console(), f"After {at}", columns, shown)
    if png is not None:
        typer.echo(_line(f"drawn: {png}"))


def _positive(rate: float) -> float:
    if not 0 < rate < math.inf:
        raise EMAConfigError(f"a bandwidth of {rate} GB/s: must be above 0")
    return rate


def _architecture(model: Path | None, parameters: str | None, dtype: Dtype | None) -> Architecture:
    import torch

    from dist_ema.planning.architecture import of_config, of_count, parse_count

    if (model is None) == (parameters is None):
        raise EMAConfigError("give either MODEL, a config.json, or --parameters, a number such as 70B")
    if model is not None:
        return of_config(model, _torch(dtype))
    return of_count(parse_count(str(parameters)), _torch(dtype) or torch.bfloat16)


def _torch(dtype: Dtype | None) -> torch.dtype | None:
    import torch

    return getattr(torch, _TORCH_NAMES[dtype]) if dtype else None


# What is shown.


def _describe(path: str, manifest: Manifest) -> dict[str, Any]:
    from dist_ema.checkpoints.manifest import VERSION

    sizes = _bytes_of(manifest)
    return {
        "path": path,
        "format_version": VERSION,
        "library": manifest.library,
        "started": manifest.started,
        "skipped": manifest.skipped,
        "updates": manifest.seen.updates,
        "progress": {moment: asdict(progress) for moment, progress in _moments(manifest).items()},
        "averages": {
            name: {
                "schedule": manifest.schedules[name].to_dict(),
                "tensors": len(tensors),
                "bytes": sizes[f"averages/{name}"],
            }
            for name, tensors in manifest.averages.items()
        },
        "tensors": _rows(manifest),
        "files": {name: file.size for name, file in manifest.files.items()},
        "lacking": list(manifest.lacking),
        "totals": _totals(manifest),
    }


def _show(path: str, manifest: Manifest) -> None:
    console, sizes, rows = _console(), _bytes_of(manifest), _rows(manifest)
    averages = [
        (name, repr(manifest.schedules[name]), manifest.seen.updates, len(tensors), _size(sizes[f"averages/{name}"]))
        for name, tensors in manifest.averages.items()
    ]
    _print_table(console, "Averages", ("name", "schedule", "updates:", "tensors:", "bytes:"), averages)
    moments = [
        (moment.replace("_", " "), *(f"{value:,}" for value in list(asdict(progress).values())[:4]))
        for moment, progress in _moments(manifest).items()
    ]
    _print_table(console, "Progress", ("", "batches:", "samples:", "tokens:", "epochs:"), moments)
    tensors = [
        (
            row["average"] or "not averaged",
            " = ".join((row["name"], *row["aliases"])),
            "x".join(map(str, row["shape"])) or "scalar",
            row["dtype"],
            _size(row["bytes"]),
            row["file"],
        )
        for row in rows
    ]
    _print_table(console, "Tensors", ("average", "name", "shape", "dtype", "bytes:", "file"), tensors)
    typer.echo(
        _line(
            f"{path}: {_contents(_totals(manifest))}; "
            f"written by dist_ema {manifest.library}; {manifest.skipped:,} elements that were not finite left out"
        )
    )
    if manifest.lacking:
        typer.echo(_line(f"It lacks {_lacks(manifest)}."))
    if not manifest.started:
        typer.echo("Saved before the first update: these are the live weights of that moment.")


def _describe_plan(model: Architecture, layout: Layout, plan: Prediction, speeds: Speeds) -> dict[str, Any]:
    """What `plan` prints in JSON: bytes and seconds, of rank 0, of the rank that pays most, and on average."""

    def over_ranks(cost: Callable[[RankCost], float]) -> dict[str, float]:
        worst = plan.worst(cost)
        return {"rank_0": cost(plan.ranks[0]), "max": cost(worst), "max_rank": worst.rank, "mean": plan.mean(cost)}

    kinds = [field.name for field in fields(plan.ranks[0]) if field.name != "rank"]
    return {
        "parameters": model.parameters,
        "tensors": len(model.tensors),
        "layout": asdict(layout),
        "ranks": len(plan.ranks),
        "shadow_on": "host" if plan.offload else "accelerator",
        "bytes": {kind: over_ranks(attrgetter(kind)) for kind in kinds},
        "update_seconds": over_ranks(lambda cost: cost.update_seconds(speeds)),
        "checkpoint": {
            "bytes": plan.checkpoint,
            "manifest_bytes": plan.manifest,
            "files": len(plan.files),
            "seconds": plan.checkpoint / speeds.disk,
        },
    }


def _show_plan(found: dict[str, Any]) -> None:
    labels = {
        "shadow": "averages",
        "buffers": "copies of buffers",
        "staging": "copies of weights on their way",
        "scratch": "scratch of an update, at most",
        "in_use": "besides, while an average is in use",
        "update": "moved by an update",
        "link": "sent to the host by an update",
        "checkpoint": "written to a checkpoint",
    }
    rows = []
    for kind, label in labels.items():
        costs = found["bytes"][kind]
        place = found["shadow_on"] if kind in ("shadow", "buffers", "staging", "scratch", "in_use") else ""
        if costs["max"]:
            sizes = (_size(round(costs[key])) for key in ("rank_0", "max", "mean"))
            rows.append((label, place, *sizes, costs["max_rank"]))
    times = found["update_seconds"]
    rows.append(("time of an update", "", *(_time(times[key]) for key in ("rank_0", "max", "mean")), times["max_rank"]))
    layout, checkpoint = found["layout"], found["checkpoint"]
    title = f"{found['parameters']:,} parameters, {layout['engine']}, {_many(layout['world_size'], 'rank')}"
    _print_table(_console(), title, ("per rank", "in", "rank 0:", "most:", "mean:", "most on rank:"), rows)
    typer.echo(
        f"checkpoint: {_size(checkpoint['bytes'])} in {_many(checkpoint['files'], 'file')}, "
        f"{_time(checkpoint['seconds'])} for all ranks together"
    )
    if found["ranks"] < layout["world_size"]:
        typer.echo(f"most and mean are those of {found['ranks']} ranks at equal distances")


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
    _print_table(_console(), "Differences", columns, rows)


def _lacks(manifest: Manifest) -> str:
    """What was left out of a checkpoint, for a sentence."""
    shown = ", ".join(manifest.lacking[:3]) + (", ..." if len(manifest.lacking) > 3 else "")
    return f"{_many(len(manifest.lacking), 'tensor')} of what is not averaged ({shown})"


def _complain_of_lacks(path: str, manifest: Manifest) -> None:
    if manifest.lacking:
        _complain(f"{path} was saved without {_lacks(manifest)}")


def _rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Every tensor as it is described in JSON."""
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


def _totals(manifest: Manifest) -> dict[str, int]:
    return {
        "tensors": sum(len(tensors) for tensors in manifest.folders().values()),
        "bytes": sum(_bytes_of(manifest).values()),
        "files": len(manifest.files),
        "file_bytes": sum(file.size for file in manifest.files.values()),
    }


def _bytes_of(manifest: Manifest) -> dict[str, int]:
    """Bytes of the tensors of each folder."""
    return {folder: sum(tensor.nbytes for tensor in tensors.values()) for folder, tensors in manifest.folders().items()}


def _moments(manifest: Manifest) -> dict[str, Any]:
    """The clock of the training, at the first copy, and between the first copy and the last update."""
    return {"training": manifest.clock, "first_copy": manifest.start, "averaged": manifest.seen}


# How it is shown.


def _console(error: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    # Into a file or a pipe, lines as long as they need to be: nothing is cut or wrapped.
    return Console(stderr=error, width=None if stream.isatty() else 1 << 14, highlight=False, markup=False)


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A column whose title ends with a colon is a number."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(column.rstrip(":"), justify="right" if column.endswith(":") else "left", overflow="fold")
    for row in rows:
        # Text, so that brackets in names are no markup; names may come from anywhere.
        table.add_row(*(Text(_line(str(cell))) for cell in row))
    console.print(table)


@contextmanager
def _progress(operation: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar on stderr if that is a terminal. Gives a function of all bytes that gives a function of those done."""
    if not sys.stderr.isatty():
        yield lambda _: lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(operation), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(error=True), transient=True) as bar:

        def begin(total: int) -> Callable[[int], None]:
            task = bar.add_task(operation, total=total)
            return lambda done: bar.advance(task, done)

        yield begin


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """On chunks this small torch's threads wait for each other, and are in the way of the threads of ``verify``."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _finite(value: object) -> object:
    """The value, or what JSON can say of it: it has no numbers that are not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _complain(what: object) -> None:
    typer.echo(_line(f"dist-ema: {what}"), err=True)


def _line(text: str) -> str:
    """The text on one line; what a terminal would obey is escaped, since paths and names may come from anywhere."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _contents(totals: dict[str, int]) -> str:
    return f"{_many(totals['tensors'], 'tensor')}, {_size(totals['bytes'])}, {_many(totals['files'], 'file')}"


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _time(seconds: float) -> str:
    """``"1.5 ms"``."""
    value, unit = seconds * 1e6, "us"
    for larger, factor in (("ms", 1000), ("s", 1000), ("min", 60)):
        if value < factor:
            break
        value, unit = value / factor, larger
    return f"{value:.3g} {unit}"


def _size(size: int) -> str:
    """``"1.5 MB"``, decimal."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
