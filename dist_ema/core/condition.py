"""Decides whether a call may read or write the weights and the average now.

A call is refused if the model holds an average (``average_parameters()`` is open), if the live weights are torn (see
``swap.py``), if an update has failed half way, or if other code has written into the average.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from dist_ema.core.swap import Swap, Visit
from dist_ema.core.writes import Written
from dist_ema.engines.base import Engine
from dist_ema.errors import EMAStateError

#: Maps every module that holds tensors itself to the visit that is open in it, or that left its weights torn. There is
#: one map for the process, because several ShardedEMA objects may average one model, or models that overlap.
_visits: WeakKeyDictionary[nn.Module, Visit] = WeakKeyDictionary()


class Condition:
    """Records what has happened to one average and its model, and refuses calls accordingly. Local.

    Args:
        engine: the engine of the model.

    Attributes:
        broken: the call that failed after it had changed a part of the average; None if the average is intact.
        written: what other code wrote into the average while it was in the model; None if nothing was written.
        visit: the open visit of one of this object's averages; None if the model has its live weights.
        swap: the swap of that visit; None before the first update, when the live model is the average.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.broken: str | None = None
        self.written: Written | None = None
        self.visit: Visit | None = None
        self.swap: Swap | None = None

    @property
    def held_by(self) -> str | None:
        """Returns who holds an average in the model; None if the model has its live weights."""
        return next((visit.held_by for visit in self._visits() if visit.open), None)

    def refuse(self, operation: str, mends: bool = False, inside: bool = False, reads: bool = True) -> None:
        """Raises EMAStateError if a call may not be made now.

        Args:
            operation: the call, for errors.
            mends: the call replaces the average, so it may be made although the average or the weights are damaged.
            inside: the call may be made while this object's own ``average_parameters()`` is open.
            reads: the call reads the average. ``update()`` does not: it is allowed after other code has written into
                the average, since possibly only this rank knows of that, and the other ranks would go on without it.
        """
        visits = self._visits()
        for visit in visits:
            if visit.open and not (inside and visit is self.visit):
                raise EMAStateError(
                    f"{operation} inside average_parameters({visit.name!r}), which {visit.held_by} holds open: the "
                    "live weights and the shadow have changed places there; call it after the with block"
                )
        if mends:
            return
        for visit in visits:
            if visit.torn is not None:
                raise EMAStateError(f"{operation}: {visit.torn}")
        if self.broken is not None:
            raise EMAStateError(
                f"{operation}: the average is not whole, because {self.broken} failed after it had changed a part of "
                "it. Call reset() to start again from the live weights, or load() a checkpoint"
            )
        if self.written is not None and reads:
            raise self.written.error(operation)

    def refuse_torn(self, operation: str) -> None:
        """Raises EMAStateError if live weights are torn: the ranks that tore them no longer answer collective calls."""
        if any(visit.torn is not None for visit in self._visits()):
            self.refuse(operation)

    def begin(self, visit: Visit) -> None:
        """Opens a visit for every object that averages one of these modules."""
        _visits.update(dict.fromkeys(self._holders(), visit))

    def end(self, visit: Visit) -> None:
        """Closes a visit. One that left the weights torn stays recorded."""
        if visit.torn is None:
            for module in [module for module, known in _visits.items() if known is visit]:
                _visits.pop(module, None)

    def clear(self) -> None:
        """Forgets all damage, after ``reset()`` or ``load()``. The caller has replaced the average, and the user has
        loaded the live weights again if they were torn.
        """
        self.broken = None
        self.written = None
        for module in self._holders():
            _visits.pop(module, None)

    def _visits(self) -> list[Visit]:
        """Returns the visits that are recorded for these modules; almost always there are none."""
        if not _visits:
            return []
        return list(dict.fromkeys(_visits[module] for module in self._holders() if module in _visits))

    def _holders(self) -> list[nn.Module]:
        """Returns the modules that hold tensors themselves. Models that overlap have some of them in common."""
        roots = self._engine.modules()
        return [module for root in roots for module in root.modules() if module._parameters or module._buffers]
