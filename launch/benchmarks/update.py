"""What an update of the average costs, beside what people use today and beside the memory's speed.

One process, one run, everything side by side: the contenders take turns in each round, so that a busy machine is as
unfair to one as to the other, and the medians are compared. The bound is ``a += w * b`` over the same bytes, on a GPU a
copy on the device of as many. There updates are queued and timed by events, and the host's time is said beside.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.bound import bound
from benchmarks.clock import QUEUED, synchronize, timed
from benchmarks.memory import peak_growth
from benchmarks.peers import DECAY, Contender, FullTensor, Model, package, peers, weights
from benchmarks.show import cell, print_json, print_table
from dist_ema import ShardedEMA
from dist_ema.kernels import cuda, native

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED = 8  # tensors that are compared with a float64 average
THREE = {"fast": 0.999, "middle": DECAY, "slow": 0.99999}
SMALL = 1000  # tensors of one element, for what an update costs in Python

NOTES = """\
GB/s counts the necessary bytes: the weights read once, each shadow read and written. "of bound" is the bound's time
over this time; three averages have a bound of their own, which reads the weights once. "extra MiB" is the peak of
temporaries during updates. "off by" is the largest error against a float64 average, over the largest distance that it
moved: at this decay a bf16 shadow does not follow.
Contenders with a bf16 shadow cannot average bf16 weights into an fp32 one; they move fewer bytes than the others.
Composer gathers the whole model for each update: one process shows its arithmetic, not that communication.
DeepSpeed-Chat's form is that of ZeRO-0 to 2; under ZeRO-3 its average does not move at all.
"The form of" a project is its arithmetic written out, where the package itself was not called.
On a machine whose cores are taken (load average) threads wait for each other, tensor by tensor: measure on an idle one,
or with OMP_NUM_THREADS=1."""


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Moves every weight, to the same place in every copy of the model."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


# Ours.


def ours(model: Model, guard: bool = True, averages: int = 1, eager: bool = False) -> Contender:
    schedules: dict[str, Any] = {"decay": DECAY} if averages == 1 else {"averages": THREE}
    ema = ShardedEMA(model, skip_nonfinite=guard, **schedules)

    def update() -> None:
        with forced_eager() if eager else contextlib.nullcontext():
            ema.update()

    def shadows() -> list[Tensor]:
        full = ema.full_state_dict(None if averages == 1 else "middle")  # the one with everybody's decay
        return [full[name] for name, _ in model.named_parameters()]

    update()
    return Contender(update, shadows)


@contextlib.contextmanager
def forced_eager() -> Iterator[None]:
    """What ``DIST_EMA_KERNEL=eager`` does, which is read once in a process."""
    with mock.patch.object(native, "_decided", [None]), mock.patch.object(cuda, "_decided", [None]):
        yield


#: Options of ``ours`` whose guard is measured: with and without it.
GUARDED: dict[str, dict[str, Any]] = {
    "ShardedEMA": {},
    "ShardedEMA, three averages": {"averages": 3},
    "ShardedEMA, eager route": {"eager": True},
}
UNGUARDED = ", skip_nonfinite=False"


def contenders(dtype: torch.dtype) -> dict[str, FullTensor]:
    """Label and contender of everyone, in the table's order."""
    entries = {}
    for label, given in GUARDED.items():
        for ending, guard in (("", True), (UNGUARDED, False)):
            builder = functools.partial(ours, guard=guard, **given)
            entries[label + ending] = FullTensor(builder, averages=given.get("averages", 1))
    return entries | peers(dtype)


# Measuring.


@contextlib.contextmanager
def one_process(device: str) -> Iterator[None]:
    """A process group of this process alone, which FSDP and DTensors need."""
    store = dist.HashStore()
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FSDP's, about a single process
            yield
    finally:
        dist.destroy_process_group()


