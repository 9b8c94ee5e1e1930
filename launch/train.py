"""Trains a byte-level GPT on real text with any engine, and evaluates and exports a sharded average of its weights.

One process, or two, or with another engine, or with options of one's own::

    python launch/train.py
    torchrun --nproc-per-node 2 launch/train.py --config configs/fsdp2.yaml
    torchrun --nproc-per-node 2 launch/train.py --config configs/zero3.yaml --data ~/books --steps 2000

With ``--out`` the same command goes on where a run was interrupted, at any number of processes::

    torchrun --nproc-per-node 2 --max-restarts 3 launch/train.py --config configs/fsdp2.yaml --out runs/mine

GPUs and NCCL where there are any, else the CPU and gloo. ``--help`` lists the options.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))  # for those who import this file instead of starting it

from demo.options import parse
from demo.stop import EXIT_STATUS, Signals

if TYPE_CHECKING:
    from demo.report import Summary


def main(
    argv: list[str] | None = None, *, world_size: int | None = None, stop: Callable[[], int] = lambda: False
) -> Summary | None:
    """Runs on every process of a group, which is made here unless the caller has one.

    Args:
        argv: command line; by default this process's.
        world_size: number of processes; by default what torchrun says, or 1.
        stop: asked after each step; where any process says True or ``Stop.EXPORT``, training ends early, with a
            checkpoint, evaluation and export, and where it says ``Stop.SAVE`` with a checkpoint only.

    Returns:
        How the run ended; None after ``Stop.SAVE``.
    """
    options = parse(argv, world_size or int(os.environ.get("WORLD_SIZE", "1")))
    from demo.loop import train  # imports torch, which takes seconds: not before the options are known to be right

    return train(options, stop)


if __name__ == "__main__":
    if main(stop=Signals().wanted) is None:
        sys.exit(EXIT_STATUS)
