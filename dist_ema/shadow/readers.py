"""Whether another thread of this process works with a tensor, which its variables tell."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Container, Iterator
from types import FrameType

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

#: Objects among one thread's variables that are looked at.
_LOOKS = 50_000


def is_at_work(storages: Container[StorageWeakRef]) -> bool:
    """Returns whether a tensor with one of these storages is among the variables of another thread, or in a dict or
    list there.

    A thread that has it elsewhere, as an attribute, is noticed while it has the tensor itself in hand. Local.
    """
    own = threading.get_ident()
    frames = [frame for thread, frame in sys._current_frames().items() if thread != own]
    return any(_sees(value, storages) for frame in frames for value in _values(frame))


def _values(frame: FrameType) -> Iterator[object]:
    """Everything that the functions of one thread have in variables, and what these contain."""
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
        # Copies, since the other thread may change them at any time.
        if isinstance(value, dict):
            values.extend(list(value.values()))
        elif isinstance(value, (list, tuple, deque)):
            values.extend(list(value))


def _sees(value: object, storages: Container[StorageWeakRef]) -> bool:
    """Returns whether this is one of the storages, or a tensor, or a part of an average, that lies there."""
    if isinstance(value, Tensor):
        value = vars(value).get("held", value)  # of a BoxedTensor, which has no storage
    if type(value) is Tensor and value.layout is torch.strided and not value.is_meta:
        value = value.untyped_storage()
    return isinstance(value, torch.UntypedStorage) and StorageWeakRef(value) in storages  # type: ignore[no-untyped-call]
