"""What averages cost on an accelerator: updates by its own clock, every other call, and offloading beside training.

On the CPU the same runs, for who wants to see that it does.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import synchronize, timed
from benchmarks.memory import resident
from benchmarks.peers import DECAY, Model
from benchmarks.show import cell, print_json, print_table
from dist_ema import ShardedEMA

THREE = {"fast": 0.999, "middle": DECAY, "slow": 0.99999}
#: Of each row: dtype of the weights, elements by which each lies off a multiple of 16 bytes, and ShardedEMA's options.
UPDATES: dict[str, tuple[torch.dtype, int, dict[str, Any]]] = {
    "fp32 weights": (torch.float32, 0, {}),
    "bf16 weights": (torch.bfloat16, 0, {}),
    "bf16 weights, skip_nonfinite=False": (torch.bfloat16, 0, {"skip_nonfinite": False}),
    "bf16 weights, three averages": (torch.bfloat16, 0, {"averages": THREE}),
    "fp32 weights, not aligned": (torch.float32, 1, {}),
    "bf16 weights, not aligned": (torch.bfloat16, 1, {}),
    "fp32 weights, bf16 shadow": (torch.float32, 0, {"dtype": torch.bfloat16}),
    "bf16 weights, bf16 shadow": (torch.bfloat16, 0, {"dtype": torch.bfloat16}),
}
#: Beside training: ShardedEMA's options, None for none; ``overlap`` is attach()'s.
TRAINED: dict[str, dict[str, Any] | None] = {
    "no average": None,
    "fp32 shadow on the device": {},
    "fp32 shadow on the device, overlap": {"overlap": True},
    "bf16 shadow on the device": {"dtype": torch.bfloat16},
    "offload": {"offload": "cpu"},
    "offload, every 4 steps": {"offload": "cpu", "update_interval": "4ba"},
    "offload, all cores but 2": {"offload": "cpu", "offload_threads": max(1, (os.cpu_count() or 1) - 2)},
}


def _averaged(elements: int, tensors: int, device: str, row: tuple[torch.dtype, int, dict[str, Any]]) -> ShardedEMA:
    dtype, offset, options = row
    model = Model(elements, tensors, dtype, device)
    for parameter in model.tensors:
        room = torch.empty(parameter.numel() + offset, dtype=dtype, device=device)
        parameter.data = room[offset:].copy_(parameter.data)
    schedule: dict[str, Any] = {} if "averages" in options else {"decay": DECAY}
    ema = ShardedEMA(model, **schedule, **options)
    for _ in range(2):
        ema.update()
    return ema


def updates(elements: int, tensors: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """A row each: the device's time of an update, of a copy of as many bytes on the device, and the host's time."""
    rows = []
    for name, row in UPDATES.items():
        dtype, _, options = row
        ema = _averaged(elements, tensors, device, row)
        shadow: torch.dtype = options.get("dtype", torch.float32)
        width = dtype.itemsize + 2 * shadow.itemsize * len(ema.names)
        source = torch.empty(elements * width // 2, dtype=torch.uint8, device=device)  # half is read, half written
        target = torch.empty_like(source)
        times = []
        for _ in range(repeats + 1):
            copied, _ = timed(lambda target=target, source=source: target.copy_(source), device)  # type: ignore[misc]
            times.append((*timed(ema.update, device), copied))
        taken, host, bound = map(statistics.median, zip(*times[1:], strict=True))
        rows.append({"row": name, "us": taken * 1e6, "of_copy": bound / taken, "host_us": host * 1e6})
        del ema, source, target
    return rows


def calls(elements: int, tensors: int, repeats: int, device: str, folder: Path) -> list[dict[str, Any]]:
    """Milliseconds of every other call, and of what a save cannot be faster than."""
    ema = _averaged(elements, tensors, device, UPDATES["bf16 weights"])
    shadow = torch.empty(elements, device=device)
    host = torch.empty(elements, pin_memory=device != "cpu")

    def swap() -> None:
        with ema.average_parameters():
            pass

    def write() -> None:
        with (folder / "raw").open("wb", buffering=0) as file:
            data = memoryview(host.view(torch.uint8).numpy().data)
            while data:
                data = data[file.write(data[: 16 << 20]) :]
            os.fsync(file.fileno())

    made: dict[str, Callable[[], object]] = {
        "average_parameters, in and out": swap,
        "fingerprint": ema.fingerprint,
        "metrics": ema.metrics,
        "copy of the shadow to the host": lambda: host.copy_(shadow),
        "raw write and sync of it": write,
        "save": lambda: ema.save(folder / "saved"),
        "save, in the background, until it returns": lambda: ema.save(folder / "saved", block=False),
        "load": lambda: ema.load(folder / "saved"),
    }
    rows = []
    for name, call in made.items():
        times = []
        for _ in range(repeats + 1):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - start)
            ema.wait()
        rows.append({"row": name, "ms": statistics.median(times[1:]) * 1e3})
    return rows


class Transformer(nn.Module):
    """Layers of a usual language model, without its embedding: about 12 x width^2 parameters each."""

    def __init__(self, parameters: int, device: str) -> None:
        super().__init__()
        self.width = 2048 if parameters > 1e8 else 64
        count = max(1, round(parameters / (12 * self.width**2)))
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True, "device": device}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(self.width, 16, 4 * self.width, dtype=torch.bfloat16, **options)
            for _ in range(count)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


def training(parameters: int, steps: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Of a step of a bf16 model: milliseconds, what more than without an average, and GB more on device and host."""
    rows: list[dict[str, Any]] = []
    for name, options in TRAINED.items():
        model = Transformer(parameters, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device != "cpu")
        batch = torch.randn(8, 1024 if device != "cpu" else 8, model.width, dtype=torch.bfloat16, device=device)
        before = resident()
        ema = None
        if options is not None:
            chosen = dict(options)
            overlap = chosen.pop("overlap", False)
            ema = ShardedEMA(model, decay=DECAY, **chosen)
            ema.attach(optimizer, overlap=overlap)

        def step(model: nn.Module = model, optimizer: Any = optimizer, batch: Tensor = batch) -> None:
            model(batch).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step()
        synchronize(device)
        if device != "cpu":
            torch.accelerator.reset_peak_memory_stats()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize(device)
            times.append((time.perf_counter() - start) / steps)
        peak = torch.accelerator.max_memory_allocated() if device != "cpu" else 0
        grown = resident() - before
        rows.append(
            {"row": name, "ms": statistics.median(times) * 1e3, "device_gb": peak / 1e9, "host_gb": grown / 1e9}
        )
        if ema is not None:
            ema.close()
        del model, optimizer, ema, step
    return rows


