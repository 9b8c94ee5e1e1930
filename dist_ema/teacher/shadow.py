"""Keeps the average in the weights of a teacher, a second model that may be run between any two steps.

If a teacher's tensor has the dtype and the device of the shadow and is contiguous, it *is* the shadow. Otherwise the
shadow has memory of its own, and the update also writes the teacher's tensor::

    fp32 teacher   average in the teacher's tensor                     (4 bytes per parameter in all)
    bf16 teacher   average in an fp32 shadow ---> teacher's tensor     (4 + 2 bytes)
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
    """Implements :class:`Shadow` for an average that a teacher computes with, once it is installed.

    Args:
        names: the name of the average, of which there is one.
        shares, skip_nonfinite, seed: as for :class:`Shadow`.
        counterpart: the teacher's tensors, in the order of the shares.
        claim: called before the teacher is written; raises EMAStateError if another average writes to it.
        release: called on ``close()``, when another average may write to the teacher.
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
        self._tensors: list[Tensor] = []  # the teacher's tensors at the last look
        self._addresses: list[int] = []  # where these were, to notice that they have moved
        self._nothing = torch.empty(0)  # stands for a share without a shadow

    @property
    def fixed(self) -> frozenset[int]:
        """Returns the shares whose shadow is the teacher's tensor, so a swap must not exchange elements with it."""
        kept = frozenset(self._averaged + self._copied)
        return kept - self._own if self._installed and self.started else frozenset()

    def install(self) -> None:
        """Moves the average, with its present values, into the teacher. Local."""
        if self._installed:
            return
        self._installed = True
        if self.started:
            values = self._by_share()
            self._place([values.get(index, self._nothing) for index in range(len(self._shares))], values)
            self.write_teacher()

    def allocate(self, sources: Sequence[Tensor]) -> None:
        """Implements :meth:`Shadow.allocate`; once installed, only for shadows that cannot be the teacher's tensors."""
        if self._installed:
            self._place(sources)
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
        """Implements :meth:`Shadow.follow`. Shares that join use the teacher's tensors too."""
        averaged, copied = self._numbers_after(shares, places, new)
        # Shadows that are not the teacher's tensors keep their memory, under their new indices.
        values = {places[index]: tensor for index, tensor in self._by_share().items()} if self.started else {}
        own = {places[index]: values[places[index]] for index in self._own} if self.started else {}
        before = self._shares, self._counterpart
        self._shares = shares
        self._counterpart = counterpart or self._counterpart
        # Everything that may fail comes first, and is undone if it does.
        try:
            if self.started:
                tensors = self._teacher_tensors()
                self._refuse_resized(tensors, new)
                beside = [index for index in new if not self._can_be_shadow(tensors[index], sources[index], index)]
                own |= dict(zip(beside, self._allocate(sources, beside), strict=True))
        except BaseException:
            self._shares, self._counterpart = before
            raise
        self._averaged = averaged
        self._copied = copied
        self._positions = None
        if self.started:
            self._own = frozenset(own)
            self._new = list(new)
            self._take_views(tensors, own)

    def _refuse_resized(self, tensors: Sequence[Tensor], new: Sequence[int]) -> None:
        """Raises EMAStateError if the teacher's tensor has another size than the average that will use it."""
        for index in new:
            if tensors[index].numel() != self._shares[index].numel:
                raise EMAStateError(
                    f"{self._shares[index].spec.name!r} was resized to {self._shares[index].numel} elements on this "
                    f"rank, and the teacher (into=) has {tensors[index].numel()} there: resize the teacher's too, or "
                    "leave that tensor out of the average (exclude=, buffers='ignore')"
                )

    def _fill_new(self, sources: Sequence[Tensor], number: int) -> None:
        super()._fill_new(sources, number)
        self.write_teacher()

    def update(self, sources: Sequence[Tensor], weights: Sequence[float], number: int) -> None:
        """Implements :meth:`Shadow.update`. The same kernel also writes teacher tensors that are not the shadow."""
        self._follow_teacher()
        with self._derived.renewed():
            super().update(sources, weights, number)
            self._finish_write()

    def fill(self, sources: Sequence[Tensor]) -> None:
        """Implements :meth:`Shadow.fill`."""
        super().fill(sources)
        self.write_teacher()

    def loaded(self) -> None:
        """Implements :meth:`Shadow.loaded`."""
        super().loaded()
        self.write_teacher()

    def tensors(self, name: str) -> list[Tensor | None]:
        """Implements :meth:`Shadow.tensors`."""
        self._follow_teacher()
        return super().tensors(name)

    def release_parts(self) -> None:
        """Implements :meth:`Shadow.release_parts`. The teacher's memory cannot move, so there the parts are copied."""
        if lent.outstanding() and self._installed and self.started:
            lent.move_parts(self._tensors[index] for index in self.fixed)
        super().release_parts()

    def write_teacher(self) -> None:
        """Writes the teacher's tensors that are not the shadow itself. Local."""
        if not (self._installed and self.started):
            return
        with self._derived.renewed():
            if self._copies is not None:
                (average,) = self._averages.values()
                kernels.write_copies(average, self._copies, range(len(average)))
            self._finish_write()

    def _finish_write(self) -> None:
        """Writes the teacher's buffers, and drops what the teacher has cached of its previous weights. Local."""
        if self._installed and self.started:
            for index, buffer in zip(self._copied, self._buffers, strict=True):
                if index in self._own:
                    kernels.write(self._tensors[index], 0, self._shares[index].numel, buffer)
            for cache in self._counterpart.caches():
                cache.drop()

    def nbytes(self) -> dict[torch.device, int]:
        """Implements :meth:`Shadow.nbytes`, without the teacher's own memory."""
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

    def _teacher_tensors(self) -> list[Tensor]:
        """Returns the teacher's tensors as they are now. Local.

        A forward pass without a backward pass leaves full weights behind (FSDP's root, ZeRO-3's small parameters), and
        the next forward pass would use them again. They are dropped here, so that it sees the new values.
        """
        self._claim()
        self._counterpart.reshard()
        tensors = self._counterpart.sources()
        self._counterpart.refuse_trained()
        return tensors

    def _follow_teacher(self) -> None:
        """Takes new views of the teacher's tensors if their memory has moved. Local; no host sync."""
        if not (self._installed and self.started):
            return
        tensors = self._teacher_tensors()
        if list(map(Tensor.data_ptr, tensors)) == self._addresses:
            return  # the usual case: nothing has moved
        # After a move, for example by ``teacher.to(device)``, a tensor must still be able to be the shadow.
        for index in self._averaged + self._copied:
            if index not in self._own and not self._can_be_shadow(tensors[index], self._tensors[index], index):
                raise EMAStateError(
                    f"{self._shares[index].spec.name!r} of the teacher (into=) has another dtype, layout or device "
                    "than when averaging began. Call reset() to start again"
                )
        self._refuse_resized(tensors, self._averaged + self._copied)
        self._take_views(tensors, self._by_share())

    def _place(self, beside: Sequence[Tensor], values: dict[int, Tensor] | None = None) -> None:
        """Decides for each shadow whether it is the teacher's tensor, and allocates the others. Local.

        Args:
            beside: for each share a tensor on the device that the shadow should have.
            values: values to copy into the shadows, by index of the share; None leaves them as they are.
        """
        kept = self._averaged + self._copied
        tensors = self._teacher_tensors()
        lent.move_parts(tensors[index] for index in kept)  # parts of a state_dict() that are views of the teacher
        for index in kept:
            if tensors[index].is_meta:
                raise EMAStateError(
                    f"{self._shares[index].spec.name!r} of the teacher (into=) is on the meta device: materialize it "
                    "before update() or load()"
                )
        self._own = frozenset(index for index in kept if not self._can_be_shadow(tensors[index], beside[index], index))
        own = sorted(self._own)
        if values is not None and len(own) == len(kept):
            self._take_views(tensors, values)  # no shadow moves
            return
        self._take_views(tensors, dict(zip(own, self._allocate(beside, own), strict=True)))
        found = self._by_share()
        for index, value in (values or {}).items():
            found[index].copy_(value)

    def _can_be_shadow(self, tensor: Tensor, beside: Tensor, index: int) -> bool:
        """Returns whether a teacher's tensor has the dtype, device and layout that the shadow of a share needs."""
        here = tensor.device == beside.device and tensor.dtype == self._shares[index].dtype
        return here and tensor.is_contiguous()

    def _take_views(self, tensors: list[Tensor], own: dict[int, Tensor]) -> None:
        """Sets the averages and buffers to views of the teacher's ``tensors``, or to ``own`` memory. Local."""
        # The average is the teacher's memory where that is possible. Only for the other tensors is there something to
        # copy after an update.
        views = {
            index: own[index] if index in self._own else tensors[index].view(-1)
            for index in self._averaged + self._copied
        }
        self._averages = {name: [views[index] for index in self._averaged] for name in self._names}
        self._buffers = [views[index] for index in self._copied]
        written = [tensors[index] if index in self._own else None for index in self._averaged]
        self._copies = Copies(written) if self._own.intersection(self._averaged) else None
        self._tensors = tensors
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._spans = None
