"""What a checkpoint costs, beside writing the same bytes and beside what people use today, as ranks and sizes grow.

Every number of ranks and every size is a run of its own under torchrun, in which all contenders take turns: an FSDP2
model, cut over the ranks. A contender's time is that of its slowest rank, from a barrier on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import mmap
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.memory import peak_growth
from benchmarks.processes import torchrun
from benchmarks.show import cell, print_json, print_table
from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.checkpoints.folder import IO_CHUNK
from dist_ema.kernels.fingerprint import partial_digest

BLOCK = 16 << 20
DIRECT, HUGE_PAGE = 4 << 20, 2 << 20
TENSORS = 8
#: Contenders that read, and what they are compared with.
READS = {"raw read", "raw read into new memory", "load", "load, verify=False", "verify, one thread"}
#: What a save does at least: a checksum of the bytes, a copy to aligned memory, and writing that past the page cache.
BOUND = "bound: checksum, copy, direct write, fsync"
#: What is read from the disk, and not from the system's copy of it in memory, as after a restart on another machine.
UNCACHED = ", not cached"

#: Folders of contenders that write no place twice; the others remove within their time what they wrote before.
ANEW = {
    "dcp.save": ["dcp"],
    "dcp.save to Hugging Face files, consolidated": ["hf"],
    "save to a new place": ["new"],
    "save to a new place, then load": ["new"],
    "export": ["export"],
}


def _sync(path: Path) -> None:
    for file in [path, *path.rglob("*")]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _forget(path: Path) -> None:
    """Has the system drop its copy in memory of what is on the disk."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _write_raw(tensors: list[Tensor], path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            data = _bytes(tensor)
            while data:
                data = data[file.write(data[:BLOCK]) :]
        os.fsync(file.fileno())


