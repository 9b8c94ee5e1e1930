"""Uses private parts of Lightning's Trainer for a second evaluation. Read in lightning 2.6.6."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


@contextmanager
def unseen_evaluation(trainer: Any, loop: Any, callbacks: Sequence[Any]) -> Iterator[dict[str, Tensor]]:
    """Keeps an evaluation in the block out of the logs, and shows it to the given callbacks only.

    Yields the dict of the metrics that callbacks would see. It is filled when the block ends.

    Args:
        trainer: the trainer that evaluates.
        loop: the trainer's loop that will be run.
        callbacks: the callbacks that take part.
    """
    connector = trainer._logger_connector
    found = dict[str, Tensor]()
    kept = {name: getattr(connector, name) for name in _METRICS}
    others = trainer.callbacks
    verbose = loop.verbose
    for name in _METRICS:
        setattr(connector, name, {})
    connector.log_metrics = _log_nothing  # in front of the class's method
    trainer.callbacks, loop.verbose = list(callbacks), False
    try:
        yield found
        found.update(connector._callback_metrics)
    finally:
        trainer.callbacks, loop.verbose = others, verbose
        del connector.log_metrics
        for name, value in kept.items():
            setattr(connector, name, value)


def _log_nothing(*_: object, **__: object) -> None:
    return