def peak_of_updates(label: str, elements: int, tensors: int, dtype: torch.dtype, device: str) -> int | None:
    """Bytes by which memory grows during updates, past what stays from before the first. None if it cannot be known."""
    with one_process(device):
        model = Model(elements, tensors, dtype, device)
        contender = contenders(dtype)[label].builder(model)
        gc.collect()
        if device != "cpu":
            torch.accelerator.reset_peak_memory_stats()
            before = torch.accelerator.memory_allocated()
            contender.update()
            synchronize(device)
            return torch.accelerator.max_memory_allocated() - before
        torch.ones(1 << 20).lerp_(torch.ones(1 << 20), 0.5).sum()  # starts the threads, which cost memory too
        try:
            return peak_growth(lambda: (contender.update(), contender.update()))
        except (OSError, AttributeError):
            return None


@dataclass
class Row:
    """One line of the table; times in milliseconds, ``host_ms`` of the calling thread."""

    contender: str
    source: str
    ms: float
    host_ms: float
    gb_per_s: float
    of_bound: float
    over_ours: float
    extra_mib: float | None
    off_by: float | None


@dataclass
class Guard:
    """What leaving out NaN and Inf adds to an update, as a part of it: the median of rounds side by side."""

    contender: str
    source: str
    cost: float


def off_by(contender: Contender, before: Sequence[Tensor], after: Sequence[Tensor], updates: int) -> float:
    """Largest error over largest movement, on the first tensors, against a float64 average."""
    kept = DECAY**updates
    error = movement = 0.0
    for shadow, old, new in zip(contender.shadows(), before, after, strict=False):
        reference = kept * old.double() + (1 - kept) * new.double()
        error = max(error, (shadow.to(new.device).double() - reference).abs().max().item())
        movement = max(movement, (reference - old.double()).abs().max().item())
    return error / movement


def measure(
    elements: int, tensors: int, repeats: int, device: str, dtype: torch.dtype, memory: Any
) -> tuple[list[Row], list[Guard]]:
    """The rows for sources of one dtype, and what the guard costs.

    ``memory`` runs :func:`peak_of_updates` in a process of its own.
    """
    name = next(name for name, value in DTYPES.items() if value == dtype)
    with one_process(device):
        model = Model(elements, tensors, dtype, device)
        entries = contenders(dtype)
        built = {label: entry.builder(model) for label, entry in entries.items()}
        before = [source.clone() for source in weights(model)[:CHECKED]]
        for each in [model, *(contender.live for contender in built.values() if contender.live is not None)]:
            train(each)
        after = weights(model)[:CHECKED]
        total = sum(source.numel() for source in weights(model))
        bounds = {averages: bound(model, averages) for averages in (1, len(THREE))}
        functions = dict(bounds.values()) | {label: contender.update for label, contender in built.items()}
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in functions}
        for _ in range(repeats + 1):
            for key, function in functions.items():
                times[key].append(timed(function, device))
        # The first round is left out: memory is touched and scratch made there.
        medians = {key: statistics.median(taken for taken, _ in values[1:]) for key, values in times.items()}
        hosts = {key: statistics.median(host for _, host in values[1:]) for key, values in times.items()}
        made = (repeats + 1) * (1 if device == "cpu" else QUEUED)
        errors = {key: off_by(contender, before, after, made) for key, contender in built.items()}
    counts = {label: averages for averages, (label, _) in bounds.items()}
    counts |= {label: entry.averages for label, entry in entries.items()}
    rows = []
    for key, seconds in medians.items():
        shadow = entries[key].shadow if key in entries else torch.float32
        extra = memory(key, elements, tensors, dtype, device) if key in entries else None
        rows.append(
            Row(
                key,
                name,
                seconds * 1e3,
                hosts[key] * 1e3,
                total * (dtype.itemsize + 2 * shadow.itemsize * counts[key]) / seconds / 1e9,
                medians[bounds[counts[key]][0]] / seconds,
                seconds / medians["ShardedEMA"],
                None if extra is None else extra / 2**20,
                errors.get(key),
            )
        )
    guards = []
    for key in GUARDED:
        ratios = [a / b for (a, _), (b, _) in zip(times[key][1:], times[key + UNGUARDED][1:], strict=True)]
        guards.append(Guard(key, name, statistics.median(ratios) - 1))
    return rows, guards


