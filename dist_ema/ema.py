"""``ShardedEMA``: what users call. Policy only; arithmetic, geometry, wrappers and files are elsewhere."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoints.arrangement import Arrangement
from dist_ema.checkpoints.background import Background
from dist_ema.checkpoints.contents import Contents
from dist_ema.checkpoints.export import arranged, export
from dist_ema.checkpoints.hub import check_layout
from dist_ema.checkpoints.hub_tensors import HubTensors
from dist_ema.checkpoints.load import Load, report_schedules
from dist_ema.checkpoints.save import Save
from dist_ema.checkpoints.versions import read_anew_if_replaced
from dist_ema.clock import Progress
from dist_ema.collectives import (
    Call,
    agreed,
    answering,
    check_same_clocks,
    check_same_updates,
    rank_in,
    same_call,
    sum_floats,
    sum_integers,
)
from dist_ema.duration import what_is_missed
from dist_ema.engines import Attached, Engine, RemovableHandle, detect_in
from dist_ema.engines.unwrapped import unwrapped
from dist_ema.errors import CheckpointError, CheckpointMismatchError, EMAConfigError, EMAStateError
from dist_ema.groups import OwnGroups, Turn
from dist_ema.interrupts import Uninterrupted
from dist_ema.kernels.fingerprint import Part, partial_digests
from dist_ema.kernels.streams import Handover
from dist_ema.options import Options, check_cast
from dist_ema.schedules import Schedule
from dist_ema.shadow.broadcast import swaps_together
from dist_ema.shadow.condition import Condition
from dist_ema.shadow.device import Shadow
from dist_ema.shadow.host import HostShadow, wait_for_reads
from dist_ema.shadow.memory_report import memory_report, summary
from dist_ema.shadow.swap import Swap, Visit
from dist_ema.shadow.teacher import Teacher, counterpart
from dist_ema.shadow.view import View
from dist_ema.sharding.gather import LocalValues, check_readable, full_tensors
from dist_ema.sharding.proof import proven_catalogue
from dist_ema.sharding.resharding import check_same_model, move
from dist_ema.sharding.shares import (
    Share,
    as_live,
    assign_shares,
    follow_shapes,
    follow_specs,
    is_ignored,
    may_join,
    resized,
    was_resized,
)
from dist_ema.sharding.spec import TensorSpec
from dist_ema.sharding.stream import everywhere, in_windows
from dist_ema.sharding.writers import FullTensor, is_writer
from dist_ema.snapshots import Snapshots
from dist_ema.state import EMAState, Track
from dist_ema.untraced import untraced

logger = logging.getLogger(__name__)
_Method = TypeVar("_Method", bound=Callable[..., Any])
#: Seconds that a call on files waits for a rank that does not answer, beside what reading and writing takes.
_PATIENCE = 120.0


def _collective(operation: str) -> Callable[[_Method], _Method]:
    """Makes a method one collective call: other threads' calls wait, and an error names it."""

    def decorate(method: _Method) -> _Method:
        @wraps(method)
        def call(self: ShardedEMA, *args: Any, **kwargs: Any) -> Any:
            with answering(operation), self._groups.turn(operation):
                return method(self, *args, **kwargs)

        return cast(_Method, call)

    return decorate


