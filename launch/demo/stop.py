"""Being asked to stop: the signals, what they ask for, how the processes agree. Imports torch only for that."""

from __future__ import annotations

import signal
from collections.abc import Callable
from enum import IntEnum
from types import FrameType


class Stop(IntEnum):
    """What a run is asked to do after the step that it is in. Where processes differ, the greater wins."""

    NO = 0
    EXPORT = 1  # SIGUSR1: there are minutes. Save, evaluate and export
    SAVE = 2  # SIGTERM: there are seconds. Save


EXIT_STATUS = 128 + signal.SIGTERM  # of a run that SIGTERM ended: it is not finished, so it is no success


class Signals:
    """Takes SIGUSR1, which Slurm sends before it ends the job, and SIGTERM, which everybody sends before SIGKILL."""

    def __init__(self) -> None:
        self._stop = Stop.NO
        signal.signal(signal.SIGUSR1, self._take)
        # It may come twice, from the scheduler and from torchrun: it stays taken until the checkpoint is written.
        signal.signal(signal.SIGTERM, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._stop = max(self._stop, Stop.SAVE if number == signal.SIGTERM else Stop.EXPORT)

    def wanted(self) -> Stop:
        """The most urgent wish until now."""
        return self._stop


class Agreement:
    """Makes all processes stop after the same step, whichever of them was asked, and in whatever step it was."""

    def __init__(self, wanted: Callable[[], int]) -> None:
        """Collective. ``wanted`` is asked at every step; True is :attr:`Stop.EXPORT`."""
        import torch.distributed as dist

        self._wanted = wanted
        # On the CPU, so that no step waits for the accelerator.
        self._group = dist.new_group(backend="gloo")

    def stop(self) -> Stop:
        """What all processes do after this step. Collective, a few bytes."""
        import torch
        import torch.distributed as dist

        value = torch.tensor(int(self._wanted()))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return Stop(int(value))
