"""Implements ``plan``: what averages would cost in a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_ema.cli.app import AsJSON, Dtype, app, torch_dtype
from dist_ema.cli.show import many, print_json, print_table, size, time
from dist_ema.errors import EMAConfigError

if TYPE_CHECKING:
    from dist_ema.planning.architecture import Architecture
    from dist_ema.planning.layouts import Layout
    from dist_ema.planning.plan import Prediction, RankCost, Speeds


class AverageDtype(str, Enum):
    """Lists the dtypes that averages may be kept in."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp64 = "fp64"
    own = "own"


_OF_AVERAGES = {choice: None if choice == AverageDtype.own else Dtype(choice.value) for choice in AverageDtype}


@app.command()
def plan(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A config.json of Hugging Face, or its directory. Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma, GPT-2 "
            "and DeepSeek-V3 need nothing else; other models need transformers (pip install transformers).",
            show_default=False,
        ),
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
    options = make_options(
        averages=averages, dtype=torch_dtype(_OF_AVERAGES[dtype]), offload=offload, shard=shard_replicas
    )
    if memory_bandwidth is None:
        memory_bandwidth = 50 if offload else 3000
    speeds = Speeds(*(_positive(rate) * 1e9 for rate in (memory_bandwidth, link_bandwidth, disk_bandwidth)))
    architecture = _architecture(model, parameters, param_dtype)
    found = _describe_plan(architecture, layout, predict(architecture, layout, options), speeds)
    if as_json:
        print_json(found)
    else:
        _show_plan(found)


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
        return of_config(model, torch_dtype(dtype))
    return of_count(parse_count(str(parameters)), torch_dtype(dtype) or torch.bfloat16)


def _describe_plan(model: Architecture, layout: Layout, plan: Prediction, speeds: Speeds) -> dict[str, Any]:
    """Returns what `plan` prints as JSON: bytes and seconds of rank 0, of the most expensive rank, and on average."""

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
        "staging": "copies of weights",
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
            sizes = (size(round(costs[key])) for key in ("rank_0", "max", "mean"))
            rows.append((label, place, *sizes, costs["max_rank"]))
    times = found["update_seconds"]
    rows.append(("time of an update", "", *(time(times[key]) for key in ("rank_0", "max", "mean")), times["max_rank"]))
    layout = found["layout"]
    checkpoint = found["checkpoint"]
    title = f"{found['parameters']:,} parameters, {layout['engine']}, {many(layout['world_size'], 'rank')}"
    print_table(title, ("per rank", "in", "rank 0:", "most:", "mean:", "most on rank:"), rows)
    typer.echo(
        f"checkpoint: {size(checkpoint['bytes'])} in {many(checkpoint['files'], 'file')}, "
        f"{time(checkpoint['seconds'])} for all ranks together"
    )
    if found["ranks"] < layout["world_size"]:
        typer.echo(f"most and mean are those of {found['ranks']} ranks at equal distances")
