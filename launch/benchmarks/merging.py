"""What a merge costs, beside reading the same bytes and beside what others do with the same files.

Sources are Hugging Face directories on one disk. Contenders take turns; each runs in a process of its own, so that its
memory is its own, after the files' copies in memory were dropped.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import peak_growth
from benchmarks.show import cell, print_json, print_table

TENSORS = 16
BLOCK = 1 << 20
#: Weights of three targets, for any number of sources.
SCHEMES = ("uniform", "wsm:sqrt", "ema:0.2")


def make(folder: Path, sources: int, elements: int) -> list[Path]:
    """Files of random fp32 weights."""
    paths = []
    for number in range(sources):
        torch.manual_seed(number)
        paths.append(folder / f"source-{number}")
        paths[-1].mkdir()
        tensors = {f"layers.{index}.weight": torch.randn(elements // TENSORS) for index in range(TENSORS)}
        save_file(tensors, paths[-1] / "model.safetensors", metadata={"format": "pt"})
    return paths


def raw(paths: list[Path], out: Path) -> None:
    """Reads every byte, and writes none."""
    data = memoryview(bytearray(BLOCK))
    for path in paths:
        with (path / "model.safetensors").open("rb", buffering=0) as file:
            while file.readinto(data):
                pass


def ours(paths: list[Path], out: Path) -> None:
    """dist_ema.merge, into one target."""
    from dist_ema import merge

    merge(paths, out)


def three(paths: list[Path], out: Path) -> None:
    """Three targets in one pass, as synthesize makes them."""
    from dist_ema.offline.merging.merge import OutputOptions, Target, combine
    from dist_ema.offline.merging.schemes import scheme_weights
    from dist_ema.offline.merging.sources import Selection, open_sources

    with open_sources(paths, Selection()) as sources:
        targets = [
            Target(out / str(index), scheme_weights(scheme, len(paths)), scheme) for index, scheme in enumerate(SCHEMES)
        ]
        combine(sources, targets, OutputOptions(), None, None, "benchmark")


def whole_states(paths: list[Path], out: Path) -> None:
    """The form of Megatron-LM's weighted_merge.py: whole state dicts, one after the other, into one that is kept."""
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, value in load_file(path / "model.safetensors").items():
            total[name] = total.get(name, 0) + value.float() / len(paths)
    out.mkdir()
    save_file(total, out / "model.safetensors")


def mergekit(paths: list[Path], out: Path) -> None:
    """mergekit's linear merge, where it is installed."""
    config: dict[str, Any] = {"merge_method": "linear", "dtype": "float32", "models": []}
    config["models"] = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths]
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    program = Path(sys.executable).with_name("mergekit-yaml")
    subprocess.run([program, file, out, "--no-copy-tokenizer"], check=True, capture_output=True)


CONTENDERS: dict[str, Callable[[list[Path], Path], None]] = {
    "raw read": raw,
    "merge": ours,
    "three merges in one pass": three,
    "whole state dicts (the form of Megatron-LM's)": whole_states,
    "mergekit linear": mergekit,
}


def worker(folder: Path, name: str) -> None:
    """One contender, once; prints seconds and bytes of memory as JSON."""
    paths = sorted(folder.glob("source-*"))
    torch.ones(1 << 20).lerp_(torch.ones(1 << 20), 0.5)
    import dist_ema.offline.merging.merge  # noqa: F401 - what is imported is no part of it

    start = time.perf_counter()
    grown = peak_growth(lambda: CONTENDERS[name](paths, folder / "out"))
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": grown}))


def _forget(paths: list[Path]) -> None:
    """Has the system drop its copies in memory of these files."""
    for path in paths:
        descriptor = os.open(path / "model.safetensors", os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(sources: int, elements: int, repeats: int, folder: Path | None, as_json: bool) -> None:
    """Measures and prints medians."""
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory(prefix="dist_ema_benchmark_", dir=folder) as place:
        paths = make(Path(place), sources, elements)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for _ in range(repeats):
            for name in CONTENDERS:
                _forget(paths)
                program = [sys.executable, str(Path(__file__).parent.with_name("benchmark.py")), "merge"]
                command = [*program, "--folder", place, "--worker", name]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                shutil.rmtree(Path(place) / "out", ignore_errors=True)
                if done.returncode == 0:
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
                elif name != "mergekit linear":
                    raise SystemExit(done.stderr)
    size = sources * elements * 4
    for name, runs in found.items():
        if runs:
            seconds, held = (statistics.median(one[key] for one in runs) for key in ("seconds", "bytes"))
            rows.append({"contender": name, "seconds": seconds, "gb_per_s": size / seconds / 1e9, "mib": held / 2**20})
    bare = rows[0]["seconds"]
    if as_json:
        print_json({"rows": rows, "bytes": size, "load_average": load})
        return
    print(f"{sources} sources of {elements * 4 / 1e6:.0f} MB, medians of {repeats}, load average before {load:.1f}\n")
    print_table(
        ["contender", "s", "GB/s read", "x raw", "MiB more"],
        [
            [
                row["contender"],
                cell(row["seconds"], ".2f"),
                cell(row["gb_per_s"], ".2f"),
                cell(bare / row["seconds"], ".2f"),
                cell(row["mib"], ".0f"),
            ]
            for row in rows
        ],
    )
