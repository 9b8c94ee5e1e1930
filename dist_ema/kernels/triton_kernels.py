"""The Triton kernel: ``shadow += weight * (source - shadow)`` over lists of tensors, for several averages at once.

Imports triton, so it is imported itself only where that is there. One program has one chunk of one tensor. The
arithmetic is that of ``torch.lerp`` on CUDA: one subtraction and one fused multiply-add, from the nearer end. A GPU
gives its bits; Triton's interpreter, which multiplies and adds in two roundings, differs by at most one unit in the
last place of the larger of shadow and source. For bf16 shadows there is a second kernel, which rounds stochastically:
:mod:`dist_ema.kernels.rounding` says how.
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
        _count(skipped, bad)


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
        value = _lerped(start, end, weights[average])
        if GUARDED:
            value = tl.where(tl.abs(start) < float("inf"), value, end)
            value = tl.where(finite, value, start)
        tl.store(shadow, value, mask)
    return (~finite).to(tl.int32)


@triton.jit
def _lerped(start: tl.tensor, end: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """``torch.lerp`` on CUDA: from the nearer end, so that a weight of 1 gives ``end`` itself."""
    near = tl.abs(weight) < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit
def _count(skipped: tl.tensor, bad: tl.tensor) -> None:
    found = tl.sum(bad)
    if found > 0:  # an atomic for each program would be as many as there are chunks
        tl.atomic_add(skipped, found.to(tl.int64))


@triton.jit
def _pointer(place: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The address at ``place`` of the table, as a pointer."""
    pointer = tl.load(place).to(tl.pointer_type(DTYPE), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# bf16 shadows.


@triton.jit
def lerp_rounded(
    chunks: tl.tensor,
    tensors: tl.tensor,
    keys: tl.tensor,
    skipped: tl.tensor,
    weights: tl.tuple,
    AVERAGES: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Averages one chunk of one run of one tensor.

    Args:
        chunks: int64; of each program the row of its tensor, the element where its chunk begins, its number of elements
            and its position in the full tensor.
        tensors: int64; of each tensor the hash of its name, and the addresses of its source and of its shadows.
        keys: int64; of each average, for this update.
        skipped, weights, AVERAGES, SOURCE, BLOCK: as of :func:`lerp`.
    """
    chunk = chunks + 4 * tl.program_id(0).to(tl.int64)
    row = tensors + tl.load(chunk) * (2 + AVERAGES)
    low, count, position = tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    bad = tl.zeros((BLOCK,), dtype=tl.int32)
    for begin in range(0, count, BLOCK):
        inside = begin + tl.arange(0, BLOCK)
        mask = inside < count
        end = tl.load(_pointer(row + 1, SOURCE, False) + low + inside, mask).to(tl.float32)
        finite = tl.abs(end) < float("inf")
        for average in tl.static_range(AVERAGES):
            shadow = _pointer(row + 2 + average, tl.uint16, False) + low + inside
            before = tl.load(shadow, mask)
            start = (before.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
            value = _lerped(start, end, weights[average])
            if skipped is not None:
                value = tl.where(tl.abs(start) < float("inf"), value, end)
            after = _rounded(value, _draws(position + inside, tl.load(row), tl.load(keys + average)))
            if skipped is not None:
                after = tl.where(finite, after, before)
            tl.store(shadow, after, mask)
        bad += (mask & ~finite).to(tl.int32)
    if skipped is not None:
        _count(skipped, bad)


@triton.jit
def _draws(positions: tl.tensor, tensor: tl.tensor, average: tl.tensor) -> tl.tensor:
    key = (tensor + average).to(tl.uint64, bitcast=True)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = key ^ (key >> 31)
    half = _mix(positions.to(tl.uint32) ^ key.to(tl.uint32))
    return _mix((half + (positions >> 32).to(tl.uint32)) ^ (key >> 32).to(tl.uint32)) >> 16


@triton.jit
def _mix(bits: tl.tensor) -> tl.tensor:
    bits = (bits ^ (bits >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    bits = (bits ^ (bits >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def _rounded(values: tl.tensor, draws: tl.tensor) -> tl.tensor:
    bits = values.to(tl.uint32, bitcast=True)
    up = bits + draws
    keeps = (tl.abs(values) < float("inf")) & ((up & 0x7F800000) != 0x7F800000)
    quiet = tl.where(values != values, 0x40, 0).to(tl.uint32)
    return tl.where(keeps, up >> 16, (bits >> 16) | quiet).to(tl.uint16)
