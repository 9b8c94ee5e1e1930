"""What an update of the average costs, beside what people use today and beside the memory's speed.

    python launch/benchmark.py update
    python launch/benchmark.py update --elements 20000000 --dtype bf16 --device cuda --json

One process, one run, everything side by side: the contenders take turns in each round, so that a busy machine is as
unfair to one as to the other, and the medians are compared. The bound is ``a += w * b`` over the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmark_checkpoint import add_checkpoint
from benchmark_offload import add_offload
from benchmark_scale import add_scale
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_ema import ShardedEMA

DECAY = 0.9999
WEIGHT = 1 - DECAY
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED = 8  # tensors that are compared with a float64 average

NOTES = """\
GB/s counts the necessary bytes: the weights read once, the shadow read and written. "of bound" is the bound's time
over this time. "extra MiB" is the peak of temporaries during updates. "off by" is the largest error against a float64
average, over the largest distance that it moved: at this decay a bf16 shadow does not follow.
Contenders with a bf16 shadow cannot average bf16 weights into an fp32 one; they move fewer bytes than the others.
Composer gathers the whole model for each update: one process shows its arithmetic, not that communication.
DeepSpeed-Chat's form is that of ZeRO-0 to 2; under ZeRO-3 its average does not move at all.
On a machine whose cores are taken (load average) threads wait for each other, tensor by tensor: measure on an idle one,
or with OMP_NUM_THREADS=1."""


class Model(nn.Module):
    """Nothing but parameters: ``tensors`` flat ones of very different sizes, ``elements`` in all."""

    def __init__(self, elements: int, tensors: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        draw = random.Random(0)
        shares = [draw.lognormvariate(0, 1.5) for _ in range(tensors)]
        sizes = [max(1, int(share / sum(shares) * elements)) for share in shares]
        torch.manual_seed(0)
        self.tensors = nn.ParameterList(torch.randn(size, device=device).to(dtype) for size in sizes)


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Moves every weight, to the same place in every copy of the model."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


@dataclass
class Contender:
    """One way to average.

    Attributes:
        update: averages the weights of ``live`` once.
        shadows: the averages, in the order of the model's parameters.
        live: the model that it averages, where that cannot be the common one.
    """

    update: Callable[[], object]
    shadows: Callable[[], Sequence[Tensor]]
    live: nn.Module | None = None


Builder = Callable[[Model], Contender]


def weights(model: Model) -> list[Tensor]:
    return [parameter.detach() for parameter in model.tensors]


# The bound.


def compile_axpy(folder: Path) -> ctypes.CDLL | None:
    """``a += w * b`` for fp32 and for bf16 ``b``, compiled; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("c++")
    if compiler is None:
        return None
    source = """
    #include <stdint.h>
    #include <string.h>
    void fp32(float *restrict a, const float *restrict b, int64_t n, float w) {
        for (int64_t i = 0; i < n; i++) a[i] += w * b[i];
    }
    void bf16(float *restrict a, const uint16_t *restrict b, int64_t n, float w) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)b[i] << 16;
            float value;
            memcpy(&value, &bits, 4);
            a[i] += w * value;
        }
    }"""
    (folder / "axpy.c").write_text(source)
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-x", "c", "axpy.c", "-o", "axpy.so"]
    if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
        return None
    return ctypes.CDLL(str(folder / "axpy.so"))


