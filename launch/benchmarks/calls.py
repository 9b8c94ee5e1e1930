"""What each call costs on real ranks, and how often it makes them wait for each other.

A model of many small tensors, where the number of collective calls counts and not the bytes; under FSDP2, and under DDP
for what replicas send each other. A call's time is that of its slowest rank, from a barrier on; ranks share the cores
of one machine, so with many of them a good part of it is waiting for a core.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.processes import torchrun
from benchmarks.show import cell, print_json, print_table
from dist_ema import ShardedEMA
from dist_ema.comm.channels import Channel

#: What makes a rank wait for others; those of objects are made of these.
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "scatter",
)


def model(tensors: int, elements: int) -> nn.Module:
    """A model of so many tensors, of so many fp32 elements each."""
    held = nn.ParameterList(torch.empty(elements) for _ in range(tensors))
    for parameter in held:
        nn.init.normal_(parameter)
    return held


def calls(folder: Path, tensors: int, elements: int) -> dict[str, Callable[[], object]]:
    """By name, in the order in which they take turns."""
    sharded, replicated = model(tensors, elements), DistributedDataParallel(model(tensors, elements))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    fsdp2, ddp = ShardedEMA(sharded, decay=0.9), ShardedEMA(replicated, decay=0.9)
    fsdp2.update()
    ddp.update()
    saved, out = folder / "saved", folder / "out"

    def swap() -> None:
        with ddp.average_parameters():
            pass

    return {
        "update, FSDP2": fsdp2.update,
        "full_state_dict, FSDP2": fsdp2.full_state_dict,
        "export, FSDP2": lambda: fsdp2.export(out),
        "export through rank 0, FSDP2": lambda: fsdp2.export(out, gather=True),
        "save, FSDP2": lambda: fsdp2.save(saved),
        "load, FSDP2": lambda: fsdp2.load(saved),
        "state_dict, FSDP2": fsdp2.state_dict,
        "fingerprint, FSDP2": fsdp2.fingerprint,
        "metrics, FSDP2": fsdp2.metrics,
        "average_parameters in and out, DDP": swap,
        "full_state_dict, DDP": ddp.full_state_dict,
    }


@contextmanager
def counted() -> Iterator[list[str]]:
    """Inside, the collective calls of this process, one after the other."""
    made: list[str] = []
    in_own_groups = Channel.gather
    before = {name: getattr(distributed_c10d, name) for name in COLLECTIVES}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        return call

    for (name, function), module in itertools.product(before.items(), (dist, distributed_c10d)):
        setattr(module, name, counting(name, function))
    # Rounds in groups of our own are sent by the group itself, past the functions above.
    setattr(Channel, "gather", counting("gather", in_own_groups))  # noqa: B010  (mypy: a method)
    try:
        yield made
    finally:
        setattr(Channel, "gather", in_own_groups)  # noqa: B010
        for (name, function), module in itertools.product(before.items(), (dist, distributed_c10d)):
            setattr(module, name, function)


def worker(folder: Path, tensors: int, elements: int, repeats: int) -> None:
    """One rank; rank 0 prints milliseconds and waits of each call as JSON."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    made = calls(folder, tensors, elements)
    times: dict[str, list[float]] = {name: [] for name in made}
    waits: dict[str, int] = {}
    for number, (name, function) in itertools.product(range(repeats + 1), made.items()):
        if name.startswith("export") and dist.get_rank() == 0:
            shutil.rmtree(folder / "out", ignore_errors=True)
        dist.barrier()
        start = time.perf_counter()
        if number:
            function()
        else:  # the first round warms up, and counts
            with counted() as collectives:
                function()
            waits[name] = len(collectives)
        dist.barrier()
        times[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        medians = {name: statistics.median(rounds[1:]) * 1e3 for name, rounds in times.items()}
        print(json.dumps({"ms": medians, "waits": waits}))
    dist.barrier()
    dist.destroy_process_group()


def measure(processes: Sequence[int], tensors: int, elements: int, repeats: int) -> list[dict[str, Any]]:
    """Medians on each number of processes."""
    runs = []
    for ranks in processes:
        with tempfile.TemporaryDirectory(prefix="dist_ema_benchmark_") as folder:
            sizes = ["--tensors", str(tensors), "--elements", str(elements), "--repeats", str(repeats)]
            runs.append(torchrun(["calls", "--worker", folder, *sizes], ranks))
    return runs


def show(runs: Sequence[dict[str, Any]], tensors: int, elements: int, repeats: int) -> None:
    """Prints a table of what was measured."""
    loads = ", ".join(format(found["load_average"], ".1f") for found in runs)
    print(f"{tensors} tensors of {elements * 4} bytes, medians of {repeats} rounds, load average before each {loads}\n")
    print_table(
        ["call", *(f"{found['ranks']} ranks: {what}" for found in runs for what in ("ms", "waits"))],
        [
            [name, *(text for found in runs for text in (cell(found["ms"][name], ".1f"), str(found["waits"][name])))]
            for name in runs[0]["ms"]
        ],
    )


def run(processes: Sequence[int], tensors: int, elements: int, repeats: int, as_json: bool) -> None:
    """Measures and prints."""
    runs = measure(processes, tensors, elements, repeats)
    if as_json:
        print_json({"tensors": tensors, "elements": elements, "runs": runs})
    else:
        show(runs, tensors, elements, repeats)
