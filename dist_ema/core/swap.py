"""Puts an average into the live model, and later the live weights back, without a second model.

How the elements of one share move depends on the dtypes of its shadow and of its source (the live tensor):

- Equal dtypes: shadow and source exchange their elements, one chunk at a time. No further memory is needed.
- Different dtypes (an fp32 shadow of bf16 weights): the live elements are copied into ``_kept``, and the source gets
  the rounded average. On the way back the source gets the copy.

A swap has local steps and, where parameters are replicated or the engine publishes, a collective step::

    enter()   1. keep live elements   local
              2. average into model   local       each replica writes only the part that it averages
              3. synchronize ranks    collective  replicas send each other their parts; the engine publishes
    leave()   1. live elements back   local       each replica restores only the part that it averages
              2. synchronize ranks    collective  as on the way in

Sending live parts on the way back restores the weights bit for bit, because replicas hold the same bits. ``enter()``
checks that; replicas that differ each keep a copy of all they had. Buffers that each rank has for itself, such as
BatchNorm's, are replaced by those of the rank that writes them in an export, and every rank keeps its own.

What happens if a step fails or is interrupted follows from whether other ranks take part in it. A local step continues
where it stopped when ``leave()`` is called again. The collective step cannot be repeated, because the other ranks are
elsewhere by then. So signals wait until it ends, and if it fails the weights are marked as torn (``Visit.torn``)::

                  enter()                       leave()
    OUTSIDE ---> SENDING ---> INSIDE ---> SENDING ---> OUTSIDE
                    |                        |
                    +-- a rank is lost ------+--> torn: every later call raises until load() or reset()
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum

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
#: Errors after which a step is given up. Interrupts, such as KeyboardInterrupt, do not count.
_TRIES = 3


class Phase(Enum):
    """How far the collective step of a swap has come."""

    OUTSIDE = "every rank has its live weights"
    SENDING = "ranks are sending each other what they have put into the model"
    INSIDE = "every rank has the average"


@dataclass(eq=False)
class Visit:
    """Describes one visit of an average to a live model, for all calls that touch the model.

    Attributes:
        name: the name of the average.
        operation: the call that opened the visit.
        held_by: who opened it, for errors.
        open: whether the model computes with the average.
        torn: None, or the text of the error for weights that are partly the average and partly live weights.
        weights: which weights are torn, for errors.
    """

    name: str
    operation: str
    held_by: str = ""
    open: bool = False
    torn: str | None = None
    weights: str = "the live weights"


class Swap:
    """Carries out one visit: ``prepare()``, ``enter()``, then ``leave()``; or ``prepare()``, then ``copy()``.

    Args:
        engine: the engine of the model.
        shares: what this rank averages of each tensor.
        shadows: this rank's part of the average for each share; None where the average is the live tensor.
        scratch: memory for one chunk. Nothing else may use it until ``leave()``.
        visit: is marked as torn if the collective step fails.
        wait: returns when no thread reads the shadows any more. Called before ``leave()`` changes them.
        fixed: indices of shares whose shadow has to keep its elements, because another model computes with it. Their
            live elements are copied, as for different dtypes.
        fraction: how far ``copy()`` moves the live weights toward the average. Below 1 it moves only what is averaged,
            and each rank moves its own buffers toward its own average of them.

    Attributes:
        entries: every full tensor of the model. Must be set before ``enter()`` if the swap is collective.
        written: the parameters that other code wrote while the average was in the model; None if there were none.
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
        self._is_compared = False  # whether ``written`` is known
        self._broadcast = Broadcast(engine, shares)
        self.entries: Sequence[FullTensor] = ()
        self._exchanges: dict[int, kernels.Exchange] = {}  # shares that exchange elements with their source
        self._blends: dict[int, kernels.Blend] | None = None if fraction == 1 else self._plan_blends(fraction)
        self._kept: dict[int, Tensor] = {}  # copies of live elements, of the part that this rank averages
        self._diverged: dict[int, Tensor] = {}  # copies of whole tensors whose replicas differ
        self._outside: dict[int, Tensor] = {}  # buffers that a buffer of the average's shape replaces in the model
        self._shapes: dict[int, torch.Size] = {}  # shapes of buffers before the average came in
        self._sent_shapes: dict[str, torch.Size] = {}  # shapes of the buffers that ranks send each other
        self._sources: list[Tensor] = []
        self._caches: list[CachedScale] = []
        # How far the visit has come. leave() reads these to undo exactly what was done.
        self._is_kept = False  # whether _kept holds the live elements
        self._phase = Phase.OUTSIDE
        self._done = True  # whether nothing is left to do or to undo

    def prepare(self, keep: bool) -> None:
        """Checks that this rank can take part; with ``keep`` also allocates what ``enter()`` needs. Local.

        Call it before anything else. If the swap is collective, all ranks call it and agree on the outcome, because
        the others would wait for a rank that cannot go on.

        Raises:
            EMAStateError: the model has changed, or there is not enough memory.
        """
        try:
            self._engine.reshard()
            sources = self._engine.sources()
            if keep:
                self._kept = self._allocate_kept(sources)
                self._exchanges = self._plan_exchanges(sources)
        except EMAError:
            raise
        except Exception as error:  # for example, out of memory
            raise EMAStateError(f"{type(error).__name__}: {error}") from error

    def in_model(self, index: int) -> bool:
        """Returns whether share ``index`` has exchanged elements, so that its shadow holds the live ones. Local."""
        return index in self._exchanges

    def live(self, index: int) -> Tensor | None:
        """Returns this rank's live elements of share ``index``, 1D, while the average is in the model. Local.

        None means that they are in the model.
        """
        return self._shadows[index] if index in self._exchanges else self._kept.get(index)

    def wait_for_readers(self) -> None:
        """Waits at most 30 s for threads that read what ``leave()`` will write. Local; signals interrupt it."""
        if not self._done:
            lent.wait([*self._sources, *self._shadows])

    @torch.no_grad()
    def enter(self) -> None:
        """Puts the average into the model. Collective if :func:`swaps_together` is true.

        If it raises, ``leave()`` undoes what was done.
        """
        self._engine.reshard()
        with self._derived.renewed():
            self._sources = self._engine.sources()
            lent.move_parts(self._sources)
            self._wait_for_device_copies()
            self._caches = self._engine.caches()
            self._done = False  # from here on leave() has something to undo
            self._keep_live()
            self._move_own(inside=True)
            self._drop_caches()
            self._synchronize_ranks(inside=True)
        torch.clear_autocast_cache()  # it holds casts of the previous weights
        self._watch.begin()

    def leave(self) -> None:
        """Restores the live weights and the shadow, bit for bit. Collective if replicas or ``publish`` are.

        A second call continues where the first one stopped. An interrupt is raised when everything is restored.

        Raises:
            EMAStateError: a parameter was replaced inside; or the weights are torn, as ``visit.torn`` says.
        """
        self._run_to_end(self._leave)

    def copy(self) -> None:
        """Overwrites the live weights with the average, or moves them a fraction toward it. The shadow stays.

        Collective as ``enter()``; with a fraction, if ``swaps_together(buffers=False)`` is true. Raises as ``leave()``.
        """
        self._done = False
        self._run_to_end(self._copy)

    def _run_to_end(self, step: Callable[[], None]) -> None:
        """Calls a step again until it is done, and then raises the first exception that interrupted it.

        The step continues where it stopped. After ``_TRIES`` errors it is given up, and the weights are torn.
        """
        first: BaseException | None = None
        failures = 0
        with Uninterrupted():
            while not self._done:
                try:
                    step()
                except BaseException as error:
                    first = error if first is None else first
                    if isinstance(error, Exception):
                        failures += 1
                    if failures >= _TRIES and not self._done:
                        raise self._mark_torn() from first
        if self._visit.torn is not None and first is not None:
            raise self._mark_torn() from first
        if first is not None:
            raise first

    @torch.no_grad()
    def _leave(self) -> None:
        self._wait()
        self._engine.reshard()
        replaced: EMAStateError | None = None
        try:
            self._sources = self._engine.sources()
        except EMAStateError as error:
            # A parameter was replaced inside. The average is still in the tensors that ``_sources`` has from before,
            # so it is taken out of those, and the error is raised afterwards.
            replaced = error
        else:
            self._find_writes()
        lent.move_parts([*self._sources, *self._shadows])
        with self._derived.renewed():
            self._wait_for_device_copies()
            self._move_own(inside=False)
            for cache in self._caches:
                cache.restore()
            # If enter() failed before the ranks sent anything, no rank has anything to send back.
            if self._phase is not Phase.OUTSIDE:
                self._synchronize_ranks(inside=False)
            for index, whole in self._diverged.items():
                kernels.write(self._sources[index], 0, self._shares[index].spec.local_numel, whole)
        torch.clear_autocast_cache()
        self._done = True
        if replaced is not None:
            raise replaced

    def check_writes(self, operation: str) -> None:
        """Raises EMAStateError if other code has written parameters since ``enter()``. Local."""
        self._engine.reshard()
        written = self._watch.parameters(self.in_model)
        if written is not None and not self._done:
            raise written.error(operation)

    def accept_buffers(self) -> None:
        """Excuses all writes to buffers so far: this library made them and has undone them. Local."""
        self._watch.accept_buffers()

    def _find_writes(self) -> None:
        """Finds what other code has written. Only the first call looks, before this library writes. Local."""
        if not self._is_compared:
            self.written = self._watch.parameters(self.in_model)
            self._watch.warn_of_buffers(self.in_model)
            self._is_compared = True

    @torch.no_grad()
    def _copy(self) -> None:
        if not self._sources:
            self._done = True  # nothing has been written yet, so an error here needs no second try
            self._engine.reshard()
            sources = self._engine.sources()
            self._done = False
            self._sources = sources
            self._caches = self._engine.caches()
        lent.move_parts(self._sources)
        with self._derived.renewed():
            self._wait_for_device_copies()
            if self._blends is None:
                self._overwrite()
            else:
                self._blend(self._blends)
            self._drop_caches()
            self._synchronize_ranks(inside=True)
        torch.clear_autocast_cache()
        self._done = True

    def _overwrite(self) -> None:
        """Writes this rank's part of the average into its sources. Local."""
        for index, (share, shadow) in enumerate(zip(self._shares, self._shadows, strict=True)):
            if shadow is None:
                continue
            if is_own(share):
                self._write_buffer(index, shadow)
            else:
                kernels.write(self._sources[index], share.start, share.stop, shadow)

    def _blend(self, blends: dict[int, kernels.Blend]) -> None:
        """Moves this rank's part of its sources toward the average. Local; continues where it stopped."""
        for index, blend in blends.items():
            share = self._shares[index]
            source = self._sources[index]
            # A buffer that was resized has no average of its new shape yet.
            if not is_own(share) or source.shape == share.spec.shape:
                blend.move(source)

    def _plan_blends(self, fraction: float) -> dict[int, kernels.Blend]:
        blends = {}
        for index, (share, shadow) in enumerate(zip(self._shares, self._shadows, strict=True)):
            if shadow is not None and share.mode == "average":
                blends[index] = kernels.Blend(shadow, share.start, share.stop, fraction, self._scratch)
        return blends

    def _move_own(self, inside: bool) -> None:
        """Moves this rank's part of the average into its sources (``inside``), or its live elements back. Local."""
        exchanges = list(self._exchanges.items())
        if not inside:
            # All exchanges share one scratch. One that was interrupted has elements in it, so it has to go first on the
            # way back, and it is the last one that was begun on the way in.
            exchanges.reverse()
        for index, exchange in exchanges:
            exchange.move(self._sources[index], inside)
        if self._is_kept:
            for index, kept in self._kept.items():
                self._move_kept(index, kept, inside)

    def _move_kept(self, index: int, kept: Tensor, inside: bool) -> None:
        """Writes the average of a share into its source (``inside``), or the copy of the live elements. Local."""
        share = self._shares[index]
        shadow = self._shadows[index]
        if shadow is None:
            return
        if not is_own(share):
            kernels.write(self._sources[index], share.start, share.stop, shadow if inside else kept)
        elif inside:
            self._write_buffer(index, shadow)
        elif index in self._outside:  # the average had another shape: the module gets its own buffer back
            self._engine.replace_buffer(self._sources[index], self._outside[index])
            self._sources[index] = self._outside[index]
        else:
            self._ensure_shape(index, self._shapes[index])  # a forward pass may have resized it
            kernels.write(self._sources[index], 0, kept.numel(), kept)

    def _write_buffer(self, index: int, shadow: Tensor) -> None:
        """Writes the average of a buffer into the model; into a new tensor if its shape is another. Local."""
        before = self._sources[index]
        shape = self._shape_inside(index)
        if before.shape != shape:
            self._outside[index] = before
        self._ensure_shape(index, shape)
        # If the sizes differ, the values of another rank are sent here by _synchronize_ranks().
        if self._sources[index].numel() == shadow.numel():
            kernels.write(self._sources[index], 0, shadow.numel(), shadow)

    def _shape_inside(self, index: int) -> torch.Size:
        """Returns the shape that a buffer has while the average is in the model.

        If ranks send each other buffers, that is the shape on the rank that sends it; else the shape on this rank.
        """
        share = self._shares[index]
        if not self._broadcast.several:
            return share.spec.shape
        if not self._sent_shapes:
            self._sent_shapes = {entry.name: torch.Size(entry.shape) for entry in self.entries}
        return self._sent_shapes.get(share.spec.name, share.spec.shape)

    def _ensure_shape(self, index: int, shape: torch.Size) -> None:
        """Replaces a buffer of the model by an empty one of this shape, unless it has this shape. Local."""
        source = self._sources[index]
        if source.shape != shape:
            fresh = torch.empty(shape, dtype=source.dtype, device=source.device)
            self._engine.replace_buffer(source, fresh)
            self._sources[index] = fresh

    def _drop_caches(self) -> None:
        """Drops values that were computed from the weights, so the next forward pass computes them anew. Local."""
        for cache in self._caches:
            cache.drop()

    def _synchronize_ranks(self, inside: bool) -> None:
        """Gives every rank what the others have put into their sources. Collective if ``swaps_together`` is true."""
        if self._phase is Phase.SENDING and self._broadcast.several:
            # An earlier attempt stopped half way. The other ranks have left it, so this rank cannot repeat it alone,
            # and its model may be a mixture.
            raise self._mark_torn()
        self._phase = Phase.SENDING
        self._broadcast.spread(self._sources)
        if inside and self._blends is None:
            self._broadcast.send_buffers(self._sources, self.entries)
        with peer_errors() if self._engine.publish_is_collective else nullcontext():
            self._engine.publish()
        self._phase = Phase.INSIDE if inside else Phase.OUTSIDE

    def _mark_torn(self) -> EMAStateError:
        """Marks the weights as a mixture of average and live weights, and returns the error that says so.

        The average itself is not damaged: this rank's shadows hold either all of it or what ``leave()`` restores.
        """
        self._visit.torn = (
            f"{self._visit.weights} are partly those of the average {self._visit.name!r} and partly others, because "
            "the ranks did not finish the exchange (one is gone, did not answer in time, or was interrupted). Do not "
            "save them. Load a checkpoint into the model, then load() one of the average, or reset() it"
        )
        self._done = True
        return EMAStateError(f"{self._visit.operation} failed: {self._visit.torn}")

    def _wait_for_device_copies(self) -> None:
        """Waits for copies to the device that still read weights in host memory (FSDP's CPU offload)."""
        if torch.accelerator.is_available() and any(source.is_cpu for source in self._sources):
            torch.accelerator.synchronize()

    def _allocate_kept(self, sources: Sequence[Tensor]) -> dict[int, Tensor]:
        """Allocates the copies of live elements, for shares that cannot exchange elements with their shadow.

        These are shares whose shadow has another dtype or is fixed, and buffers, which a forward pass may resize.
        """
        kept = {}
        for index, (share, shadow, source) in enumerate(zip(self._shares, self._shadows, sources, strict=True)):
            own = is_own(share)
            if shadow is not None and (shadow.dtype != source.dtype or own or index in self._fixed):
                size = source.numel() if own else share.numel
                kept[index] = torch.empty(size, dtype=source.dtype, device=shadow.device)
        return kept

    def _plan_exchanges(self, sources: Sequence[Tensor]) -> dict[int, kernels.Exchange]:
        """Plans which shares exchange elements with their sources. Allocates memory for one chunk."""
        exchanges = {}
        for index, (share, shadow) in enumerate(zip(self._shares, self._shadows, strict=True)):
            if shadow is not None and index not in self._kept:
                self._scratch.like(shadow[:1], sources[index].dtype, sources[index].device)
                exchanges[index] = kernels.Exchange(shadow, share.start, share.stop, self._scratch)
        return exchanges

    def _keep_live(self) -> None:
        """Copies the live elements that exchanges do not keep, before anything is changed. Collective among replicas.

        Replicas whose bits differ cannot restore each other. Each then keeps whole tensors, in host memory.
        """
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
                    "Replicas of %r and of %d more parameters differ between ranks. Each rank keeps a copy of its own "
                    "weights in host memory while the average is in use.",
                    self._shares[members[0]].spec.name,
                    len(members) - 1,
                )
                for index in members:
                    source = self._sources[index]
                    whole = torch.empty(source.numel(), dtype=source.dtype, device="cpu")
                    kernels.read(source, 0, source.numel(), whole)
                    self._diverged[index] = whole
