"""``average_parameters()`` and ``copy_to()``: the average goes into a model, and the live weights come back.

Collective where parameters are replicated or the engine has to gather (DDP, HSDP, DeepSpeed), else local.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from dist_ema.comm.agreement import Call, named_operation
from dist_ema.core.average import Average
from dist_ema.core.broadcast import swaps_together
from dist_ema.core.swap import Swap, Visit
from dist_ema.options import check_fraction
from dist_ema.runtime.interrupts import Uninterrupted
from dist_ema.shadow.reading import wait_for_reads
from dist_ema.teacher.teacher import counterpart

logger = logging.getLogger(__name__)
_OPERATION = "average_parameters()"


@contextmanager
def average_parameters(average: Average, name: str | None, held_by: str) -> Iterator[None]:
    """See :meth:`ShardedEMA.average_parameters`; ``held_by`` is what errors say of who opened it.

    An exception may come between any two lines, from a signal or a debugger. The live weights are restored in any case:
    the three levels of ``finally`` do the same, and each does only what the one inside has left.
    """
    _quiesce(average)
    swap: Swap | None = None
    condition = average.condition
    visit = Visit("", _OPERATION, held_by)
    try:
        try:
            try:
                # Signals wait. If this rank broke off here, the others would go on with half of its weights.
                with Uninterrupted():
                    swap = _swap(average, average.call(_OPERATION, name=name), name, visit, keep=True)
                    visit.open = True
                    condition.visit, condition.swap = visit, swap
                    if swap is not None:
                        with named_operation(_OPERATION):
                            swap.enter()
                yield
            finally:
                _leave(average, swap, visit)
        finally:  # an exception between two lines above ends here
            _leave(average, swap, visit)
    finally:  # and a second one here: a launcher sends SIGINT, then SIGTERM
        _leave(average, swap, visit)
        condition.visit = condition.swap = None
        written = None if swap is None else swap.written
        if written is not None and sys.exc_info()[0] is not None:  # what the block raised is not replaced
            logger.warning("average_parameters(): %s.", written)
    if written is not None:
        raise written.error(_OPERATION)


def _leave(average: Average, swap: Swap | None, visit: Visit) -> None:
    """Puts the live weights back, unless that is done. Collective where the swap is."""
    try:
        if swap is not None:
            swap.wait_for_readers()
            swap.leave()
    finally:
        visit.open = False
        average.condition.end(visit)
        if swap is not None and swap.written is not None and swap.written.changed:
            average.condition.written = swap.written


def _quiesce(average: Average) -> None:
    """Waits until no thread works on the averages or reads them. Local; signals interrupt it."""
    average.background.wait_until_read()
    average.shadow.drain()
    average.shadow.make_way()


def _swap(
    average: Average, call: Call, name: str | None, visit: Visit, keep: bool, fraction: float = 1.0
) -> Swap | None:
    """Prepares to put an average into the model. Collective where the swap is.

    Args:
        average: has the model and the average.
        call: for errors, and what all ranks have to call.
        name: which average, as the user gave it.
        visit: is told the name, and that it has begun.
        keep: whether the live weights are to be restored.
        fraction: how far ``copy()`` moves the live weights, as the user gave it.

    Returns:
        None before the first update, when the average is the live model.
    """
    started = average.shadow.started
    average.groups.check(call.name)  # the engine asks its process groups
    # In a pipeline another rank's stage may have buffers, which ranks send each other.
    together = average.engine.is_part or swaps_together(average.engine, average.shares, buffers=fraction == 1)
    turn = average.groups.turn(call.name) if together else nullcontext()
    with named_operation(call.name), turn, average.begin(call) if together else nullcontext():
        average.condition.refuse(call.name)
        visit.name = average.name(name)
        part = check_fraction(fraction)
        shadow = average.shadow
        swap = Swap(
            average.engine,
            average.shares,
            shadow.tensors(visit.name) if started else [None] * len(average.shares),
            shadow.scratch,
            visit,
            average.background.wait_until_read,
            shadow.fixed,
            part,
        )
        swap.prepare(keep and started)
    if together:
        swap.entries = average.full_tensors
    average.condition.begin(visit)
    wait_for_reads()
    return swap if started else None


def copy_to(average: Average, name: str | None, into: object, fraction: float) -> None:
    """See :meth:`ShardedEMA.copy_to`."""
    _quiesce(average)
    if into is None:
        _copy_to_live(average, name, fraction)
    else:
        _copy_into(average, name, into, fraction)


def _copy_to_live(average: Average, name: str | None, fraction: float) -> None:
    operation = "copy_to()"
    visit = Visit("", operation)
    with Uninterrupted():
        try:
            call = average.call(operation, name=name, fraction=fraction)
            swap = _swap(average, call, name, visit, keep=False, fraction=fraction)
            if swap is not None:
                with named_operation(operation):
                    swap.copy()
        finally:
            average.condition.end(visit)


def _copy_into(average: Average, name: str | None, into: object, fraction: float) -> None:
    """Copies the average into a third model, or moves that a fraction toward it. Collective."""
    operation = "copy_to(into=...)"
    visit = Visit("", operation, weights="the weights of the model that was given as into=")
    with named_operation(operation), Uninterrupted(), average.groups.turn(operation):
        with average.begin(average.call(operation, name=name, fraction=fraction)):
            view = average.view(operation, inside=False)
            visit.name = average.name(name)
            part = check_fraction(fraction)
            other = counterpart(average.engine, into, average.shares, average.options, average.group, average.teacher)
            values = view.whole_average(visit.name)
            copying = Swap(other, average.shares, values, average.shadow.scratch, visit, fraction=part)
            copying.prepare(keep=False)
        copying.entries = average.full_tensors
        wait_for_reads()
        copying.copy()


def calling_line() -> str:
    """Returns the file and line of the code that called the method that calls this."""
    frame = sys._getframe(2)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
