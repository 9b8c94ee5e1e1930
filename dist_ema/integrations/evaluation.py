"""Checks the options that all trainers' callbacks share: which weights they evaluate, and which steps they average."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.clock import Progress

#: ``evaluate=`` of a trainer that is to evaluate the live weights and the average.
BOTH = "both"
#: ``should_update=``: told of the training clock after a step, says whether the step's weights are averaged.
ShouldUpdate: TypeAlias = Callable[[Progress], bool]


def check_choice(option: str, value: object, names: Sequence[str], both: bool = False) -> None:
    """Raises EMAConfigError unless an option is False, True, or the name of an average; True names the only one.

    Args:
        option: the name of the option.
        value: the value that the user gave.
        names: the names of the averages.
        both: whether ``"both"`` is allowed, if there is one average.
    """
    choice: list[bool | str] = [False]
    if len(names) == 1:
        choice += [True, BOTH] if both else [True]
    choice += names
    if not isinstance(value, (bool, str)) or value not in choice:
        raise EMAConfigError(f"{option}={value!r}: allowed are {', '.join(map(repr, choice))}")


def check_should_update(value: object, update_interval: object, ema_start: object) -> None:
    """Raises EMAConfigError unless ``should_update`` is None, or a callable that alone says when to update."""
    if value is None:
        return
    if not callable(value):
        raise EMAConfigError(
            f"should_update={value!r}: allowed are None and a callable that takes the training clock, such as "
            "lambda clock: clock.batches % 10 == 0"
        )
    for option, other in (("update_interval", update_interval), ("ema_start", ema_start)):
        if other is not None:
            raise EMAConfigError(f"{option}={other!r}: should_update says when to update; give one of the two")


def is_due(should_update: ShouldUpdate | None, now: Progress) -> bool | None:
    """Returns the value for ``ShardedEMA.update(due=)``: None if the interval decides."""
    return None if should_update is None else bool(should_update(now))


@contextmanager
def same_random() -> Iterator[None]:
    """Restores the states of the random generators after the block, so that a further evaluation changes no training.
    Local.

    These are the generators of Python, numpy, torch on the CPU and torch on the current accelerator.
    """
    import numpy as np

    python = random.getstate()
    legacy = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