def _aligned(size: int) -> np.ndarray:
    """Memory that begins at a huge page and is of huge pages: a disk takes 4 KiB pages one by one. uint8, 1D."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    values = np.frombuffer(memory, dtype=np.uint8)
    skipped = -values.ctypes.data % HUGE_PAGE
    return values[skipped : skipped + size]


def _takes_direct_writes(folder: Path) -> bool:
    """Whether the file system of a folder opens files with O_DIRECT; some network and memory file systems do not."""
    path = folder / f"probe-{dist.get_rank()}"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def _write_bound(tensors: list[Tensor], path: Path) -> None:
    path.unlink(missing_ok=True)  # blocks of a new file have to be found, as those of a save
    room = _aligned(DIRECT)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    position = used = 0
    for tensor in tensors:
        for part in torch.split(tensor.view(-1), IO_CHUNK):
            partial_digest(part, ((0, part.numel()),))
            data = part.view(torch.uint8).numpy()
            while len(data):
                taken = min(len(data), len(room) - used)
                room[used : used + taken] = data[:taken]
                data, used = data[taken:], used + taken
                if used == len(room):
                    os.pwrite(descriptor, room.data, position)
                    position, used = position + used, 0
    os.pwrite(descriptor, room.data[: -(-used // mmap.PAGESIZE) * mmap.PAGESIZE], position)
    os.fsync(descriptor)
    os.close(descriptor)


def _read_raw(path: Path, out: Tensor) -> None:
    data = _bytes(out)
    with path.open("rb", buffering=0) as file:
        while data and (count := file.readinto(data[:BLOCK])):
            data = data[count:]


class Contenders:
    """A sharded model, its average, and everyone who writes or reads it."""

    def __init__(self, folder: Path, elements: int) -> None:
        self.folder = folder
        self.rank, ranks = dist.get_rank(), dist.get_world_size()
        rows = elements // TENSORS // 1024
        self.elements = rows * 1024 * TENSORS
        torch.manual_seed(self.rank)
        with torch.device("meta"):
            self.model: nn.Module = nn.ParameterList(torch.empty(rows, 1024) for _ in range(TENSORS))
        fully_shard(self.model, mesh=init_device_mesh("cpu", (ranks,)))
        self.model.to_empty(device="cpu")
        self.own = [parameter.to_local().detach() for parameter in self.model.parameters()]  # type: ignore[attr-defined]
        for tensor in self.own:
            tensor.normal_()
        self.ema = ShardedEMA(self.model, decay=0.9)
        self.ema.update()
        self.out = torch.zeros(sum(tensor.numel() for tensor in self.own))
        self.direct = _takes_direct_writes(folder)

    def all(self) -> dict[str, Callable[[], object]]:
        """By name, in the order in which they take turns."""
        raw = self.folder / f"raw-{self.rank}"
        bound = {BOUND: lambda: _write_bound(self.own, self.folder / f"bound-{self.rank}")}
        return {
            "raw write + fsync": lambda: _write_raw(self.own, raw),
            **(bound if self.direct else {}),
            "safetensors save_file + fsync, a file a rank": self._safetensors,
            "dcp.save": lambda: dcp.save(dict(self.model.state_dict()), checkpoint_id=self.folder / "dcp"),
            "FSDP full state dict + torch.save + fsync": self._full,
            "dcp.save to Hugging Face files, consolidated": self._consolidated,
            "save": lambda: self.ema.save(self.folder / "ours"),
            "save, no digests": self._undigested,
            "save to a new place": lambda: self.ema.save(self.folder / "new"),
            "save to a new place, then load": self._save_and_load,
            "export": self._export,
            "raw read": lambda: _read_raw(raw, self.out),
            "raw read into new memory": lambda: _read_raw(raw, torch.empty_like(self.out)),
            "load": lambda: self.ema.load(self.folder / "ours"),
            "load, verify=False": lambda: self.ema.load(self.folder / "ours", verify=False),
            "verify, one thread": lambda: self.rank or verify_checkpoint(self.folder / "ours", threads=1),
            "raw read" + UNCACHED: lambda: _read_raw(raw, self.out),
            "load" + UNCACHED: lambda: self.ema.load(self.folder / "ours"),
        }

    def clear(self, name: str) -> None:
        """Removes what a contender would not write over, or must not find in memory."""
        dist.barrier()
        if self.rank == 0:
            for folder in ANEW.get(name, ()):
                shutil.rmtree(self.folder / folder, ignore_errors=True)
            for file in self.folder.glob("raw-*" if name.startswith("raw") else "ours") if UNCACHED in name else ():
                _forget(file)
        dist.barrier()

    def _safetensors(self) -> None:
        path = self.folder / f"safetensors-{self.rank}"
        save_file({f"t{index}": tensor for index, tensor in enumerate(self.own)}, path)
        _sync(path)

    def _full(self) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        if self.rank == 0:
            torch.save(state, self.folder / "full")
            _sync(self.folder / "full")

    def _consolidated(self) -> None:
        names = dict.fromkeys(self.model.state_dict(), 1)
        writer = dcp.HuggingFaceStorageWriter(
            str(self.folder / "hf"), fqn_to_index_mapping=names, save_distributed=True, enable_consolidation=True
        )
        dcp.save(dict(self.model.state_dict()), storage_writer=writer)
        if self.rank == 0:
            _sync(self.folder / "hf")

    def _undigested(self) -> None:
        with mock.patch("dist_ema.checkpoints.folder.partial_digest", lambda *_: 0):
            self.ema.save(self.folder / "plain")

    def _save_and_load(self) -> None:
        self.ema.save(self.folder / "new")
        self.ema.load(self.folder / "new")

    def _export(self) -> None:
        self.ema.export(self.folder / "export", dtype=torch.float32)


def worker(folder: Path, elements: int, repeats: int, only: Sequence[str]) -> None:
    """One rank of one run, of the contenders ``only``, or of all; rank 0 prints the figures as JSON."""
    dist.init_process_group("gloo")
    logs = contextlib.redirect_stderr(None) if dist.get_rank() else contextlib.nullcontext()
    warnings.simplefilter("ignore")
    with logs:
        contenders = Contenders(folder, elements)
        threads = torch.get_num_threads()
        chosen = {name: call for name, call in contenders.all().items() if not only or name in only}
        times: dict[str, list[float]] = {name: [] for name in chosen}
        for _, (name, function) in itertools.product(range(repeats + 1), chosen.items()):
            contenders.clear(name)
            torch.set_num_threads(1 if name.startswith("verify") else threads)
            start = time.perf_counter()
            function()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
        torch.set_num_threads(threads)
        peaks = [peak_growth(contenders.all()["save"])]
        contenders.clear("export")
        peaks.append(peak_growth(contenders.all()["export"]))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, peaks)
    if dist.get_rank() == 0:
        medians = {name: statistics.median(rounds[1:]) for name, rounds in times.items()}  # the first round warms up
        save_peak, export_peak = (max(ranks) / 2**20 for ranks in zip(*found, strict=True))
        size = contenders.elements * 4
        print(json.dumps({"bytes": size, "seconds": medians, "save_mib": save_peak, "export_mib": export_peak}))
    dist.destroy_process_group()


def _run(elements: int, ranks: int, repeats: int, only: Sequence[str], parent: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dist_ema_benchmark_", dir=parent) as folder:
        sizes = ["--elements", str(elements), "--repeats", str(repeats)]
        chosen = [word for name in only for word in ("--only", name)]
        return torchrun(["checkpoint", "--worker", "--folder", folder, *sizes, *chosen], ranks)


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    seconds = found["seconds"]
    rows = []
    for name, taken in seconds.items():
        raw = seconds.get(_baseline(name), math.nan)
        of_new = taken / seconds.get("raw read into new memory", math.nan) if name in READS else math.nan
        of_bound = math.nan if name in READS or UNCACHED in name else taken / seconds.get(BOUND, math.nan)
        rows.append(
            {
                "contender": name,
                "ms": taken * 1e3,
                "mb_per_s": found["bytes"] / taken / 1e6,
                "of_raw": _number(taken / raw),
                "of_raw_new": _number(of_new),
                "of_bound": _number(of_bound),
            }
        )
    return rows


def _number(value: float) -> float | None:
    """As JSON has it: None for what was not measured."""
    return None if math.isnan(value) else value


def _baseline(name: str) -> str:
    if UNCACHED in name:
        return "raw read" + UNCACHED
    return "raw read" if name in READS else "raw write + fsync"


def run(
    elements: Sequence[int],
    ranks: Sequence[int],
    repeats: int,
    only: Sequence[str],
    folder: Path | None,
    as_json: bool,
) -> None:
    """Measures, everyone in turn in each round, and prints medians."""
    runs = []
    for size, number in itertools.product(elements, ranks):
        found = _run(size, number, repeats, only, folder)
        found["rows"] = _rows(found)
        runs.append(found)
        if not as_json:
            _print(found, repeats)
    if as_json:
        print_json(runs)


def _print(found: dict[str, Any], repeats: int) -> None:
    size, ranks, load = found["bytes"] / 1e6, found["ranks"], found["load_average"]
    print(f"{size:.0f} MB, {ranks} rank(s), medians of {repeats} rounds, load average before {load:.1f}")
    print_table(
        ["contender", "ms", "MB/s", "x raw", "x raw into new memory", "x bound"],
        [
            [
                row["contender"],
                cell(row["ms"], ".1f"),
                cell(row["mb_per_s"], ".0f"),
                cell(row["of_raw"], ".2f"),
                cell(row["of_raw_new"], ".2f"),
                cell(row["of_bound"], ".2f"),
            ]
            for row in found["rows"]
        ],
    )
    print(f"extra peak memory a rank: save {found['save_mib']:.1f} MiB, export {found['export_mib']:.1f} MiB\n")
