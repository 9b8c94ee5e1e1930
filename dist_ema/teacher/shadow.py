"""An average that is a model: its memory is a teacher's weights, which compute at any time between two steps.

Where a teacher's tensor has the shadow's dtype, lies together and on the same device, it *is* the shadow. Else the
shadow is kept as ever (fp32, for a bf16 teacher), and the teacher's tensor is written from it after each update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dist_ema import kernels
from dist_ema.engines.counterpart import Counterpart
from dist_ema.engines.derived import DerivedState
from dist_ema.errors import EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.kernels.copies import Copies
from dist_ema.shadow import lent
from dist_ema.shadow.device import Shadow


class TeacherShadow(Shadow):
    """The average that a teacher computes with, once it is installed.

    Args:
        names: of the average; there is one.
        shares: what this rank keeps of each tensor.
        skip_nonfinite: leave out NaN and Inf.
        seed: of stochastic rounding.
        counterpart: the teacher's tensors, in the order of the shares.
        claim: called before the teacher is written; raises EMAStateError if that is another's.
        release: called when nothing more will be written, as far as one knows.
    """

    def __init__(
        self,
        names: Iterable[str],
        shares: Sequence[Share],
        skip_nonfinite: bool,
        seed: int | None,
        counterpart: Counterpart,
        claim: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        super().__init__(names, shares, skip_nonfinite, seed)
        self._claim = claim
        self._release = release
        self._counterpart = counterpart
        self._derived = DerivedState(counterpart.modules(), drops_compiled=False)
        self._installed = False
        self._own: frozenset[int] = frozenset()  # shares whose shadow is not the teacher's memory
        self._tensors: list[Tensor] = []  # the teacher's
        self._nothing = torch.empty(0)
        self._addresses: list[int] = []

    @property
    def fixed(self) -> frozenset[int]:
        """Shares whose shadow the teacher computes with, so that nothing may change places with it."""
        kept = frozenset(self._averaged + self._copied)
        return kept - self._own if self._installed and self.started else frozenset()

    def install(self) -> None:
        """Moves the average into the teacher, with the values that it has already. Local."""
        if self._installed:
            return
        self._installed = True
        if self.started:
            values = self._by_share()
            self._lie_down([values.get(index, self._nothing) for index in range(len(self._shares))], values)
            self.hand_on()

    def allocate(self, sources: Sequence[Tensor]) -> None:
        """See :meth:`Shadow.allocate`; once installed, only for what cannot lie in the teacher."""
        if self._installed:
            self._lie_down(sources)
        else:
            super().allocate(sources)

    def follow(
        self,
        shares: Sequence[Share],
        places: Sequence[int],
        new: Sequence[int],
        sources: Sequence[Tensor],
        counterpart: Counterpart | None = None,
    ) -> None:
        """See :meth:`Shadow.follow`; what joins lies in the teacher like the others, and overwrites what is there."""
        averaged, copied = self._numbers_after(shares, places, new)
        values = {places[index]: tensor for index, tensor in self._by_share().items()} if self.started else {}
        own = {places[index]: values[places[index]] for index in self._own} if self.started else {}
        before = self._shares, self._counterpart
        self._shares, self._counterpart = shares, counterpart or self._counterpart
        try:
            if self.started:
                tensors = self._look()
                self._refuse_resized(tensors, new)
                beside = [index for index in new if not self._lies_in(tensors[index], sources[index], index)]
                own |= dict(zip(beside, self._allocate(sources, beside), strict=True))
        except BaseException:
            self._shares, self._counterpart = before
            raise
        self._averaged, self._copied, self._positions = averaged, copied, None
        if self.started:
            self._own, self._new = frozenset(own), list(new)
            self._take_views(tensors, own)

    def _refuse_resized(self, tensors: Sequence[Tensor], new: Sequence[int]) -> None:
        """Raises EMAStateError if the teacher's tensor has not the shape of the average that shall lie in it."""
        for index in new:
            if tensors[index].numel() != self._shares[index].numel:
                raise EMAStateError(
                    f"{self._shares[index].spec.name!r} was resized to {self._shares[index].numel} elements on this "
                    f"rank, and the teacher (into=) has {tensors[index].numel()} there: resize the teacher's too, or "
                    "leave that tensor out of the average (exclude=, buffers='ignore')"
                )

    def _fill_new(self, sources: Sequence[Tensor], number: int) -> None:
        super()._fill_new(sources, number)
        self.hand_on()

    def update(self, sources: Sequence[Tensor], weights: Sequence[float], number: int) -> None:
        """See :meth:`Shadow.update`; the same pass writes what does not lie in the teacher."""
        self._find()
        with self._derived.renewed():
            super().update(sources, weights, number)
            self._finish_write()

    def fill(self, sources: Sequence[Tensor]) -> None:
        """See :meth:`Shadow.fill`."""
        super().fill(sources)
        self.hand_on()

    def loaded(self) -> None:
        """See :meth:`Shadow.loaded`."""
        super().loaded()
        self.hand_on()

    def tensors(self, name: str) -> list[Tensor | None]:
        """See :meth:`Shadow.tensors`."""
        self._find()
        return super().tensors(name)

    def release_parts(self) -> None:
        """See :meth:`Shadow.release_parts`. What lies in the teacher cannot move, so there the parts do."""
        if lent.outstanding() and self._installed and self.started:
            lent.move_parts(self._tensors[index] for index in self.fixed)
        super().release_parts()

    def hand_on(self) -> None:
        """Writes into the teacher what does not lie there. Local."""
        if not (self._installed and self.started):
            return
        with self._derived.renewed():
            if self._copies is not None:
                (average,) = self._averages.values()
                kernels.write_copies(average, self._copies, range(len(average)))
            self._finish_write()

    def _finish_write(self) -> None:
        """Writes the buffers, and drops what the teacher has computed from the weights that it had. Local."""
        if self._installed and self.started:
            for index, buffer in zip(self._copied, self._buffers, strict=True):
                if index in self._own:
                    kernels.write(self._tensors[index], 0, self._shares[index].numel, buffer)
            for cache in self._counterpart.caches():  # the teacher's weights are others now
                cache.drop()

    def nbytes(self) -> dict[torch.device, int]:
        """See :meth:`Shadow.nbytes`; without the teacher's own memory."""
        sizes = super().nbytes()
        for index in self.fixed:
            sizes[self._tensors[index].device] -= self._tensors[index].nbytes
        return sizes

    def notes(self) -> list[str]:
        size = sum(self._tensors[index].nbytes for index in self.fixed)
        return [f"the teacher's own weights are {size / 2**20:.1f} MiB of the average, in no other memory"]

    def close(self) -> None:
        super().close()
        self._release()

    def _by_share(self) -> dict[int, Tensor]:
        """Returns the shadow of each share that has one."""
        (average,) = self._averages.values()
        return dict(zip(self._averaged + self._copied, [*average, *self._buffers], strict=True))

    def _look(self) -> list[Tensor]:
        """Returns the teacher's tensors as they are now. Local.

        A forward pass without a backward leaves full weights behind (FSDP's root, ZeRO-3's small parameters), which the
        next one would take as they are: they are dropped first, so that it sees what is written.
        """
        self._claim()
        self._counterpart.reshard()
        tensors = self._counterpart.sources()
        self._counterpart.refuse_trained()
        return tensors

    def _find(self) -> None:
        """Follows the teacher's memory, which may have moved. Local; no host sync."""
        if not (self._installed and self.started):
            return
        tensors = self._look()
        if list(map(Tensor.data_ptr, tensors)) == self._addresses:
            return
        for index in self._averaged + self._copied:
            if index not in self._own and not self._lies_in(tensors[index], self._tensors[index], index):
                raise EMAStateError(
                    f"{self._shares[index].spec.name!r} of the teacher (into=) has another dtype, layout or device "
                    "than it had when the average was begun. Call reset() to begin anew"
                )
        self._refuse_resized(tensors, self._averaged + self._copied)
        self._take_views(tensors, self._by_share())

    def _lie_down(self, beside: Sequence[Tensor], values: dict[int, Tensor] | None = None) -> None:
        """Finds where each shadow lies: in the teacher, or ``beside`` the tensors given. Copies ``values`` there."""
        kept = self._averaged + self._copied
        tensors = self._look()
        lent.move_parts(tensors[index] for index in kept)
        for index in kept:
            if tensors[index].is_meta:
                raise EMAStateError(
                    f"{self._shares[index].spec.name!r} of the teacher (into=) is on the meta device: materialise it "
                    "before update() or load()"
                )
        self._own = frozenset(index for index in kept if not self._lies_in(tensors[index], beside[index], index))
        own = sorted(self._own)
        if values is not None and len(own) == len(kept):
            self._take_views(tensors, values)  # in the memory that they have
            return
        self._take_views(tensors, dict(zip(own, self._allocate(beside, own), strict=True)))
        found = self._by_share()
        for index, value in (values or {}).items():
            found[index].copy_(value)

    def _lies_in(self, tensor: Tensor, beside: Tensor, index: int) -> bool:
        here = tensor.device == beside.device and tensor.dtype == self._shares[index].dtype
        return here and tensor.is_contiguous()

    def _take_views(self, tensors: list[Tensor], own: dict[int, Tensor]) -> None:
        views = {
            index: own[index] if index in self._own else tensors[index].view(-1)
            for index in self._averaged + self._copied
        }
        self._averages = {name: [views[index] for index in self._averaged] for name in self._names}
        self._buffers = [views[index] for index in self._copied]
        written = [tensors[index] if index in self._own else None for index in self._averaged]
        self._copies = Copies(written) if self._own.intersection(self._averaged) else None
        self._tensors, self._addresses, self._spans = tensors, list(map(Tensor.data_ptr, tensors)), None
