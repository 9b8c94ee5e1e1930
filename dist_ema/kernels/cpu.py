"""Runs the compiled update of averages on the CPU: selects the tensors that it takes, and builds its arguments.

It makes one pass over memory, with one parallel region for all tensors and the guard inside, which no sequence of torch
operations can do. The bits are those of ``torch.lerp``, except for the sign of zero at a weight of exactly 1: there
torch itself gives different signs in its vectorized loop and in the elements that are left over.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dist_ema.kernels import arguments, native
from dist_ema.kernels.arguments import CODES, Averages, Ranges, address, check_numbers
from dist_ema.kernels.copies import Copies
from dist_ema.kernels.rounding import ElementPositions, Rounding

Arrays: TypeAlias = "list[array[int]]"
Table: TypeAlias = "arguments.Table[Arrays]"


def table(positions: ElementPositions | None = None) -> Table:
    """Returns an empty table for one list of tensors, which the caller keeps; for bf16 shadows, with their
    ``positions``.
    """
    return arguments.Table("cpu", _arrays, torch.float32 if positions is None else torch.bfloat16)


def _arrays(taken: list[int], averages: Averages, sources: Sequence[Tensor], ranges: Ranges) -> Arrays:
    """Builds the arrays that :meth:`dist_ema.kernels.native.Library.lerp` takes."""
    counts = [ranges[index][1] - ranges[index][0] for index in taken]
    starts = [address(sources[index], ranges[index][0]) for index in taken]
    codes = [CODES[sources[index].dtype] for index in taken]
    targets = [average[index].data_ptr() for average in averages for index in taken]
    offsets = itertools.accumulate(counts, initial=0)
    return [array("q", values) for values in (offsets, starts, codes, targets, taken)]


def lerp(
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
    weights: Sequence[float],
    table: Table,
    guarded: bool,
    rounding: Rounding | None = None,
    copies: Copies | None = None,
) -> tuple[int, list[int]]:
    """Computes ``shadow += weight * (source - shadow)`` for the tensors that the kernel takes. Local.

    It takes contiguous tensors in the CPU's memory: fp32 shadows (with ``rounding``, bf16 ones), and sources in fp32,
    bf16 or fp16. The arguments are those of :func:`dist_ema.kernels.lerp`; the caller keeps ``table`` for these
    tensors.

    Returns:
        The number of source elements that were skipped, and the indices of the tensors that it did not take: all of
            them
        if there is no kernel.

    Raises:
        EMAConfigError: ``DIST_EMA_KERNEL`` has another value than those allowed, or asks for a kernel that cannot be
            built.
    """
    if not any(source.is_cpu for source in sources) or (kernel := native.choice()) is None:
        return 0, list(range(len(sources)))
    check_numbers(averages, weights, rounding)
    arrays, rest = table.read(averages, sources, ranges)
    addresses = None if copies is None else copies.addresses
    return kernel.lerp(arrays, weights, guarded, rounding, addresses), rest
