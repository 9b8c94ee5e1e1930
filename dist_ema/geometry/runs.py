"""Describes where the elements of a local shard lie in the full tensor. Pure Python, without torch.

One idea serves every engine: a local shard is a sorted tuple of *runs* ``(start, length)``, in elements, in the
row-major flattening of the full tensor. FSDP1, ZeRO and ``Shard(0)`` hold one run, tensor-parallel columns one run per
row, an empty shard none. The elements of the local tensor, flattened, are the runs one after the other. Runs are a
tuple, or :class:`Rows`, which compare equal to the tuple of the same runs.

A tensor of 8 rows and 4 columns on two or four ranks. The digit is the rank that holds the element, and the last line
is rank 0's runs::

    FSDP, Shard(0)     tensor parallel,    packed tensor       FSDP2 over packed     HSDP, 2 copies      FSDP1, ZeRO:
    on 4 ranks         Shard(1), 2 ranks   parallel, 2 ranks   layers, 2 x 2 ranks   x 2 shards          3 ranks, flat

      0 0 0 0            0 0 1 1             0 0 0 0  gate       0 0 0 0  gate         02 02 02 02         0 0 0 0
      0 0 0 0            0 0 1 1             0 0 0 0             0 0 0 0               02 02 02 02         0 0 0 0
      1 1 1 1            0 0 1 1             1 1 1 1             1 1 1 1               02 02 02 02         0 0 0 1
      1 1 1 1            0 0 1 1             1 1 1 1             1 1 1 1               02 02 02 02         1 1 1 1
      2 2 2 2            0 0 1 1             0 0 0 0  up         2 2 2 2  up           13 13 13 13         1 1 1 1
      2 2 2 2            0 0 1 1             0 0 0 0             2 2 2 2               13 13 13 13         1 1 2 2
      3 3 3 3            0 0 1 1             1 1 1 1             3 3 3 3               13 13 13 13         2 2 2 2
      3 3 3 3            0 0 1 1             1 1 1 1             3 3 3 3               13 13 13 13         2 2 2 2

    (0, 8)             (0, 2), (4, 2),     (0, 8), (16, 8)     (0, 8)                (0, 16), of which   (0, 11)
                       (8, 2), ...                                                   it averages half

Under FSDP2 over packed layers tensor parallelism gives ranks 0 and 2 the first half of gate and of up, ranks 1 and 3
the second halves; then FSDP2 cuts those four rows, and rank 0 keeps the gate's two, rank 2 the two of up.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from math import prod
from typing import overload

Run = tuple[int, int]
Runs = Sequence[Run]
#: Offsets and sizes along each dimension of a full tensor.
Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Run]):
    """Holds runs of one length at equal distances, as the columns of a matrix are. Any part of them is :class:`Rows`
    again.

    It has six numbers instead of a tuple for each run: an eighth of the columns of 256 experts are two million runs.

    ::

        start                step
        |<- length ->|<----------------->|
        [....########]...................[############]...................[######......]
         skip                                                                     drop

    Attributes:
        start: where the first run starts.
        length: the length of each run.
        step: the distance from the start of one run to the start of the next; more than ``length``.
        number: the number of runs.
        skip: elements at the beginning of the first run that do not belong to it.
        drop: elements at the end of the last run that do not belong to it.

    >>> tuple(Rows(start=2, length=3, step=8, number=2))
    ((2, 3), (10, 3))
    >>> tuple(Rows(start=2, length=3, step=8, number=2, skip=1, drop=2))
    ((3, 2), (10, 1))
    """

    start: int
    length: int
    step: int
    number: int
    skip: int = 0
    drop: int = 0

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, index: int) -> Run: ...

    @overload
    def __getitem__(self, index: slice) -> Runs: ...

    def __getitem__(self, index: int | slice) -> Run | Runs:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(self.number)[index])
        place = range(self.number)[index]
        begin = self.start + place * self.step
        size = self.length
        # The first run begins late, and the last one ends early. With one run both hold for it.
        if place == 0:
            begin = begin + self.skip
            size = size - self.skip
        if place == self.number - 1:
            size -= self.drop
        return begin, size

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rows) and astuple(self) == astuple(other):
            return True  # without a look at each run
        if isinstance(other, (tuple, Rows)):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    @property
    def is_even(self) -> bool:
        """Returns whether the first and the last run are as long as the others."""
        return not self.skip and not self.drop

    def parts(self) -> Iterator[Runs]:
        """Yields the same runs in at most three parts: an incomplete first run, the complete ones, an incomplete last
        run.
        """
        first = int(self.skip > 0)
        last = int(self.drop > 0)
        if first + last >= self.number:
            yield from ((run,) for run in self)
            return
        if first:
            yield (self[0],)
        even = Rows(self.start + first * self.step, self.length, self.step, self.number - first - last)
        yield even if even.number > 1 else (even[0],)
        if last:
            yield (self[-1],)


def whole(numel: int) -> Runs:
    """Returns the runs of a rank that holds all ``numel`` elements.

    >>> whole(6)
    ((0, 6),)
    """
    return ((0, numel),) if numel else ()


def count(runs: Runs) -> int:
    """Returns the number of elements in ``runs``.

    >>> count(((0, 2), (5, 3)))
    5
    """
    if isinstance(runs, Rows):
        return runs.number * runs.length - runs.skip - runs.drop
    return sum(length for _, length in runs)


def cut(runs: Runs, start: int, stop: int) -> Runs:
    """Returns the runs of local elements ``start <= i < stop``. Local elements are numbered along ``runs``.

    >>> cut(((0, 4), (10, 4)), 2, 6)  # local elements 2 to 5
    ((2, 2), (10, 2))
    """
    if isinstance(runs, Rows):
        return _cut_rows(runs, max(start, 0), min(stop, count(runs)))
    pieces: list[Run] = []
    position = 0  # local number of the first element of this run
    for begin, length in runs:
        # The part of the wanted elements that lies within this run.
        low = max(start - position, 0)
        high = min(stop - position, length)
        if low < high:
            pieces.append((begin + low, high - low))
        position += length
        if position >= stop:
            break
    return tuple(pieces)


def _cut_rows(rows: Rows, start: int, stop: int) -> Runs:
    """Does what :func:`cut` does for rows, without a look at each run: a shard may have millions of them."""
    if start >= stop:
        return ()
    # Count the elements as if the first run were complete: run k then has elements k * length to (k + 1) * length.
    low = start + rows.skip
    high = stop + rows.skip
    # The first and the last run that are touched, and what does not belong to the result at their outer ends.
    first = low // rows.length
    last = (high - 1) // rows.length
    skip = low - first * rows.length
    drop = (last + 1) * rows.length - high
    found = Rows(rows.start + first * rows.step, rows.length, rows.step, last + 1 - first, skip, drop)
    return found if found.number > 1 else (found[0],)


def chunks(runs: Runs, limit: int) -> Iterator[Runs]:
    """Yields ``runs`` in order, in lists of at most ``limit`` elements. A run is cut where a list is full.

    >>> list(chunks(((0, 4), (10, 4)), 3))
    [((0, 3),), ((3, 1), (10, 2)), ((12, 2),)]
    """
    if isinstance(runs, Rows):
        total = count(runs)
        yield from (cut(runs, low, low + limit) for low in range(0, total, limit))
        return
    part: list[Run] = []
    room = limit  # elements that the present list can still take
    for start, length in runs:
        # A long run may fill several lists.
        while length:
            size = min(length, room)
            part.append((start, size))
            start = start + size
            length = length - size
            room = room - size
            if not room:  # the rest of this run goes into the next list
                yield tuple(part)
                part = []
                room = limit
    if part:
        yield tuple(part)


def overlap(runs: Runs, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Intersects ``runs`` with the window ``[start, stop)`` of the full tensor.

    Yields ``(local, inside, length)``: ``length`` elements that start at element ``local`` of the local shard and at
    element ``inside`` of the window.

    >>> list(overlap(((0, 4), (10, 4)), 3, 12))  # element 3, then 10 and 11
    [(3, 0, 1), (4, 7, 2)]
    """
    position = 0  # local number of the first element of this run
    touched: Iterable[Run] = runs
    if isinstance(runs, Rows):
        # Only the runs that end behind `start` and begin before `stop`, found by arithmetic. All runs count as complete
        # here: the first or last one may have nothing in the window, which the comparison below finds.
        first = max((start - runs.start - runs.length) // runs.step + 1, 0)
        last = min(-(-(stop - runs.start) // runs.step), runs.number)
        position = first * runs.length - runs.skip if first else 0
        touched = map(runs.__getitem__, range(first, last))
    for begin, length in touched:
        low = max(begin, start)
        high = min(begin + length, stop)
        if low < high:
            yield position + low - begin, low - start, high - low
        position += length


def flattened(runs: Runs) -> array[int]:
    """Returns start and length of each run, one after the other, as 64-bit integers for compiled code.

    >>> flattened(((0, 4), (10, 3)))
    array('q', [0, 4, 10, 3])
    """
    if not isinstance(runs, Rows):
        return array("q", chain.from_iterable(runs))
    pairs = array("q", [0, runs.length]) * runs.number
    pairs[::2] = array("q", range(runs.start, runs.start + runs.number * runs.step, runs.step))
    # The first and the last run may be incomplete.
    pairs[0], pairs[1] = runs[0]
    pairs[-2], pairs[-1] = runs[-1]
    return pairs


def chunk(intervals: Runs, parts: int, index: int) -> Runs:
    """Returns part ``index`` of ``intervals`` as ``torch.chunk`` divides: ceil(n / parts) each, the last one short or
    empty.

    >>> [chunk(((0, 5),), 4, rank) for rank in range(4)]  # 5 rows on 4 ranks
    [((0, 2),), ((2, 2),), ((4, 1),), ()]
    """
    size = -(-count(intervals) // parts)
    return cut(intervals, index * size, (index + 1) * size)


def strided_chunk(intervals: Runs, factor: int, parts: int, index: int, *, one_step: bool = False) -> Runs:
    """Returns part ``index`` of each of ``factor`` groups of ``intervals``, as torch's ``_StridedShard`` divides.

    With ``one_step`` the intervals are cut into ``factor`` times ``parts`` pieces at once, as older versions of torch
    do. The results differ only if the sizes do not divide evenly.

    >>> [strided_chunk(((0, 8),), factor=2, parts=2, index=rank) for rank in range(2)]
    [((0, 2), (4, 2)), ((2, 2), (6, 2))]
    >>> strided_chunk(((0, 9),), 2, 4, 0), strided_chunk(((0, 9),), 2, 4, 0, one_step=True)
    (((0, 2), (5, 1)), ((0, 2), (8, 1)))
    """
    pieces: list[Run] = []
    for group in range(factor):
        if one_step:
            piece = chunk(intervals, factor * parts, group * parts + index)
        else:
            piece = chunk(chunk(intervals, factor, group), parts, index)
        pieces.extend(piece)
    return merge(tuple(pieces))


def box_runs(shape: Sequence[int], kept: Sequence[Runs]) -> Runs:
    """Returns the runs of the elements whose index along dimension ``d`` is in ``kept[d]``, for a tensor of shape
    ``shape``.

    Runs that touch are merged, so a shard of whole rows is one run.

    >>> box_runs((4, 6), (((1, 2),), ((0, 6),)))  # rows 1 and 2: whole rows are one run
    ((6, 12),)
    >>> tuple(box_runs((2, 6), (((0, 2),), ((2, 2),))))  # columns 2 and 3: a run for each row
    ((2, 2), (8, 2))
    """
    if len(shape) != len(kept):
        raise ValueError(
            f"box_runs needs one list of intervals per dimension, got {len(kept)} for shape {tuple(shape)}"
        )
    # From the last dimension outwards: `runs` lie within one row of the next dimension, which has `stride` elements.
    runs: Runs = ((0, 1),)  # a scalar is one element
    stride = 1
    for size, intervals in zip(reversed(shape), reversed(kept), strict=True):
        inner_is_whole = runs == ((0, stride),)
        if inner_is_whole:  # whole rows touch: a run for each interval, not for each row
            runs = tuple((start * stride, length * stride) for start, length in intervals)
        else:
            runs = _in_each_row(runs, stride, intervals)
        runs = as_rows(runs)
        stride *= size
    return merge(runs) if prod(shape) else ()


def as_rows(runs: Runs) -> Runs:
    """Returns several runs of one length at equal distances as :class:`Rows`; other runs unchanged.

    The two pieces of a packed layer are such runs, so they stay a few numbers however many rows or experts there are.
    """
    if isinstance(runs, Rows) or len(runs) < 2:
        return runs
    first, length = runs[0]
    second, _ = runs[1]
    step = second - first
    if step <= length:  # runs that touch are merged later
        return runs
    if any(run != (first + number * step, length) for number, run in enumerate(runs)):
        return runs
    return Rows(first, length, step, len(runs))


def _in_each_row(runs: Runs, stride: int, intervals: Runs) -> Runs:
    """Repeats ``runs``, a part of the first row, in each row of ``intervals``. A row has ``stride`` elements."""
    if len(runs) == 1:
        runs = Rows(*runs[0], step=stride, number=1)
    # If the distances fill a row exactly, the first run of the next row follows the last one at the same distance. The
    # result is then regular too:
    #
    #     row 0            row 1            step 4, two runs a row of 8
    #     [x x . . x x . .][x x . . x x . .]
    if len(intervals) == 1 and isinstance(runs, Rows) and runs.is_even and runs.step * runs.number == stride:
        ((first, rows),) = intervals
        return Rows(first * stride + runs.start, runs.length, runs.step, rows * runs.number)
    repeated: list[Run] = []
    for first, rows in intervals:
        for row in range(first, first + rows):
            repeated.extend((row * stride + begin, length) for begin, length in runs)
    return tuple(repeated)


def boxes(runs: Runs, shape: Sequence[int]) -> list[Box]:
    """Returns the elements of ``runs``, in their order, as boxes of a tensor of shape ``shape``.

    Elements within a box are in row-major order, so box after box the local elements are contiguous. One run of a
    tensor of k dimensions becomes at most 2k - 1 boxes. The rows of a tensor-parallel shard of columns become one box.

    >>> boxes(((4, 8),), (4, 4))  # rows 1 and 2
    [((1, 0), (2, 4))]
    >>> boxes(((2, 2), (6, 2)), (2, 4))  # columns 2 and 3
    [((0, 2), (2, 2))]
    """
    found: list[Box] = []
    # The closed form for rows needs complete runs, so an incomplete first or last run is a part of its own.
    for part in runs.parts() if isinstance(runs, Rows) else [runs]:
        for box in _boxes_of_part(part, tuple(shape)):
            found.append(box)
            # Two boxes that became one may fit the box before them, so this repeats until nothing fits.
            while len(found) > 1 and (joined := _join(found[-2], found[-1])) is not None:
                found[-2:] = [joined]
    return found


def _boxes_of_part(runs: Runs, shape: tuple[int, ...]) -> Iterator[Box]:
    """Yields boxes of the elements of ``runs``, in order. Neighbours may still be joined by the caller."""
    found = _boxes_of_rows(runs, shape) if isinstance(runs, Rows) else []
    if found:
        yield from found
        return
    for start, length in merge(runs):
        yield from _run_boxes(start, start + length, shape)


def _boxes_of_rows(rows: Rows, shape: tuple[int, ...]) -> list[Box]:
    """Returns the boxes of regular rows in closed form; ``[]`` if that does not apply."""
    # Find the dimensions whose elements together are as many as the distance of the runs. If the tensor is seen as a
    # matrix with rows of that length, each row holds one run, at the same columns:
    #
    #     shape (2, 3, 4), step 4      outer dimensions (2, 3): the rows       inner dimension (4,): the columns
    dim = next((dim for dim in range(1, len(shape)) if prod(shape[dim:]) == rows.step), len(shape))
    if dim == len(shape):
        return []
    first_row, column = divmod(rows.start, rows.step)
    if column + rows.length > rows.step:  # a run reaches into the next row
        return []
    inner = list(_run_boxes(column, column + rows.length, shape[dim:]))
    if len(inner) != 1:
        return []
    ((inner_offsets, inner_sizes),) = inner
    found = []
    for offsets, sizes in _run_boxes(first_row, first_row + rows.number, shape[:dim]):
        found.append(((*offsets, *inner_offsets), (*sizes, *inner_sizes)))
    return found


def _run_boxes(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Yields the boxes of elements ``[start, stop)``, in order. ``start`` is less than ``stop``.

    There are at most three kinds of boxes, here for elements 2 to 13 of a (4, 4) tensor::

        . . a a     the end of a row
        b b b b     whole rows
        b b b b
        c c . .     the beginning of a row

    In tensors of more dimensions the first and the last kind are divided again (:func:`_in_row`).
    """
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    # Rows ``first`` to ``last - 1`` are whole.
    first = -(-start // row)
    last = stop // row
    if first > last:  # within one row
        yield from _in_row(last, start - last * row, stop - last * row, shape)
        return
    if start < first * row:  # the end of a row that begins before
        yield from _in_row(first - 1, start - (first - 1) * row, row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < stop:  # the beginning of a row that ends behind
        yield from _in_row(last, 0, stop - last * row, shape)


def _in_row(index: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Yields the boxes of elements ``[start, stop)`` of row ``index``."""
    for offsets, sizes in _run_boxes(start, stop, shape[1:]):
        yield (index, *offsets), (1, *sizes)


def _join(first: Box, second: Box) -> Box | None:
    """Returns two boxes as one, if its elements are those of the first, followed by those of the second; else None."""
    starts, sizes = first
    next_starts, next_sizes = second
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if next_starts[dim] == start + size:  # the second box follows the first one along this dimension
            # In the dimensions behind it both have to cover the same range, or their union is no box.
            rest = starts[dim + 1 :], sizes[dim + 1 :]
            next_rest = next_starts[dim + 1 :], next_sizes[dim + 1 :]
            if rest != next_rest:
                return None
            return starts, (*sizes[:dim], size + next_sizes[dim], *sizes[dim + 1 :])
        # In every dimension before it both must be the same single row, or row-major order would mix their elements.
        is_same_row = next_starts[dim] == start and size == 1 and next_sizes[dim] == 1
        if not is_same_row:
            return None
    return None


def merge(runs: Runs) -> Runs:
    """Joins runs that touch. ``runs`` are sorted and do not overlap.

    >>> merge(((0, 2), (2, 3), (8, 1)))
    ((0, 5), (8, 1))
    """
    if isinstance(runs, Rows):
        # Rows never touch, as their step is more than their length. A single run is returned as a tuple.
        return runs if len(runs) > 1 else runs[:]
    joined: list[Run] = []
    for start, length in runs:
        last_start, last_length = joined[-1] if joined else (0, 0)
        if joined and last_start + last_length == start:
            joined[-1] = (last_start, last_length + length)
        elif length:
            joined.append((start, length))
    return tuple(joined)


def split_evenly(sizes: Sequence[int], itemsizes: Sequence[int], parts: int, index: int) -> list[tuple[int, int]]:
    """Returns part ``index`` of a list of 1D tensors that are laid end to end and cut into ``parts`` of equal bytes.

    ``sizes`` are numbers of elements, and ``itemsizes`` bytes per element. Returns ``(start, stop)`` in elements for
    each tensor; ``start == stop`` if the part has nothing of it. Over all indices the ranges cover every element
    exactly once, and no two parts differ by more than one element in bytes for each cut.

    >>> split_evenly([3, 5], [4, 4], parts=2, index=0), split_evenly([3, 5], [4, 4], parts=2, index=1)
    ([(0, 3), (0, 1)], [(3, 3), (1, 5)])
    """
    # In bytes along all tensors laid end to end: this part is [low, high), this tensor begins at `position`.
    total = sum(size * item for size, item in zip(sizes, itemsizes, strict=True))
    low = index * total // parts
    high = (index + 1) * total // parts
    ranges: list[tuple[int, int]] = []
    position = 0
    for size, item in zip(sizes, itemsizes, strict=True):
        # A cut inside an element rounds up on both of its sides, so neighbours agree on who has it.
        start = min(max(-(-(low - position) // item), 0), size)
        stop = min(max(-(-(high - position) // item), 0), size)
        ranges.append((start, stop))
        position += size * item
    return ranges


def split_for_all(sizes: Sequence[int], itemsizes: Sequence[int], parts: int) -> list[list[tuple[int, int, int]]]:
    """Returns the cuts of :func:`split_evenly` for every part at once, in time proportional to ``len(sizes) + parts``.

    Returns for each part its non-empty ranges ``(tensor, start, stop)``, in order.

    >>> split_for_all([3, 5], [4, 4], parts=2)
    [[(0, 0, 3), (1, 0, 1)], [(1, 1, 5)]]
    """
    total = sum(size * item for size, item in zip(sizes, itemsizes, strict=True))
    ranges: list[list[tuple[int, int, int]]] = [[] for _ in range(parts)]
    part = 0  # the part that the next element goes to
    position = 0  # of this tensor, in bytes along all tensors laid end to end
    for tensor, (size, item) in enumerate(zip(sizes, itemsizes, strict=True)):
        start = 0
        while start < size:
            # The same rounding as in split_evenly(): an element in which a part ends belongs to that part.
            end_of_part = (part + 1) * total // parts
            stop = min(max(-(-(end_of_part - position) // item), 0), size)
            if stop > start:
                ranges[part].append((tensor, start, stop))
                start = stop
            if start < size:  # the part is full, and this tensor has more
                part += 1
        position += size * item
    return ranges
