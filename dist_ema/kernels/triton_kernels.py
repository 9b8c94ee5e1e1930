"""The Triton kernel: ``shadow += weight * (source - shadow)`` over lists of tensors, for several averages at once.

Imports triton, so it is imported itself only where that is there. One program has one chunk of one tensor. The
arithmetic is that of ``torch.lerp`` on CUDA: one subtraction and one fused multiply-add, from the nearer end. A GPU
gives its bits; Triton's interpreter, which multiplies and adds in two roundings, differs by at most one unit in the
last place of the larger of shadow and source. bf16 shadows are rounded stochastically: :mod:`dist_ema.kernels.rounding`
says how.

All that an average needs of a block is loaded before anything of it is stored: a store might change what a later load
reads, for all that the compiler knows, so it would wait for it.

Instructions for an element in the loop over whole blocks, of Triton 3.7.1's machine code for sm_90 (the same within 3
for sm_80 and sm_100); an H100 (132 processors, 1.7 GHz, 3.35 TB/s) issues 86 in the time in which its memory moves the
10 bytes of bf16 weights and fp32 shadow, 51 in that of 6, for a bf16 shadow:

====================================  ============  =========  ============================================
weights, shadow                       instructions  registers  loads and stores of a thread
====================================  ============  =========  ============================================
fp32, fp32                            11.5          30         4 loads and 2 stores of 16 bytes for 8 elements
bf16, fp32                            13            32         2 of 8 and 2 of 16 bytes, 2 of 16, for 8
bf16, fp32, weights not aligned       13            29         8 of 2 and 2 of 16 bytes, 2 of 16, for 8
bf16, three in fp32                   29            40         1 of 8 and 3 of 16 bytes, 3 of 16, for 4
bf16, bf16                            43            58         2 of 16 bytes, 1 of 16, for 8
bf16, bf16, column shards             46            60         the same
bf16, fp32, weights swapped           25            32         8 of 2 and 2 of 16 bytes, 2 of 16, for 8
bf16, bf16, weights swapped           52            55         8 of 2 and 1 of 16 bytes, 1 of 16, for 8
====================================  ============  =========  ============================================

Swapped weights lie in ``channels_last`` or transposed, and are read out of order: a warp's load touches as many lines
as there are places in a filter (9 for 3 x 3), or 32, and blocks share them through the cache. A processor looks at one
line in a cycle: by that reckoning filters keep near the memory's speed, and a transposed matrix, whose every element
lies in a line of its own, comes to half or two thirds of it.

So all but bf16 shadows wait for memory alone, and these nearly so; what a card says of it, and what no card has said
yet, is in ``launch/benchmarks/README.md``.
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
    keys: tl.tuple,
    AVERAGES: tl.constexpr,
    SOURCE: tl.constexpr,
    SHADOW: tl.constexpr,
    SOURCE_ALIGNED: tl.constexpr,
    SHADOW_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    SWAPPED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """Averages one chunk of one tensor.

    Args:
        chunks: int64; of each program the row of its tensor, and the element of it where its chunk begins. For bf16
            shadows seven more, which say where its elements lie in the full tensor: see ``programs.COLUMNS``.
        tensors: int64; of each tensor its number of elements (for bf16 shadows the hash of its name), and the addresses
            of its source and of its shadows.
        skipped: int64; source elements that were not finite are added to it. None takes sources as they are.
        weights: fp32; of each average.
        keys: int64; of each average two, for this update of bf16 shadows: see ``cuda.packed``. None of fp32 ones.
        AVERAGES: how many.
        SOURCE: the sources' dtype.
        SHADOW: the shadows'; bf16 ones are read as uint16.
        SOURCE_ALIGNED, SHADOW_ALIGNED: all their addresses are multiples of 16 bytes.
        ROWS: a chunk may reach over several runs of its tensor.
        SWAPPED: two dimensions of the sources have changed places in memory; ``tensors`` has seven columns more: see
            ``cuda.Launch``.
        CHUNK: elements of a chunk at most, a multiple of ``BLOCK``.
        BLOCK: elements of a block: as many for each thread as the narrowest type has in 16 bytes, or fewer.
        UNROLL: blocks at a time.
    """
    COLUMNS: tl.constexpr = 2 if keys is None else 9
    chunk = chunks + COLUMNS * tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = 2 + AVERAGES + (7 if SWAPPED else 0)
    row = tensors + tl.load(chunk) * WIDTH
    low = tl.load(chunk + 1)
    if SHADOW_ALIGNED:
        low = tl.multiple_of(low, 16)
    # What all blocks have in common is read here: in the loop the compiler would read it again after every store.
    source = _pointer(row + 1, SOURCE, SOURCE_ALIGNED)
    if SWAPPED:
        layout = _layout(row + 2 + AVERAGES, low)
    else:
        source += low
        layout = None
    shadows = ()
    mixed = ()
    for average in tl.static_range(AVERAGES):
        shadows += (_pointer(row + 2 + average, SHADOW, SHADOW_ALIGNED) + low,)
        if keys is not None:
            mixed += (_key(tl.load(row), keys[2 * average], keys[2 * average + 1]),)
    if keys is None:
        count = tl.minimum(tl.load(row) - low, CHUNK).to(tl.int32)
        grid = None
    else:
        count = tl.load(chunk + 2).to(tl.int32)
        grid = _grid(chunk + 3, ROWS)
    bad = tl.zeros((BLOCK,), dtype=tl.int32)
    STEP: tl.constexpr = BLOCK * UNROLL
    whole = count // STEP * STEP
    for begin in range(0, whole, STEP):  # no mask, so that loads and stores are wide
        bad += _blocks(
            source,
            layout,
            shadows,
            begin,
            None,
            weights,
            mixed,
            grid,
            AVERAGES,
            BLOCK,
            UNROLL,
            ROWS,
            skipped is not None,
        )
    for begin in range(whole, count, BLOCK):
        bad += _blocks(
            source, layout, shadows, begin, count, weights, mixed, grid, AVERAGES, BLOCK, 1, ROWS, skipped is not None
        )
    if skipped is not None:
        found = tl.sum(bad)
        if found > 0:  # an atomic for each program would be as many as there are chunks
            tl.atomic_add(skipped, found.to(tl.int64))


@triton.jit
def _blocks(
    source: tl.tensor,
    layout: tl.tuple,
    shadows: tl.tuple,
    begin: tl.tensor,
    stop: tl.tensor,
    weights: tl.tuple,
    keys: tl.tuple,
    grid: tl.tuple,
    AVERAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    GUARDED: tl.constexpr,
) -> tl.tensor:
    """Averages some blocks from element ``begin`` of a chunk on, up to ``stop`` if that is not None.

    Returns, for each place of a block, how many of its source elements were not finite.
    """
    ends = ()
    befores = ()
    for block in tl.static_range(UNROLL):
        inside = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = None if stop is None else inside < stop
        at = inside if layout is None else _swapped(inside, layout)
        end = tl.load(source + at, mask).to(tl.float32)
        ends += (end if mask is None else tl.where(mask, end, 0.0),)
        for average in tl.static_range(AVERAGES):
            befores += (tl.load(shadows[average] + inside, mask),)
    bad = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in tl.static_range(UNROLL):
        inside = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = None if stop is None else inside < stop
        end = ends[block]
        finite = tl.abs(end) < float("inf")  # False of NaN too
        places = None if grid is None else _places(grid, inside, ROWS)
        for average in tl.static_range(AVERAGES):
            before = befores[block * AVERAGES + average]
            start = before.to(tl.float32)
            value = _lerped(start, end, weights[average])
            if GUARDED:
                value = tl.where(tl.abs(start) < float("inf"), value, end)
            if grid is not None:
                value = _rounded(value, _draws(places, grid[1], keys[average]))
            if GUARDED:
                value = tl.where(finite, value, start)
            if grid is not None:
                value = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            tl.store(shadows[average] + inside, value, mask)
        bad += (~finite).to(tl.int32)
    return bad


@triton.jit
def _layout(columns: tl.tensor, low: tl.tensor) -> tl.tuple:
    """Of a swapped source, in uint32: the element where the chunk begins; by how much the place of an element changes
    with its number, the number of its line and that of its outer one; the divisions by b and by a."""
    begin = (tl.load(columns) + low).to(tl.uint32)
    a = tl.load(columns + 1).to(tl.uint32)
    area = a * tl.load(columns + 2).to(tl.uint32)
    layout = (begin, a, 1 - area, area - a)
    for column in tl.static_range(3, 7):
        layout += (tl.load(columns + column).to(tl.uint32),)
    return layout


@triton.jit
def _swapped(inside: tl.tensor, layout: tl.tuple) -> tl.tensor:
    """Returns where elements lie in memory whose row-major order is (outer, a, b), and their memory's (outer, b, a).

    Element ``number = line * b + column``, of ``line = outer * a + row``, lies at ``(outer * b + column) * a + row``:
    summed up by what is known of it, modulo 2**32.
    """
    number = layout[0] + inside.to(tl.uint32)
    line = tl.umulhi(number, layout[4]) >> layout[5]
    outer = tl.umulhi(line, layout[6]) >> layout[7]
    return (number * layout[1] + line * layout[2] + outer * layout[3]).to(tl.int32)


@triton.jit
def _lerped(start: tl.tensor, end: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """``torch.lerp`` on CUDA: from the nearer end, so that a weight of 1 gives ``end`` itself."""
    near = tl.abs(weight) < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit
def _pointer(place: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Returns the address at ``place`` of the table, as a pointer."""
    pointer = tl.load(place).to(tl.pointer_type(DTYPE), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# The random bits of bf16 shadows. What depends on the chunk alone is computed once; the rest is 32-bit arithmetic.


@triton.jit
def _grid(columns: tl.tensor, ROWS: tl.constexpr) -> tl.tuple:
    """Returns where a chunk lies: the position of its first run in the full tensor, in two halves, of which the upper
    one is that of all its elements; where it has several runs, also what ``programs.COLUMNS`` says of them.
    """
    first = tl.load(columns)
    grid = (first.to(tl.uint32), (first >> 32).to(tl.uint32))
    if ROWS:
        for column in tl.static_range(1, 6):
            grid += (tl.load(columns + column).to(tl.uint32),)
    return grid


@triton.jit
def _places(grid: tl.tuple, inside: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """Returns the lower 32 bits of the positions of elements ``inside`` a chunk, uint32."""
    place = inside.to(tl.uint32)
    if ROWS:
        place += grid[2]
        run = tl.umulhi(place, grid[5]) >> grid[6]  # place // length
        place += run * (grid[4] - grid[3])
    return grid[0] + place


@triton.jit
def _key(tensor: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tuple:
    """``rounding.element_key``, in two halves, from the hash of a name and the halves of an average's key."""
    average = ((low >> 8) & 0xFFFFFFFF) | ((high >> 8) << 32)
    key = (tensor + average).to(tl.uint64, bitcast=True)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = key ^ (key >> 31)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _draws(places: tl.tensor, page: tl.tensor, key: tl.tuple) -> tl.tensor:
    """16 random bits of each position ``page * 2**32 + place``, as uint32."""
    half = _mix(places ^ key[0])
    half = half ^ (half >> 16)
    return _mix((half + page) ^ key[1]) >> 16


@triton.jit
def _mix(bits: tl.tensor) -> tl.tensor:
    """lowbias32, without its last step, which does not change the upper half."""
    bits = (bits ^ (bits >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    return (bits ^ (bits >> 15)) * tl.full((), 0x846CA68B, tl.uint32)


@triton.jit
def _rounded(values: tl.tensor, draws: tl.tensor) -> tl.tensor:
    """fp32 values whose upper halves are the bf16 numbers, up as often as the bits say that are cut off: what
    ``rounding.rounded`` gives.

    Of the largest bf16 number on nothing goes up: no finite value becomes Inf, and what is none stays what it is.
    """
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    up = bits + tl.where(magnitude >= 0x7F7F0000, 0, draws)
    quiet = tl.where(magnitude > 0x7F800000, 0x400000, 0).to(tl.uint32)  # a NaN whose upper bits are those of Inf
    return (up | quiet).to(tl.float32, bitcast=True)
