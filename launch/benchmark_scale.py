"""What planning costs as a run grows: one rank's share of large models, on as many imagined ranks as there are.

No process group: the share of rank 0 and of the last rank are computed in one process, as each rank of a real run
computes its own. Then the files of a checkpoint and its manifest, which rank 0 writes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from dist_ema.checkpoints.manifest import NAME
from dist_ema.options import Options
from dist_ema.planning.architecture import Architecture, of_config
from dist_ema.planning.layouts import Layout
from dist_ema.planning.plan import checkpoint_files, make_options, rank_cost, rank_shares
from dist_ema.shadow.device import Shadow

MODELS = Path(__file__).parent.parent / "configs" / "models"
T = TypeVar("T")


@dataclass
class Row:
    """One line of the table.

    Attributes:
        share_ms: time of one rank's specs, share and empty shadow.
        share_kb: memory that these keep.
        first_gb, last_gb: fp32 averages of rank 0 and of the last rank.
        times_1_n: ``first_gb`` over an equal part of the whole.
        files_ms: time of the layout of all files and the manifest's text.
    """

    model: str
    engine: str
    world_size: int
    share_ms: float
    share_kb: float
    first_gb: float
    last_gb: float
    times_1_n: float
    files: int
    files_ms: float
    manifest_kb: float


def layout(engine: str, world_size: int) -> Layout:
    """Copies of 256 ranks under hsdp, or two of a smaller run; 8 ranks a layer under tensor parallelism."""
    return Layout(
        engine,
        world_size,
        replicate=max(world_size // 256, 2) if engine == "hsdp" else 1,
        tensor_parallel=8 if engine == "fsdp2+tp" else 1,
    )


def construct(model: Architecture, spread: Layout, options: Options, rank: int) -> Shadow:
    """What ``ShardedEMA`` makes of an engine's specs, and those specs."""
    shares = rank_shares(model, spread, options, rank)
    return Shadow(options.schedules, shares, options.skip_nonfinite)


def median(function: Callable[[], object], repeats: int) -> float:
    """Seconds of one call."""
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def kept(function: Callable[[], T]) -> int:
    """Bytes that the result of a call keeps."""
    gc.collect()
    tracemalloc.start()
    result = function()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del result
    return size


def measure(name: str, model: Architecture, spread: Layout, options: Options, repeats: int) -> Row:
    """The row of one model on one layout."""
    last = spread.world_size - 1
    first_bytes, last_bytes = (rank_cost(model, spread, options, rank).shadow for rank in (0, last))
    shares = rank_shares(model, spread, options, 0)
    files = checkpoint_files(shares, options)
    return Row(
        name,
        spread.engine,
        spread.world_size,
        median(lambda: construct(model, spread, options, last), repeats) * 1e3,
        kept(lambda: construct(model, spread, options, last)) / 1e3,
        first_bytes / 1e9,
        last_bytes / 1e9,
        first_bytes * spread.world_size / (4 * model.parameters),
        len(files),
        median(lambda: checkpoint_files(shares, options), repeats) * 1e3,
        files[NAME] / 1e3,
    )


def scale(arguments: argparse.Namespace) -> None:
    """Measures and prints medians."""
    load, options, rows = os.getloadavg()[0], make_options(), []
    for file in arguments.models:
        model = of_config(file, None)
        for engine in arguments.engines:
            spreads = [layout(engine, size) for size in arguments.ranks]
            rows += [measure(file.stem, model, spread, options, arguments.repeats) for spread in spreads]
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "load_average": load}, indent=1))
        return
    print(f"one rank's plan, fp32 averages; medians of {arguments.repeats} rounds, load average before {load:.1f}\n")
    head = ("model", "engine", "ranks", "ms", "kB", "GB rank 0", "GB last", "x 1/N", "files", "files ms", "manifest kB")
    print("{:12} {:9} {:>6} {:>7} {:>7} {:>10} {:>9} {:>6} {:>6} {:>9} {:>12}".format(*head))
    for row in rows:
        print(
            f"{row.model:12} {row.engine:9} {row.world_size:6} {row.share_ms:7.1f} {row.share_kb:7.0f} "
            f"{row.first_gb:10.4f} {row.last_gb:9.4f} {row.times_1_n:6.2f} {row.files:6} {row.files_ms:9.1f} "
            f"{row.manifest_kb:12.1f}"
        )


def add_scale(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of the subcommand. ``positive`` reads a number above zero."""
    command.add_argument("--repeats", type=positive, default=5, help="rounds after a first one (%(default)s)")
    command.add_argument(
        "--ranks", nargs="+", type=positive, default=[8, 64, 512, 8192], help="of the runs (%(default)s)"
    )
    command.add_argument(
        "--engines",
        nargs="+",
        choices=("ddp", "fsdp1", "fsdp2", "hsdp", "fsdp2+tp", "zero1", "zero3"),
        default=["fsdp2", "hsdp", "fsdp2+tp", "zero1", "zero3"],
    )
    command.add_argument(
        "--models",
        nargs="+",
        type=Path,
        default=[MODELS / "llama-3-70b.json", MODELS / "deepseek-v3.json"],
        help="config.json files of Hugging Face (Llama 3 70B, DeepSeek-V3)",
    )
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    command.set_defaults(run=scale, device="cpu")
