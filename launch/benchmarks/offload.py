"""What ``offload="cpu"`` leaves of an update's time, and what its thread costs training and a data loader."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.show import cell, print_json, print_table
from dist_ema import ShardedEMA
from dist_ema.shadow import staging
from dist_ema.shadow.reading import wait_for_reads

WIDTH = 1024
BATCH = 64
NOTES = """\
Training has one core. "update" is how long update() keeps the caller. "wait" is how long the optimizer's step then
waits until the weights have been read. "step" is a whole training step; "loader" the batches a second of a loader whose
one process is busy all the time, in training that waits for it.
"a copy at once" takes a copy of the weights before update() returns, as accelerators do by themselves, on the CPU."""


@dataclass
class Row:
    """Medians of one way to average, in milliseconds, and batches a second."""

    contender: str
    update: float
    wait: float
    step: float
    loader: float


#: Options of ShardedEMA, and whether weights are copied although they are in host memory.
CONTENDERS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "no average": (None, False),
    "ShardedEMA": ({}, False),
    "offload, 1 thread": ({"offload": "cpu", "offload_threads": 1}, False),
    "offload, 2 threads": ({"offload": "cpu", "offload_threads": 2}, False),
    "offload, 1 thread, a copy at once": ({"offload": "cpu", "offload_threads": 1}, True),
}


class Busy(Dataset[Tensor]):
    """Samples that take a core a while."""

    def __init__(self, count: int, work: int) -> None:
        self._count = count
        self._work = work

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        torch.rand(self._work, generator=generator).sort()
        return torch.randn(WIDTH, generator=generator)


class Training:
    """A model of ``elements`` parameters, and one way to average it."""

    def __init__(self, elements: int, options: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        layers = max(1, elements // WIDTH**2)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.ema = None if options is None else ShardedEMA(self.model, decay=0.9999, **options)

    def step(self, batch: Tensor) -> tuple[float, float, float]:
        """Seconds of update, of waiting, and of everything."""
        start = time.perf_counter()
        self.model(batch).square().mean().backward()
        ready = time.perf_counter()
        wait_for_reads()
        waited = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        stepped = time.perf_counter()
        if self.ema is not None:
            self.ema.update()
        end = time.perf_counter()
        return end - stepped, waited - ready, end - start

    def close(self) -> None:
        if self.ema is not None:
            self.ema.close()


@contextlib.contextmanager
def _made(name: str, elements: int) -> Iterator[Training]:
    options, copies = CONTENDERS[name]
    with mock.patch.dict(staging.LINKS, {"cpu": staging.HostLink} if copies else {}):
        training = Training(elements, options)
        for _ in range(2):
            training.step(torch.randn(BATCH, WIDTH))
        yield training
        training.close()


def _loader_rate(training: Training, batches: int, work: int) -> float:
    """Batches a second, while the loader's process and the average's thread share the cores with training."""
    loader = DataLoader(Busy(batches + 4, work), batch_size=1, num_workers=1, multiprocessing_context="fork")
    found = iter(loader)
    for _ in range(3):  # the loader's lead
        training.step(next(found))
    start = time.perf_counter()
    for _ in range(batches):
        training.step(next(found))
    return batches / (time.perf_counter() - start)


def _loader_work(seconds: float) -> int:
    """How many numbers take so long to sort."""
    size = 1 << 18
    Busy(1, size)[0]
    start = time.perf_counter()
    Busy(1, size)[0]
    return int(size * seconds / (time.perf_counter() - start))


def measure(elements: int, steps: int, repeats: int) -> list[Row]:
    """Everyone in turn in each round."""
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CONTENDERS}
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    batch = torch.randn(BATCH, WIDTH)
    with _made("no average", elements) as training:
        work = _loader_work(2 * statistics.median(training.step(batch[:1])[2] for _ in range(5)))
    for _ in range(repeats):
        for name in CONTENDERS:
            with _made(name, elements) as training:
                times[name] += [training.step(batch) for _ in range(steps)]
                rates[name].append(_loader_rate(training, steps, work))
    rows = []
    for name, found in times.items():
        update, wait, step = (statistics.median(column) * 1e3 for column in zip(*found, strict=True))
        rows.append(Row(name, update, wait, step, statistics.median(rates[name])))
    return rows


def run(elements: int, repeats: int, steps: int, as_json: bool) -> None:
    """Measures and prints."""
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    torch.set_num_threads(1)
    rows = measure(elements, steps, repeats)
    torch.set_num_threads(threads)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows], "load_average": load})
        return
    plain = next(row for row in rows if row.contender == "ShardedEMA")
    bare = rows[0]
    print(
        f"{elements:,} fp32 elements, {os.cpu_count()} cores, torch {torch.__version__}, medians of {repeats} rounds "
        f"of {steps} steps, load average before {load:.1f}\n"
    )
    print_table(
        ["contender", "update ms", "of plain", "wait ms", "step ms", "of bare", "loader /s", "of bare"],
        [
            [
                row.contender,
                cell(row.update, ".2f"),
                cell(row.update / plain.update, ".3f"),
                cell(row.wait, ".2f"),
                cell(row.step, ".1f"),
                cell(row.step / bare.step, ".2f"),
                cell(row.loader, ".1f"),
                cell(row.loader / bare.loader, ".2f"),
            ]
            for row in rows
        ],
    )
    print(f"\n{NOTES}")
