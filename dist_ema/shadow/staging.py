"""Copies weights from a device to the host for an offloaded average, in order with training.

A *link* copies tensors of one device. A copy contains all work that was launched before it, and none that is launched
after ``wait_for_reads()``. Copies go into host memory of the size and dtype of this rank's weights. A smaller area
would be filled several times: the worker would have to empty it before the last part could be copied, and the next
optimizer step would have to wait for the worker. Here only the device waits, and only for copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_ema import kernels
from dist_ema.runtime import memory
from dist_ema.runtime.streams import OwnStream

#: Maximum bytes of one allocation, unless one tensor is larger. torch rounds pinned memory up to a power of two.
_BLOCK = 1 << 30

Allocate = Callable[[int, torch.dtype], Tensor]


@dataclass
class CopyRequest:
    """Describes one copy: elements ``[start, stop)`` of the flattened ``source`` go into ``out``, 1D host memory.

    ``soon`` says that a forward pass may write the source, as it may write buffers, and not only an optimizer step.
    """

    source: Tensor
    start: int
    stop: int
    out: Tensor
    soon: bool


class Link(ABC):
    """Copies tensors of one device to the host.

    The methods are called in this order, by the thread that trains; only ``join`` may be called by any thread.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns uninitialised host memory to copy to."""

    @abstractmethod
    def copy(self, takes: Sequence[CopyRequest]) -> None:
        """Starts copies of the present values of the sources. May return before they are complete."""

    @abstractmethod
    def wait_for_reads(self) -> None:
        """Makes later work on the device wait for the copies."""

    @abstractmethod
    def join(self) -> None:
        """Waits until the copies are complete. Any thread may call it."""


class Copies:
    """Repeats the copies of one list of tensors at every update.

    The views of sources and targets are kept as long as the weights have the same addresses, because making them takes
    10 us per tensor.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, bool, int, int, int]] = []  # what the views were made for
        self._from: list[Tensor] = []
        self._to: list[Tensor] = []
        self._others: list[int] = []  # indices of sources that are not contiguous

    def start(self, takes: Sequence[CopyRequest], non_blocking: bool) -> None:
        """Launches all copies on the current stream; waits for them unless ``non_blocking``."""
        seen = [
            (take.source.data_ptr(), take.source.is_contiguous(), take.start, take.stop, take.out.data_ptr())
            for take in takes
        ]
        if seen != self._seen:
            flat = [take for take in takes if take.source.is_contiguous()]
            self._from = [take.source.detach().view(-1)[take.start : take.stop] for take in flat]
            self._to = [take.out for take in flat]
            self._others = [index for index, take in enumerate(takes) if not take.source.is_contiguous()]
            self._seen = seen
        if self._from:
            torch._foreach_copy_(self._to, self._from, non_blocking=non_blocking)
        for index in self._others:
            take = takes[index]
            kernels.read(take.source, take.start, take.stop, take.out, non_blocking)


class HostLink(Link):
    """Copies from any device, on the calling thread, before ``copy`` returns."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies = Copies()

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return pageable(numel, dtype)

    def copy(self, takes: Sequence[CopyRequest]) -> None:
        self._copies.start(takes, non_blocking=False)

    def wait_for_reads(self) -> None:
        return

    def join(self) -> None:
        return


class CudaLink(Link):
    """Copies on a second stream, beside what the device computes. The host waits only in ``join``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = OwnStream(device)
        self._soon = Copies()
        self._later = Copies()

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return memory.pinned(numel, dtype)

    def copy(self, takes: Sequence[CopyRequest]) -> None:
        self._soon.start([take for take in takes if take.soon], non_blocking=True)
        self._stream.follow()
        with self._stream.inside():
            self._later.start([take for take in takes if not take.soon], non_blocking=True)
        self._stream.record()

    def wait_for_reads(self) -> None:
        self._stream.hold_back()

    def join(self) -> None:
        self._stream.join()


#: The link for each type of device. Weights in host memory need none: the worker reads them in place.
LINKS: dict[str, Callable[[torch.device], Link]] = {"cuda": CudaLink}


def pageable(numel: int, dtype: torch.dtype) -> Tensor:
    """Returns uninitialised host memory that is not pinned."""
    return memory.empty(numel, dtype, torch.device("cpu"))


def carve(sizes: Sequence[tuple[int, torch.dtype]], empty: Allocate) -> list[Tensor]:
    """Returns a 1D tensor of each size, cut from a few allocations whose sizes are close to powers of two.

    torch rounds pinned memory up to a power of two, so other sizes would waste up to half of it. A tensor larger than
    :data:`_BLOCK` gets an allocation of its own.

    Args:
        sizes: the number of elements and the dtype of each tensor.
        empty: allocates that many elements of a dtype.
    """
    left: Counter[torch.dtype] = Counter()  # elements that have no place yet
    for numel, dtype in sizes:
        left[dtype] += numel
    blocks: list[tuple[torch.dtype, list[int]]] = []
    open_blocks: dict[torch.dtype, tuple[list[int], int]] = {}  # the tensors in the last block, and the room left in it
    for index, (numel, dtype) in enumerate(sizes):
        members, room = open_blocks.get(dtype, ([], -1))
        if numel > room:
            # A new block of the largest power of two that is not larger than what is left.
            nbytes = min(left[dtype] * dtype.itemsize, _BLOCK)
            members = []
            room = max((1 << max(nbytes.bit_length() - 1, 0)) // dtype.itemsize, numel)
            blocks.append((dtype, members))
        members.append(index)
        left[dtype] -= numel
        open_blocks[dtype] = members, room - numel
    tensors: dict[int, Tensor] = {}
    for dtype, members in blocks:
        counts = [sizes[index][0] for index in members]
        parts: Sequence[Tensor] = empty(sum(counts), dtype).split(counts)  # type: ignore[no-untyped-call]
        tensors.update(zip(members, parts, strict=True))
    return [tensors[index] for index in range(len(sizes))]
