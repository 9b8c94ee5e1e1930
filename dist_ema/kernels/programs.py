"""Builds the table of a GPU kernel's programs: which elements of which tensor each program has. Pure; on the host.

For bf16 shadows a program also needs the places of its elements in the full tensor, because the random bits depend on
them. A chunk of a column shard covers many runs of one length at equal distances. So a program has the first run and
that distance, and computes the others; with one program for each run there would be thousands with little to do. For
example the columns 2 to 4 of a matrix with 8 columns::

    full tensor   0  1 [2  3  4] 5  6  7 | 8  9 [10 11 12] 13 14 15 | 16 17 [18 19 20] 21 22 23
    shadow              0  1  2                   3  4  5                    6  7  8

    a program for the elements 1 to 7 of the shadow:
    low 1, count 7, position 2, before 1, length 3, step 8

    its element i:  run = (before + i) // length        position + run * step + (before + i) % length

The kernel works with 32-bit integers. So no chunk crosses a multiple of 2**32 in the full tensor: the upper halves of
all its positions are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_ema.kernels.rounding import ElementPositions

#: Elements of one program. Small enough that a few large tensors keep every processor of a GPU busy.
CHUNK = 1 << 14
#: The columns of the table for bf16 shadows:
#: row: the row of the tensor; low, count: the first element in the shadow, and the number of elements;
#: position: where the first run begins in the full tensor; before: elements of that run before the program's own;
#: length, step: the length of all runs, and the distance from one run to the next;
#: multiplier, shift: the :func:`division` by the length. A program with one run has the multiplier 0.
COLUMNS = ("row", "low", "count", "position", "before", "length", "step", "multiplier", "shift")
#: Runs have to be shorter than this for :func:`division`.
_SHORT = 1 << 30
#: Positions that are equal above this many bits have the same upper half.
_PAGE = 32


def even(numels: Sequence[int]) -> Tensor:
    """Cuts each tensor into equal parts, and returns for each its row and its first element. int64, (programs, 2)."""
    with torch.inference_mode(False):
        parts = (torch.tensor(numels, dtype=torch.int64, device="cpu") + CHUNK - 1) // CHUNK
        owners = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), parts)
        firsts = torch.cumsum(parts, 0) - parts
        lows = (torch.arange(len(owners), device="cpu") - firsts[owners]) * CHUNK
        return torch.stack([owners, lows], dim=1)


def placed(positions: ElementPositions, numels: Mapping[int, int]) -> Tensor:
    """Does what :func:`even` does, with the positions of the elements. int64, (programs, ``COLUMNS``).

    Args:
        positions: the positions of the elements of all tensors.
        numels: number of elements of each tensor that is wanted, by its index; their order is that of the rows.
    """
    chunks: list[tuple[int, ...]] = []
    for row, (index, numel) in enumerate(numels.items()):
        local, full = positions.of_tensor(index)
        for chunk in _chunks(local, full, numel):
            chunks.append((row, *chunk))
    with torch.inference_mode(False):
        return torch.tensor(chunks, dtype=torch.int64, device="cpu").view(-1, len(COLUMNS))


def has_rows(chunks: Tensor) -> bool:
    """Returns whether a program has several runs."""
    return bool(chunks[:, COLUMNS.index("multiplier")].any())


def _chunks(local: Sequence[int], full: Sequence[int], numel: int) -> Iterator[tuple[int, ...]]:
    """Yields all columns except the row, for a tensor whose runs start at these elements of the shadow and the full
    tensor.
    """
    grid = _grid(local, full, numel)
    for low in range(0, numel, CHUNK):
        high = min(low + CHUNK, numel)
        several_runs = _in_rows(low, high, *grid) if grid is not None else None
        if several_runs is not None:
            yield several_runs
        else:
            # One run, irregular runs, or a multiple of 2**32 inside: a program for each run.
            yield from _by_run(low, high, local, full, numel)


def _grid(local: Sequence[int], full: Sequence[int], numel: int) -> tuple[int, int, int, int] | None:
    """Returns ``(start, before, length, step)`` for runs of one length at equal distances; None for other runs.

    The first run may lack ``before`` elements at its beginning, and the last one some at its end.
    """
    if len(local) < 2:
        return None
    begins = np.array(full)
    lengths = np.diff(np.append(np.asarray(local), numel))
    length = int(lengths.max())
    before = length - int(lengths[0])
    begins[0] -= before
    steps = np.diff(begins)
    regular = (lengths[1:-1] == length).all() and (steps == steps[0]).all()
    return (int(begins[0]), before, length, int(steps[0])) if regular and 1 < length < _SHORT else None


def _in_rows(low: int, high: int, start: int, before: int, length: int, step: int) -> tuple[int, ...] | None:
    """Returns the chunk of elements ``[low, high)``; None if it has only one run, or crosses a multiple of 2**32."""
    (first, skipped), (last, inside) = divmod(before + low, length), divmod(before + high - 1, length)
    position = start + first * step
    if first == last or position >> _PAGE != (start + last * step + inside) >> _PAGE:
        return None
    return low, high - low, position, skipped, length, step, *division(length)


def division(length: int) -> tuple[int, int]:
    """Returns ``(multiplier, shift)`` with ``i // length == i * multiplier >> 32 >> shift`` for i below 2**31.

    ``length`` is from 2 to 2**30 - 1. From Granlund and Montgomery, "Division by invariant integers using
    multiplication", 1994.
    """
    shift = (length - 1).bit_length()
    return -(-(1 << 31 + shift) // length), shift - 1


def _by_run(low: int, high: int, local: Sequence[int], full: Sequence[int], numel: int) -> Iterator[tuple[int, ...]]:
    """Yields a chunk for each run of elements ``[low, high)``, cut at multiples of 2**32."""
    run = int(np.searchsorted(np.asarray(local), low, "right")) - 1
    while low < high:
        end = min(local[run + 1] if run + 1 < len(local) else numel, high)
        while low < end:
            position = full[run] + low - local[run]
            stop = min(end, low + (((position >> _PAGE) + 1) << _PAGE) - position)
            yield low, stop - low, position, 0, 0, 0, 0, 0
            low = stop
        run += 1
