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
    """Implements :meth:`ShardedEMA.average_parameters`; ``held_by`` names who opened it, for errors.

    A signal or a debugger may raise an exception between any two lines. The live weights are restored in any case: all
    three levels of ``finally`` call ``_leave()``, and each call does only what the previous one has left undone.
    """
    _wait_for_threads(average)
    swap: Swap | None = None
    condition = average.condition
    visit = Visit("", _OPERATION, held_by)
    try:
        try:
            try:
                # Signals wait until the end of this block. If this rank stopped inside it, the others would go on with
                # half of its weights.
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
        finally:  # for an exception that came between the yield and the end of the first _leave()
            _leave(average, swap, visit)
    finally:  # for a second exception: launchers send SIGINT, and then SIGTERM
        _leave(average, swap, visit)
        condition.visit = condition.swap = None
        written = None if swap is None else swap.written
        if written is not None and sys.exc_info()[0] is not None:  # the block's own exception is more important
            logger.warning("average_parameters(): %s.", written)
    if written is not None:
        raise written.error(_OPERATION)


def _leave(average: Average, swap: Swap | None, visit: Visit) -> None:
    """Restores the live weights, unless that is done. Collective if the swap is."""
    try:
        if swap is not None:
            swap.wait_for_readers()
            swap.leave()
    finally:
        visit.open = False
        average.condition.end(visit)
        if swap is not None and swap.written is not None and swap.written.changed:
            average.condition.written = swap.written


def _wait_for_threads(average: Average) -> None:
    """Waits until no thread writes or reads the averages. Local; signals interrupt it."""
    average.background.wait_until_read()
    average.shadow.drain()
    average.shadow.release_parts()


def _swap(
    average: Average, call: Call, name: str | None, visit: Visit, keep: bool, fraction: float = 1.0
) -> Swap | None:
    """Prepares a swap of an average and the live weights. Collective if the swap is.

    Args:
        average: the object whose model it is.
        call: the call that every rank has to make.
        name: the name of the average, as the user gave it.
        visit: gets the name, and is begun.
        keep: whether the live weights will be restored.
        fraction: how far ``copy()`` moves the live weights, as the user gave it.

    Returns:
        None before the first update, when the average is the live model.
    """
    started = average.shadow.started
    average.groups.check(call.name)  # before the engine uses its process groups
    # In a pipeline the stage of another rank may have buffers that ranks send each other, so all ranks take part.
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
    """Implements :meth:`ShardedEMA.copy_to`."""
    _wait_for_threads(average)
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
    """Copies the average into another model, or moves that model a fraction toward it. Collective."""
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
