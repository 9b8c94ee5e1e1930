"""Makes streams on an accelerator for the library's own threads, in order with the thread that trains.

A new thread has the default stream of device 0. Work that it launches there would not wait for the kernels that are
queued on the training thread's stream, would delay all other kernels, and would create a context of half a gigabyte on
a device of another rank. So each thread of the library works inside an :class:`OwnStream`, which the training thread
has made. Which work waits for which: the table in :mod:`dist_ema.runtime`.

Streams and events are those of ``torch.cuda``: ``torch.Event`` ignores ``blocking=True`` (torch 2.13), so a thread that
waits for one would keep a core busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from dist_ema.runtime import memory


class OwnStream:
    """Holds one stream on one device. Only ``inside`` and ``join`` may be called by other threads than the training
    thread.
    """

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
        """Launches the work of the block on this stream and its device. Any thread may call it."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def record(self) -> None:
        """Marks all work launched so far, for ``hold_back`` and ``join``."""
        self._event.record(self._stream)

    def hold_back(self) -> None:
        """Makes later work of the caller's stream wait for the marked work. The host does not wait. Local."""
        torch.cuda.current_stream(self.device).wait_event(self._event)

    def join(self) -> None:
        """Waits on the host for the marked work. Any thread may call it."""
        with torch.cuda.device(self.device):
            self._event.synchronize()


class Handover:
    """Orders a thread's use of tensors after the earlier work of the thread that made it. Local; does not wait."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._streams = [OwnStream(device) for device in {tensor.device for tensor in tensors if tensor.is_cuda}]
        for stream in self._streams:
            stream.follow()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Launches the block's work, in the thread, after the work of the maker's streams. For several threads."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(stream.inside())
            yield

    def join(self) -> None:
        """Waits on the host for all work that the threads have launched, after they have ended."""
        for stream in self._streams:
            stream.record()
            stream.join()


class Relay:
    """Holds two pinned host buffers through which one thread copies to or from a device.

    One buffer is being copied while the thread works on the other.

    Args:
        nbytes: bytes of each buffer.
    """

    def __init__(self, nbytes: int) -> None:
        self._buffers = [memory.pinned(nbytes, torch.uint8) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns the buffer that was used longest ago, 1D and uninitialised. Waits until the device has left it."""
        event = self._events[self._next]
        if event is not None:
            event.synchronize()
        return self._buffers[self._next][: numel * dtype.itemsize].view(dtype)

    def asked(self) -> torch.cuda.Event:
        """Records that a copy to or from the buffer was launched, and returns its event. The other buffer is next."""
        event = self._events[self._next] or torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events[self._next] = event
        self._next = 1 - self._next
        return event


def read_ahead(sizes: Sequence[int], dtype: torch.dtype, read: Callable[[int, int, Tensor], None]) -> Iterator[Tensor]:
    """Yields consecutive parts of a device's values on the host. Each is valid until the next one is requested.

    While the caller works on a part, the next one is copied. Local; uses the current stream::

        device    copy 0 | copy 1 ....... | copy 2 ....... |
        caller           | works on 0     | works on 1     | works on 2

    Args:
        sizes: number of elements of each part.
        dtype: dtype of the parts.
        read: ``read(start, stop, out)`` launches a copy of these elements to pinned memory.
    """
    relay = Relay(max(sizes, default=0) * dtype.itemsize)
    start = 0
    current: tuple[Tensor, torch.cuda.Event] | None = None
    for size in [*sizes, None]:  # None: one more turn, which launches nothing and yields the last part
        following = None
        if size is not None:
            out = relay.buffer(size, dtype)
            read(start, start + size, out)
            following = (out, relay.asked())
            start = start + size
        if current is not None:
            values, copied = current
            copied.synchronize()
            yield values
        current = following