class Small(nn.Module):
    """Nothing but tensors of one element: averaging them is Python's work alone."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.randn(1, device=device) for _ in range(SMALL))


def overhead(device: str, rounds: int = 300) -> dict[str, float]:
    """Milliseconds that ``update()`` keeps the calling thread for 1,000 tensors: the least of many, by engine."""
    with one_process(device):
        mesh = init_device_mesh(device, (1,))
        sharded = Small(device)
        fully_shard(sharded, mesh=mesh)
        models = {"plain": Small(device), "FSDP2": sharded}
        found = {}
        for name, model in models.items():
            ema = ShardedEMA(model, decay=DECAY)
            times = []
            for _ in range(rounds + 2):
                start = time.perf_counter()  # not synchronised: a GPU works on its own
                ema.update()
                times.append(time.perf_counter() - start)
            found[name] = min(times[2:]) * 1e3
    return found


def run(elements: int, tensors: int, repeats: int, device: str, dtypes: Sequence[str], as_json: bool) -> None:
    """Measures and prints."""
    # Forked from a process that has imported torch and run nothing: a contender then costs a fraction of a second, and
    # its memory is its own.
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo is imported by the first DTensor, and takes longer than a contender.
    ours = ["benchmarks.update", "torch._dynamo", "torch.distributed.fsdp", "torch.optim.swa_utils"]
    theirs = {"diffusers.training_utils": "EMAModel", "ema_pytorch": "EMA", "timm.utils": "ModelEmaV3"}
    # What cannot be imported would end the process that is forked from.
    installed = [module for module, name in theirs.items() if package(module, name) is not None]
    context.set_forkserver_preload(ours + installed)

    def memory(*job: Any) -> int | None:
        if device != "cpu":
            return peak_of_updates(*job)
        with context.Pool(1) as pool:
            result: int | None = pool.apply(peak_of_updates, job)
            return result

    load = os.getloadavg()[0]
    calling = overhead(device)
    rows, guards = [], []
    for name in dtypes:
        found = measure(elements, tensors, repeats, device, DTYPES[name], memory)
        rows += found[0]
        guards += found[1]
        gc.collect()
    if as_json:
        lists = {"rows": [asdict(row) for row in rows], "guard": [asdict(guard) for guard in guards]}
        print_json({**lists, "calling_thread_ms": calling})
        return
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(
        f"EMA update, {elements:,} elements in {tensors} uneven tensors, fp32 shadow, "
        f"decay {DECAY}\n{where}, torch {torch.__version__}, medians of {repeats} rounds, "
        f"load average before {load:.1f}\n"
    )
    print_table(
        ["contender", "weights", "ms", "host ms", "GB/s", "of bound", "x ours", "extra MiB", "off by"],
        [
            [
                row.contender,
                row.source,
                cell(row.ms, ".2f"),
                cell(row.host_ms, ".2f"),
                cell(row.gb_per_s, ".1f"),
                cell(row.of_bound, ".2f"),
                cell(row.over_ours, ".2f"),
                cell(row.extra_mib, ".1f"),
                cell(row.off_by, ".2%"),
            ]
            for row in rows
        ],
    )
    for guard in guards:
        print(f"guard of {guard.contender}, {guard.source} weights: {guard.cost:+.1%} of the update without it")
    each = ", ".join(f"{name} {ms:.2f} ms" for name, ms in calling.items())
    print(f"update() of {SMALL:,} tensors of one element keeps its caller: {each}\n\n{NOTES}")
