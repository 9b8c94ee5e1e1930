"""Whether an average and its model are whole, and whose weights the model computes with."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from dist_ema.core.swap import Swap, Visit
from dist_ema.core.writes import Written
from dist_ema.engines.base import Engine
from dist_ema.errors import EMAStateError

#: For every module that holds tensors itself, the visit of an average that is under way or that left its weights torn.
#: Of the whole process: another object may average the same model, a part of it, or one of which it is a part.
_visits: WeakKeyDictionary[nn.Module, Visit] = WeakKeyDictionary()


class Condition:
    """Knows whether a call may read or write the weights and the average. Local.

    Args:
        engine: of the model.

    Attributes:
        broken: the call that broke off when it had changed a part of the average; None where the average is whole.
        written: what others wrote into the average while it was in the model, so that it is not one any more.
        visit: of an average of ours to the model; None where the model has its own weights.
        swap: what brought that average in; None where there is no average yet.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.broken: str | None = None
        self.written: Written | None = None
        self.visit: Visit | None = None
        self.swap: Swap | None = None

    @property
    def held_by(self) -> str | None:
        """Returns who holds an average in the model; None if nobody does."""
        return next((visit.held_by for visit in self._visits() if visit.open), None)

    def refuse(self, operation: str, mends: bool = False, inside: bool = False, reads: bool = True) -> None:
        """Raises EMAStateError where a call may not be made now.

        That is inside ``average_parameters()``, unless the call may be made ``inside`` our own; and where the average
        or the live weights are not whole, unless the call ``mends`` them. An average that others have changed can be
        updated, where only this rank may know of it, but no call ``reads`` it.
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
                f"{operation}: the average is not whole, since {self.broken} broke off when it had changed a part of "
                "it. Call reset() to start anew from the live weights, or load() a checkpoint"
            )
        if self.written is not None and reads:
            raise self.written.error(operation)

    def refuse_torn(self, operation: str) -> None:
        """Refuses torn live weights, before a collective call that other ranks cannot answer."""
        if any(visit.torn is not None for visit in self._visits()):
            self.refuse(operation)

    def begin(self, visit: Visit) -> None:
        """Lets every object that averages one of these modules see the visit."""
        _visits.update(dict.fromkeys(self._holders(), visit))

    def end(self, visit: Visit) -> None:
        """The visit concerns nobody any more, unless it left the weights torn."""
        if visit.torn is None:
            for module in [module for module, known in _visits.items() if known is visit]:
                _visits.pop(module, None)

    def mended(self) -> None:
        """The average is whole, and the user says that the live weights are."""
        self.broken = None
        self.written = None
        for module in self._holders():
            _visits.pop(module, None)

    def _visits(self) -> list[Visit]:
        """Returns the visits of any average to these modules; almost always there are none."""
        if not _visits:
            return []
        return list(dict.fromkeys(_visits[module] for module in self._holders() if module in _visits))

    def _holders(self) -> list[nn.Module]:
        """Returns the modules that hold tensors themselves: overlapping targets have some of them in common."""
        roots = self._engine.modules()
        return [module for root in roots for module in root.modules() if module._parameters or module._buffers]
