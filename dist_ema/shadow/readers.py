"""Finds out whether another thread of this process is working with a tensor, by looking at the thread's variables."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Container, Iterator
from types import FrameType

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

#: Number of objects that are looked at in the variables of one thread.
_LOOKS = 50_000


def is_at_work(storages: Container[StorageWeakRef]) -> bool:
    """Returns whether a variable of another thread refers to one of these storages. Local.

    Looks at local variables of all functions on the thread's stack, and into dicts, lists and tuples. A tensor that the
    thread reaches only through an attribute of an object is found while a variable refers to the tensor itself.
    """
    own = threading.get_ident()
    frames = [frame for thread, frame in sys._current_frames().items() if thread != own]
    return any(_refers_to(value, storages) for frame in frames for value in _values(frame))


def _values(frame: FrameType) -> Iterator[object]:
    """Yields the local variables of all functions on a stack, and the contents of dicts, lists and tuples in them."""
    seen: set[int] = set()
    values: deque[object] = deque()
    current: FrameType | None = frame
    while current is not None:
        values.extend(current.f_locals.values())
        current = current.f_back
    while values and len(seen) < _LOOKS:
        value = values.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        # list() copies: the other thread may change the container at any time.
        if isinstance(value, dict):
            values.extend(list(value.values()))
        elif isinstance(value, (list, tuple, deque)):
            values.extend(list(value))


def _refers_to(value: object, storages: Container[StorageWeakRef]) -> bool:
    """Returns whether a value is one of these storages, or a tensor or a part of an average in one of them."""
    if isinstance(value, Tensor):
        value = vars(value).get("held", value)  # a BoxedTensor has no storage, but its ``held`` has
    if type(value) is Tensor and value.layout is torch.strided and not value.is_meta:
        value = value.untyped_storage()
    return isinstance(value, torch.UntypedStorage) and StorageWeakRef(value) in storages  # type: ignore[no-untyped-call]
