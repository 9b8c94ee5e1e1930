"""Digests the elements of a list of runs into a number that can be summed over ranks. No torch.distributed.

Ranks prove with it that together they hold every element of a tensor once. Each position ``i`` has a pseudo-random
64-bit number ``h(i)``, and a rank adds up the numbers of the positions that it holds, modulo 2**64. The total over the
ranks is that of the whole tensor only if each position was added once, but for a chance of about 2**-64.

A run of any length costs two evaluations, because ``h(i) = H(i + 1) - H(i)``, where ``H`` is SplitMix64::

    h(start) + h(start + 1) + ... + h(stop - 1) = H(stop) - H(start)

Sums of powers of the positions have a closed form too, but sets that differ in a regular pattern, as a wrong order of
shards does, may have the same ones: 0, 3, 5, 6 and 1, 2, 4, 7 agree in their count, their sum and their squares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple

import numpy as np
from numpy.typing import NDArray

from dist_ema.geometry.runs import Rows, Runs, count

#: Runs that are hashed at a time, so that arrays are small whatever the number of runs.
BLOCK = 1 << 13

Integers = NDArray[np.uint64]


def position_sums(held: Sequence[Runs]) -> Integers:
    """Returns the count and the hash sum of the positions in each list of runs. Shape (len(held), 2).

    Runs may overlap; a position that is held twice counts twice. Equal :class:`Rows`, which the layers of a model often
    have, are computed once.

    >>> halves = position_sums([((0, 3), (8, 2)), ((3, 5),)])
    >>> bool((halves.sum(axis=0) == position_sums([((0, 10),)])[0]).all())
    True
    """
    sums = np.zeros((len(held), 2), dtype=np.uint64)
    known: dict[tuple[int, ...], int] = {}  # where the sums of such rows are
    repeated: list[tuple[int, int]] = []
    distinct: list[tuple[int, Runs]] = []
    for owner, runs in enumerate(held):
        if isinstance(runs, Rows):
            first = known.setdefault(astuple(runs), owner)
            if first != owner:
                repeated.append((owner, first))
                continue
        distinct.append((owner, runs))
    for owners, starts, lengths in _blocks(distinct):
        np.add.at(sums[:, 0], owners, lengths)
        np.add.at(sums[:, 1], owners, _mix(starts + lengths) - _mix(starts))
    for owner, first in repeated:
        sums[owner] = sums[first]
    return sums


def _blocks(held: Iterable[tuple[int, Runs]]) -> Iterator[tuple[NDArray[np.int64], Integers, Integers]]:
    """Yields the runs of numbered lists, at most one block at a time: the number of the list, the start, the length."""
    collected: list[tuple[int, int, int]] = []
    for owner, runs in held:
        if isinstance(runs, Rows):  # may be millions: never as a list
            for part in runs.parts():
                yield from _blocks_of_rows(owner, part) if isinstance(part, Rows) else _blocks([(owner, part)])
            continue
        for start, length in runs:
            collected.append((owner, start, length))
            if len(collected) == BLOCK:
                yield _columns(collected)
                collected = []
    if collected:
        yield _columns(collected)


def _blocks_of_rows(owner: int, rows: Rows) -> Iterator[tuple[NDArray[np.int64], Integers, Integers]]:
    """Does what :func:`_blocks` does, for runs of one length."""
    for first in range(0, rows.number, BLOCK):
        numbers = np.arange(first, min(first + BLOCK, rows.number), dtype=np.uint64)
        starts = numbers * np.uint64(rows.step) + np.uint64(rows.start)
        yield np.full(len(numbers), owner), starts, np.full(len(numbers), rows.length, dtype=np.uint64)


def _columns(collected: list[tuple[int, int, int]]) -> tuple[NDArray[np.int64], Integers, Integers]:
    table = np.array(collected, dtype=np.int64)
    return table[:, 0], table[:, 1].astype(np.uint64), table[:, 2].astype(np.uint64)


def _mix(values: Integers) -> Integers:
    """Returns SplitMix64's finalizer of each value. Products wrap around."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Integers = values ^ (values >> np.uint64(31))
    return mixed


def holds(runs: Runs, shape: Sequence[int], kept: Sequence[NDArray[np.int64]]) -> bool:
    """Returns whether ``runs`` are, in order, the elements whose index along dimension ``d`` is in ``kept[d]``. Exact.

    ``kept`` are the indices in the order in which the local tensor has them. Nothing of the tensor's size is made. If
    indices rise along every dimension, positions rise from one local element to the next. So it is enough to look at
    both ends of each run: integers that rise from ``start`` to ``start + length - 1`` in ``length`` steps have no
    choice between them.

    >>> rows, columns = np.array([1, 2]), np.arange(4)
    >>> holds(((4, 8),), (5, 4), [rows, columns]), holds(((0, 8),), (5, 4), [rows, columns])
    (True, False)
    """
    local_shape = tuple(map(len, kept))
    if count(runs) != np.prod(local_shape, dtype=np.int64):
        return False
    if count(runs) == 0:
        return True
    if not shape:
        return tuple(runs) == ((0, 1),)  # a scalar
    if any(np.any(np.diff(indices) <= 0) for indices in kept):
        return False  # runs always rise
    local = 0  # number of the first local element of this block
    for _, starts, lengths in _blocks([(0, runs)]):
        first = local + np.cumsum(lengths.astype(np.int64)) - lengths.astype(np.int64)
        last = first + lengths.astype(np.int64) - 1
        ends = starts.astype(np.int64) + lengths.astype(np.int64) - 1
        if np.any(_position(first, shape, kept) != starts.astype(np.int64)):
            return False
        if np.any(_position(last, shape, kept) != ends):
            return False
        local = int(last[-1]) + 1
    return True


def _position(local: NDArray[np.int64], shape: Sequence[int], kept: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Returns the positions of local elements in the row-major flattening of the full tensor."""
    position = np.zeros_like(local)
    stride = 1  # of this dimension in the full tensor
    for size, indices in zip(reversed(shape), reversed(kept), strict=True):
        local, index = np.divmod(local, len(indices))
        position += indices[index] * stride
        stride *= size
    return position
