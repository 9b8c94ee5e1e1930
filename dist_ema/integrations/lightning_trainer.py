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

    # Remember what the block replaces.
    kept_metrics = {name: getattr(connector, name) for name in _METRICS}
    kept_callbacks = trainer.callbacks
    kept_verbose = loop.verbose

    # Give the evaluation metrics of its own, so that it does not overwrite those of the evaluation around it.
    for name in _METRICS:
        setattr(connector, name, {})
    connector.log_metrics = _log_nothing  # an attribute of the instance hides the class's method
    trainer.callbacks = list(callbacks)
    loop.verbose = False  # prints no table of results
    try:
        yield found
        found.update(connector._callback_metrics)
    finally:
        trainer.callbacks = kept_callbacks
        loop.verbose = kept_verbose
        del connector.log_metrics  # the class's method is visible again
        for name, value in kept_metrics.items():
            setattr(connector, name, value)


def _log_nothing(*_: object, **__: object) -> None:
    """Replaces ``log_metrics()``, which would send the metrics to the trainer's loggers."""
