"""Computes on lists of plain local tensors, in place. Does not depend on process groups or wrappers.

==================  ================================================================================
file                subject
==================  ================================================================================
``elements.py``     read and write elements of a tensor of any layout, a chunk at a time
``averaging.py``    an update: averages move towards the sources; NaN and Inf are skipped
``scratch.py``      memory for conversions; exchanging a shadow with live weights, or blending them
``rounding.py``     stochastic rounding of bf16 averages
``fingerprint.py``  checksums that do not depend on the sharding
``arguments.py``    kernel arguments, kept from one update to the next
``choice.py``       compiled or eager: decided once for each kind of device
``cpu.py``          compiled kernels on the CPU, in ``fused.cpp`` (``native.py``, ``compiler.py``)
``cuda.py``         Triton kernels on a GPU (``triton_kernels.py``, ``programs.py``)
``copies.py``       further tensors that an update writes, for a teacher
==================  ================================================================================
"""

from dist_ema.kernels.averaging import Guard, copy, is_finite, lerp, looks_finite, write_copies
from dist_ema.kernels.elements import (
    ACCELERATOR_CHUNK,
    CACHE_CHUNK,
    chunk_size,
    flat_reals,
    pieces,
    read,
    squared_distance,
    write,
)
from dist_ema.kernels.scratch import Blend, Exchange, Scratch

__all__ = [
    "ACCELERATOR_CHUNK",
    "CACHE_CHUNK",
    "Blend",
    "Exchange",
    "Guard",
    "Scratch",
    "chunk_size",
    "copy",
    "flat_reals",
    "is_finite",
    "lerp",
    "looks_finite",
    "pieces",
    "read",
    "squared_distance",
    "write",
    "write_copies",
]