def bound(model: Model) -> tuple[str, Callable[[], object]]:
    """Label and function of ``a += w * b`` over one flat array of as many elements."""
    source = torch.cat(weights(model))
    target = source.to(torch.float32, copy=True)
    if source.device.type == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            library = compile_axpy(Path(folder))
        if library is not None:
            name = "fp32" if source.dtype == torch.float32 else "bf16"
            function = getattr(library, name)
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float)
            function.restype = None
            # Python threads: a second OpenMP runtime would spin against that of torch. The caller does its part as
            # with OpenMP: on a busy machine a fresh thread is scheduled before one that has been working.
            threads = torch.get_num_threads()
            parts = list(zip(target.chunk(threads), source.chunk(threads), strict=True))
            pool = ThreadPoolExecutor(threads)

            def part(a: Tensor, b: Tensor) -> None:
                function(a.data_ptr(), b.data_ptr(), a.numel(), 1e-9)

            def run() -> None:
                others = [pool.submit(part, *pair) for pair in parts[1:]]
                part(*parts[0])
                for other in others:
                    other.result()

            return "bound: a += w * b, C, one array", run
        if source.dtype != torch.float32:  # torch would convert the whole array first
            size = 1 << 18
            scratch = torch.empty(size)

            def chunked() -> None:
                for a, b in zip(torch.split(target, size), torch.split(source, size), strict=True):
                    a.add_(scratch[: b.numel()].copy_(b), alpha=1e-9)

            return "bound: a += w * b, torch, chunks", chunked
    return "bound: a += w * b, torch, one array", lambda: target.add_(source, alpha=1e-9)


# The contenders. Each builder makes the first copy, so that every ``update`` averages.


def ours(model: Model, **options: Any) -> Contender:
    ema = ShardedEMA(model, decay=DECAY, **options)
    ema.update()

    def shadows() -> list[Tensor]:
        full = ema.full_state_dict()
        return [full[name] for name, _ in model.named_parameters()]

    return Contender(ema.update, shadows)


def ours_unguarded(model: Model) -> Contender:
    return ours(model, skip_nonfinite=False)


def composer(model: Model) -> Contender:
    """Composer's compute_ema under FSDP: every update gathers the model and visits a full copy."""
    average = copy.deepcopy(model).float()
    live = FullyShardedDataParallel(
        copy.deepcopy(model), use_orig_params=True, device_id=torch.device(weights(model)[0].device)
    )

    @torch.no_grad()
    def form() -> None:
        for shadow, parameter in zip(average.parameters(), live.parameters(), strict=True):
            shadow.copy_(shadow * DECAY + (1.0 - DECAY) * parameter.detach())

    def update() -> None:
        with FullyShardedDataParallel.summon_full_params(live):
            form()

    return Contender(update, lambda: [parameter.detach() for parameter in average.parameters()], live)


def averaged_model(model: Model) -> Contender:
    """torch's own class. It copies the model, dtype and all."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
    average.update_parameters(model)
    return Contender(
        lambda: average.update_parameters(model), lambda: [p.detach() for p in average.module.parameters()]
    )


def diffusers_class() -> Any:
    """diffusers' EMAModel, or None."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    with contextlib.suppress(Exception):  # whatever an optional package's import may raise
        return importlib.import_module("diffusers.training_utils").EMAModel
    return None


def diffusers(model: Model) -> Contender:
    """diffusers' EMAModel with fp32 shadows, as its training scripts use it (no foreach)."""
    cls = diffusers_class()
    if cls is not None:
        average = cls(model.parameters(), decay=DECAY, min_decay=DECAY)  # min_decay: no warm-up
        average.to(dtype=torch.float32)
        average.step(model.parameters())  # its first step copies
        return Contender(lambda: average.step(model.parameters()), lambda: average.shadow_params)
    shadows = [source.float().clone() for source in weights(model)]

    @torch.no_grad()
    def step() -> None:
        for shadow, parameter in zip(shadows, model.tensors, strict=True):
            shadow.sub_(WEIGHT * (shadow - parameter))

    return Contender(step, lambda: shadows)


def deepspeed_chat(model: Model) -> Contender:
    """DeepSpeed-Chat's moving_average: out of place and copied, in the model's dtype, tensor by tensor."""
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        for parameter, shadow in zip(model.parameters(), average.parameters(), strict=True):
            shadow.data.copy_(torch.lerp(parameter.data, shadow.data, DECAY))

    return Contender(update, lambda: weights(average))


