"""What averages cost, side by side with what people use today and with the speed of memory and disk.

    python launch/benchmark.py update
    python launch/benchmark.py update --elements 20000000 --dtype bf16 --device cuda --json
    python launch/benchmark.py teacher
    python launch/benchmark.py checkpoint --ranks 2

Options that are lists are given once for each entry. Needs nothing beside the library; ``.[peers]`` brings more rows.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent))  # for those who import this file instead of starting it

MODELS = Path(__file__).parent.parent / "configs" / "models"
FIGURES = Path(__file__).parent / "benchmarks" / "README.md"
HELP = "What averages cost, side by side with what people use today and with the speed of memory and disk."
app = typer.Typer(help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False)


class Device(str, Enum):
    """Where the weights are."""

    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """Of the weights."""

    fp32 = "fp32"
    bf16 = "bf16"


class Engine(str, Enum):
    """Whose layouts are planned."""

    ddp = "ddp"
    fsdp1 = "fsdp1"
    fsdp2 = "fsdp2"
    hsdp = "hsdp"
    fsdp2_tp = "fsdp2+tp"
    zero1 = "zero1"
    zero3 = "zero3"


AsJSON = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds, after a first one that warms up.")]


@app.command()
def update(
    elements: Annotated[int, typer.Option(min=1, help="Parameters in all.")] = 100_000_000,
    tensors: Annotated[int, typer.Option(min=1, help="In how many tensors.")] = 400,
    repeats: Repeats = 5,
    device: Device = Device.cpu,
    dtype: Annotated[list[Dtype], typer.Option(help="Of the weights.")] = [Dtype.fp32, Dtype.bf16],  # noqa: B006
    as_json: AsJSON = False,
) -> None:
    """Time and memory of one update, beside the alternatives."""
    import torch

    from benchmarks.update import run

    if device == Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("cuda: this torch sees no CUDA device", param_hint="--device")
    run(elements, tensors, repeats, device.value, [each.value for each in dtype], as_json)


@app.command()
def teacher(
    elements: Annotated[int, typer.Option(min=1, help="Parameters in all.")] = 50_000_000,
    tensors: Annotated[int, typer.Option(min=1, help="In how many tensors.")] = 400,
    repeats: Repeats = 7,
    device: Device = Device.cpu,
    as_json: AsJSON = False,
) -> None:
    """Time of an update into a teacher, beside what is written by hand."""
    import torch

    from benchmarks.teacher import run

    if device == Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("cuda: this torch sees no CUDA device", param_hint="--device")
    run(elements, tensors, repeats, device.value, as_json)


@app.command()
def checkpoint(
    elements: Annotated[list[int], typer.Option(min=1, help="fp32 parameters.")] = [25_000_000],  # noqa: B006
    ranks: Annotated[list[int], typer.Option(min=1, help="Processes.")] = [1, 2, 4],  # noqa: B006
    repeats: Repeats = 5,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure; else the temporary one.", show_default=False)
    ] = None,
    only: Annotated[list[str], typer.Option(help="Contenders, by their names in the table; else all.")] = [],  # noqa: B006
    as_json: AsJSON = False,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Time and memory of a save and a load, beside the alternatives."""
    from benchmarks import checkpoint

    if worker and folder is not None:
        checkpoint.worker(folder, elements[0], repeats, only)
    else:
        checkpoint.run(elements, ranks, repeats, only, folder, as_json)


