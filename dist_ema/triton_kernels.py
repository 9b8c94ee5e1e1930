"""The Triton kernel: ``shadow += weight * (source - shadow)`` over lists of tensors, for several averages at once.

Imports triton, so it is imported itself only where that is there. One program has one chunk of one tensor. The
arithmetic is that of ``torch.lerp`` on CUDA: one subtraction and one fused multiply-add, from the nearer end. A GPU
gives its bits; Triton's interpreter, which multiplies and adds in two roundings, differs by at most one unit in the
last place of the larger of shadow and source.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lerp(
    chunks: tl.tensor,
    tensors: tl.tensor,
    skipped: tl.tensor,
    weights: tl.tuple,
    AVERAGES: tl.constexpr,
    SOURCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Averages one chunk of one tensor.

    Args:
        chunks: int64; of each program the row of its tensor, and the element of it where its chunk begins.
        tensors: int64; of each tensor its number of elements, and the addresses of its source and of its shadows.
        skipped: int64; source elements that were not finite are added to it. None takes sources as they are.
        weights: fp32; of each average.
        AVERAGES: how many.
        SOURCE: the sources' dtype.
        ALIGNED: every address is a multiple of 16 bytes.
        CHUNK: elements of a chunk, a multiple of ``BLOCK``.
        BLOCK: elements at a time.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row = tensors + tl.load(chunks + 2 * chunk) * (2 + AVERAGES)
    low = tl.multiple_of(tl.load(chunks + 2 * chunk + 1), 16)
    count = tl.minimum(tl.load(row) - low, CHUNK)
    bad = tl.zeros((BLOCK,), dtype=tl.int32)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):  # no mask, so that loads and stores are wide
        places = low + begin + tl.arange(0, BLOCK)
        bad += _blend(row, places, None, weights, AVERAGES, SOURCE, ALIGNED, skipped is not None)
    if whole < count:
        places = low + whole + tl.arange(0, BLOCK)
        bad += _blend(row, places, places < low + count, weights, AVERAGES, SOURCE, ALIGNED, skipped is not None)
    if skipped is not None:
        found = tl.sum(bad)
        if found > 0:
            tl.atomic_add(skipped, found.to(tl.int64))


@triton.jit
def _blend(
    row: tl.tensor,
    places: tl.tensor,
    mask: tl.tensor,
    weights: tl.tuple,
    AVERAGES: tl.constexpr,
    SOURCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GUARDED: tl.constexpr,
) -> tl.tensor:
    """Averages one block; where its source is not finite, 1."""
    end = tl.load(_pointer(row + 1, SOURCE, ALIGNED) + places, mask).to(tl.float32)
    if mask is not None:
        end = tl.where(mask, end, 0.0)
    finite = tl.abs(end) < float("inf")  # False of NaN too
    for average in tl.static_range(AVERAGES):
        shadow = _pointer(row + 2 + average, tl.float32, ALIGNED) + places
        start = tl.load(shadow, mask)
        weight = weights[average]
        near = tl.abs(weight) < 0.5
        value = tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))
        if GUARDED:
            value = tl.where(tl.abs(start) < float("inf"), value, end)
            value = tl.where(finite, value, start)
        tl.store(shadow, value, mask)
    return (~finite).to(tl.int32)


@triton.jit
def _pointer(place: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The address at ``place`` of the table, as a pointer."""
    pointer = tl.load(place).to(tl.pointer_type(DTYPE), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
