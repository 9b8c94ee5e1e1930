"""Memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which a call raises this process's memory above what it was before, at its peak (Linux).

    Raises OSError or AttributeError where the system does not count it.
    """
    ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept by the allocator would hide temporaries (glibc)
    Path("/proc/self/clear_refs").write_text("5")  # counts the peak anew
    before = _resident("VmRSS")
    function()
    return max(_resident("VmHWM") - before, 0)


def resident() -> int:
    """Bytes of memory that this process has now."""
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
