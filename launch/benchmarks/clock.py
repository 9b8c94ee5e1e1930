"""How long a device works, and how long it keeps the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

#: Calls that are queued before a GPU begins with the first one, so that it never waits for the host.
QUEUED = 20
_CYCLES = 200_000_000  # a tenth of a second of a GPU: more than the host needs for that many calls


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device != "cpu":
        torch.accelerator.synchronize()


def timed(function: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of one call on the device, and on the thread that makes it.

    On a GPU of many calls in a row, between two events, behind work that lasts until all are queued; on the CPU, where
    both are the same, of one call.
    """
    if device == "cpu":
        start = time.perf_counter()
        function()
        taken = time.perf_counter() - start
        return taken, taken
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.accelerator.synchronize()
    torch.cuda._sleep(_CYCLES)  # type: ignore[no-untyped-call]
    before.record()
    start = time.perf_counter()
    for _ in range(QUEUED):
        function()
    host = time.perf_counter() - start
    after.record()
    torch.accelerator.synchronize()
    return before.elapsed_time(after) / 1e3 / QUEUED, host / QUEUED
