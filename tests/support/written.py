"""Files that an earlier version wrote: what is in each, and how to build the average that wrote it.

``data/written_by_0.1.0/write.py`` has written the files and ``test_written_files.py`` reads them. Both use this module,
so that a reader builds what the writer had. Weights change by the same bits under every engine and world size, so all
engines have to give the same average. ``expected.json`` has a digest of each tensor and the clocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import DATA
from support.models import CASES, build
from support.zero_models import make_engine

import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_ema import ShardedEMA, schedules

FOLDER = DATA / "written_by_0.1.0"
#: Updates before a file was written.
UPDATES = 3
#: Steps before a file was written, and after it was read again.
MOMENTS = {"written": range(UPDATES), "later": range(UPDATES, 5)}
AVERAGES = {"fast": 0.5, "slow": schedules.PowerFunction(sigma_rel=0.1)}
EVERY_SCHEDULE = {
    "constant": schedules.ConstantDecay(0.75),
    "cosine": schedules.Cosine(0.5, 1.0, "1dur"),
    "half_life": schedules.HalfLife("300tok"),
    "half_life_ramp": schedules.HalfLife("30sp", ramp=0.25),
    "half_life_fraction": schedules.HalfLifeFraction(0.5),
    "linear": schedules.Linear(0.25, 0.75, "8ba"),
    "num_updates_warmup": schedules.NumUpdatesWarmup(0.999),
    "power": schedules.PowerFunction(sigma_rel=0.2),
    "smoothing": schedules.Smoothing(0.875),
    "uniform": schedules.Uniform(),
    "warmup": schedules.Warmup(0.99),
    "window": schedules.Window("2ba", "4ba"),  # the file is written in the middle of a window
    "window_of_epochs": schedules.Window("0.5ep", "0.5ep", shape="sqrt"),
}


FEW = [r"^embed\.", r"^module\.0\.up\.", r"^norm\."]


@dataclass
class Options:
    """Of ``ShardedEMA`` and of the call that writes."""

    ema: Mapping[str, Any] = field(default_factory=dict)
    save: Mapping[str, Any] = field(default_factory=dict)
    nan: bool = False  # one element is NaN at an update, and is skipped


#: By name. Every engine writes with the first.
OPTIONS = {
    "engine": Options({"averages": AVERAGES, "buffers": "average"}),
    "one_average": Options({"half_life": "3ba"}),
    "bf16": Options({"averages": AVERAGES, "dtype": torch.bfloat16, "seed": 5}),
    "own_dtype": Options({"smoothing": 0.75, "dtype": None}),
    "buffers_ignored": Options({"decay": 0.5, "buffers": "ignore"}),
    "offloaded": Options({"decay": 0.5, "offload": "cpu"}),
    "excluded": Options({"decay": 0.5, "exclude": r"^module\."}),
    "without_untracked": Options({"decay": 0.5}, {"include_untracked": False}),
    "in_the_background": Options({"decay": 0.5}, {"block": False}),
    "not_started": Options({"decay": 0.5, "ema_start": "9ba"}),
    "skipped": Options({"decay": 0.5}, nan=True),
    "schedules": Options({"averages": EVERY_SCHEDULE, "max_duration": "8ba", "include": r"^one\."}),
    # Few tensors, since each takes 1.2 kB in a file of torch.save.
    "few": Options({"averages": AVERAGES, "dtype": torch.bfloat16, "seed": 7, "include": FEW, "buffers": "average"}),
}
#: Engines that have written, and on how many ranks.
ENGINES = {
    "plain": 1,
    "ddp": 2,
    "fsdp1-full": 2,
    "fsdp1-full-orig": 2,
    "fsdp2": 2,
    "hsdp": 4,
    "tp": 2,
    "fsdp2-tp": 4,
    "zero0": 2,
    "zero1": 2,
    "zero2": 2,
    "zero3": 2,
}
#: Files of ``save()``: the engine and the options of each.
SAVED = {f"save/{engine}": (engine, "engine") for engine in ENGINES}
SAVED |= {f"save/{name}": ("fsdp2", name) for name in OPTIONS if name != "engine"}
SAVED["save/offloaded"] = ("plain", "offloaded")
#: Folders of ``dcp.save({"ema": ema})``.
DCP = {f"dcp/{engine}": (engine, "few") for engine in ("plain", "ddp", "fsdp2", "tp", "zero2")}
DCP["dcp/schedules"] = ("plain", "schedules")
#: Files of ``torch.save(ema.state_dict())``, one for each rank, and of its forms.
PER_RANK = {f"torch_save/{engine}": (engine, "few") for engine in ("plain", "fsdp2", "zero1")}
FULL = {f"torch_save/{name}": ("fsdp2", "few") for name in ("full", "full_live")}
LIVE = {"torch_save/live": ("fsdp2", "few")}
#: Other checkpoints, with the average that is looked at.
READABLE = {
    "snapshots/2ba": "fast",
    "snapshots/4ba": "slow",
    "snapshots_bf16/0.25ep": "fast",
    "snapshots_bf16/0.5ep": "slow",
    "merged_checkpoint": "slow",
    "synthesized": None,
}
#: Folders as ``from_pretrained`` reads them.
FOLDERS = ("export", "merged")


def make(engine: str, options: str, **others: Any) -> ShardedEMA:
    """An average that has seen nothing yet, of a model with the same weights on every rank. Collective."""
    model = build(scalar=False, hidden=12)
    target = make_engine(int(engine[-1]), model=model) if engine.startswith("zero") else CASES[engine].wrap(model)
    return ShardedEMA(target, **{**OPTIONS[options].ema, **others})


@torch.no_grad()
def set_weights(ema: ShardedEMA, step: int, nan: bool) -> None:
    """Changes every trained element and buffer, by operations that give the same bits on any shard."""
    ema.wait()  # nothing offloaded is still being read
    for share, source in zip(ema._average.shares, ema._average.engine.sources(), strict=True):
        if share.spec.kind == "parameter":
            source.mul_(1.0 + 0.25 * (step + 1))
        elif source.is_floating_point():
            source.fill_(step + 0.375)
        else:
            source.fill_(step % 2)
        if nan and share.spec.name == "one.weight":  # its first element, on the rank that has it
            local = source.to_local() if hasattr(source, "to_local") else source
            local.view(-1)[:1].fill_(torch.nan if step == 1 else 0.5)
    ema._average.engine.publish()


def advance(ema: ShardedEMA, steps: range, options: str, update: bool = True) -> None:
    """Goes through these steps, with updates or without. DeepSpeed has not stepped: this is about files."""
    ema._average.engine.stepped = lambda: True  # type: ignore[method-assign]
    for step in steps:
        set_weights(ema, step, OPTIONS[options].nan)
        if update:
            ema.update(samples=8, tokens=100, epochs=0.125)
    ema.wait()


def digest(tensor: Tensor) -> str:
    """The dtype, the shape and a hash of the bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    name = str(tensor.dtype).removeprefix("torch.")
    return f"{name}{list(tensor.shape)} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]}"


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Of every tensor."""
    return {name: digest(value) for name, value in sorted(state.items())}


def facts(ema: ShardedEMA) -> dict[str, Any]:
    """All that a file has to bring back: tensors, clocks and counts. Collective; complete on rank 0."""
    return {
        "averages": {name: digests(ema.full_state_dict(name)) for name in ema.names},
        "clock": str(ema.clock),
        "progress": str(ema.progress),
        "updates": ema.num_updates,
        "skipped": ema.metrics()["ema/skipped_elements"],
    }


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a folder."""
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def expected() -> dict[str, Any]:
    """What the writer recorded: by file, and for each set of options (``options/NAME/MOMENT``)."""
    found: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
    return found
