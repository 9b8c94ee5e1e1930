"""Tracks reads of weights that continue after ``update()`` has returned, so that writers can wait for them.

Optimizer steps wait by a hook that torch calls before each step of every optimizer. DeepSpeed's optimizers run a torch
optimizer inside, so the hook is called for them too.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

from torch.optim.optimizer import register_optimizer_step_pre_hook

from dist_ema.runtime.untraced import untraced


class Reader(Protocol):
    """Reads weights while training continues."""

    def wait_for_reads(self) -> None:
        """Makes later work on the device wait until the weights have been read. Raises nothing."""


_readers: WeakSet[Reader] = WeakSet()
_hooks: list[object] = []


def wait_for_reads(*_: object) -> None:
    """Waits until every average of this process has read its weights. For copies by a device only the device waits."""
    for reader in list(_readers):
        reader.wait_for_reads()


def announce(reader: Reader) -> None:
    """Registers a reader, so that optimizers wait for it from now on. The reader is held by a weak reference."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(untraced(wait_for_reads)))
    _readers.add(reader)