def torchtitan(model: Model) -> Contender:
    """torchtitan's: one foreach over DTensors, in the model's dtype."""
    mesh = init_device_mesh(weights(model)[0].device.type, (1,))

    def shard(local: Tensor) -> Tensor:
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    averages = [source.clone() for source in weights(model)]
    live, shadows = [[shard(local) for local in side] for side in (weights(model), averages)]
    return Contender(lambda: torch._foreach_lerp_(shadows, live, WEIGHT), lambda: list(averages))


def contenders(dtype: torch.dtype) -> dict[str, tuple[Builder, torch.dtype]]:
    """Label, builder and shadow dtype of each, in the table's order."""
    real = "EMAModel" if diffusers_class() is not None else "EMAModel's form"
    own = f" ({'fp32' if dtype == torch.float32 else 'bf16'} shadow)" if dtype != torch.float32 else ""
    return {
        "ShardedEMA": (ours, torch.float32),
        "ShardedEMA, skip_nonfinite=False": (ours_unguarded, torch.float32),
        f"torchtitan's form, DTensors{own}": (torchtitan, dtype),
        f"torch AveragedModel{own}": (averaged_model, dtype),
        f"diffusers {real}": (diffusers, torch.float32),
        f"DeepSpeed-Chat's form{own}": (deepspeed_chat, dtype),
        "Composer compute_ema's form, FSDP": (composer, torch.float32),
    }


# Measuring.


@contextlib.contextmanager
def one_process(device: str) -> Iterator[None]:
    """A process group of this process alone, which FSDP and DTensors need."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FSDP's, about a single process
            yield
    finally:
        dist.destroy_process_group()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def reset_peak() -> None:
    """Makes the kernel count this process's peak memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (peak) of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def peak_of_updates(label: str, elements: int, tensors: int, dtype: torch.dtype, device: str) -> int | None:
    """Bytes by which memory grows during updates, past what stays from before the first. None if it cannot be known."""
    with one_process(device):
        model = Model(elements, tensors, dtype, device)
        contender = contenders(dtype)[label][0](model)
        gc.collect()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.update()
            synchronize(device)
            return torch.cuda.max_memory_allocated() - before
        torch.ones(1 << 20).lerp_(torch.ones(1 << 20), 0.5).sum()  # starts the threads, which cost memory too
        try:
            ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept by the allocator would hide temporaries (glibc)
            reset_peak()
            before = resident("VmRSS")
        except (OSError, AttributeError):
            return None
        contender.update()
        contender.update()
        return max(resident("VmHWM") - before, 0)


@dataclass
class Row:
    """One line of the table; times in milliseconds."""

    contender: str
    source: str
    ms: float
    gb_per_s: float
    of_bound: float
    over_ours: float
    extra_mib: float | None
    off_by: float | None


def off_by(contender: Contender, before: Sequence[Tensor], after: Sequence[Tensor], updates: int) -> float:
    """Largest error over largest movement, on the first tensors, against a float64 average."""
    kept = DECAY**updates
    error = movement = 0.0
    for shadow, old, new in zip(contender.shadows(), before, after, strict=False):
        reference = kept * old.double() + (1 - kept) * new.double()
        error = max(error, (shadow.to(new.device).double() - reference).abs().max().item())
        movement = max(movement, (reference - old.double()).abs().max().item())
    return error / movement


