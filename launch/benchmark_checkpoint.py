"""What a checkpoint costs, beside writing the same bytes and beside what people use today. One process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_ema import ShardedEMA, verify_checkpoint

BLOCK = 16 << 20


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _peak(function: Callable[[], object]) -> int:
    """Bytes of memory above those before (Linux)."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    function()
    return status("VmHWM:") - before


def _sync(path: Path) -> None:
    for file in [path, *path.rglob("*")]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _write_raw(tensors: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        for tensor in tensors.values():
            file.write(memoryview(tensor.view(torch.uint8).numpy().data))
    _sync(path)


def _read_raw(path: Path, out: Tensor) -> None:
    data = memoryview(out.view(torch.uint8).numpy().data)
    with path.open("rb", buffering=0) as file:
        while data and (count := file.readinto(data[:BLOCK])):
            data = data[count:]


def checkpoint(arguments: argparse.Namespace) -> None:
    """Measures, everyone in turn in each round, and prints medians."""
    folder = Path(tempfile.mkdtemp(prefix="dist_ema_benchmark_", dir=arguments.folder))
    size = arguments.elements // 8
    model = nn.ParameterList(torch.randn(size) for _ in range(8))
    ema = ShardedEMA(model, decay=0.9)
    ema.update()
    tensors = {f"t{index}": torch.randn(size) for index in range(8)}
    out = torch.empty(size * 8)
    without = mock.patch("dist_ema.writing.partial_digest", lambda *_: 0)
    threads = torch.get_num_threads()

    def save(name: str, digests: bool) -> None:
        with contextlib.nullcontext() if digests else without:
            ema.save(folder / name)

    def dcp_save() -> None:
        dcp.save(tensors, checkpoint_id=folder / "dcp", no_dist=True)
        _sync(folder / "dcp")

    def safetensors_save() -> None:
        save_file(tensors, folder / "safetensors")
        _sync(folder / "safetensors")

    def torch_save() -> None:
        torch.save(tensors, folder / "torch")
        _sync(folder / "torch")

    contenders: dict[str, Callable[[], object]] = {
        "raw write + fsync": lambda: _write_raw(tensors, folder / "raw"),
        "safetensors save_file + fsync": safetensors_save,
        "dcp.save + fsync": dcp_save,
        "torch.save + fsync": torch_save,
        "save": lambda: save("ours", True),
        "save, no digests": lambda: save("plain", False),
        "raw read": lambda: _read_raw(folder / "raw", out),
        "load": lambda: ema.load(folder / "ours"),
        "load, verify=False": lambda: ema.load(folder / "ours", verify=False),
        "verify, one thread": lambda: verify_checkpoint(folder / "ours", threads=1),
    }
    load = os.getloadavg()[0]
    try:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.repeats + 1):
            for name, function in contenders.items():
                shutil.rmtree(folder / "dcp", ignore_errors=True)
                torch.set_num_threads(1 if name.startswith("verify") else threads)
                times[name].append(_timed(function))
        torch.set_num_threads(threads)
        peak = _peak(contenders["save"])
    finally:
        shutil.rmtree(folder)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first round warms up
    rows = [
        {
            "contender": name,
            "ms": seconds * 1e3,
            "mb_per_s": size * 8 * 4 / seconds / 1e6,
            "of_raw": seconds / medians["raw read" if "read" in name or name[0] in "lv" else "raw write + fsync"],
        }
        for name, seconds in medians.items()
    ]
    if arguments.json:
        print(json.dumps({"rows": rows, "extra_mib": peak / 2**20, "load_average": load}, indent=1))
        return
    print(f"{size * 32 / 1e6:.0f} MB, medians of {arguments.repeats} rounds, load average before {load:.1f}")
    for row in rows:
        print(f"{row['contender']:30} {row['ms']:9.1f} ms {row['mb_per_s']:8.0f} MB/s  {row['of_raw']:5.2f} x raw")
    print(f"extra peak memory of save: {peak / 2**20:.1f} MiB")


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """The options of the subcommand, beside ``--elements`` and ``--repeats``."""
    command.add_argument("--folder", type=Path, help="a directory on the disk to measure (the temporary one)")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    command.set_defaults(run=checkpoint, device="cpu")
