"""How the calls grow with the number of names: eight times as many tensors should take eight times as long.

Plans are made for 4,096 imagined ranks. The calls run in this process, on a model of parameters with two elements, so
that their time is spent on names and not on elements.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.show import cell, print_table
from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.geometry.spec import TensorSpec
from dist_ema.planning.architecture import Architecture
from dist_ema.planning.layouts import Layout
from dist_ema.planning.plan import checkpoint_files, make_options, rank_shares

#: Imagined ranks of a plan.
RANKS = 4096
#: Rows and columns of each tensor of a plan: enough for every rank to hold a row of some tensors, and none of others.
SHAPE = (64, 16)
ENGINES = ("fsdp2", "zero3", "ddp")


@dataclass
class Named:
    """One measurement: processor seconds of a step for a number of names."""

    names: int
    step: str
    seconds: float


def planned(count: int) -> list[Named]:
    """Measures the plan of the last rank, and the files and the manifest of a checkpoint."""
    spec = [
        TensorSpec.unsharded(f"layers.{number}.weight", torch.empty(SHAPE, device="meta"), partitioned=False)
        for number in range(count)
    ]
    model = Architecture(spec, {})
    options = make_options()
    found = []
    for engine in ENGINES:
        layout = Layout(engine, RANKS)
        plan = partial(rank_shares, model, layout, options, RANKS - 1)
        found.append(Named(count, f"plan, {engine}", seconds(plan)))
    shares = rank_shares(model, Layout("fsdp2", RANKS), options, 0)
    found.append(Named(count, "files and manifest", seconds(lambda: checkpoint_files(shares, options))))
    return found


def called(count: int, folder: Path) -> list[Named]:
    """Measures the calls of an average, and of one in a teacher, in this process."""
    model = nn.ModuleList([nn.Linear(1, 2) for _ in range(count // 2)])
    teacher = nn.ModuleList([nn.Linear(1, 2) for _ in range(count // 2)]).requires_grad_(False)
    made: dict[str, ShardedEMA] = {}

    def construct() -> None:
        made["plain"] = ShardedEMA(model, decay=0.5)

    def construct_teacher() -> None:
        made["teacher"] = ShardedEMA(model, into=teacher, decay=0.5)

    path = folder / str(count)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("construct", construct),
        ("first update", lambda: made["plain"].update()),
        ("second update", lambda: made["plain"].update()),
        ("third update", lambda: made["plain"].update()),
        ("save", lambda: made["plain"].save(path / "saved")),
        ("verify_checkpoint", lambda: verify_checkpoint(path / "saved")),
        ("load", lambda: made["plain"].load(path / "saved")),
        ("full_state_dict", lambda: made["plain"].full_state_dict()),
        ("export", lambda: made["plain"].export(path / "export")),
        ("construct, into=", construct_teacher),
        ("first update, into=", lambda: made["teacher"].update()),
        ("second update, into=", lambda: made["teacher"].update()),
    ]
    return [Named(count, step, seconds(function)) for step, function in steps]


def seconds(function: Callable[[], object]) -> float:
    """Returns the processor seconds of one call, on all threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(counts: Sequence[int]) -> list[Named]:
    """Measures every step for each number of names, the smallest first."""
    logger = logging.getLogger("dist_ema")
    level = logger.level
    logger.setLevel(logging.ERROR)  # warnings about so small a run would stand between the figures
    found: list[Named] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            called(64, Path(folder) / "warm up")
            for count in sorted(counts):
                found += planned(count)
                found += called(count, Path(folder))
    finally:
        logger.setLevel(level)
    return found


def show(rows: Sequence[Named]) -> None:
    """Prints a line for each step: seconds for each number of names, and the last over the first."""
    counts = sorted({row.names for row in rows})
    found = {(row.step, row.names): row.seconds for row in rows}
    print(f"processor seconds by number of names; plans are of {RANKS:,} ranks; names x {counts[-1] / counts[0]:g}\n")
    lines = []
    for step in dict.fromkeys(row.step for row in rows):
        times = [found[step, count] for count in counts]
        lines.append([step, *(cell(one, ".3f") for one in times), cell(times[-1] / max(times[0], 1e-9), ".1f")])
    print_table(["step", *(f"{count:,}" for count in counts), "last / first"], lines)
