"""Tracks reads of weights that go on after ``update()`` has returned, so that a writer can wait for them.

An optimizer's step waits by a hook for all of torch's optimizers, from which DeepSpeed's inherit.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

from torch.optim.optimizer import register_optimizer_step_pre_hook

from dist_ema.runtime.untraced import untraced


class Reader(Protocol):
    """Something that reads weights while training goes on."""

    def wait_for_reads(self) -> None:
        """Makes later work of the device wait for the reading. Raises nothing."""


_readers: WeakSet[Reader] = WeakSet()
_hooks: list[object] = []


def wait_for_reads(*_: object) -> None:
    """Every average of this process has read its weights afterwards, as far as the device's order goes."""
    for reader in list(_readers):
        reader.wait_for_reads()


def announce(reader: Reader) -> None:
    """Makes writers of weights wait for this reader from now on."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(untraced(wait_for_reads)))
    _readers.add(reader)
