"""The compiled update of averages on the CPU: which tensors it takes, and its arguments.

One pass over memory, one parallel region for all tensors, the guard inside: what no sequence of torch operations can
do. The bits are those of ``torch.lerp``, but for the sign of zero at a weight of exactly 1, where torch's vectors and
the elements that are left over from them differ between themselves.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_ema import native
from dist_ema.native import CODES

_pointer = Tensor.data_ptr


class Table:
    """The kernel's arguments, kept from one update to the next: making them takes longer than a small update.

    Addresses, dtypes and layouts are compared at every update, since a parameter's memory may move.
    """

    def __init__(self) -> None:
        self._seen: list[object] = []
        self._arrays: list[array[int]] = []
        self._rest: list[int] = []

    def read(
        self, averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], ranges: Sequence[tuple[int, int]]
    ) -> tuple[list[array[int]], list[int]]:
        """The arrays for :meth:`dist_ema.native.Library.lerp`, and the indices of the tensors that it cannot take."""
        seen: list[object] = [
            [source.dtype for source in sources],
            *(list(map(read, sources)) for read in (_pointer, Tensor.numel, Tensor.is_contiguous)),
            *(list(map(_pointer, average)) for average in averages),
            list(ranges),
        ]
        if seen != self._seen:
            self._make(averages, sources, ranges)
            self._seen = seen
        return self._arrays, self._rest

    def _make(
        self, averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], ranges: Sequence[tuple[int, int]]
    ) -> None:
        taken = []
        self._rest = []
        for index, (source, (start, stop)) in enumerate(zip(sources, ranges, strict=True)):
            shadows = [average[index] for average in averages]
            if source.dtype in CODES and _lies_flat(source, stop) and all(_fits(s, stop - start) for s in shadows):
                taken.append(index)
            else:
                self._rest.append(index)
        counts = [ranges[index][1] - ranges[index][0] for index in taken]
        starts = [_pointer(sources[index]) + ranges[index][0] * sources[index].itemsize for index in taken]
        codes = [CODES[sources[index].dtype] for index in taken]
        targets = [_pointer(average[index]) for average in averages for index in taken]
        offsets = itertools.accumulate(counts, initial=0)
        self._arrays = [array("q", values) for values in (offsets, starts, codes, targets)]


def _lies_flat(tensor: Tensor, count: int) -> bool:
    """Whether its first ``count`` elements lie one after the other, aligned, in the CPU's memory."""
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__  # not a wrapper around other tensors
    flat = plain and tensor.is_cpu and tensor.is_contiguous() and tensor.numel() >= count
    return flat and tensor.data_ptr() % tensor.itemsize == 0


def _fits(shadow: Tensor, count: int) -> bool:
    return shadow.dtype == torch.float32 and _lies_flat(shadow, count)


def lerp(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    ranges: Sequence[tuple[int, int]],
    weights: Sequence[float],
    table: Table,
    guarded: bool,
) -> tuple[int, list[int]]:
    """``shadow += weight * (source - shadow)`` for the tensors that the kernel takes. Local.

    It takes what lies contiguously in the CPU's memory: fp32 shadows, and sources in fp32, bf16 or fp16. Arguments are
    those of :func:`dist_ema.kernels.lerp`; ``table`` is kept by the caller for these tensors.

    Returns:
        How many source elements were skipped since they were not finite, and the indices of the tensors that it did not
        take: all of them where there is no kernel.

    Raises:
        EMAConfigError: ``DIST_EMA_KERNEL`` is not a choice, or asks for a kernel that cannot be built.
    """
    if not any(source.is_cpu for source in sources) or (kernel := native.choice()) is None:
        return 0, list(range(len(sources)))
    if len(weights) != len(averages):
        raise ValueError(f"{len(weights)} weights for {len(averages)} averages")
    arrays, rest = table.read(averages, sources, ranges)
    return kernel.lerp(arrays, weights, guarded), rest
