"""How a thread of ours comes to use tensors on a device in order with the thread that handed them over.

A new thread has the default stream of device 0, whatever streams its maker has: it would not wait for the kernels that
are queued there, and what they write would be read half, or overwrite what the thread has written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


class Handover:
    """Made by the caller, of the tensors that the thread will read or write. Local; waits for nothing.

    Copies between device and pageable memory, which is all that our threads do, are over when they return: whoever
    waits for the thread has waited for them.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._events = [(device, torch.cuda.current_stream(device).record_event()) for device in devices]

    @contextmanager
    def taken(self) -> Iterator[None]:
        """In the thread: streams of its own, which go on where the caller's were. On the device that is meant."""
        with ExitStack() as stack:
            for device, event in self._events:
                stack.enter_context(torch.cuda.device(device))
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                stream.wait_event(event)
                stack.enter_context(torch.cuda.stream(stream))
            yield
