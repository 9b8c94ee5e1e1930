"""``Average``: the state of one ``ShardedEMA`` on this rank, and how each of its calls begins.

Every file of ``core/`` is a set of functions on an ``Average``. A collective call goes through it in this order::

    turn()       local        keeps calls of other threads out; names the call in errors
      begin()    collective   each rank checks what it can check alone; then all ranks go on, or all raise
        view()   local        for calls that read: where this rank's elements are at the moment
        live()   local        for calls that replace the average: the live tensors
      ...        collective   what the call does
      replace()  local        for calls that replace the average: makes the new one active
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch.distributed as dist
from torch import Tensor

from dist_ema.comm.agreement import Call, agreed, check_same_clocks, check_same_updates, named_operation
from dist_ema.comm.catalogue import FullTensor, is_writer, proven_catalogue
from dist_ema.comm.collectives import rank_in
from dist_ema.comm.groups import OwnGroups
from dist_ema.core.condition import Condition
from dist_ema.core.snapshots import Snapshots
from dist_ema.core.track import Track
from dist_ema.core.view import View
from dist_ema.engines import Attached, Engine, detect_in
from dist_ema.engines.masters import with_masters
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.geometry.shares import (
    Share,
    assign_shares,
    averaged_names,
    follow_shapes,
    follow_specs,
    is_ignored,
    may_join,
    resized,
    was_resized,
)
from dist_ema.geometry.spec import TensorSpec
from dist_ema.options import Options
from dist_ema.runtime.background import Background
from dist_ema.runtime.interrupts import Uninterrupted
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.state import EMAState
from dist_ema.shadow.device import Shadow
from dist_ema.shadow.host import HostShadow
from dist_ema.teacher.teacher import Teacher

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
#: Seconds that a call on files waits for a rank that does not answer, in addition to the time for reading and writing.
PATIENCE = 120.0


class Average:
    """Holds the state of one ``ShardedEMA`` on this rank, and the steps that its calls have in common.

    Lists have one entry for each tensor of the model, in the order of ``engine.specs()``. "The number of a share" is
    its index in these lists. For a model of four tensors and an average ``a``::

        engine.specs()      [  w0 (frozen)   w1          b1          running_mean (buffer)  ]
        engine.sources()    [  live tensor   live        live        live                   ]
        shares              [  "live"        "average"   "average"   "copy"                 ]
        shadow.tensors(a)   [  None          1D          1D          1D                     ]

    ``ShardedEMA`` keeps it as ``_average``; tests read the state there.

    Args:
        target: the model, as ``ShardedEMA`` takes it.
        options: the options that the user gave.
        group: the ranks that hold the model; None means all ranks.
        into: the teacher that holds the average; None without one.
        masters: the optimizer that keeps master weights, or a function that finds them; None for neither.

    Attributes:
        options: as given.
        group: as given.
        masters: as given.
        engine: reads and writes the live model.
        shares: for each tensor of the model, which elements this rank averages, copies or leaves alone.
        frozen: the numbers of the shares whose parameters join the average as soon as they are trained.
        shadow: the averaged values.
        track: the clocks, and the decays of the last update.
        condition: says whether the average and the live weights are whole, and whether the average is in the model.
        catalogue: every full tensor of the model, as all ranks have agreed on it; None until the next collective call.
        groups: the process groups that the library has made for itself.
        background: the thread that writes saves and snapshots.
        snapshots: the series of snapshots that ``snapshot()`` has begun.
        teacher: the model that holds the average; None without ``into=``.
        attached: the handle of the optimizer that calls ``update()``; None without one.
        overlap: whether updates run in parallel with training, on a stream of their own (``attach(overlap=True)``).
        may_be_resized: whether the next due update has to look for buffers whose shape has changed.
        changes: how many shadows have been active. An iteration over tensors compares it to notice a load or reset.
        skipped_before: NaN and Inf elements that were left out before the last load or rebind. Only rank 0 counts
            those of a loaded checkpoint.
    """

    def __init__(
        self,
        target: object,
        options: Options,
        group: dist.ProcessGroup | None,
        into: object = None,
        masters: object = None,
    ) -> None:
        self.options = options
        self.masters = masters
        self.group = group
        self.engine = self.detect(target)
        self.shares: list[Share] = []
        self.frozen: list[int] = []
        self.condition = Condition(self.engine)
        self.catalogue: list[FullTensor] | None = None
        self.background = Background()
        self.snapshots: list[Snapshots] = []
        self.teacher: Teacher | None = None
        self.attached: Attached | None = None
        self.overlap = False
        self.may_be_resized = False
        self.changes = 0
        self._warned: set[str] = set()
        # Construction is local, except with a teacher: what a rank raises for its teacher is raised on all ranks.
        with nullcontext() if into is None else agreed(self.engine.group, "ShardedEMA(into=...)"):
            if into is not None:
                self.teacher = Teacher(target, into, options, group)
            self.plan(Progress())
        self.groups = OwnGroups(self.engine.group, repr(options.facts()))

    # What is averaged, and which rank holds it. Local.

    def detect(self, target: object) -> Engine:
        """Returns the engine of a model. It checks only tensors that are averaged or copied. Local."""
        engine = with_masters(detect_in(target, self.group), self.masters)
        engine.ignore(partial(is_ignored, self.options))
        return engine

    def plan(self, clock: Progress) -> None:
        """Decides what will be averaged, and starts without an average. Local.

        Args:
            clock: the reading of the training clock.

        Raises:
            EMAConfigError: a pattern matches no name, or nothing is left to average.
        """
        specs = self.engine.specs()
        names = [spec.name for spec in specs]
        # In a pipeline this rank sees only its own stage. A pattern may be meant for the stage of another rank.
        is_whole_model = not self.engine.is_part
        if is_whole_model:
            self.options.check_patterns(names, [spec.name for spec in specs if spec.kind == "buffer"])

        shares = assign_shares(specs, self.options)
        if not any(share.mode == "average" for share in shares):
            # In a GAN no parameter is trained between two steps. After reset() those are taken that were averaged
            # before it.
            shares = assign_shares(specs, self.options, averaged_names(self.shares))
        if is_whole_model and not any(share.mode == "average" for share in shares):
            trained = sum(spec.kind == "parameter" for spec in specs)
            raise EMAConfigError(
                f"nothing to average: {trained} of the model's {len(specs)} parameters and buffers are trained, and "
                "include= and exclude= select none of them"
            )
        shadow = self.new_shadow(shares=shares)

        # Nothing has changed up to here. If what follows is interrupted, only reset() or load() help.
        self.changes += 1
        self.condition.broken = "reset()"
        self.set_shares(shares)
        self._warned -= {"still", "resized"}
        self._warn_if_coarse()
        self.track = Track(self.options, clock)
        self.shadow = shadow
        shadow.install()
        self.skipped_before = 0
        self.condition.broken = None

    def reset(self) -> None:
        """Forgets the average. The training clock keeps its reading. Local."""
        self.condition.refuse("reset()", mends=True)
        self.background.wait()
        old = self.shadow
        with Uninterrupted():
            self.plan(self.track.training)
            old.discard()
            self.condition.clear()

    def live_tensors(self) -> list[Tensor]:
        """Returns the live tensors, one for each share, after a check that the model still has them. Local.

        Tensors that are not averaged may have been added, removed or resized. The shares are changed to match. Every
        rank has the same model, so all ranks make the same change.

        Raises:
            EMAStateError: a parameter was replaced, added, removed or resized (see ``engines/binding.py``).
        """
        # A forward pass may have left full parameters behind, such as FSDP's. The shards are what training updates.
        self.engine.reshard()
        sources = self.engine.sources()
        # Inside average_parameters() a swap refers to tensors by their numbers, which must not change.
        outdated = self.engine.outdated and self.condition.visit is None
        if outdated or self.engine.resized():
            specs = self.engine.specs() if outdated else self.engine.announced()
            follow = follow_specs if outdated else follow_shapes
            self.take_shares(follow(self.shares, specs, self.options), sources)
            if not self.shadow.started:
                self._take_shapes(specs)
            self.may_be_resized = True
            sources = self.engine.sources() if outdated else sources
        return sources

    def _take_shapes(self, specs: Sequence[TensorSpec]) -> None:
        """Changes the shares to the new shapes of buffers before the first update. Local.

        Later shapes wait for the next due update, because the shadow has values of the old shape until then.
        """
        shares = []
        for share, spec in zip(self.shares, specs, strict=True):
            shares.append(resized(share, spec.shape) if was_resized(share, spec) else share)
        self.start_over(shares)

    def start_over(self, shares: list[Share]) -> None:
        """Replaces the shares, and the empty shadow, before the first update. Local."""
        if shares != self.shares:
            shadow = self.new_shadow(self.shadow.seed, shares)
            self.set_shares(shares)
            self.install(shadow)

    def take_shares(self, shares: list[Share], sources: Sequence[Tensor], new: Sequence[int] = ()) -> None:
        """Replaces the shares, and keeps the averaged values of those that remain. Local.

        If this raises, nothing has changed.

        Args:
            shares: one for each tensor of the model as it is now.
            sources: the live tensors.
            new: the numbers of the shares that get new memory, because they join the average or were resized.
        """
        # Where each present share is in the new list; -1 for a tensor that is gone. A tied tensor has several names.
        numbers: dict[str, int] = {}
        for number, share in enumerate(shares):
            numbers.update(dict.fromkeys(share.names, number))
        places = [numbers.get(share.spec.name, -1) for share in self.shares]
        counterpart = None if self.teacher is None else self.teacher.match(shares, self.teacher.target)
        self.shadow.follow(shares, places, new, sources, counterpart)
        self.set_shares(shares)

    def set_shares(self, shares: list[Share]) -> None:
        """Sets which elements this rank averages. Ranks have to agree on the catalogue again afterwards. Local."""
        self.shares = shares
        self.catalogue = None
        self.may_be_resized = True
        self.frozen = [number for number, share in enumerate(shares) if may_join(share, self.options)]

    def new_shadow(
        self, saved_seed: int | None = None, shares: Sequence[Share] | None = None, target: object = None
    ) -> Shadow:
        """Makes an empty shadow of the kind that the options ask for. Local.

        Args:
            saved_seed: the seed of a loaded or earlier average, which has precedence over the option.
            shares: what this rank averages; None means the present shares.
            target: the model whose shares they are; None means the averaged model.
        """
        options = self.options
        seed = self.seed(saved_seed)
        shares = self.shares if shares is None else shares
        if self.teacher is not None:
            group = self.engine.group
            common = options.schedules, shares, options.skip_nonfinite, seed, group
            return self.teacher.shadow(*common, self._proven_catalogue, target)
        if options.offload:
            return HostShadow(options.schedules, shares, options.skip_nonfinite, options.offload_threads, seed)
        shadow = Shadow(options.schedules, shares, options.skip_nonfinite, seed)
        shadow.run_beside(self.overlap)
        return shadow

    def seed(self, saved: int | None) -> int | None:
        """Returns the seed of stochastic rounding; None if values are rounded to nearest.

        A saved seed has precedence over the option, so that a resumed run rounds as an uninterrupted one would.
        """
        own = self.options.seed
        if own is None or saved is None:
            return own
        if saved != own:
            logger.info(
                "The average was saved with seed=%d. It continues with that seed, not with seed=%d.", saved, own
            )
        return saved

    def install(self, shadow: Shadow) -> None:
        """Makes ``shadow`` the active one, and ends threads and streams that work on the one before. Local."""
        self.changes += 1
        old = self.shadow
        self.shadow = shadow
        if old is not shadow:
            old.discard()
        shadow.install()

    def replace(self, shadow: Shadow, shares: list[Share], state: EMAState, operation: str) -> None:
        """Makes a loaded average the active one, and sets the clocks to its own. Local.

        Args:
            shadow: the loaded values.
            shares: what this rank holds of them.
            state: the clocks and counts that were saved.
            operation: the call, for errors if this is interrupted.
        """
        # Loading also ends an earlier failure. ``broken`` is set until everything below fits together.
        self.condition.broken = operation
        if shares is not self.shares:
            self.set_shares(shares)
        self.may_be_resized = True  # the live buffers may have other shapes than the loaded ones
        self.install(shadow)
        self.track.restore(state)
        for snapshots in self.snapshots:
            snapshots.begin(self.track.training)
        # The saved count is that of all ranks. Counts of ranks are added up, so only rank 0 may start from it.
        self.skipped_before = state.skipped if rank_in(self.engine.group) == 0 else 0
        self.condition.clear()

    # Beginning a call.

    def call(self, name: str, operation: str = "", /, **arguments: object) -> Call:
        """Describes a collective call, with the arguments that must be equal on all ranks. Local.

        Args:
            name: the method, such as ``"save()"``.
            operation: what error messages call it. It may differ between ranks, as a path may. Empty means ``name``.
            arguments: the arguments that ranks compare. A path is not among them: that of rank 0 is used.
        """
        facts = {argument: repr(value) for argument, value in arguments.items()}
        options = {f"ShardedEMA's {option}": value for option, value in self.options.facts().items()}
        return Call(name, facts | options, operation)

    @contextmanager
    def turn(self, operation: str) -> Iterator[None]:
        """Wraps one collective call: calls of other threads wait, and errors name the call. Local."""
        with named_operation(operation), self.groups.turn(operation):
            yield

    @contextmanager
    def begin(
        self, call: Call, replaces: bool = False, timeout: float | None = None, groups: OwnGroups | None = None
    ) -> Iterator[None]:
        """Begins a collective call: in the block each rank checks whether it can take part; then all go on, or none.

        Collective at the end of the block. Afterwards ``full_tensors`` is known::

            rank 0    checks, succeeds --+                      +--> goes on       (all succeeded)
            rank 1    checks, succeeds --+-- exchange results --+
            rank 2    checks, raises   --+                      +--> every rank raises what rank 2 raised

        Args:
            call: describes what this rank calls.
            replaces: the call replaces the average, so the numbers of updates and the clocks may differ between ranks.
            timeout: seconds to wait for the other ranks; None means the timeout of the group.
            groups: the process groups to communicate in; None means those of this average.

        Raises:
            EMAStateError: on every rank, if ranks make different calls, or their training progress differs.
            EMAError: on every rank, what any of them raised in the block.
        """
        groups = self.groups if groups is None else groups
        if not replaces:
            self.condition.refuse_torn(call.name)
        units = sorted(self.options.units())
        call = replace(call, number=groups.number)
        with agreed(groups.group, call, lambda message: groups.gather(message, timeout)) as round_:
            yield
            clocks = {unit: self.track.training.value(unit) for unit in units}
            round_.send((self.num_updates, clocks, self.catalogue is not None))
        updates, readings, known = zip(*round_.received, strict=True)
        if not replaces:
            check_same_updates(updates)
            check_same_clocks(readings)
        # A catalogue is dropped locally, by reset() for example, so some ranks may have one and others not. Making it
        # is collective: if one rank needs it, all ranks make it.
        if not all(known):
            self.catalogue = self.proven(self.engine, self.shares, groups.group)

    def proven(self, engine: Engine, shares: Sequence[Share], group: dist.ProcessGroup | None) -> list[FullTensor]:
        """Lists every full tensor of a model, after a check that ranks together hold each element. Collective."""
        return proven_catalogue(shares, group, engine.check_layout, engine.layout)

    def _proven_catalogue(self, shares: Sequence[Share]) -> list[FullTensor]:
        """Returns ``proven()`` for the present engine. Collective."""
        return self.proven(self.engine, shares, self.engine.group)

    def view(self, operation: str, inside: bool = True) -> View:
        """Returns access to this rank's averages and live weights. Local; waits for an offloaded update.

        Args:
            operation: the call, for errors.
            inside: whether the call may also be made inside ``average_parameters()``.

        Raises:
            EMAStateError: the average is not whole, the model has changed, or the weights were written inside.
        """
        self.condition.refuse(operation, inside=inside)
        if self.condition.swap is not None:
            self.condition.swap.check_writes(operation)
        self.shadow.wait()
        sources = self.live_tensors()  # may replace self.shares, so it comes before they are read
        return View(self.shares, self.shadow, sources, self.condition)

    def live(self, operation: str) -> list[Tensor]:
        """Returns the live tensors, for a call that replaces the average. Local.

        Such a call is allowed if the average is not whole, because it mends that.
        """
        self.condition.refuse(operation, mends=True)
        return self.live_tensors()

    def wait_for_save(self) -> None:
        """Waits for a save in the background, and raises its failure as a CheckpointError.

        Call it inside ``begin()``: a failure that only some ranks have is then raised on all of them.
        """
        try:
            self.background.wait()
        except Exception as error:
            raise CheckpointError(f"the previous save failed: {error}") from error

    # Names, counts and the catalogue. Local.

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the averages."""
        return tuple(self.options.schedules)

    @property
    def num_updates(self) -> int:
        """Returns the number of updates, the first copy included."""
        return self.track.averaged.updates

    def name(self, name: str | None) -> str:
        """Returns the name of an average; None means the only one. Raises EMAConfigError for an unknown name."""
        names = self.names
        if name is None and len(names) == 1:
            return names[0]
        if name is None or name not in names:
            raise EMAConfigError(f"name={name!r}: allowed are {', '.join(map(repr, names))}")
        return name

    @property
    def full_tensors(self) -> list[FullTensor]:
        """Returns every full tensor of the model, the same on every rank. Known after ``begin()``."""
        return self.catalogue or []

    def wanted(self, include_untracked: bool) -> list[FullTensor]:
        """Lists all full tensors; without ``include_untracked`` only those that are averaged or copied."""
        return [entry for entry in self.full_tensors if include_untracked or entry.mode != "live"]

    def writes(self) -> list[bool]:
        """Returns for each share whether this rank contributes it. Of ranks with equal elements only one does."""
        entries = {entry.name: entry for entry in self.full_tensors}
        rank = rank_in(self.engine.group)
        return [is_writer(entries[share.spec.name], share, rank) for share in self.shares]

    def state(self, skipped: int) -> EMAState:
        """Returns the clocks and counts that a checkpoint stores.

        ``skipped`` is the number of NaN and Inf elements that were left out.
        """
        return self.track.state(self.shadow.started, skipped, self.shadow.seed)

    def skipped(self) -> int:
        """Counts NaN and Inf elements that this rank left out; on rank 0 also those before a load. Local.

        It waits for the device.
        """
        self.shadow.report_nonfinite(wait=True)
        guard = self.shadow.guard
        return self.skipped_before + (guard.total() if guard is not None else 0)

    def nbytes(self) -> int:
        """Returns roughly how many bytes this rank reads or writes in a checkpoint. Timeouts grow with it."""
        return sum(share.numel * share.dtype.itemsize for share in self.shares) * len(self.names)

    # Warnings.

    def first_time(self, warning: str) -> bool:
        """Returns True on the first call with this key, and False on later ones."""
        if warning in self._warned:
            return False
        self._warned.add(warning)
        return True

    def warn_if_not_started(self, operation: str) -> None:
        """Warns once, on rank 0, that ``operation`` writes the live weights because no update was made yet."""
        if self.shadow.started or not self.first_time(operation):
            return
        if rank_in(self.engine.group) == 0:
            logger.warning(
                "%s writes the live weights instead of an average: no update was due yet (ema_start=%r, "
                "update_interval=%r; trained so far: %s).",
                operation,
                str(self.options.start),
                str(self.options.interval),
                self.track.training,
            )

    def _warn_if_coarse(self) -> None:
        """Warns if shadows of at most 16 bits are rounded to nearest. With dtype= they are rounded stochastically."""
        coarse = [share for share in self.shares if share.mode == "average" and share.dtype.itemsize < 4]
        if coarse and self.options.dtype is None:
            logger.warning(
                "dtype=None keeps %d shadows in %s, %r among them. A slow average stops moving at that precision, "
                "because its steps are smaller than its last bit. Use dtype=torch.float32.",
                len(coarse),
                coarse[0].dtype,
                coarse[0].spec.name,
            )


def collective(
    operation: str,
) -> Callable[[Callable[Concatenate[Average, P], R]], Callable[Concatenate[Average, P], R]]:
    """Runs a function inside ``Average.turn()``, as one collective call. The average is its first argument."""

    def decorate(function: Callable[Concatenate[Average, P], R]) -> Callable[Concatenate[Average, P], R]:
        @wraps(function)
        def call(average: Average, /, *args: P.args, **kwargs: P.kwargs) -> R:
            with average.turn(operation):
                return function(average, *args, **kwargs)

        return call

    return decorate
