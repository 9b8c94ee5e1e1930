"""What a teacher's update costs, beside what self-distillation and reference policies do by hand.

One process; contenders take turns in each round, and what is compared is each one's time over ours in the same round.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.bound import bound
from benchmarks.clock import QUEUED, timed
from benchmarks.peers import Model
from benchmarks.show import cell, print_json, print_table
from benchmarks.update import one_process, train
from dist_ema import ShardedEMA, compute_ema

MOMENTUM = 0.996  # DINO's first
CHECKED = 8  # tensors that are compared with a float64 average
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "ShardedEMA(into=teacher)"

NOTES = """\
"x ours" is a contender's time over that of ShardedEMA in the same round: the median, and the lowest. "off by" is the
largest error of a teacher's weight against a float64 average, over the largest distance that one moved.
The form of DINOv3 is its torch._foreach_mul_ and torch._foreach_add_ over two lists of parameters, kept from step to
step. That of TRL is sync_target_model's mul_ and add_, parameter by parameter; under ZeRO-3 it gathers both models on
rank 0 before, which one process does not show. Neither reshards an FSDP2 teacher, whose root goes stale after a
forward; ours does, at each update, and its time has that in it. compute_ema is this library's, Composer's function.
A bf16 teacher of ours follows an fp32 shadow, and is off by its last bit, which is much of so short a way; the others'
averages are bf16 themselves, and each step rounds them anew."""


@dataclass
class Row:
    """One line of the table; the time in milliseconds."""

    contender: str
    layout: str
    teacher: str
    ms: float
    over_ours: float
    least_over_ours: float
    off_by: float | None


def local(model: nn.Module) -> list[Tensor]:
    tensors = [parameter.detach() for parameter in model.parameters()]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def contenders(student: nn.Module, make: Callable[[], nn.Module]) -> dict[str, tuple[Callable[[], object], nn.Module]]:
    """The update of each, and its own teacher."""
    ours, dino, trl, composer = (make() for _ in range(4))
    ema = ShardedEMA(student, into=ours, decay=MOMENTUM)
    ema.update()
    teachers: list[Tensor] = list(dino.parameters())
    students: list[Tensor] = list(student.parameters())

    @torch.no_grad()
    def pair() -> None:
        torch._foreach_mul_(teachers, MOMENTUM)
        torch._foreach_add_(teachers, students, alpha=1 - MOMENTUM)

    @torch.no_grad()
    def sync() -> None:
        for target, source in zip(trl.parameters(), student.parameters(), strict=True):
            target.data.mul_(MOMENTUM).add_(source.data, alpha=1 - MOMENTUM)

    return {
        OURS: (ema.update, ours),
        "the form of DINOv3, foreach mul and add": (pair, dino),
        "the form of TRL, sync_target_model": (sync, trl),
        "dist_ema.compute_ema": (lambda: compute_ema(student, composer, MOMENTUM), composer),
    }


def error(teacher: nn.Module, before: Sequence[Tensor], after: Sequence[Tensor], updates: int) -> float:
    """Largest error over largest movement, on the first tensors."""
    kept, worst, moved = MOMENTUM**updates, 0.0, 0.0
    for found, old, new in zip(local(teacher)[:CHECKED], before, after, strict=False):
        reference = kept * old.double() + (1 - kept) * new.double()
        worst = max(worst, (found.double() - reference).abs().max().item())
        moved = max(moved, (reference - old.double()).abs().max().item())
    return worst / moved


def measure(elements: int, tensors: int, repeats: int, device: str, layout: str, name: str) -> list[Row]:
    """The rows of one layout and one dtype of the teacher, of fp32 students."""
    with one_process(device):
        model = Model(elements, tensors, torch.float32, device)

        def shard(module: nn.Module) -> nn.Module:
            if layout == "FSDP2":
                fully_shard(module, mesh=init_device_mesh(device, (1,)))
            return module

        def teacher() -> nn.Module:
            return shard(copy.deepcopy(model).to(DTYPES[name]).requires_grad_(False))

        student = shard(copy.deepcopy(model))
        built = contenders(student, teacher)
        before = [tensor.clone() for tensor in local(student)[:CHECKED]]
        train(student)
        after = local(student)
        label, speed = bound(model)
        functions = {key: update for key, (update, _) in built.items()} | {label: speed}
        times: dict[str, list[float]] = {key: [] for key in functions}
        for _ in range(repeats + 1):
            for key, function in functions.items():
                times[key].append(timed(function, device)[0])
        made = (repeats + 1) * (1 if device == "cpu" else QUEUED)
        rows = []
        for key, found in times.items():
            ratios = [theirs / mine for theirs, mine in zip(found[1:], times[OURS][1:], strict=True)]
            off = error(built[key][1], before, after, made) if key in built else None
            seconds = statistics.median(found[1:])
            rows.append(Row(key, layout, name, seconds * 1e3, statistics.median(ratios), min(ratios), off))
        return rows


def run(elements: int, tensors: int, repeats: int, device: str, as_json: bool) -> None:
    """Measures and prints."""
    load = os.getloadavg()[0]
    rows = [
        row
        for layout in ("plain", "FSDP2")
        for name in DTYPES
        for row in measure(elements, tensors, repeats, device, layout, name)
    ]
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(
        f"A teacher's update, {elements:,} elements in {tensors} uneven tensors, fp32 students, momentum {MOMENTUM}\n"
        f"{where}, torch {torch.__version__}, medians of {repeats} rounds, load average before {load:.1f}\n"
    )
    print_table(
        ["contender", "layout", "teacher", "ms", "x ours", "lowest", "off by"],
        [
            [
                row.contender,
                row.layout,
                row.teacher,
                cell(row.ms, ".2f"),
                cell(row.over_ours, ".2f"),
                cell(row.least_over_ours, ".2f"),
                cell(row.off_by, ".2%"),
            ]
            for row in rows
        ],
    )
    print(NOTES)