def run(elements: int, tensors: int, parameters: int, repeats: int, device: str, as_json: bool) -> None:
    """Measures and prints."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dist_ema_benchmark_") as folder:
        found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
            "torch": torch.__version__,
            "load_average": load,
            "updates": updates(elements, tensors, repeats, device),
            "calls": calls(elements, tensors, repeats, device, Path(folder)),
            "training": training(parameters, 10 if device != "cpu" else 1, repeats, device),
        }
    if as_json:
        print_json(found)
        return
    print(f"{found['device']}, torch {found['torch']}, load average before {load:.1f}, medians of {repeats} rounds")
    print(
        f"\nupdate() of {elements:,} elements in {tensors} uneven tensors, queued; fp32 shadow unless said otherwise\n"
    )
    print_table(
        ["weights, shadow", "us", "of a copy", "host us"],
        [
            [row["row"], cell(row["us"], ".0f"), cell(row["of_copy"], ".2f"), cell(row["host_us"], ".0f")]
            for row in found["updates"]
        ],
    )
    print("calls, of bf16 weights and their fp32 shadow\n")
    print_table(["call", "ms"], [[row["row"], cell(row["ms"], ".1f")] for row in found["calls"]])
    bare = found["training"][0]
    print(f"a training step of {parameters:,} parameters in bf16, and what an average adds to it\n")
    print_table(
        ["average", "step ms", "more", "device GB more", "host GB more"],
        [
            [
                row["row"],
                cell(row["ms"], ".1f"),
                cell(row["ms"] / bare["ms"] - 1, "+.1%"),
                cell(row["device_gb"] - bare["device_gb"], ".2f"),
                cell(row["host_gb"] - bare["host_gb"], ".2f"),
            ]
            for row in found["training"]
        ],
    )
