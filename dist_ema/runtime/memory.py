"""Allocates and fills memory as large as a model. Does not use torch.distributed."""

from __future__ import annotations

import ctypes
import logging
import mmap
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
#: Huge pages of the usual size; what is smaller gains nothing from them.
_HUGE = 2 << 20


def empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a 1D uninitialised tensor, outside of inference mode. Local.

    On the CPU its memory is in huge pages if the system has them (Linux). The first write to it, as by a load, is then
    twice as fast, and an update needs fewer address translations.
    """
    with torch.inference_mode(False):
        tensor = torch.empty(count, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= 2 * _HUGE:
        _advise(tensor.data_ptr(), tensor.nbytes)
    return tensor


def pinned(numel: int, dtype: torch.dtype) -> Tensor:
    """Returns uninitialised pinned host memory; pageable memory, and a warning in the log, if none can be pinned."""
    try:
        with torch.inference_mode(False):  # what is kept must serve outside of it too
            return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        logger.warning(
            "No pinned memory for %.1f MiB, so pageable memory is used, and copies between it and a device hold up "
            "training. Look at the limits on locked memory (ulimit -l, the container's). %s",
            numel * dtype.itemsize / 2**20,
            error,
        )
        return empty(numel, dtype, torch.device("cpu"))


def _advise(address: int, size: int) -> None:
    """Asks the system for huge pages. A failure is ignored, since ordinary pages work as well."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(stop - begin), advice)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
