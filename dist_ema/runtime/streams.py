"""Streams of our own on an accelerator, in order with the thread that trains: for offloading, saving and loading.

A new thread has the default stream of device 0, whatever streams its maker has. What it asks for there would not wait
for the kernels that are queued on the maker's stream, would hold up everyone's kernels, and would make a context of
half a gigabyte on a device that another rank has. So a thread of ours works inside an :class:`OwnStream`, which its
maker has made. Who waits for whom: the table in :mod:`dist_ema.shadow`.

Streams and events are those of ``torch.cuda``: ``torch.Event`` takes ``blocking=True`` and ignores it (torch 2.13), so
that a thread which waits for one would keep a core busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from dist_ema.runtime import memory


class OwnStream:
    """One stream on one device. All calls but ``inside`` and ``join`` are for the thread that trains."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Blocking, or a waiting thread would keep a core busy.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """Makes later work in this stream wait for all earlier work of the caller's stream. Local."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Queues the work of the block in this stream, on its device. From any thread."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def record(self) -> None:
        """Marks what has been asked so far, for the next two calls."""
        self._event.record(self._stream)

    def hold_back(self) -> None:
        """Makes later work of the caller's stream wait for what was marked. The host does not wait. Local."""
        torch.cuda.current_stream(self.device).wait_event(self._event)

    def join(self) -> None:
        """Waits, on the host, for what was marked. From any thread."""
        with torch.cuda.device(self.device):
            self._event.synchronize()


class Handover:
    """Orders a thread's use of tensors after the work of the thread that made it. Local; waits for nothing."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._streams = [OwnStream(device) for device in {tensor.device for tensor in tensors if tensor.is_cuda}]
        for stream in self._streams:
            stream.follow()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Queues the block's work, in the thread, after that of the maker's streams. Several threads may use it."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(stream.inside())
            yield

    def join(self) -> None:
        """Waits, on the host, for all that the threads have asked for, when they are through."""
        for stream in self._streams:
            stream.record()
            stream.join()


class Relay:
    """Two host buffers, pinned, through which one thread copies to or from a device: one is on its way while the thread
    works on the other.

    Args:
        nbytes: of each.
    """

    def __init__(self, nbytes: int) -> None:
        self._buffers = [memory.pinned(nbytes, torch.uint8) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns the buffer that was used longest ago, when the device has let go of it: flat, uninitialised."""
        event = self._events[self._next]
        if event is not None:
            event.synchronize()
        return self._buffers[self._next][: numel * dtype.itemsize].view(dtype)

    def asked(self) -> torch.cuda.Event:
        """Says that a copy to or from that buffer was asked of the current stream. Returns what is done when it is."""
        event = self._events[self._next] or torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events[self._next] = event
        self._next = 1 - self._next
        return event


def read_ahead(sizes: Sequence[int], dtype: torch.dtype, read: Callable[[int, int, Tensor], None]) -> Iterator[Tensor]:
    """Parts of what lies on a device, one after the other, on the host; each is there until the next one is asked for.

    The next one is on its way meanwhile. Local; in the current stream.

    Args:
        sizes: of the parts, in elements.
        dtype: of the parts.
        read: ``read(start, stop, out)`` asks for a copy of these elements to pinned memory.
    """
    relay = Relay(max(sizes, default=0) * dtype.itemsize)
    start = 0
    asked: tuple[Tensor, torch.cuda.Event] | None = None
    for size in [*sizes, None]:
        coming = None
        if size is not None:
            out = relay.buffer(size, dtype)
            read(start, start + size, out)
            coming = (out, relay.asked())
            start = start + size
        if asked is not None:
            asked[1].synchronize()
            yield asked[0]
        asked = coming
