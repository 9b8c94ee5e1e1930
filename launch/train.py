"""Trains a byte-level GPT on real text with any engine, and evaluates and exports a sharded average of its weights.

One process, or two, or with another engine, or with options of one's own::

    python launch/train.py
    torchrun --nproc-per-node 2 launch/train.py --config configs/fsdp2.yaml
    torchrun --nproc-per-node 2 launch/train.py --config configs/zero3.yaml --data ~/books --steps 2000

GPUs and NCCL where there are any, else the CPU and gloo. ``--help`` lists the options.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))  # for those who import this file instead of starting it

from options import parse

if TYPE_CHECKING:
    from report import Summary


def main(
    argv: list[str] | None = None, *, world_size: int | None = None, stop: Callable[[], bool] = lambda: False
) -> Summary:
    """Runs on every process of a group, which is made here unless the caller has one.

    Args:
        argv: command line; by default this process's.
        world_size: number of processes; by default what torchrun says, or 1.
        stop: asked now and then; True on any process ends training early, with evaluation and export.
    """
    options = parse(argv, world_size or int(os.environ.get("WORLD_SIZE", "1")))
    from loop import train  # imports torch, which takes seconds: not before the options are known to be right

    return train(options, stop)


if __name__ == "__main__":
    stopping = Event()
    signal.signal(signal.SIGUSR1, lambda *_: stopping.set())  # what Slurm sends before it ends the job
    main(stop=stopping.is_set)
