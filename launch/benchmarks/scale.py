"""What planning costs as a run grows: one rank's share of large models, on as many imagined ranks as there are.

No process group: the share of rank 0 and of the last rank are computed in one process, as each rank of a real run
computes its own. Then the files of a checkpoint and its manifest, which rank 0 writes. And each call on a few real
ranks (:mod:`benchmarks.calls`).
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks import calls, names
from benchmarks.show import cell, print_json, print_table
from dist_ema.formats.manifest import NAME
from dist_ema.options import Options
from dist_ema.planning.architecture import Architecture, of_config
from dist_ema.planning.layouts import Layout
from dist_ema.planning.plan import checkpoint_files, make_options, rank_cost, rank_shares
from dist_ema.shadow.device import Shadow

MODELS = Path(__file__).parents[2] / "configs" / "models"
#: Of the model on real ranks, in fp32 elements.
TENSORS, ELEMENTS = 100, 4096
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


def run(
    models: Sequence[Path],
    engines: Sequence[str],
    ranks: Sequence[int],
    processes: Sequence[int],
    counts: Sequence[int],
    repeats: int,
    as_json: bool,
) -> None:
    """Measures and prints medians."""
    load, options, rows = os.getloadavg()[0], make_options(), []
    for file in models:
        model = of_config(file, None)
        for engine in engines:
            rows += [measure(file.stem, model, layout(engine, size), options, repeats) for size in ranks]
    real = calls.measure(processes, TENSORS, ELEMENTS, repeats)
    named = names.measure(counts)
    if as_json:
        tables = {"rows": [asdict(row) for row in rows], "names": [asdict(row) for row in named]}
        print_json({**tables, "load_average": load, "calls": real})
        return
    print(f"one rank's plan, fp32 averages; medians of {repeats} rounds, load average before {load:.1f}\n")
    print_table(
        ["model, engine, ranks", "ms", "kB", "GB rank 0", "GB last", "x 1/N", "files", "files ms", "manifest kB"],
        [
            [
                f"{row.model} {row.engine} {row.world_size}",
                cell(row.share_ms, ".1f"),
                cell(row.share_kb, ".0f"),
                cell(row.first_gb, ".4f"),
                cell(row.last_gb, ".4f"),
                cell(row.times_1_n, ".2f"),
                str(row.files),
                cell(row.files_ms, ".1f"),
                cell(row.manifest_kb, ".1f"),
            ]
            for row in rows
        ],
    )
    print()
    calls.show(real, TENSORS, ELEMENTS, repeats)
    print()
    names.show(named)