class ShardedEMA:
    """An exponential moving average of a model's weights, sharded exactly as the weights are.

    Every rank averages the elements that it holds: ``update()`` makes no collective call. Where ranks hold the same
    elements (DDP, HSDP, ZeRO-0), each averages its part of them. The shadow is fp32 unless told otherwise, and under
    DeepSpeed follows the fp32 master weights.

    Exactly one of ``decay``, ``half_life``, ``smoothing``, ``schedule`` and ``averages`` is given; with none of them
    the half life is 1000 batches. Trained parameters are averaged. Frozen ones are not stored, but are part of every
    full state dict and export.

    The first update that is due at or after ``ema_start`` copies the weights, and progress counts from there. Before
    it the average *is* the live model, for every call. So weights may be materialised or loaded after construction.

    Args:
        target: a module (plain, DDP, FSDP, FSDP2, HSDP, tensor parallel), a DeepSpeed engine (not the module in it),
            what Accelerate's ``prepare()`` or Fabric's ``setup()`` make of them, a ``PipelineStage``, or a list of
            modules or stages: this rank's part of a pipeline. Or a module inside of a plain, DDP or FSDP2 model; of an
            FSDP1 or DeepSpeed one pass the whole, with ``include``.
        decay: kept fraction per batch, in [0, 1).
        half_life: training after which half is kept: ``"1000ba"``, ``"10000000tok"``, ``"50000sp"``, ``"2ep"``.
        smoothing: kept fraction per update, in [0, 1), whatever the interval (Composer's word).
        schedule: an object of :mod:`dist_ema.schedules`, or of a class that ``schedules.register()`` was told of.
        averages: several averages from one read of the weights: ``{"fast": .99, "slow": HalfLife("1ep")}``.
        update_interval: time between updates; an update is due when the clock passes a multiple of it.
        ema_start: when averaging begins; ``"0.1dur"`` needs ``max_duration``.
        max_duration: of the training, for ``dur``. A start or an interval beyond it is logged as a warning: there will
            be no average.
        dtype: of the shadow; None keeps each parameter's own. ``torch.bfloat16`` takes half the memory of fp32 and is
            rounded stochastically, so that a slow average goes on moving; see :mod:`dist_ema.kernels.rounding`. Complex
            parameters are averaged as pairs of real numbers and kept as complex64; other dtypes are refused.
        offload: ``"cpu"`` keeps the shadow in host memory. ``update()`` then only asks for copies of the weights, which
            cross the link once, in their own dtype, and a thread averages them while training goes on; the next
            optimizer step waits for the copies. Whoever writes weights by hand after ``update()`` calls ``wait()``
            before. Every other call waits for the thread; what fails in it is raised by every call until ``reset()``
            or ``load()``. Costs host memory for the copies besides, as many bytes as the weights.
        offload_threads: of that thread's arithmetic; None means a quarter of ``torch.get_num_threads()``, at least 1.
        shard_replicas: where parameters are replicated, spread the shadow over the replicas.
        include, exclude: regular expressions, or lists of them, searched for in canonical names.
        buffers: ``"copy"`` them at each update, ``"average"`` those of floating point, or ``"ignore"`` them: the
            average then goes with the live ones.
        skip_nonfinite: a NaN or Inf source element leaves its shadow element as it was, and is counted. The first
            update has no earlier value and copies it, which is logged: at once where weights are in host memory, on a
            GPU by the next call that reads a number from it (``save``, ``metrics``, ``state_dict``).
        seed: of that rounding. The bits of an average follow from it, whatever the sharding. A loaded checkpoint brings
            its own.
        group: the ranks that hold this model, where they are a part of the world: all collective calls are among them,
            and what is said of rank 0 is said of the first of them. None means all ranks.
        into: a second model, the teacher, whose weights are the average: it computes at any time between two steps. Of
            any wrapper (of DeepSpeed also a ZeRO-3 engine without optimizer), if each rank holds the same elements of
            the same names there. Where its tensors have the shadow's dtype they are the shadow, without a copy; a bf16
            teacher is written from the fp32 shadow by each update. It must not train, has one average, and keeps what
            the user put there until the first update copies the weights (at once:
            ``ema.update(batches=0, due=True)``). Its frozen and excluded weights are the user's. Replicas then each
            average all, whatever ``shard_replicas`` says, so ``update()`` stays local. With it, construction is
            collective.
        rename: what the teacher's names are, as regular expressions and their replacements (``re.sub``), one after the
            other: ``{r"^backbone[.]": ""}``.
        sync: ``"gather"`` takes a teacher that is sharded otherwise than the averaged model, as every teacher is under
            ZeRO-1 and 2: ``update()`` then sends the whole average to all ranks, and is collective. The shadow is
            spread over the ranks as without a teacher.

    Raises:
        EMAConfigError: an option is wrong.
        EMAEngineError: the target cannot be averaged.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> ema = ShardedEMA(model, decay=0.75)
    >>> ema.update()  # the first one copies the weights
    True
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> ema.update()
    True
    >>> with ema.average_parameters():
    ...     model.weight.item()
    0.25
    >>> model.weight.item(), ema.num_updates
    (1.0, 2)
    """

    def __init__(
        self,
        target: object,
        *,
        decay: float | None = None,
        half_life: str | int | None = None,
        smoothing: float | None = None,
        schedule: Schedule | None = None,
        averages: Mapping[str, Schedule | float] | None = None,
        update_interval: str | int = "1ba",
        ema_start: str | int = "0ba",
        max_duration: str | int | None = None,
        dtype: torch.dtype | None = torch.float32,
        offload: str | None = None,
        offload_threads: int | None = None,
        shard_replicas: bool = True,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        buffers: str = "copy",
        skip_nonfinite: bool = True,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        into: object = None,
        rename: Mapping[str, str] | None = None,
        sync: str | None = None,
    ) -> None:
        self._options = Options.parse(
            decay=decay,
            half_life=half_life,
            smoothing=smoothing,
            schedule=schedule,
            averages=averages,
            update_interval=update_interval,
            ema_start=ema_start,
            max_duration=max_duration,
            dtype=dtype,
            offload=offload,
            offload_threads=offload_threads,
            shard_replicas=shard_replicas,
            include=include,
            exclude=exclude,
            buffers=buffers,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
            into=into,
            rename=rename,
            sync=sync,
        )
        self._group = group
        self._engine = self._detect(target)
        self._condition = Condition(self._engine)
        self._warned = False
        self._changes = 0  # how often another average took the place of this one
        self._attached: Attached | None = None
        self._background = Background()
        self._snapshots: list[Snapshots] = []
        self._teacher: Teacher | None = None
        self._told: set[str] = set()  # what was logged about an average that has not begun
        self._shares: list[Share] = []
        self._said_resized = False
        with nullcontext() if into is None else agreed(self._engine.group, "ShardedEMA(into=...)"):
            self._teacher = None if into is None else Teacher(target, into, self._options, group)
            self._plan(Progress())
        self._groups = OwnGroups(self._engine.group, repr(self._options.facts()))
        if (duration := self._options.duration) is not None:
            self._warn_of_length({duration.unit: duration.value})

    def _detect(self, target: object) -> Engine:
        """The engine of a target, which checks only what is averaged or copied. Local."""
        engine = detect_in(target, self._group)
        engine.ignore(partial(is_ignored, self._options))
        return engine

    # Averaging: local.

    @untraced
    @torch.no_grad()
    def update(
        self, *, batches: int = 1, samples: int = 0, tokens: int = 0, epochs: float = 0, due: bool | None = None
    ) -> bool:
        """Advances the clock by what was trained since the last call, and averages if an update is due.

        Local: no collective call, no host sync, no memory beyond the shadow and one chunk. (Only with ``sync="gather"``
        it is collective when an update is due.)

        Args:
            batches: optimizer steps.
            samples: samples, over all ranks.
            tokens: tokens, over all ranks.
            epochs: epochs; fractions are allowed.
            due: whether an update is due, for a trainer that has a rule of its own; the clock advances in any case.
                None means that ``update_interval`` and ``ema_start`` say it.

        Returns:
            Whether it averaged. Under DeepSpeed a call on a micro-step, or on a step that was skipped for overflow,
            does nothing and returns False.

        Raises:
            EMAStateError: inside ``average_parameters()``, or a parameter or buffer was added or removed, or a
                parameter replaced or resized, or an offloaded update has failed. What ``exclude`` and
                ``buffers="ignore"`` leave out is not checked.
            EMAEngineError: a parameter that was unfrozen cannot be averaged, or the teacher (``into=``) cannot hold it.
            EMAConfigError: a count is negative or not a number.

        ``requires_grad`` may change at any time. A parameter that is frozen stays in the average. One that is trained
        when an update is due, and was frozen until then, joins the average with its value of that moment, which is
        logged. Only this takes memory. Flags have to change on all ranks alike. Before the first update they decide
        what is averaged.

        A signal's handler waits until the average has moved. An update that raises is not counted. If it was in the
        middle of it, every call that needs the average raises EMAStateError until ``reset()`` or ``load()``.
        """
        self._condition.refuse("update()", reads=False)
        self._shadow.raise_failure()
        now = self._track.training.advance(batches=batches, samples=samples, tokens=tokens, epochs=epochs)
        if not self._engine.stepped():
            return False
        if due is None:
            due = self._track.is_due(now)
        if due:
            self._background.wait_until_read()
            sources = self._present()
            self._shadow.make_way()
            with Uninterrupted():
                if not self._shadow.started:
                    sources = self._choose(sources)
                elif self._resized or (self._frozen and self._engine.trained(self._frozen)):
                    self._join(sources)
                self._shadow.check(sources)
                self._average(sources, now)
                before, self._track.training = self._track.training, now
                self._condition.broken = None
        else:
            before, self._track.training = self._track.training, now
        self._background.raise_failure()  # last, so that no update is lost
        for snapshots in self._snapshots:
            if self._shadow.started and snapshots.is_due(before, now):
                self._take_snapshot(snapshots)
        return due

    def _average(self, sources: Sequence[Tensor], now: Progress) -> None:
        if not self._shadow.started:
            self._condition.broken = "update()"
            try:
                self._shadow.first_copy(sources)
                self._track.begin(now)
            except BaseException:
                self._take(self._new_shadow())  # it may have memory, but no average in it
                self._track.forget()
                self._condition.broken = None
                raise
        else:
            after = self._track.after(now)
            log_retained = self._track.log_retained(after)
            weights = [-math.expm1(logarithm) for logarithm in log_retained.values()]
            self._warn_if_still(after)
            self._shadow.scratch.touched = self._shadow.has_new
            self._condition.broken = "update()"
            try:
                if any(weights):  # between two windows an average stands still, and its buffers with it
                    self._shadow.update(sources, weights, after.updates)
                elif self._shadow.has_new:
                    self._shadow.fill_new(sources, after.updates)
            except BaseException:
                if not self._shadow.scratch.touched:
                    self._condition.broken = None
                raise
            self._track.step(after, log_retained)

    # Following a model whose flags and buffers change: local.

    def _present(self) -> list[Tensor]:
        """The live tensors, one for each share. Local.

        Tensors that are not averaged may have been added, removed or resized: the shares follow. Every rank has the
        same model, so all decide alike.
        """
        self._engine.reshard()
        sources = self._engine.sources()
        inside = self._condition.visit is not None  # there a Swap goes by the numbers that there were
        outdated = self._engine.outdated and not inside
        if outdated or self._engine.resized():
            specs = self._engine.specs() if outdated else self._engine.announced()
            follow = follow_specs if outdated else follow_shapes
            shares = follow(self._shares, specs, self._options)
            self._take_shares(shares, sources)
            if not self._shadow.started:
                self._take_shapes(specs)
            self._resized = True  # perhaps also a buffer of the average, which the next due update looks at
            sources = self._engine.sources() if outdated else sources
        return sources

    def _take_shapes(self, specs: Sequence[TensorSpec]) -> None:
        """Follows buffers that were resized before the first update, when the live model is the average. Local."""
        shares = [
            resized(share, spec.shape) if was_resized(share, spec) else share
            for share, spec in zip(self._shares, specs, strict=True)
        ]
        if shares != self._shares:
            shadow = self._new_shadow(self._shadow.seed, shares)
            self._set_shares(shares)
            self._take(shadow)

    def _take_shares(self, shares: list[Share], sources: Sequence[Tensor], new: Sequence[int] = ()) -> None:
        """Goes on with other shares of the same average. Local. If this raises, nothing has changed.

        ``new`` are the numbers of those that join, or were resized, and get memory.
        """
        numbers = {name: number for number, share in enumerate(shares) for name in share.names}
        places = [numbers.get(share.spec.name, -1) for share in self._shares]
        counterpart = None if self._teacher is None else self._teacher.match(shares, self._teacher.target)
        self._shadow.follow(shares, places, new, sources, counterpart)
        self._set_shares(shares)

    def _set_shares(self, shares: list[Share]) -> None:
        self._shares = shares
        self._known: list[FullTensor] | None = None  # every full tensor, once all ranks have told each other
        self._resized = True
        #: The numbers of parameters that join the average when they are trained.
        self._frozen = [number for number, share in enumerate(shares) if may_join(share, self._options)]

    def _choose(self, sources: list[Tensor]) -> list[Tensor]:
        """What is averaged from the first update on, by the flags of this moment. Local.

        Where nothing is trained now (in a GAN, between two steps), flags say nothing, and what was trained when the
        average was made is averaged.
        """
        before = self._averaged_names()
        selected = [number for number, share in enumerate(self._shares) if may_join(as_live(share), self._options)]
        trained = {self._shares[number].spec.name for number in self._engine.trained(selected)}
        if trained and before - trained:
            logger.warning(
                "%r and %d more parameters were trained when the average was made, and are frozen at its first update: "
                "they are not averaged, unless they are trained at a later one.",
                min(before - trained),
                len(before - trained) - 1,
            )
        specs = self._engine.specs()
        shares = assign_shares(specs, self._options, trained or before)
        if shares != self._shares:
            shadow = self._new_shadow(self._shadow.seed, shares)
            self._set_shares(shares)
            self._take(shadow)
        return self._engine.sources()

    def _join(self, sources: Sequence[Tensor]) -> None:
        """Takes parameters that are trained now into the average, and follows buffers that were resized. Local.

        Ranks make no call for that: each sees the same flags and shapes at the same update.
        """
        announced, shares = self._engine.announced(), list(self._shares)
        joining = self._engine.trained(self._frozen)
        names = [shares[number].spec.name for number in joining]
        specs = [self._engine.describe(number) for number in joining]
        update = self._track.averaged.updates + 1
        for number, share in zip(joining, assign_shares(specs, self._options, names, update), strict=True):
            shares[number] = share
        grown = [number for number, share in enumerate(shares) if was_resized(share, announced[number])]
        for number in grown:
            (shares[number],) = assign_shares([announced[number]], self._options, joined=update)
        if joining or grown:
            self._take_shares(shares, sources, [*joining, *grown])
        self._resized = False
        if joining:
            logger.warning(
                "%r and %d more parameters were frozen and are trained now: they join the average at update %d, with "
                "their present values.",
                names[0],
                len(names) - 1,
                update,
            )
        averaged = [shares[number].spec.name for number in grown if shares[number].mode == "average"]
        if averaged and not self._said_resized:
            self._said_resized = True
            logger.warning(
                "The buffer %r was resized: its average starts anew with its present value, at each time.", averaged[0]
            )

    def _warn_if_still(self, after: Progress) -> None:
        units = self._track.unmoved(after) - {"ba"}
        if units and not self._warned:
            self._warned = True
            logger.warning(
                "An update did not move the average: its schedule counts in %s, and update() was told of none since "
                "the last one. Pass samples=, tokens= or epochs= to update().",
                " and ".join(sorted(units)),
            )

    def expect(
        self,
        *,
        batches: int | None = None,
        samples: int | None = None,
        tokens: int | None = None,
        epochs: float | None = None,
    ) -> None:
        """Logs a warning if a training of this length makes no average, or one that never moves. Local.

        For loops and trainers that know how long they train. ``max_duration`` says it in one unit at construction;
        here it can be said in several. Nothing else changes.

        Args:
            batches, samples, tokens, epochs: the clock of the training at its end; None where it is not known.
        """
        length = {"ba": batches, "sp": samples, "tok": tokens, "ep": epochs}
        self._warn_of_length({unit: float(value) for unit, value in length.items() if value})

    def _warn_of_length(self, length: Mapping[str, float]) -> None:
        missed = what_is_missed(self._options.start, self._options.interval, length)
        if missed is not None and "length" not in self._told:
            self._told.add("length")
            if rank_in(self._engine.group) == 0:
                logger.warning("%s.", missed)

    def _warn_if_not_started(self, operation: str) -> None:
        """Logs once, on the first rank, that what ``operation`` writes as the average is the live model."""
        if self._shadow.started or operation in self._told:
            return
        self._told.add(operation)
        if rank_in(self._engine.group) == 0:
            logger.warning(
                "%s writes the live weights in place of the average, which has not begun: no update was due yet "
                "(ema_start=%r, update_interval=%r; trained: %s).",
                operation,
                str(self._options.start),
                str(self._options.interval),
                self.clock,
            )

    def attach(self, optimizer: object, *, call: Callable[[], object] | None = None) -> RemovableHandle:
        """Calls ``update()`` after every real step of ``optimizer`` (for DeepSpeed: of the engine). Local.

        It may be wrapped, as Accelerate, Lightning and Fabric do: the torch optimizer is found that really steps. A
        GradScaler does not step its optimizer when gradients overflow, so such a step is not counted; nor is the one
        that ``torch.distributed.checkpoint`` makes, with learning rates of zero, so that an optimizer has a state to
        save or to load. Run steps that warm up and train nothing before ``attach()``. Raises EMAConfigError if the
        schedule, the interval or the start counts anything but batches: ``update()`` then has to be called with what
        was trained.

        The average takes the weights as they are when ``step()`` returns. Where they change after it (weight clipping,
        clamping, normalisation, a projection onto constraints), do not attach: call ``update()`` by hand after that
        change. Where several optimizers step one after the other, attach the one that steps last, so that an update
        sees weights of one step; a warning says if an optimizer lacks some of the averaged parameters.

        Args:
            optimizer: whose steps count.
            call: called in place of ``update()``, for who counts himself and then calls it, at once or later: several
                optimizers may be attached so. Under DeepSpeed it is called after micro-steps too, on which ``update()``
                does nothing.
        """
        if self._teacher is not None:
            self._teacher.check_optimizer(optimizer)
        if call is not None:
            return self._engine.attach(optimizer, call)
        others = self._options.units() - {"ba"}
        if others:
            raise EMAConfigError(
                f"attach() can count batches only, and the options count in {', '.join(sorted(others))}: call "
                "update(samples=..., tokens=..., epochs=...) after each step instead"
            )
        if self._attached is not None:
            raise EMAStateError(
                "attach(): an optimizer is attached already, and a step would be counted twice. Of several optimizers "
                "attach only the one that steps last. To attach another one, remove() the handle of the first call "
                "before. To count steps yourself, pass call= to each"
            )
        inner = self._engine.attach(optimizer, self.update)
        averaged: set[str] = set()
        known: set[str] = set()
        for share in self._shares:
            names = (share.spec.name, *share.spec.aliases)
            known.update(names)
            if share.mode == "average":
                averaged.update(names)
        self._engine.warn_of_lacking(optimizer, averaged, known)
        self._attached = Attached(inner, self._detach)
        return self._attached

    def _detach(self) -> None:
        self._attached = None

    def reset(self) -> None:
        """Forgets the averages; the next due update copies the weights again, as the model is then. Local.

        Reads anew which parameters there are and which are trained. The clock goes on. After a failure inside
        ``average_parameters()`` that left the live weights torn, load them first. Raises EMAStateError inside
        ``average_parameters()``.
        """
        self._condition.refuse("reset()", mends=True)
        self._background.wait()
        old = self._shadow
        with Uninterrupted():
            self._plan(self._track.training)
            old.discard()
            self._condition.mended()

    def _plan(self, clock: Progress) -> None:
        specs = self._engine.specs()
        names = [spec.name for spec in specs]
        if not self._engine.is_part:  # a pattern may be meant for another rank's stage
            self._options.check_patterns(names)
        shares = assign_shares(specs, self._options)
        if not any(share.mode == "average" for share in shares):  # in a GAN, between two steps: as it was before
            shares = assign_shares(specs, self._options, self._averaged_names())
        if not self._engine.is_part and not any(share.mode == "average" for share in shares):
            trained = sum(spec.kind == "parameter" for spec in specs)
            raise EMAConfigError(
                f"nothing to average: the model has {trained} trained of {len(specs)} parameters and buffers, and "
                "include and exclude leave none of them"
            )
        shadow = self._new_shadow(shares=shares)
        self._changes += 1
        self._condition.broken = "reset()"
        self._set_shares(shares)
        self._warn_if_coarse()
        self._warned = self._said_resized = False
        self._track: Track = Track(self._options, clock)
        self._shadow = shadow
        shadow.install()
        self._skipped_before = 0  # of a run that was resumed; counted by rank 0
        self._condition.broken = None

    def _averaged_names(self) -> set[str]:
        """Names of the parameters that this rank averages, be they frozen now."""
        shares = [share for share in self._shares if share.spec.kind != "buffer"]
        return {share.spec.name for share in shares if share.mode == "average"}

    @answering("rebind()")
    def rebind(self, target: object) -> None:
        """Goes on with another wrapping of the model: the same names and shapes, under any engine. Collective.

        All that is averaged has to be there. Parameters that are trained and were not averaged (a new head, a second
        adapter, what was unfrozen) join with their present values; buffers may have other shapes. Also for a model in
        which a parameter was replaced: ``rebind(model)`` goes on with the new one.

        For trainers that wrap a model anew, around an evaluation say. The average moves in memory to where the new
        wrapping wants it: without communication where each rank holds those elements already, else through one window
        of 16 MiB at a time. Clocks and counts go on. ``attach()`` again if the optimizer is another one, or a DeepSpeed
        engine.

        Also after ``destroy_process_group()`` and a new ``init_process_group()`` in the same processes: wrap the model
        again, and the average goes on. Every process must be there with the rank that it had, since each holds a part
        of the average; otherwise make a new ShardedEMA and ``load()`` a checkpoint.

        Args:
            target: as for the constructor; of the same ``group``.

        Raises:
            EMAEngineError: it cannot be averaged, or is not the same model (all differences are listed).
            EMAStateError: inside ``average_parameters()``, or an offloaded update has failed, or the ranks are not
                those of before. Nothing has changed then.
        """
        self._background.drain()
        groups = self._present_groups()
        with groups.turn("rebind()"):
            self._rebind(target, groups)

    def _present_groups(self) -> OwnGroups:
        """The object's process groups, or new ones where the program has made others since. Local."""
        initialized = dist.is_available() and dist.is_initialized()
        group = self._group or (dist.group.WORLD if initialized else None)
        if group is self._groups.group or group is None:
            return self._groups
        if self._teacher is not None:  # it is wrapped for the old groups, too
            self._groups.check("rebind()")
        return OwnGroups(group, repr(self._options.facts()))

    def _rebind(self, target: object, groups: OwnGroups) -> None:
        """See :meth:`rebind`; in its turn."""
        operation = "rebind()"
        group = groups.group
        if self._groups.group is None and group is not None:
            self._known = None  # only this process has told itself so far
        with self._begun(self._call(operation), groups=groups):
            groups.check_same_place(self._groups, operation)
            self._wait_for_save()
            self._condition.refuse(operation)
            self._shadow.wait()
            engine = self._detect(target)
            specs = engine.specs()
            averaged = {name for entry in self._full_tensors() if entry.mode == "average" for name in entry.names}
            shares = assign_shares(specs, self._options, averaged)
            shadow = self._new_shadow(self._shadow.seed, shares, target)
            engine.reshard()
            sources = engine.sources()
        old, new = self._full_tensors(), self._proven(engine, shares, group)
        joining = check_same_model(old, new, operation)
        old = [entry for entry in old if entry.mode != "live" and entry.name not in joining]
        if self._shadow.started:
            begin = shadow.start if joining else shadow.allocate  # what joins keeps its present value
            with agreed(group, operation):
                begin(sources)
                shadow.wait()
            for name in self.names:
                held = {
                    share.spec.name: LocalValues(share, values, 0)
                    for share, values in zip(self._shares, self._shadow.tensors(name), strict=True)
                    if values is not None
                }
                move(old, held.get, shares, shadow.tensors(name), group, operation)
            shadow.loaded()
        with Uninterrupted():
            self._skipped_before = self._skipped()
            self._engine = engine
            self._set_shares(shares)
            self._known = new
            self._condition = Condition(engine)
            self._groups = groups
            if self._teacher is not None:
                self._teacher.target = target
            self._take(shadow)

    def _take(self, shadow: Shadow) -> None:
        """Puts a shadow in the place of the one that there was, if it is another."""
        self._changes += 1
        old, self._shadow = self._shadow, shadow
        if old is not shadow:
            old.discard()
        shadow.install()

    def _new_shadow(
        self, saved_seed: int | None = None, shares: Sequence[Share] | None = None, target: object = None
    ) -> Shadow:
        options, seed = self._options, self._seed(saved_seed)
        shares = self._shares if shares is None else shares
        if self._teacher is not None:
            group = self._engine.group
            return self._teacher.shadow(options.schedules, shares, options.skip_nonfinite, seed, group, target)
        if options.offload:
            return HostShadow(options.schedules, shares, options.skip_nonfinite, options.offload_threads, seed)
        return Shadow(options.schedules, shares, options.skip_nonfinite, seed)

    def _seed(self, saved: int | None) -> int | None:
        """Seed of stochastic rounding; that of a loaded checkpoint wins. None where nothing is rounded."""
        own = self._options.seed
        if own is None or saved is None:
            return own
        if saved != own:
            logger.info("The average was saved with seed=%d and goes on with it, not with seed=%d.", saved, own)
        return saved

    def _warn_if_coarse(self) -> None:
        coarse = [share for share in self._shares if share.mode == "average" and share.dtype.itemsize < 4]
        if coarse and self._options.dtype is None:  # else it is rounded stochastically
            logger.warning(
                "dtype=None keeps %d shadows in %s, %r among them. A slow average of that precision stops moving, "
                "since its steps are smaller than its last bit: dtype=torch.float32 does not.",
                len(coarse),
                coarse[0].dtype,
                coarse[0].spec.name,
            )

    # The average in the model: collective where parameters are replicated or the engine has to gather.

    @contextmanager
    def average_parameters(self, name: str | None = None, *, held_by: str | None = None) -> Iterator[None]:
        """Inside, the live model computes with the average; afterwards the live weights are back bit for bit.

        Also when the body raises. No second copy of the model is made: live weights and shadow change places.
        Collective for DDP, HSDP and DeepSpeed, and where a model that is spread over ranks has buffers in its average:
        all ranks then compute with those that ``export`` writes. Local for the others, where every rank has to give the
        same ``name``. Where it is collective, the body has to raise on every rank or on none. Not reentrant. Do not
        train inside. Weights that are written there are noticed, but for writes through ``.data``: when the block ends
        and the live weights are back, EMAStateError is raised. If the average has changed by it, every call that reads
        it refuses until ``reset()`` or ``load()``. Buffers, as BatchNorm's in training mode, are a warning. Modules in
        eval mode that override ``train()`` or ``eval()`` are switched to and fro, so that they drop what they keep of
        their weights. ``save``, ``export``, ``full_state_dict``, ``state_dict`` and ``fingerprint`` give there what
        they give outside; ``update``, ``load`` and the others raise EMAStateError.

        It may be held open from one event of a trainer to another, by ``contextlib.ExitStack.enter_context``.

        Args:
            name: which average; None means the only one.
            held_by: who holds it open, for those errors ("Lightning's validation"); None means the calling line.

        Raises:
            EMAStateError: already inside; where it is collective, also whatever keeps another rank from taking part. If
                a rank is lost inside, where ranks need each other to get their live weights back, these are torn: they
                must not be saved, and every call says so until the model was loaded and then ``load()`` or ``reset()``
                called.
            EMAConfigError: there is no such average, or there are several and none was named.

        A signal's handler waits while weights are on their way in or out; what it raises is raised afterwards. An
        exception between any two lines here loses nothing either.
        """
        self._quiesce()
        swap: Swap | None = None
        condition = self._condition
        visit = Visit("", "average_parameters()", held_by or _calling_line())
        try:
            try:
                try:
                    with Uninterrupted():  # other ranks would go on alone, with weights half of which come from here
                        swap = self._swap(self._call("average_parameters()", name=name), name, visit, keep=True)
                        visit.open = True
                        condition.visit, condition.swap = visit, swap
                        if swap is not None:
                            with answering("average_parameters()"):
                                swap.enter()
                    yield
                finally:
                    self._leave(swap, visit)
            finally:  # an exception between any two lines above ends here, and what has been done is not done again
                self._leave(swap, visit)
        finally:  # so does a second one, which comes as late as here: a launcher sends SIGINT, then SIGTERM
            self._leave(swap, visit)
            condition.visit = condition.swap = None
            written = None if swap is None else swap.written
            if written is not None and sys.exc_info()[0] is not None:  # what the block raised is not replaced
                logger.warning("average_parameters(): %s.", written)
        if written is not None:
            raise written.error("average_parameters()")

    def _leave(self, swap: Swap | None, visit: Visit) -> None:
        """Leaves the model, unless that is done. Collective where the swap is."""
        try:
            if swap is not None:
                swap.wait_for_readers()
                swap.leave()
        finally:
            visit.open = False
            self._condition.end(visit)
            if swap is not None and swap.written is not None and swap.written.changed:
                self._condition.written = swap.written

    def _quiesce(self) -> None:
        """Waits, so long as signals need not wait, for whoever still works on the averages or reads them. Local."""
        self._background.wait_until_read()
        self._shadow.drain()
        self._shadow.make_way()

    def _swap(self, call: Call, name: str | None, visit: Visit, keep: bool) -> Swap | None:
        """None before the first update, when the average is the live model. Collective where the swap is."""

        started = self._shadow.started
        self._groups.check(call.name)  # the engine asks its process groups
        # Another rank's stage may have buffers.
        together = self._engine.is_part or swaps_together(self._engine, self._shares)
        turn = self._groups.turn(call.name) if together else nullcontext()
        with answering(call.name), turn, self._begun(call) if together else nullcontext():
            self._condition.refuse(call.name)
            visit.name = self._name(name)
            shadows = self._shadow.tensors(visit.name) if started else [None] * len(self._shares)
            wait = self._background.wait_until_read
            fixed = self._shadow.fixed
            swap = Swap(self._engine, self._shares, shadows, self._shadow.scratch, visit, wait, fixed)
            swap.prepare(keep and started)
        if together:
            swap.entries = self._full_tensors()
        self._condition.begin(visit)
        wait_for_reads()
        return swap if started else None

    def copy_to(self, name: str | None = None, *, into: object = None) -> None:
        """Writes the average into the live model for good, and into fp32 masters where the engine has them.

        Collective as ``average_parameters``. Raises as it does. Does nothing before the first update. An interrupt is
        raised when all is written.

        Args:
            name: which average; None means the only one.
            into: another model in place of the live one, sharded as this one is and named so (after ``rename``): a
                reference policy, a third teacher. What is averaged or copied is written, and before the first update
                that is what the live model has; frozen and excluded weights stay what they are. It may train. With it
                the call is collective, and raises EMAEngineError, on every rank, for a model that does not fit.
        """
        self._quiesce()
        if into is not None:
            self._copy_into(name, into)
            return
        visit = Visit("", "copy_to()")
        with Uninterrupted():
            try:
                swap = self._swap(self._call("copy_to()", name=name), name, visit, keep=False)
                if swap is not None:
                    with answering("copy_to()"):
                        swap.copy()
            finally:
                self._condition.end(visit)

    def _copy_into(self, name: str | None, into: object) -> None:
        operation = "copy_to(into=...)"
        visit = Visit("", operation, weights="the weights of the model that was given as into=")
        with answering(operation), Uninterrupted(), self._groups.turn(operation):
            with self._begun(self._call(operation, name=name)):
                view = self._view(operation, inside=False)
                visit.name = self._name(name)
                other = counterpart(self._engine, into, self._shares, self._options, self._group, self._teacher)
                values = view.whole_average(visit.name)
                copying = Swap(other, self._shares, values, self._shadow.scratch, visit)
                copying.prepare(keep=False)
            copying.entries = self._full_tensors()
            wait_for_reads()
            copying.copy()

    # Full tensors: collective.

    @_collective("full_state_dict()")
    def full_state_dict(
        self, name: str | None = None, *, dtype: torch.dtype | None = None, include_untracked: bool = True
    ) -> dict[str, Tensor]:
        """Full CPU tensors by canonical name on rank 0, ``{}`` elsewhere. Collective.

        Tensors are gathered one at a time through windows of 16 MiB, so other ranks need no more than that. Tied names
        share one tensor.

        Args:
            name: which average; None means the only one.
            dtype: casts floating-point tensors; None means the shadow's own, and of what is not averaged its own.
            include_untracked: with frozen and excluded parameters and ignored buffers, as they are in the model.

        Raises:
            EMAStateError: the model has changed, another object's average is in it, or what is not averaged has no
                elements that could be read by ranges (a quantised base model).
            EMAConfigError: no such average, or ``dtype`` is not a floating-point dtype.
        """
        call = self._call("full_state_dict()", name=name, dtype=dtype, include_untracked=include_untracked)
        with self._begun(call):
            check_cast(dtype)
            held = self._view(call.name).average(self._name(name), include_untracked)
            check_readable(held.values())
        return full_tensors(self._wanted(include_untracked), held.get, dtype, self._engine.group, "full_state_dict()")

    def iter_full_tensors(
        self,
        name: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        layout: str | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Full averaged tensors with their canonical names, one at a time on every rank. Collective, also between two.

        For who pushes weights to an inference server: what its ``load_weights`` takes. In an order that all ranks
        share, with what is not averaged as it is in the model; a tied tensor under each of its names. In memory at a
        time: the tensor itself, or as many small ones as 16 MiB hold, and a window of 16 MiB. Every rank goes through
        to the end, or all stop at the same tensor.

        All averaged tensors are of one moment. If the average is updated, loaded or reset before the last tensor, what
        was gathered already still comes, and the next read raises EMAStateError: start anew then. Tensors that are not
        averaged, and all of them before the first update, are those of the model when each is read.

        Args:
            name: which average; None means the only one.
            dtype: casts floating-point tensors; None means the shadow's own, and of what is not averaged its own.
            device: of the tensors; None means the CPU.
            layout: None yields the module's own names. ``"transformers"`` yields the names and shapes that
                ``export(layout="transformers")`` writes, which are those of the Hub's files: one tensor for each
                expert, and a tied tensor once. vLLM's and SGLang's ``load_weights`` take these. Besides the window, all
                tensors that are made of one tensor of the module are then in memory.

        Raises:
            CheckpointError: on every rank: the names of ``layout`` cannot be made by parts.
            EMAConfigError: no such average, ``dtype`` is not a floating-point dtype, or ``layout`` is another one.
            EMAStateError: on every rank, as ``full_state_dict()``; also if the average has moved since the first
                tensor, or another rank makes another call meanwhile.
        """
        call = self._call("iter_full_tensors()", name=name, dtype=dtype, layout=layout)
        modules = self._engine.modules()
        model = unwrapped(modules[0]) if len(modules) == 1 else None
        with answering(call.name), self._groups.turn(call.name):
            with self._begun(call):
                check_cast(dtype)
                if layout not in (None, "transformers"):
                    raise EMAConfigError(f"layout={layout!r}: allowed are None and 'transformers'")
                check_layout(layout, model)
                check_readable(self._view(call.name).average(self._name(name)).values())
            entries = self._full_tensors()
            dtypes = {entry.name: entry.cast(dtype) for entry in entries}
            arrangement = None
            if layout is not None:
                arrangement = arranged(model, layout, entries, dtypes, self._engine.group, call.name)
        return self._full_one_by_one(call, self._name(name), dtypes, torch.device(device or "cpu"), arrangement)

    def _full_one_by_one(
        self,
        call: Call,
        name: str,
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        arrangement: Arrangement | None,
    ) -> Iterator[tuple[str, Tensor]]:
        moment, entries = (self.num_updates, self._changes), self._full_tensors()
        group = self._engine.group
        hub = None if arrangement is None else HubTensors(arrangement, device)
        for batch in in_windows(entries, dtypes):
            with answering(call.name), self._groups.turn(call.name):
                # Ranks meet before each: one that has left the loop, and makes another call, is told so.
                with self._begun(call):
                    if (self.num_updates, self._changes) != moment:
                        raise EMAStateError(
                            f"{call.name}: the average was updated since the first tensor, or loaded or reset: "
                            "start anew"
                        )
                    held = self._view(call.name).average(name)
                if hub is not None:
                    found = hub.gather(batch, held.get, dtypes, group, call.name)
                else:
                    found = everywhere(batch, held.get, dtypes, group, device, call.name)
            yield from found

    @_collective("export()")
    def export(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        config_from: object = None,
        gather: bool | None = None,
        include_untracked: bool = True,
        layout: str | None = None,
    ) -> None:
        """Writes the average as a Hugging Face directory that ``from_pretrained`` reads. Collective.

        Every rank writes its own elements in place into the same files: nothing is gathered and no rank ever holds a
        full tensor. The directory appears under its name only when it is complete and on disk.

        Args:
            path: the directory, which must not exist; missing parents are made.
            name: which average; None means the only one.
            dtype: of floating-point tensors; None means the live weights' own.
            max_shard_size: bytes of one file at most, such as ``"5GB"`` or an int; a larger tensor has its own file. An
                adapter is one file, whatever its size.
            config_from: what is written beside the weights, or a list of such things: a file; a directory, whose
                configuration files (not weights) are copied; an object with ``save_pretrained``, such as a transformers
                config or tokenizer. None means the model's own configuration, if it has one and no adapters, as its
                ``save_pretrained`` writes it, with ``architectures``, dtype and generation config; so does the model's
                own ``config`` in a list: ``[model.config, tokenizer]``. ``[]`` is nothing.
            gather: True sends everything through rank 0, which alone writes; False never does; None finds out whether
                all ranks see rank 0's disk.
            include_untracked: with frozen and excluded parameters and ignored buffers, as they are in the model.
            layout: ``"transformers"``, ``"diffusers"`` and ``"peft"`` write the files of their ``save_pretrained``;
                ``"peft"`` the active adapter alone, with ``adapter_config.json``. None names files as transformers
                does. Names and shapes of a transformers model are those of its ``save_pretrained`` (one tensor for each
                expert where the module has one for all), with a tied tensor written once. Of any other model a tied
                tensor is written under all of its names, so that ``load_state_dict`` takes it. Where the names of
                ``save_pretrained`` cannot be written by parts, None logs it and writes the module's own, and
                ``"transformers"`` raises.

        Raises:
            CheckpointError: on every rank, whichever rank failed; nothing is left behind.
            EMAStateError: the model has changed, another object's average is in it, or what is to be written has no
                elements that could be read by ranges (a quantised base model): nothing has been written.
            EMAConfigError: no such average, or an option has a value that is not allowed.
        """
        arguments = {"name": name, "dtype": dtype, "max_shard_size": max_shard_size, "gather": gather}
        arguments |= {"include_untracked": include_untracked, "layout": layout}
        call = self._call("export()", **arguments)
        with self._begun(call):
            check_cast(dtype)
            held = self._view(call.name).average(self._name(name))
        self._warn_if_not_started(call.name)
        modules = self._engine.modules()
        export(
            path,
            self._full_tensors(),
            held.get,
            self._groups.files("export()", _PATIENCE, self._shadow_bytes()),
            dtype=dtype,
            max_shard_size=max_shard_size,
            config_from=config_from,
            gather=gather,
            layout=layout,
            model=unwrapped(modules[0]) if len(modules) == 1 else None,
            include_untracked=include_untracked,
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        block: bool = True,
        timeout: float = _PATIENCE,
        include_untracked: bool = True,
    ) -> None:
        """Writes a checkpoint of the averages that loads at any world size and under any engine. Collective.

        Every rank writes its own elements in place, in the shadow's dtype; what is not averaged is written too, so that
        the checkpoint is a whole model. A checkpoint at ``path`` is replaced by a complete one, in one step: at every
        moment there is the old or the new one, on disk. Extra memory: some MiB a rank.

        One run at a time should save to a path. Of two that do, the one that would replace what the other has put there
        meanwhile fails; a URL where the store cannot replace an object on condition (S3 can) may then hold nothing that
        can be read, and that save says so.

        Args:
            path: the directory, or a URL that fsspec opens. Missing parents are made. What is there must be a
                checkpoint, be it damaged, or an empty directory.
            block: wait until all is on disk. If not, the next due update waits until the shadow has been read (not
                until it is on disk; to a URL, until it has been sent), and what fails is raised by the next ``update``,
                ``save``, ``load``, ``reset``, ``wait`` or ``close``, on every rank; at the end of the program it is
                logged, with exit status 1.
            timeout: seconds to wait for a rank that does not answer, beside what writing its part takes at 50 MB/s.
            include_untracked: with frozen and excluded parameters and ignored buffers. Without, the checkpoint says
                which it lacks, and ``load`` takes it all the same: it never writes into what is not averaged.

        Raises:
            CheckpointError: on every rank, whichever rank failed; nothing is left behind. Also if ``path`` holds
                something else than a checkpoint, or another run has saved there meanwhile.
            EMAConfigError: ``path`` is empty, or no path.
            EMAStateError: the model has changed, another object's average is in it, or what is not averaged has no
                elements that could be read by ranges (a quantised base model): nothing has been written.
        """
        self._background.drain()
        with answering(f"save to {path}", timeout), self._groups.turn("save()"):
            arguments = {"block": block, "timeout": timeout, "include_untracked": include_untracked}
            with self._begun(self._call("save()", f"save to {path}", **arguments), timeout=timeout):
                self._wait_for_save()
                view = self._view("save()")
                held = {name: view.average(name, include_untracked) for name in self.names}
                check_readable(values for average in held.values() for values in average.values())
            self._warn_if_not_started("save()")
            nbytes = self._shadow_bytes()
            group = self._groups.files("save()", timeout, nbytes)
            views = {name: average.get for name, average in held.items()}
            state, schedules = self._state(self._skipped()), self._options.schedules
            contents = Contents(state, schedules, self._full_tensors(), views, include_untracked)
            save = Save(path, contents, group)
            if block:
                save.run()
                return
            save.start()
            turn = self._groups.line_up("save()", timeout, nbytes)  # all ranks are here, so in one order on all
        shadows = (shadow for name in self.names for shadow in self._shadow.tensors(name) if shadow is not None)
        handover = Handover(shadows if self._shadow.started else ())

        def finish(reading: AbstractContextManager[None]) -> None:
            with answering(f"save to {path}", timeout):
                save.finish(reading, turn)

        self._start(finish, handover, turn)

    def _start(self, work: Callable[[AbstractContextManager[None]], None], handover: Handover, turn: Turn) -> None:
        """Runs ``work`` in the background, after which its turn is over, whether it took it or not. Local."""

        def run(reading: AbstractContextManager[None]) -> None:
            try:
                work(reading)
            finally:
                turn.leave()

        try:
            self._background.start(run, handover)
        except BaseException:
            turn.leave()
            raise

    def snapshot(
        self,
        folder: str | os.PathLike[str],
        *,
        every: str | int,
        keep: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Snapshots:
        """Makes ``update()`` save the averages from now on when so much more has been trained. Collective, once.

        A snapshot is a checkpoint that ``load``, ``merge`` and ``synthesize`` read, without what is not averaged. It is
        written in the background, as by ``save(block=False)``: the next due update waits until the shadow has been
        read, and what fails is raised by a later call. No call of the thread that trains is collective.

        Snapshots beyond the moment where a run goes on, after a ``load()`` say, are of a run that was abandoned. The
        next snapshot moves them into ``FOLDER/abandoned-<number>`` and logs their names. (At a URL they stay, and one
        of the same moment is replaced.)

        Args:
            folder: of the snapshots, which lie in ``FOLDER/<progress>``, such as ``FOLDER/20000ba``; or a URL.
            every: ``"1000ba"``, ``"10000000tok"``, ``"0.5ep"``: multiples of it on the training clock.
            keep: how many of the newest are kept; None means all.
            dtype: of floating-point averages on disk, rounded to nearest: ``torch.bfloat16`` takes half the space of
                fp32. None means the shadow's own.

        Returns:
            An object whose ``paths()`` are the snapshots that there are, and whose ``remove()`` ends this.

        Raises:
            EMAConfigError: an option has a value that is not allowed.
        """
        call = self._call("snapshot()", every=every, keep=keep, dtype=dtype)
        with answering(call.name), self._groups.turn(call.name), self._begun(call):
            snapshots = Snapshots(folder, every, keep, dtype)
        snapshots.begin(self.clock)
        self._snapshots.append(snapshots)
        return snapshots

    def _take_snapshot(self, snapshots: Snapshots) -> None:
        """Has a thread save the averages as they are. Local; waits for an offloaded update and for a save before."""
        self._condition.refuse("snapshot")
        self._shadow.wait()
        path, shares, shadow, known = snapshots.path(self.clock), self._shares, self._shadow, self._known
        engine = self._engine
        state, schedules = self._state(0), self._options.schedules
        view = View(shares, shadow, self._engine.sources(), self._condition)
        held = {name: view.average(name, include_untracked=False).get for name in self.names}
        handover = Handover(values for name in self.names for values in shadow.tensors(name) if values is not None)

        turn = self._groups.line_up("snapshot()", _PATIENCE, self._shadow_bytes())

        def contents(group: dist.ProcessGroup | None) -> Contents:
            # unknown after a reset()
            entries = self._proven(engine, shares, group) if known is None else known
            with handover.taken():
                skipped = self._skipped()  # waits for the device
            return Contents(replace(state, skipped=skipped), schedules, entries, held, False, snapshots.dtype)

        def save(reading: AbstractContextManager[None]) -> None:
            with answering(f"snapshot {path}", _PATIENCE), turn as group:
                snapshots.save(path, contents, reading, group)

        self._start(save, handover, turn)

    @_collective("load()")
    def load(self, path: str | os.PathLike[str], *, strict: bool = True, verify: bool = True) -> None:
        """Reads a checkpoint, of any engine and world size, by ranges of its files. Collective.

        The average is then bit for bit the saved one, and training goes on as if it had not stopped. The clock is the
        saved one, the schedules are this object's; where they differ, that is logged.

        Args:
            path: of the checkpoint, a directory or a URL.
            strict: every tensor must fit. If not, what does not is left out, which is logged, and starts from the live
                weights. What is frozen here, and has an average in the checkpoint, fits: it goes on being averaged.
                What is trained here, and was frozen when the checkpoint was saved, starts from its stored value. A
                buffer may have another shape: its average has the stored one until the next update.
            verify: check the fingerprints of what is read.

        Raises:
            CheckpointMismatchError: lists all that is missing, unexpected or misshapen; nothing has changed.
            CheckpointCorruptError: names the damaged file and tensor; nothing has changed.
            CheckpointError: there is no checkpoint, or one of another format version.
            EMAStateError: inside ``average_parameters()``, or the model has changed.
        """
        self._background.drain()
        call = self._call("load()", f"load from {path}", strict=strict, verify=verify)
        with self._begun(call, replaces=True):
            self._wait_for_save()
            sources = self._live("load()")
        group = self._groups.files("load()", _PATIENCE, self._shadow_bytes())
        selects, dtype = self._options.selects, self._options.dtype
        manifest, shadow, shares = read_anew_if_replaced(
            lambda: Load(path, self._full_tensors(), self.names, group, selects, dtype),
            lambda load: (load.manifest, *self._filled(load, sources, strict, verify)),
        )
        with Uninterrupted():
            self._replace(shadow, shares, manifest.state, "load()")
        report_schedules(manifest.schedules, self._options.schedules)

    def _filled(self, load: Load, sources: Sequence[Tensor], strict: bool, verify: bool) -> tuple[Shadow, list[Share]]:
        """A new shadow with what a checkpoint holds, and its shares. Collective; raises as ``load()`` on every rank."""
        found = load.match(strict)
        shares = self._shares_with(load.joining, load.shapes)
        shadow = self._new_shadow(load.manifest.seed, shares)
        if load.manifest.started:
            # What a checkpoint lacks starts from the live weights; where it may lack nothing, none are copied.
            begin = shadow.allocate if strict else shadow.start
            with agreed(self._engine.group, "load()"):
                begin(_of_shape(sources, shares))
                shadow.wait()
            load.fill(shadow, shares, found, verify)
            shadow.loaded()
        return shadow, shares

    def _shares_with(self, joining: Container[str], shapes: Mapping[str, Sequence[int]]) -> list[Share]:
        """The shares of an average to be loaded: ``joining`` are averaged as well, buffers have these ``shapes``."""
        names = [name for share in self._shares for name in share.names]
        if not shapes and not any(name in joining for name in names):
            return self._shares
        specs = []
        for share in self._shares:
            shape = shapes.get(share.spec.name)
            specs.append(share.spec if shape is None else resized(share, shape).spec)
        averaged = self._averaged_names().union(name for name in names if name in joining)
        return assign_shares(specs, self._options, averaged)

    def _replace(self, shadow: Shadow, shares: list[Share], state: EMAState, operation: str) -> None:
        """A loaded average takes the place of the one that there was. Local."""
        self._condition.broken = operation
        if shares is not self._shares:
            self._set_shares(shares)
        self._resized = True  # the live buffers may have other shapes than the loaded ones
        self._take(shadow)
        self._track.restore(state)
        for snapshots in self._snapshots:
            snapshots.begin(self.clock)
        self._skipped_before = state.skipped if rank_in(self._engine.group) == 0 else 0
        self._condition.mended()

    @_collective("state_dict()")
    def state_dict(self, *, full: bool = False, live: bool = False) -> dict[str, Any]:
        """What ``torch.distributed.checkpoint`` saves, and loads into: ``dcp.save({"ema": ema}, ...)``. Collective.

        Tensors only: this rank's parts of the averages, which have the full tensors' names and shapes and can be saved
        and copied but not computed with (``dist_ema.dcp.boxed``), and clocks and schedules as text. Parts are views of
        the shadow, inside ``average_parameters()`` of the model, and keep their values for whoever holds them: a later
        write of ours waits for a thread that reads them, 30 s at most, and copies what is held then. Live weights are
        views of the model, which an optimizer step changes as it changes ``model.state_dict()``. Before the first
        update they are a copy of the live weights, which is one more shadow in memory until the dict is dropped.

        Every rank must call it, and each rank's dict has its own part only. A ``torch.save`` of rank 0's dict is not
        the average: for one file that rank 0 writes, let every rank call ``state_dict(full=True)``.

        Args:
            full: whole CPU tensors on rank 0, gathered one at a time, in place of parts; the other ranks get a dict
                without tensors. For a file that one rank writes with ``torch.save``.
            live: with the live weights of what is averaged, under ``"live"``: those that train, also while the average
                is in the model. A checkpoint whose model is the average needs them to go on.

        Raises:
            EMAStateError: on every rank: the model has changed, or another object's average is in it.
        """
        # Here, since torch.distributed.checkpoint takes seconds to import and brings torch.distributed.tensor.
        from dist_ema.dcp.stateful import full_parts, make_head

        operation = "state_dict()"
        with self._begun(self._call(operation, full=full, live=live)):
            view = self._view(operation)
        (skipped,) = sum_integers([self._skipped()], self._engine.group)
        state = self._state(skipped)
        if full:
            head = make_head(state, self._options.schedules)
            return head | full_parts(view, self.names, self._full_tensors(), self._engine.group, live)
        with agreed(self._engine.group, operation):
            return self._parts(view, state, live)

    def _parts(self, view: View, state: EMAState, live: bool) -> dict[str, Any]:
        """This rank's part of ``state_dict()``. Local."""
        from dist_ema.dcp.stateful import add_live, make_state_dict

        writes, schedules = self._writes(), self._options.schedules
        if self._shadow.started:
            parts = make_state_dict(state, schedules, view.flat, self._shares, writes, spare=False)
        else:
            spare = self._new_shadow()
            spare.start(view.sources)
            spare.wait()
            parts = make_state_dict(state, schedules, spare.tensors, self._shares, writes, spare=True)
            spare.discard()  # what keeps it up to date; its memory is the dict's
        if live:
            flat = [None if values is None else values.flat() for values in view.live()]
            add_live(parts, flat, self._shares, writes)
        return parts

    @_collective("load_state_dict()")
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a ``state_dict()`` that ``torch.distributed.checkpoint`` has filled. Collective.

        The average is then bit for bit the saved one; the clock is the saved one, and the schedules are this object's,
        as after ``load``. Values are copied, so the dict can be used again. ``dcp.load`` reads into memory of its own,
        one more shadow while it lasts: if it fails, nothing has changed.

        With ``"live"`` in it, as ``state_dict(live=True)`` makes it, the live weights are put back into the model, and
        into fp32 masters where the engine has them.

        Args:
            state_dict: also one that ``torch.save`` wrote on this rank of the same engine and world size, or one with
                full tensors on every rank, which ``state_dict(full=True)`` (for one file that rank 0 writes) and
                ``torch.distributed.checkpoint.format_utils.dcp_to_torch_save`` make. A parameter that is frozen here,
                and averaged there, goes on being averaged. (``dcp.load`` reads only what ``state_dict()`` of the moment
                has: before it, unfreeze what was averaged, and give buffers their saved shapes.)

        Raises:
            CheckpointMismatchError: lists all that does not fit, on every rank; nothing has changed.
            CheckpointError: it is damaged, or of a later version.
            EMAStateError: inside ``average_parameters()``, or the model has changed.
        """
        from dist_ema.dcp.loaded import LoadedStateDict, unlike  # as in state_dict()

        self._shadow.drain()  # what fails in it does not matter any more
        self._background.drain()
        group, operation = self._engine.group, "load_state_dict()"
        with self._begun(self._call(operation), replaces=True):
            self._wait_for_save()
            sources = self._live(operation)
        with agreed(group, operation) as round_:
            # Each rank has parts of some tensors only: all are told what any has.
            round_.send(unlike(state_dict, self._full_tensors(), self._options.selects))
        joining = {name for names, _ in round_.received for name in names}
        shares = self._shares_with(joining, dict(pair for _, shapes in round_.received for pair in shapes))
        with agreed(group, operation) as round_:
            tracked = {entry.name for entry in self._full_tensors() if entry.mode != "live" or entry.name in joining}
            restore = LoadedStateDict(state_dict, shares, self.names, tracked)
            live = restore.live(sources)
            round_.send((live is None, restore.state.averaged.updates))
        without_live, updates = zip(*round_.received, strict=True)
        if len(set(without_live)) > 1:
            raise CheckpointMismatchError(f"{operation}: some ranks' state dicts have 'live' and others' have not")
        check_same_updates(updates)
        back, visit = None, Visit("", operation)
        if live is not None:
            back = Swap(self._engine, shares, live, self._shadow.scratch, visit, self._background.wait_until_read)
            back.entries = self._full_tensors()
        shadow = self._shadow
        if shadow.failed or not (restore.state.started and shadow.started) or shares is not self._shares:
            shadow = self._new_shadow(shares=shares)
        shadow.make_way()
        with Uninterrupted():
            self._condition.broken = operation
            if restore.state.started:
                with agreed(group, operation):
                    if not shadow.started:  # where an update failed on some ranks, these alone need memory
                        shadow.allocate(_of_shape(sources, shares))
                    restore.fill(shadow)
                    shadow.loaded()
            shadow.seed = self._seed(restore.state.seed)
            self._replace(shadow, shares, restore.state, operation)
            if back is not None:
                self._condition.begin(visit)
                try:
                    wait_for_reads()
                    back.copy()
                finally:
                    self._condition.end(visit)
        report_schedules(restore.schedules, self._options.schedules)

    def wait(self) -> None:
        """Waits for a save in the background and for an offloaded update, and raises what failed in them. Local."""
        self._shadow.drain()
        self._background.wait()
        self._shadow.raise_failure()

    def close(self) -> None:
        """``wait()``, and gives back what saving and offloading took, but not the average.

        Local. The object stays usable. A failed update is raised if no call has raised it yet. The process groups that
        the library has made are shared by all objects, and end with the process.
        """
        self._shadow.drain()
        self._background.wait()
        self._shadow.close()

    @_collective("fingerprint()")
    def fingerprint(self, name: str | None = None, *, include_untracked: bool = True) -> dict[str, int]:
        """A 64-bit digest of each full tensor, by canonical name, which does not depend on how it is sharded.

        Collective, 8 bytes a tensor; the same dict on every rank. Digests the shadow's own dtype. See
        :mod:`dist_ema.kernels.fingerprint` for the formula. ``include_untracked`` and errors as ``full_state_dict``.
        """
        call = self._call("fingerprint()", name=name, include_untracked=include_untracked)
        with self._begun(call):
            held = self._view(call.name).average(self._name(name), include_untracked)
            check_readable(held.values())
        entries, rank = self._wanted(include_untracked), rank_in(self._engine.group)
        partial = dict.fromkeys([entry.name for entry in entries], 0)
        parts = {
            entry.name: Part(mine.values, mine.runs, entry.dtype, mine.start)
            for entry in entries
            if (mine := held.get(entry.name)) is not None and is_writer(entry, mine.share, rank)
        }
        partial.update(zip(parts, partial_digests(list(parts.values())), strict=True))
        totals = sum_integers(list(partial.values()), self._engine.group)
        return {entry.name: total for entry, total in zip(entries, totals, strict=True)}

    @_collective("metrics()")
    def metrics(self) -> dict[str, float]:
        """Numbers to log. Collective, a few bytes.

        ``ema/decay`` (fraction kept by the last update), ``ema/num_updates``, ``ema/skipped_elements`` (NaN and Inf
        sources, over all ranks), ``ema/distance`` (L2 norm of shadow minus live). With several averages ``decay`` and
        ``distance`` are ``ema/<name>/decay`` and ``ema/<name>/distance``. Raises EMAStateError, on every rank, inside
        ``average_parameters()``, or if the model has changed.
        """
        with self._begun(self._call("metrics()")):
            view = self._view("metrics()", inside=False)
        writes = self._writes()
        squares = [view.squared_distance(name, writes) for name in self.names]
        *squares, skipped = sum_floats([*squares, self._skipped()], self._engine.group)
        values = {"ema/num_updates": float(self.num_updates), "ema/skipped_elements": skipped}
        for name, square in zip(self._options.schedules, squares, strict=True):
            prefix = "ema" if len(squares) == 1 else f"ema/{name}"
            values[f"{prefix}/decay"] = self._track.decays[name]
            values[f"{prefix}/distance"] = square**0.5
        return values

    def _skipped(self) -> int:
        """NaN and Inf elements that this rank left out, and on rank 0 those of the run that was resumed."""
        self._shadow.report_nonfinite(wait=True)
        guard = self._shadow.guard
        return self._skipped_before + (guard.total() if guard is not None else 0)

    # Properties: local.

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages; ``("ema",)`` where there is one."""
        return tuple(self._options.schedules)

    @property
    def num_updates(self) -> int:
        """How often weights were taken into the average, the first copy included."""
        return self._track.averaged.updates

    @property
    def progress(self) -> Progress:
        """The training clock since the first copy, in all units."""
        return self._track.progress

    @property
    def clock(self) -> Progress:
        """The training clock, which runs from construction, or from that of the run whose checkpoint was loaded."""
        return self._track.training

    @property
    def units(self) -> frozenset[str]:
        """The units of the clock that the options depend on, of ``ba``, ``sp``, ``tok`` and ``ep``."""
        return frozenset(self._options.units())

    @property
    def held_by(self) -> str | None:
        """Who holds an average in the model now, as ``average_parameters`` was told; None if nobody does."""
        return self._condition.held_by

    def __repr__(self) -> str:
        if "_track" not in vars(self):  # of a construction that failed
            return object.__repr__(self)
        return summary(type(self).__name__, type(self._engine).__name__, self._shares, self._track)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """For ``copy`` and ``pickle``, which would take it for one that goes on by itself."""
        raise EMAStateError(
            "a ShardedEMA belongs to its model, its process groups and the other ranks, so it cannot be copied or "
            "pickled (nor can a model that holds one as an attribute): save() writes it to disk, state_dict() is for "
            "torch.distributed.checkpoint, and full_state_dict() gives its tensors"
        )

    def memory_report(self) -> str:
        """What the shadow costs on this rank, by device, as a short text. Local."""
        return memory_report(self._shares, self._options.schedules, self._shadow)

    # Views of an average.

    def _call(self, call: str, operation: str = "", /, **arguments: object) -> Call:
        """A collective call, with the arguments that all ranks have to give alike. (A path is rank 0's.) Local."""
        facts = {argument: repr(value) for argument, value in arguments.items()}
        options = {f"ShardedEMA's {option}": value for option, value in self._options.facts().items()}
        return Call(call, facts | options, operation)

    @contextmanager
    def _begun(
        self, call: Call, replaces: bool = False, timeout: float | None = None, groups: OwnGroups | None = None
    ) -> Iterator[None]:
        """Begins a collective call: in the block each rank looks whether it can take part; then all go on, or none.

        Collective at the end of the block. Raises, on every rank, what any raised in the block; EMAStateError if ranks
        make different calls, or have counted different training, unless the average is to be replaced: by a ``load()``
        after an update that failed on some ranks. ``timeout`` is that of this round, in seconds. ``groups`` are those
        to meet in; None means the object's own.
        """
        groups = self._groups if groups is None else groups
        if not replaces:
            self._condition.refuse_torn(call.name)
        units = sorted(self._options.units())
        call = replace(call, number=groups.number)
        with same_call(call, lambda message: groups.gather(message, timeout)) as round_:
            yield
            clocks = {unit: self._track.training.value(unit) for unit in units}
            round_.send((self.num_updates, clocks, self._known is not None))
        updates, readings, known = zip(*round_.received, strict=True)
        if not replaces:
            check_same_updates(updates)
            check_same_clocks(readings)
        if not all(known):  # reset() is local
            self._known = self._proven(self._engine, self._shares, groups.group)

    def _proven(self, engine: Engine, shares: Sequence[Share], group: dist.ProcessGroup | None) -> list[FullTensor]:
        """Every full tensor of a model, once ranks have proven that they hold each element once. Collective."""
        return proven_catalogue(shares, group, engine.check_layout, engine.layout)

    def _full_tensors(self) -> list[FullTensor]:
        """Every full tensor of the model, after ``_begun``."""
        return self._known or []

    def _wanted(self, include_untracked: bool) -> list[FullTensor]:
        return [entry for entry in self._full_tensors() if include_untracked or entry.mode != "live"]

    def _writes(self) -> list[bool]:
        """For each share, whether this rank writes it into what is collected from all ranks."""
        entries = {entry.name: entry for entry in self._full_tensors()}
        rank = rank_in(self._engine.group)
        return [is_writer(entries[share.spec.name], share, rank) for share in self._shares]

    def _wait_for_save(self) -> None:
        """Waits for a save in the background; raises what failed in it, which some ranks may have raised already."""
        try:
            self._background.wait()
        except Exception as error:
            raise CheckpointError(f"the save before failed: {error}") from error

    def _view(self, operation: str, inside: bool = True) -> View:
        """For a call that reads the average; one that may also be made ``inside`` ``average_parameters()``."""
        self._condition.refuse(operation, inside=inside)
        if self._condition.swap is not None:
            self._condition.swap.check_writes(operation)
        self._shadow.wait()
        sources = self._present()
        return View(self._shares, self._shadow, sources, self._condition)

    def _live(self, operation: str) -> list[Tensor]:
        """The live tensors, for a call that replaces the average."""
        self._condition.refuse(operation, mends=True)
        return self._present()

    def _state(self, skipped: int) -> EMAState:
        return self._track.state(self._shadow.started, skipped, self._shadow.seed)

    def _shadow_bytes(self) -> int:
        return sum(share.numel * share.dtype.itemsize for share in self._shares) * len(self.names)

    def _name(self, name: str | None) -> str:
        names = self.names
        if name is None and len(names) == 1:
            return names[0]
        if name is None or name not in names:
            raise EMAConfigError(f"name={name!r}: allowed are {', '.join(map(repr, names))}")
        return name


def _of_shape(sources: Sequence[Tensor], shares: Sequence[Share]) -> list[Tensor]:
    """The live tensors, and zeros in the place of each whole buffer that has another shape in the average. Local."""
    return [
        torch.zeros(share.spec.shape, dtype=source.dtype, device=source.device)
        if share.spec.kind == "buffer" and not share.spec.partitioned and source.shape != share.spec.shape
        else source
        for share, source in zip(shares, sources, strict=True)
    ]


def _calling_line() -> str:
    """Where the user's code is, with ``contextlib`` between it and us."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, "contextlib"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
