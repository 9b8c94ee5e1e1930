"""Keeps kernel arguments for many tensors from one update to the next. Checking them is cheaper than building them.

Addresses, dtypes and layouts of the sources are compared at every update, because the memory of a parameter may move.
Shadows belong to the library and stay where they are, so it is enough that they are the same tensors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dist_ema.kernels.rounding import Rounding

Averages = Sequence[Sequence[Tensor]]
Ranges = Sequence[tuple[int, int]]
Made = TypeVar("Made")

#: Dtypes of the sources that kernels take, and what the compiled ones call them.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_pointer = Tensor.data_ptr


class Table(Generic[Made]):
    """Holds the arguments of one kernel for one list of tensors.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``: the type of the device of tensors that the kernel takes.
        make: returns the arguments for the tensors of these indices, from the lists of all tensors.
        dtype: the dtype of shadows that the kernel takes.
        swapped: whether it also takes sources with two dimensions exchanged in memory; see :func:`swapped`.
    """

    def __init__(
        self,
        device_type: str,
        make: Callable[[list[int], Averages, Sequence[Tensor], Ranges], Made],
        dtype: torch.dtype = torch.float32,
        swapped: bool = False,
    ) -> None:
        self._swapped = swapped
        self._device_type = device_type
        self._dtype = dtype
        self._make = make
        self._seen: list[object] = []
        self._averages: list[list[Tensor]] = []
        self._made: Made | None = None
        self._rest: list[int] = []

    def read(self, averages: Averages, sources: Sequence[Tensor], ranges: Ranges) -> tuple[Made, list[int]]:
        """Returns the arguments, and the indices of the tensors that the kernel cannot take. Local."""
        # Everything that the arguments depend on. This runs at every update, so it is a few maps over all sources and
        # one comparison of lists, which Python does in C.
        seen: list[object] = [
            [source.dtype for source in sources],
            list(map(_pointer, sources)),
            list(map(Tensor.numel, sources)),
            list(map(Tensor.stride, sources)),
            list(ranges),
        ]
        if self._made is None or seen != self._seen or not self._same(averages):
            taken = self._taken(averages, sources, ranges)
            self._made = self._make(taken, averages, sources, ranges)
            self._rest = sorted(set(range(len(sources))).difference(taken))
            # Set last: if _make() raises, the next call builds the arguments again.
            self._seen = seen
            self._averages = [list(average) for average in averages]
        return self._made, self._rest

    def _same(self, averages: Averages) -> bool:
        """Returns whether these are the shadows of the previous call."""
        if list(map(len, averages)) != list(map(len, self._averages)):
            return False
        # Identity, not ==, which would compare the elements.
        pairs = zip(averages, self._averages, strict=True)
        return all(all(map(operator.is_, new, old)) for new, old in pairs)

    def _taken(self, averages: Averages, sources: Sequence[Tensor], ranges: Ranges) -> list[int]:
        """Returns the indices of the tensors that the kernel takes."""
        taken = []
        for index, (source, (start, stop)) in enumerate(zip(sources, ranges, strict=True)):
            if source.dtype not in CODES:
                continue
            if not self._lies_flat(source, stop) and not self._lies_swapped(source, stop):
                continue
            if all(self._fits(average[index], source, stop - start) for average in averages):
                taken.append(index)
        return taken

    def _fits(self, shadow: Tensor, source: Tensor, count: int) -> bool:
        """Returns whether a shadow has the kernel's dtype, is on the source's device, and is contiguous."""
        same_device = shadow.device == source.device
        return same_device and shadow.dtype == self._dtype and self._lies_flat(shadow, count)

    def _lies_flat(self, tensor: Tensor, count: int) -> bool:
        """Returns whether the first ``count`` elements are contiguous and aligned in the memory of the device."""
        return self._is_here(tensor, count) and tensor.is_contiguous()

    def _lies_swapped(self, source: Tensor, count: int) -> bool:
        here = self._swapped and self._is_here(source, count)
        return here and source.numel() < 1 << 31 and swapped(source) is not None

    def _is_here(self, tensor: Tensor, count: int) -> bool:
        plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__  # not a wrapper around other tensors
        here = plain and tensor.device.type == self._device_type
        return here and tensor.numel() >= count and tensor.data_ptr() % tensor.itemsize == 0


def swapped(source: Tensor) -> tuple[int, int] | None:
    """Returns ``(a, b)`` for a tensor of shape (outer, a, b) whose memory is (outer, b, a) without gaps; None for
    others.

    Weights of convolutions in ``channels_last`` are such tensors (a: input channels, b: places of the filter), and so
    is a transposed matrix.

    >>> swapped(torch.empty(8, 3, 5, 5).to(memory_format=torch.channels_last)), swapped(torch.empty(4, 6).t())
    ((3, 25), (6, 4))
    """
    shape = source.shape
    strides = source.stride()
    for dim, size in enumerate(shape):
        if strides[dim] != 1 or size == 1:
            continue
        inner = list(range(dim + 1, len(shape)))
        wanted = {dim: 1}
        step = size
        for other in (*reversed(inner), *reversed(range(dim))):
            wanted[other], step = step, step * shape[other]
        if all(strides[other] == expected or shape[other] == 1 for other, expected in wanted.items()):
            return size, math.prod(shape[other] for other in inner)
    return None


def check_numbers(averages: Averages, weights: Sequence[float], rounding: Rounding | None) -> None:
    """Raises ValueError unless there is one weight, and one key of the rounding, for each average.

    A kernel would read past the end of the list.
    """
    if len(weights) != len(averages):
        raise ValueError(f"{len(weights)} weights for {len(averages)} averages")
    if rounding is not None and len(rounding.keys) != len(averages):
        raise ValueError(f"{len(rounding.keys)} keys for {len(averages)} averages")


def address(source: Tensor, start: int) -> int:
    """Returns the address of element ``start``, in bytes."""
    return _pointer(source) + start * source.itemsize
