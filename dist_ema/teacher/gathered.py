"""An average that is sent to a teacher at each update, where the teacher cannot hold the elements that are averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from dist_ema import kernels
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.gather import LocalValues, gather_each
from dist_ema.engines.counterpart import Counterpart
from dist_ema.engines.derived import DerivedState
from dist_ema.errors import EMAStateError
from dist_ema.geometry.runs import Runs, overlap
from dist_ema.geometry.shares import Share
from dist_ema.shadow.device import Shadow


class GatheredTeacherShadow(Shadow):
    """The average where each rank keeps its part, as without a teacher; and a teacher that is sharded in any other way.

    Every update brings all averaged tensors to all ranks, through windows of 16 MiB, and each rank writes those
    elements that its teacher holds.

    Args:
        names: of the average; there is one.
        shares: what this rank keeps of each tensor.
        skip_nonfinite: leave out NaN and Inf.
        seed: of stochastic rounding.
        counterpart: the teacher's tensors, in the order of the shares.
        claim, release: as those of :class:`~dist_ema.teacher.shadow.TeacherShadow`.
        group: the ranks of both.
        prove: lists every full tensor of these shares, once ranks have proven that they hold each element once.
            Collective.
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
        group: dist.ProcessGroup | None,
        prove: Callable[[Sequence[Share]], list[FullTensor]],
    ) -> None:
        super().__init__(names, shares, skip_nonfinite, seed)
        self._counterpart = counterpart
        self._derived = DerivedState(counterpart.modules(), drops_compiled=False)
        self._claim = claim
        self._release = release
        self._group = group
        self._prove = prove
        self._installed = False
        self._entries: list[FullTensor] | None = None

    def install(self) -> None:
        """The teacher gets what there is. Collective if there is an average: every rank then puts one in its place."""
        self._installed = True
        self.write_teacher()

    def follow(
        self,
        shares: Sequence[Share],
        places: Sequence[int],
        new: Sequence[int],
        sources: Sequence[Tensor],
        counterpart: Counterpart | None = None,
    ) -> None:
        """See :meth:`Shadow.follow`. Local; the next update sends what is new as well."""
        super().follow(shares, places, new, sources)
        self._counterpart = counterpart or self._counterpart
        self._entries = None

    def fill_new(self, sources: Sequence[Tensor], number: int) -> None:
        """See :meth:`Shadow.fill_new`. Collective, once installed."""
        super().fill_new(sources, number)
        self.write_teacher()

    def update(self, sources: Sequence[Tensor], weights: Sequence[float], number: int) -> None:
        """See :meth:`Shadow.update`. Collective."""
        super().update(sources, weights, number)
        self.write_teacher()

    def fill(self, sources: Sequence[Tensor]) -> None:
        """See :meth:`Shadow.fill`. Collective, once installed."""
        super().fill(sources)
        self.write_teacher()

    def write_teacher(self) -> None:
        """Writes the average into the teacher. Collective, once installed. Raises what a rank meets, on every rank."""
        if not (self._installed and self.started):
            return
        if self._entries is None:
            self._entries = [entry for entry in self._prove(self._shares) if entry.mode != "live"]
        (name,) = self._names
        held = {
            share.spec.name: LocalValues(share, tensor, 0)
            for share, tensor in zip(self._shares, self.tensors(name), strict=True)
            if tensor is not None
        }
        there: dict[str, tuple[Tensor, Runs]] = {}

        def take(entry: FullTensor, start: int, values: Tensor) -> None:
            """Writes those elements of a gathered window that this rank's teacher holds."""
            if not there:  # looked up inside of gather_each(), which raises an error on every rank
                there.update(self._teachers())
            if entry.name in there:
                tensor, runs = there[entry.name]
                for local, inside, length in overlap(runs, start, start + values.numel()):
                    kernels.write(tensor, local, local + length, values[inside : inside + length])

        dtypes = {entry.name: entry.dtype for entry in self._entries}
        with self._derived.renewed():
            gather_each(self._entries, held.get, dtypes, self._group, take, "update() of a teacher", everywhere=True)

    def _teachers(self) -> dict[str, tuple[Tensor, Runs]]:
        """Returns the teacher's tensors, and which elements they are, by the name in the averaged model. Local."""
        self._claim()
        self._counterpart.reshard()
        for cache in self._counterpart.caches():  # its weights are about to change
            cache.drop()
        found = {}
        specs = self._counterpart.specs_of
        tensors = self._counterpart.sources()
        self._counterpart.refuse_trained()
        for share, spec, tensor in zip(self._shares, specs, tensors, strict=True):
            if spec is not None:
                if tensor.is_meta:
                    raise EMAStateError(f"{spec.name!r} of the teacher (into=) is on the meta device")
                found[share.spec.name] = tensor, spec.runs
        return found

    def close(self) -> None:
        super().close()
        self._release()
