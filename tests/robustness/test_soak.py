"""A long run with a save in the background every few updates keeps nothing of them."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import psutil
import torch
from torch import nn

from dist_ema import ShardedEMA, verify_checkpoint

UPDATES = 2000
EVERY = 20
#: Bytes by which memory may grow between the fifth of the run that warms up and its end.
GROWTH = 8 << 20


def test_2000_updates_with_100_background_saves_leave_nothing_behind(tmp_path: Path) -> None:
    """A few kilobytes, a thread or a descriptor a save kill a run of a month."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 255), nn.BatchNorm1d(255), nn.Linear(255, 256))
    ema = ShardedEMA(model, averages={"fast": 0.5, "slow": 0.99})
    process = psutil.Process()
    threads, early = threading.active_count(), (0, 0, 0)
    for step in range(UPDATES):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.999)
        ema.update()
        if step % EVERY == 0:
            ema.save(tmp_path / "c", block=False)
        if step == UPDATES // 5 - 1:
            ema.wait()
            gc.collect()
            early = (process.memory_info().rss, process.num_fds(), process.num_threads())
    ema.wait()
    gc.collect()
    memory, descriptors, system_threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    assert memory - early[0] < GROWTH
    assert descriptors == early[1]
    assert system_threads == early[2]
    assert threading.active_count() == threads
    assert [found.name for found in tmp_path.iterdir()] == ["c"]
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert verify_checkpoint(tmp_path / "c").seen.updates == UPDATES - EVERY + 1
