"""Device-to-host copies of weights for an offloaded average, and their order against training.

A *link* takes copies of one device's tensors. Everything that was asked of the device before a copy is in it, and
nothing that is asked after ``wait_for_reads()``. Copies go straight into host memory of the size and dtype of this
rank's weights: a smaller staging area would have to be emptied by the worker before the last part can be copied, so
that the next optimizer step would wait for the worker, and the host for both. Here only the device waits, and only for
copies.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_ema import kernels
from dist_ema.kernels import memory

logger = logging.getLogger(__name__)
#: Bytes of one allocation at most, unless one tensor is larger: torch rounds pinned memory up to a power of two.
_BLOCK = 1 << 30

Allocate = Callable[[int, torch.dtype], Tensor]


@dataclass
class Take:
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
    def copy(self, takes: Sequence[Take]) -> None:
        """Asks for copies of what the sources are now. May return before they are made."""

    @abstractmethod
    def wait_for_reads(self) -> None:
        """What the device is asked after this waits for the copies."""

    @abstractmethod
    def join(self) -> None:
        """Waits until the copies are there. From any thread."""


class HostLink(Link):
    """Copies at once, on the calling thread, from any device."""

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return pageable(numel, dtype)

    def copy(self, takes: Sequence[Take]) -> None:
        for take in takes:
            kernels.read(take.source, take.start, take.stop, take.out)

    def wait_for_reads(self) -> None:
        return

    def join(self) -> None:
        return


class CudaLink(Link):
    """Copies on a stream of its own, beside what the device computes. The host waits for nothing but in ``join``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Blocking, or a waiting thread would keep a core busy.
        self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return pinned(numel, dtype)

    def copy(self, takes: Sequence[Take]) -> None:
        current = torch.cuda.current_stream(self.device)
        self._take(take for take in takes if take.soon)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._take(take for take in takes if not take.soon)
        self._copied.record(self._stream)

    def _take(self, takes: Iterable[Take]) -> None:
        for take in takes:
            kernels.read(take.source, take.start, take.stop, take.out, non_blocking=True)

    def wait_for_reads(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._copied)

    def join(self) -> None:
        with torch.cuda.device(self.device):  # the worker's own is device 0, where this would make a context
            self._copied.synchronize()


#: By the type of a device. Weights in host memory need none: the worker reads them where they are.
LINKS: dict[str, Callable[[torch.device], Link]] = {"cuda": CudaLink}


def pageable(numel: int, dtype: torch.dtype) -> Tensor:
    """Plain host memory, uninitialised."""
    return memory.empty(numel, dtype, torch.device("cpu"))


def pinned(numel: int, dtype: torch.dtype) -> Tensor:
    """Host memory that a device reaches by itself, uninitialised; pageable, which is logged, if there is none."""
    try:
        with torch.inference_mode(False):  # what is kept must serve outside of it too
            return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        logger.warning(
            "No pinned memory for %.1f MiB of an offloaded average, so pageable memory is used, and copies hold up "
            "training. Look at the limits on locked memory (ulimit -l, the container's). %s",
            numel * dtype.itemsize / 2**20,
            error,
        )
        return pageable(numel, dtype)


def carve(sizes: Sequence[tuple[int, torch.dtype]], empty: Allocate) -> list[Tensor]:
    """A flat tensor of each size, in elements, from few allocations."""
    blocks: list[tuple[torch.dtype, list[int]]] = []
    open_blocks: dict[torch.dtype, tuple[list[int], int]] = {}  # what is in it, and how much room there is
    for index, (numel, dtype) in enumerate(sizes):
        members, room = open_blocks.get(dtype, ([], -1))
        if numel > room:
            members, room = [], max(_BLOCK // dtype.itemsize, numel)
            blocks.append((dtype, members))
        members.append(index)
        open_blocks[dtype] = members, room - numel
    tensors: dict[int, Tensor] = {}
    for dtype, members in blocks:
        counts = [sizes[index][0] for index in members]
        parts: Sequence[Tensor] = empty(sum(counts), dtype).split(counts)  # type: ignore[no-untyped-call]
        tensors.update(zip(members, parts, strict=True))
    return [tensors[index] for index in range(len(sizes))]