def measure(elements: int, tensors: int, repeats: int, device: str, dtype: torch.dtype, memory: Any) -> list[Row]:
    """The rows for sources of one dtype. ``memory`` is an executor of processes for what each contender takes."""
    name = next(name for name, value in DTYPES.items() if value == dtype)
    with one_process(device):
        model = Model(elements, tensors, dtype, device)
        entries = contenders(dtype)
        built = {label: builder(model) for label, (builder, _) in entries.items()}
        before = [source.clone() for source in weights(model)[:CHECKED]]
        for each in [model, *(contender.live for contender in built.values() if contender.live is not None)]:
            train(each)
        after = weights(model)[:CHECKED]
        total = sum(source.numel() for source in weights(model))
        label, run = bound(model)
        functions = {label: run} | {other: contender.update for other, contender in built.items()}
        times: dict[str, list[float]] = {key: [] for key in functions}
        for _ in range(repeats + 1):
            for key, function in functions.items():
                times[key].append(timed(function, device))
        # The first round is left out: memory is touched and scratch made there.
        medians = {key: statistics.median(values[1:]) for key, values in times.items()}
        errors = {key: off_by(contender, before, after, repeats + 1) for key, contender in built.items()}
    rows = []
    for key, seconds in medians.items():
        shadow = entries[key][1] if key in entries else torch.float32
        extra = memory(key, elements, tensors, dtype, device) if key in entries else None
        rows.append(
            Row(
                key,
                name,
                seconds * 1e3,
                total * (dtype.itemsize + 2 * shadow.itemsize) / seconds / 1e9,
                medians[label] / seconds,
                seconds / medians["ShardedEMA"],
                None if extra is None else extra / 2**20,
                errors.get(key),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""

    def cell(value: float | None, text: str) -> str:
        return "-" if value is None or math.isnan(value) else format(value, text)

    head = ["contender", "weights", "ms", "GB/s", "of bound", "x ours", "extra MiB", "off by"]
    body = [
        [
            row.contender,
            row.source,
            cell(row.ms, ".2f"),
            cell(row.gb_per_s, ".1f"),
            cell(row.of_bound, ".2f"),
            cell(row.over_ours, ".2f"),
            cell(row.extra_mib, ".1f"),
            cell(row.off_by, ".2%"),
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = []
    for line in [head, *body]:
        cells = [line[0].ljust(widths[0])] + [
            text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def update(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    # Forked from a process that has imported torch and run nothing: a contender then costs a fraction of a second, and
    # its memory is its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_ema.ema", "torch.distributed.fsdp", "torch.optim.swa_utils"])

    def memory(*job: Any) -> int | None:
        if arguments.device != "cpu":
            return peak_of_updates(*job)
        with context.Pool(1) as pool:
            result: int | None = pool.apply(peak_of_updates, job)
            return result

    load = os.getloadavg()[0]
    rows = []
    for name in arguments.dtype:
        rows += measure(
            arguments.elements, arguments.tensors, arguments.repeats, arguments.device, DTYPES[name], memory
        )
        gc.collect()
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    where = f"{torch.get_num_threads()} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"EMA update, {arguments.elements:,} elements in {arguments.tensors} uneven tensors, fp32 shadow, "
        f"decay {DECAY}\n{where}, torch {torch.__version__}, medians of {arguments.repeats} rounds, "
        f"load average before {load:.1f}\n\n{table(rows)}\n\n{NOTES}"
    )


def positive(text: str) -> int:
    """An int above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("update", help="time and memory of one update, beside the alternatives")
    command.add_argument("--elements", type=positive, default=100_000_000, help="parameters in all (%(default)s)")
    command.add_argument("--tensors", type=positive, default=400, help="in how many tensors (%(default)s)")
    command.add_argument("--repeats", type=positive, default=5, help="rounds after a first one (%(default)s)")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="of the weights (both)"
    )
    command.add_argument("--json", action="store_true", help="print the rows as JSON")
    command.set_defaults(run=update)
    command = commands.add_parser("checkpoint", help="time and memory of a save and a load, beside the alternatives")
    add_checkpoint(command, positive)
    command = commands.add_parser("offload", help="what an offloaded update costs training and a data loader")
    command.add_argument("--elements", type=positive, default=20_000_000, help="parameters in all (%(default)s)")
    command.add_argument("--repeats", type=positive, default=5, help="rounds (%(default)s)")
    add_offload(command)
    add_scale(commands.add_parser("scale", help="planning for 70 B and 671 B parameters on 8 to 8,192 ranks"), positive)
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    return parsed


if __name__ == "__main__":
    options = parse()
    options.run(options)