@app.command()
def calls(
    processes: Annotated[list[int], typer.Option(min=1, help="Ranks on this machine.")] = [2, 8, 24],  # noqa: B006
    tensors: Annotated[int, typer.Option(min=1, help="Of the model.")] = 100,
    elements: Annotated[int, typer.Option(min=1, help="fp32 parameters in each.")] = 4096,
    repeats: Repeats = 5,
    as_json: AsJSON = False,
    worker: Annotated[Path | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Time of each call on real ranks, and how often it waits for other ranks."""
    from benchmarks import calls

    if worker is not None:
        calls.worker(worker, tensors, elements, repeats)
    else:
        calls.run(processes, tensors, elements, repeats, as_json)


@app.command()
def merge(
    sources: Annotated[int, typer.Option(min=2, help="Checkpoints.")] = 8,
    elements: Annotated[int, typer.Option(min=16, help="fp32 parameters of each.")] = 250_000_000,
    repeats: Repeats = 3,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure; else the temporary one.", show_default=False)
    ] = None,
    as_json: AsJSON = False,
    worker: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Time and memory of merging checkpoints, beside reading them and beside the alternatives."""
    from benchmarks import merging

    if worker is not None and folder is not None:
        merging.worker(folder, worker)
    else:
        merging.run(sources, elements, repeats, folder, as_json)


@app.command("device")
def on_device(
    elements: Annotated[int, typer.Option(min=1, help="Parameters whose average is updated.")] = 100_000_000,
    tensors: Annotated[int, typer.Option(min=1, help="In how many tensors.")] = 400,
    parameters: Annotated[int, typer.Option(min=1, help="Of the model in training.")] = 1_000_000_000,
    repeats: Repeats = 5,
    device: Device = Device.cuda,
    as_json: AsJSON = False,
) -> None:
    """On a GPU: updates by its own clock, every other call, and offloading beside training."""
    import torch

    from benchmarks.device import run

    if device == Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("cuda: this torch sees no CUDA device", param_hint="--device")
    run(elements, tensors, parameters, repeats, device.value, as_json)


@app.command()
def offload(
    elements: Annotated[int, typer.Option(min=1, help="Parameters in all.")] = 20_000_000,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a round.")] = 15,
    repeats: Repeats = 5,
    as_json: AsJSON = False,
) -> None:
    """What an offloaded update costs training and a data loader."""
    from benchmarks.offload import run

    run(elements, repeats, steps, as_json)


@app.command()
def scale(
    models: Annotated[list[Path], typer.Option(help="Files config.json of Hugging Face.")] = [  # noqa: B006
        MODELS / "llama-3-70b.json",
        MODELS / "deepseek-v3.json",
    ],
    engines: Annotated[list[Engine], typer.Option(help="Of the runs.")] = [  # noqa: B006
        Engine.fsdp2,
        Engine.hsdp,
        Engine.fsdp2_tp,
        Engine.zero1,
        Engine.zero3,
    ],
    ranks: Annotated[list[int], typer.Option(min=1, help="Of the runs.")] = [8, 64, 512, 8192],  # noqa: B006
    processes: Annotated[list[int], typer.Option(min=1, help="Real ranks, on this machine.")] = [2, 8, 24],  # noqa: B006
    names: Annotated[list[int], typer.Option(min=2, help="Tensors of the models by name.")] = [5000, 40_000],  # noqa: B006
    repeats: Repeats = 5,
    as_json: AsJSON = False,
) -> None:
    """Planning for 70 B and 671 B parameters on 8 to 8,192 ranks; calls on real ranks; 40,000 names on 4,096 ranks."""
    from benchmarks.scale import run

    run(models, [engine.value for engine in engines], ranks, processes, names, repeats, as_json)


@app.command()
def names(
    count: Annotated[list[int], typer.Option(min=2, help="Tensors of the models.")] = [5000, 40_000],  # noqa: B006
    as_json: AsJSON = False,
) -> None:
    """How plans of 4,096 ranks and the calls of one process grow with the number of names."""
    from dataclasses import asdict

    from benchmarks.names import measure, show
    from benchmarks.show import print_json

    rows = measure(count)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        show(rows)


@app.command()
def chart(out: Annotated[Path, typer.Argument(help="The SVG to write.")]) -> None:
    """Draws the recorded table of updates, benchmarks/README.md, as the picture of the guide."""
    from benchmarks.chart import picture

    out.write_text(picture(FIGURES))


if __name__ == "__main__":
    app()
