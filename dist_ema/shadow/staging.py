"""Device-to-host copies of weights for an offloaded average, and their order against training.

A *link* takes copies of one device's tensors. Everything that was asked of the device before a copy is in it, and
nothing that is asked after ``wait_for_reads()``. Copies go straight into host memory of the size and dtype of this
rank's weights: a smaller staging area would have to be emptied by the worker before the last part can be copied, so
that the next optimizer step would wait for the worker, and the host for both. Here only the device waits, and only for
copies.
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

#: Bytes of one allocation at most, unless one tensor is larger: torch rounds pinned memory up to a power of two.
_BLOCK = 1 << 30

Allocate = Callable[[int, torch.dtype], Tensor]


@dataclass
class CopyRequest:
    """Elements ``[start, stop)`` of ``source``, flattened, and the flat host memory ``out`` that they go to.

    ``soon``: a forward pass may write the source (buffers), not only an optimizer step.
    """

    source: Tensor
    start: int
    stop: int
    out: Tensor
    soon: bool


class Link(ABC):
    """Copies from one device; the calls come in this order, from the thread that trains but for ``join``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Host memory to copy to, uninitialised."""

    @abstractmethod
    def copy(self, takes: Sequence[CopyRequest]) -> None:
        """Asks for copies of what the sources are now. May return before they are made."""

    @abstractmethod
    def wait_for_reads(self) -> None:
        """Makes later work of the device wait for the copies."""

    @abstractmethod
    def join(self) -> None:
        """Waits until the copies are there. From any thread."""


class Copies:
    """The copies of one list of tensors, asked for again at every update: views are made once, for as long as weights
    lie where they lay. A loop in Python over pieces of each takes 10 us a tensor."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, bool, int, int, int]] = []
        self._from: list[Tensor] = []
        self._to: list[Tensor] = []
        self._others: list[int] = []

    def ask(self, takes: Sequence[CopyRequest], non_blocking: bool) -> None:
        """Asks the current stream for all of them; waits for them unless ``non_blocking``."""
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
    """Copies at once, on the calling thread, from any device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies = Copies()

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return pageable(numel, dtype)

    def copy(self, takes: Sequence[CopyRequest]) -> None:
        self._copies.ask(takes, non_blocking=False)

    def wait_for_reads(self) -> None:
        return

    def join(self) -> None:
        return


class CudaLink(Link):
    """Copies on a stream of its own, beside what the device computes. The host waits for nothing but in ``join``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = OwnStream(device)
        self._soon = Copies()
        self._later = Copies()

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return memory.pinned(numel, dtype)

    def copy(self, takes: Sequence[CopyRequest]) -> None:
        self._soon.ask([take for take in takes if take.soon], non_blocking=True)
        self._stream.follow()
        with self._stream.inside():
            self._later.ask([take for take in takes if not take.soon], non_blocking=True)
        self._stream.record()

    def wait_for_reads(self) -> None:
        self._stream.hold_back()

    def join(self) -> None:
        self._stream.join()


#: By the type of a device. Weights in host memory need none: the worker reads them where they are.
LINKS: dict[str, Callable[[torch.device], Link]] = {"cuda": CudaLink}


def pageable(numel: int, dtype: torch.dtype) -> Tensor:
    """Plain host memory, uninitialised."""
    return memory.empty(numel, dtype, torch.device("cpu"))


def carve(sizes: Sequence[tuple[int, torch.dtype]], empty: Allocate) -> list[Tensor]:
    """Returns a flat tensor of each size, in elements, from few allocations, of which most are nearly a power of two of
    bytes.

    A tensor larger than :data:`_BLOCK` has one of its own, whatever torch makes of it.
    """
    left: Counter[torch.dtype] = Counter()  # elements that have no place yet
    for numel, dtype in sizes:
        left[dtype] += numel
    blocks: list[tuple[torch.dtype, list[int]]] = []
    open_blocks: dict[torch.dtype, tuple[list[int], int]] = {}  # what is in it, and how much room there is
    for index, (numel, dtype) in enumerate(sizes):
        members, room = open_blocks.get(dtype, ([], -1))
        if numel > room:
            # What is left as a sum of powers of two, the largest first.
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
