"""Memory of the model's size. Knows no process group."""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache

import torch
from torch import Tensor

#: Huge pages of the usual size; what is smaller gains nothing from them.
_HUGE = 2 << 20


def empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat uninitialised tensor, outside of inference mode. Local.

    On the CPU in huge pages where the system has them (Linux): it is then there twice as fast when it is first written
    to, as by a load, and an update needs fewer address translations.
    """
    with torch.inference_mode(False):
        tensor = torch.empty(count, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= 2 * _HUGE:
        _advise(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _advise(address: int, size: int) -> None:
    """Asks for huge pages; a system that has none, or does not give them, says no, which does not matter."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(stop - begin), advice)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
