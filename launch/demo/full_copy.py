"""What a full copy of the model costs, the usual way to average: for the last table of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from demo.options import Options
from demo.wrap import plain

ROUNDS = 7


@dataclass(frozen=True)
class FullCopy:
    """Bytes of a full copy, and seconds of one update of it by torch's ``AveragedModel``."""

    size: int
    seconds: float


def measure(options: Options, device: torch.device) -> FullCopy:
    """Averages an unsharded model on this rank a few times. Gathering sharded weights would come on top."""
    model = plain(options, device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))  # type: ignore[no-untyped-call]
    times = []
    for _ in range(ROUNDS):
        _wait_for(device)
        start = time.perf_counter()
        average.update_parameters(model)
        _wait_for(device)
        times.append(time.perf_counter() - start)
    return FullCopy(sum(p.numel() * p.element_size() for p in average.module.parameters()), median(times))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
