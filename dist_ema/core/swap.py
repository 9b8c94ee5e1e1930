"""Puts an average into the live model, and the live weights back, without a second model.

Where shadow and source have one dtype they change places, so nothing else is held. Where they differ (an fp32 shadow of
bf16 weights) the live elements that this rank averages are kept beside. Replicas each write the part that they average
and then send it to each other; on the way back they send the live weights in the same manner, which restores them bit
for bit because replicas hold the same bits. That is checked on the way in, and where it does not hold each rank keeps
what it had. Buffers that each rank has for itself (BatchNorm's) are inside those that an export would write: the rank
that writes them sends them, and every rank keeps its own.

What is local may break off anywhere and goes on where it was. What is collective cannot be repeated, since the other
ranks are elsewhere by then: signals wait for its end, and where it fails the weights are said to be *torn*.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_ema import kernels
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.collectives import peer_errors
from dist_ema.core.broadcast import Broadcast, is_own
from dist_ema.core.writes import Watch, Written
from dist_ema.engines.base import Engine
from dist_ema.engines.derived import DerivedState
from dist_ema.errors import EMAError, EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.geometry.subclasses import CachedScale
from dist_ema.runtime.interrupts import Uninterrupted
from dist_ema.shadow import lent

logger = logging.getLogger(__name__)
#: Errors in a row after which the way back is given up; interrupts do not count.
_TRIES = 3


@dataclass(eq=False)
class Visit:
    """One visit of an average to a live model, as all calls that touch the model have to know of it.

    Attributes:
        name: of the average.
        operation: the call.
        held_by: who opened it, as errors say it.
        open: whether the model computes with it.
        torn: what happened to live weights that are neither the average nor what they were before.
        weights: whose those are, as errors say it.
    """

    name: str
    operation: str
    held_by: str = ""
    open: bool = False
    torn: str | None = None
    weights: str = "the live weights"


class Swap:
    """One visit of an average to the live model: ``prepare()``, ``enter()``, then ``leave()``; or ``copy()``.

    Args:
        engine: of the model.
        shares: what this rank keeps of each tensor.
        shadows: the average, None where it is live.
        scratch: nothing else may use it until ``leave()``.
        visit: told whether the weights are torn.
        wait: returns when nobody reads the average any more where it is. To be left, it has to be moved.
        fixed: shares whose shadow has to stay where it is, since another model computes with it: the live elements are
            kept beside.
        fraction: how far ``copy()`` moves the live weights toward the average. Below 1 it moves only what is averaged,
            and each rank's buffers toward the average that this rank has of them.

    Attributes:
        entries: every full tensor of the model; to be set before ``enter()`` where the swap is collective.
        written: the parameters that others wrote while the average was in the model; None if none was.
    """

    def __init__(
        self,
        engine: Engine,
        shares: Sequence[Share],
        shadows: Sequence[Tensor | None],
        scratch: kernels.Scratch,
        visit: Visit,
        wait: Callable[[], None] = lambda: None,
        fixed: Collection[int] = (),
        fraction: float = 1.0,
    ) -> None:
        self._engine = engine
        self._shares = shares
        self._shadows = shadows
        self._scratch = scratch
        self._visit = visit
        self._wait = wait
        self._watch = Watch(engine, shares)
        self._derived = DerivedState(engine.modules())
        self._fixed = self._watch.excused.union(fixed)
        self.written: Written | None = None
        self._compared = False  # whether ``written`` is known
        self._broadcast = Broadcast(engine, shares)
        self.entries: Sequence[FullTensor] = ()
        self._exchanges: dict[int, kernels.Exchange] = {}
        self._blends: dict[int, kernels.Blend] | None = None if fraction == 1 else self._plan_blends(fraction)
        self._kept: dict[int, Tensor] = {}
        self._diverged: dict[int, Tensor] = {}
        self._outside: dict[int, Tensor] = {}  # buffers that others, of the average's shape, stand in for
        self._shapes: dict[int, torch.Size] = {}  # of buffers, before the average came in
        self._sent_shapes: dict[str, torch.Size] = {}  # of the buffers that ranks send each other
        self._sources: list[Tensor] = []
        self._caches: list[CachedScale] = []
        # How far it has come.
        self._is_kept = False  # live elements that cannot change places are
        self._where: Literal["outside", "sending", "inside"] = "outside"  # of what ranks bring each other
        self._done = True  # nothing is left to do, or to undo

    def prepare(self, keep: bool) -> None:
        """Looks whether this rank can take part; with ``keep`` takes the memory that ``enter()`` needs. Local.

        Raises EMAStateError. To be called first, and where the swap is collective by all ranks, which then agree to go
        on: the others would wait for one that cannot.
        """
        try:
            self._engine.reshard()
            sources = self._engine.sources()
            if keep:
                self._kept = self._spare(sources)
                self._exchanges = self._plan(sources)
        except EMAError:
            raise
        except Exception as error:  # no memory, for one
            raise EMAStateError(f"{type(error).__name__}: {error}") from error

    def in_model(self, index: int) -> bool:
        """Returns whether share ``index`` of the average is in the model, and its shadow holds the live elements.
        Local.
        """
        return index in self._exchanges

    def live(self, index: int) -> Tensor | None:
        """Returns this rank's live elements of share ``index``, flat, while the average is in the model; None if they
        are in the model. Local.
        """
        return self._shadows[index] if index in self._exchanges else self._kept.get(index)

    def wait_for_readers(self) -> None:
        """Waits for threads that read what ``leave()`` is going to write, at most 30 s. Local; signals interrupt it."""
        if not self._done:
            lent.wait([*self._sources, *self._shadows])

    @torch.no_grad()
    def enter(self) -> None:
        """The live model computes with the average afterwards. Collective as :func:`swaps_together` says. If it raises,
        ``leave()`` undoes what was done."""
        self._engine.reshard()
        with self._derived.renewed():
            self._sources = self._engine.sources()
            lent.make_way(self._sources)
            self._settle()
            self._caches = self._engine.caches()
            self._done = False  # from here on leave() has something to undo
            self._keep()  # copies live elements that cannot change places
            self._put(inside=True)  # this rank's part of the average, local
            self._drop_caches()
            self._share(inside=True)  # the parts of the replicas, and publish()
        torch.clear_autocast_cache()  # it holds casts of the weights that were
        self._watch.begin()

    def leave(self) -> None:
        """The live weights are bit for bit what they were, and the shadow too. Collective where replicas or ``publish``
        are.

        Called again it goes on where it broke off. What interrupts it is raised when all is done.

        Raises:
            EMAStateError: a parameter was replaced inside; or the weights are torn, which ``visit.torn`` then says.
        """
        self._finish(self._leave)

    def copy(self) -> None:
        """Writes the average into the live model for good, or moves the model a fraction toward it; the shadow stays.

        Collective as ``enter``; with a fraction, as :func:`swaps_together` without buffers. Raises as ``leave``.
        """
        self._done = False
        self._finish(self._copy)

    def _finish(self, step: Callable[[], None]) -> None:
        """Repeats a step that goes on where it stopped until all is done; raises what came in its way afterwards."""
        first: BaseException | None = None
        failures = 0
        with Uninterrupted():
            while not self._done:
                try:
                    step()
                except BaseException as error:
                    first = error if first is None else first
                    failures += isinstance(error, Exception)
                    if failures >= _TRIES and not self._done:
                        raise self._tear() from first
        if self._visit.torn is not None and first is not None:
            raise self._tear() from first
        if first is not None:
            raise first

    @torch.no_grad()
    def _leave(self) -> None:
        self._wait()
        self._engine.reshard()
        replaced: EMAStateError | None = None
        try:
            self._sources = self._engine.sources()
        except EMAStateError as error:  # the shadow is still in the tensors that there were
            replaced = error
        else:
            self._compare()
        lent.make_way([*self._sources, *self._shadows])
        with self._derived.renewed():
            self._settle()
            self._put(inside=False)
            for cache in self._caches:
                cache.restore()
            if self._where != "outside":
                self._share(inside=False)
            for index, whole in self._diverged.items():
                kernels.write(self._sources[index], 0, self._shares[index].spec.local_numel, whole)
        torch.clear_autocast_cache()
        self._done = True
        if replaced is not None:
            raise replaced

    def check_writes(self, operation: str) -> None:
        """Raises EMAStateError if parameters were written since ``enter()``. Local."""
        self._engine.reshard()
        written = self._watch.parameters(self.in_model)
        if written is not None and not self._done:
            raise written.error(operation)

    def accept_buffers(self) -> None:
        """Writes into buffers up to now were our own, and have been undone. Local."""
        self._watch.accept_buffers()

    def _compare(self) -> None:
        """Finds out what others have written, once, before we write ourselves. Local."""
        if not self._compared:
            self.written = self._watch.parameters(self.in_model)
            self._watch.warn_of_buffers(self.in_model)
            self._compared = True

    @torch.no_grad()
    def _copy(self) -> None:
        if not self._sources:
            self._done = True  # what is raised before anything is written has changed nothing
            self._engine.reshard()
            sources = self._engine.sources()
            self._done = False
            self._sources, self._caches = sources, self._engine.caches()
        lent.make_way(self._sources)
        with self._derived.renewed():
            self._settle()
            if self._blends is None:
                self._overwrite()
            else:
                self._blend(self._blends)
            self._drop_caches()
            self._share(inside=True)
        torch.clear_autocast_cache()
        self._done = True

    def _overwrite(self) -> None:
        """This rank's part of the average takes the place of its sources' elements. Local."""
        for index, (share, shadow) in enumerate(zip(self._shares, self._shadows, strict=True)):
            if shadow is not None and is_own(share):
                self._put_buffer(index, shadow)
            elif shadow is not None:
                kernels.write(self._sources[index], share.start, share.stop, shadow)

    def _blend(self, blends: dict[int, kernels.Blend]) -> None:
        """This rank's part of its sources moves toward the average. Local; goes on where it broke off."""
        for index, blend in blends.items():
            share = self._shares[index]
            source = self._sources[index]
            if not is_own(share) or source.shape == share.spec.shape:  # the average of a resized buffer starts anew
                blend.go(source)

    def _plan_blends(self, fraction: float) -> dict[int, kernels.Blend]:
        blends = {}
        for index, (share, shadow) in enumerate(zip(self._shares, self._shadows, strict=True)):
            if shadow is not None and share.mode == "average":
                blends[index] = kernels.Blend(shadow, share.start, share.stop, fraction, self._scratch)
        return blends

    def _put(self, inside: bool) -> None:
        """This rank's part of the average goes into its sources, or its live elements back. Local."""
        exchanges = list(self._exchanges.items())
        for index, exchange in exchanges if inside else exchanges[::-1]:  # one that broke off needs the scratch first
            exchange.go(self._sources[index], inside)
        if self._is_kept:
            for index, kept in self._kept.items():
                self._put_kept(index, kept, inside)

    def _put_kept(self, index: int, kept: Tensor, inside: bool) -> None:
        share = self._shares[index]
        shadow = self._shadows[index]
        if shadow is None:
            return
        if not is_own(share):
            kernels.write(self._sources[index], share.start, share.stop, shadow if inside else kept)
        elif inside:
            self._put_buffer(index, shadow)
        elif index in self._outside:
            self._engine.replace_buffer(self._sources[index], self._outside[index])
            self._sources[index] = self._outside[index]
        else:
            self._fit(index, self._shapes[index])
            kernels.write(self._sources[index], 0, kept.numel(), kept)

    def _put_buffer(self, index: int, shadow: Tensor) -> None:
        """The average of a buffer goes into the model; of another shape, as another tensor. Local."""
        before = self._sources[index]
        shape = self._shape_inside(index)
        if before.shape != shape:
            self._outside[index] = before
        self._fit(index, shape)
        if self._sources[index].numel() == shadow.numel():  # else another rank's buffer is sent here
            kernels.write(self._sources[index], 0, shadow.numel(), shadow)

    def _shape_inside(self, index: int) -> torch.Size:
        """Returns the shape of a buffer of the average: that of the rank that writes it, where ranks send it to each
        other.
        """
        share = self._shares[index]
        if not self._broadcast.several:
            return share.spec.shape
        if not self._sent_shapes:
            self._sent_shapes = {entry.name: torch.Size(entry.shape) for entry in self.entries}
        return self._sent_shapes.get(share.spec.name, share.spec.shape)

    def _fit(self, index: int, shape: torch.Size) -> None:
        """Puts a buffer of this shape into the model, unless there is one. Local."""
        source = self._sources[index]
        if source.shape != shape:
            fresh = torch.empty(shape, dtype=source.dtype, device=source.device)
            self._engine.replace_buffer(source, fresh)
            self._sources[index] = fresh

    def _drop_caches(self) -> None:
        """The next forward pass computes from the weights that are in the model now. Local."""
        for cache in self._caches:
            cache.drop()

    def _share(self, inside: bool) -> None:
        """Ranks bring each other what each has put into its own sources. Collective where ``swaps_together`` says."""
        # Still "sending" here: an earlier attempt broke off while ranks sent each other something. The others are
        # elsewhere by now, so it cannot be repeated, and this rank may hold a mixture.
        if self._where == "sending" and self._broadcast.several:
            raise self._tear()
        self._where = "sending"
        self._broadcast.spread(self._sources)
        if inside and self._blends is None:
            self._broadcast.send_buffers(self._sources, self.entries)
        with peer_errors() if self._engine.publish_is_collective else nullcontext():
            self._engine.publish()
        self._where = "inside" if inside else "outside"

    def _tear(self) -> EMAStateError:
        """Notes that the live weights are neither the one nor the other. The shadow is whole, if this rank's is."""
        self._visit.torn = (
            f"{self._visit.weights} are partly those of the average {self._visit.name!r} and partly others, since "
            "ranks could not bring them in or out together (one is gone or did not answer in time, or was "
            "interrupted): do not save them. Load a checkpoint into the model, then load() one of the average, or "
            "reset() it"
        )
        self._done = True
        return EMAStateError(f"{self._visit.operation} failed: {self._visit.torn}")

    def _settle(self) -> None:
        """Waits for copies to the device that still read weights in host memory (CPU offload): they are written now."""
        if torch.accelerator.is_available() and any(source.is_cpu for source in self._sources):
            torch.accelerator.synchronize()

    def _spare(self, sources: Sequence[Tensor]) -> dict[int, Tensor]:
        """Memory for live elements that cannot change places with their shadow: its dtype is another, it is a buffer,
        which a forward pass may resize, or it is fixed."""
        spare = {}
        for index, (share, shadow, source) in enumerate(zip(self._shares, self._shadows, sources, strict=True)):
            own = is_own(share)
            if shadow is not None and (shadow.dtype != source.dtype or own or index in self._fixed):
                size = source.numel() if own else share.numel
                spare[index] = torch.empty(size, dtype=source.dtype, device=shadow.device)
        return spare

    def _plan(self, sources: Sequence[Tensor]) -> dict[int, kernels.Exchange]:
        """Plans which shares change places with their sources. Takes memory for one chunk."""
        exchanges = {}
        for index, (share, shadow) in enumerate(zip(self._shares, self._shadows, strict=True)):
            if shadow is not None and index not in self._kept:
                self._scratch.like(shadow[:1], sources[index].dtype, sources[index].device)
                exchanges[index] = kernels.Exchange(shadow, share.start, share.stop, self._scratch)
        return exchanges

    def _keep(self) -> None:
        """Copies what could not be brought back, before anything is changed."""
        for index, kept in self._kept.items():
            share = self._shares[index]
            source = self._sources[index]
            if is_own(share):
                self._shapes[index] = source.shape
                kernels.read(source, 0, source.numel(), kept)
            else:
                kernels.read(source, share.start, share.stop, kept)
        self._is_kept = True
        for members in self._broadcast.sets:
            if not self._broadcast.replicas_agree(members, self._sources):
                logger.warning(
                    "Replicas of %r and %d more parameters differ between ranks: each rank keeps a copy of its own "
                    "while the average is in use.",
                    self._shares[members[0]].spec.name,
                    len(members) - 1,
                )
                for index in members:
                    source = self._sources[index]
                    whole = torch.empty(source.numel(), dtype=source.dtype, device="cpu")
                    kernels.read(source, 0, source.numel(), whole)
                    self._diverged[index] = whole
