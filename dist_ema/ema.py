"""``ShardedEMA``: what users call, with its documentation. What each call does is in :mod:`dist_ema.core`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.core import files, tensors, visit
from dist_ema.core import state_dict as stateful
from dist_ema.core import update as updating
from dist_ema.core.average import PATIENCE, Average
from dist_ema.core.memory_report import memory_report, summary
from dist_ema.core.rebind import rebind
from dist_ema.core.snapshots import Snapshots
from dist_ema.engines import RemovableHandle
from dist_ema.errors import EMAConfigError, EMAStateError
from dist_ema.options import Options
from dist_ema.runtime.untraced import untraced
from dist_ema.schedules import Schedule
from dist_ema.schedules.clock import Progress


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
            average then goes with the live ones. Or regular expressions and what becomes of buffers in whose names they
            are found: ``{"expert_bias$": "average", "running_": "ignore"}``. The first match counts, and buffers
            without a match are copied. Use it where some buffers are learnt (the biases of an MoE router) and others
            are caches.
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
        buffers: str | Mapping[str, str] = "copy",
        skip_nonfinite: bool = True,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        into: object = None,
        rename: Mapping[str, str] | None = None,
        sync: str | None = None,
    ) -> None:
        options = Options.parse(
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
        self._average = Average(target, options, group, into)
        if options.duration is not None:
            updating.warn_of_length(self._average, {options.duration.unit: options.duration.value})

    # Averaging: local.

    @untraced
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
            does nothing and returns False. ``update(batches=0, due=True)`` claims no step, and always averages: before
            the first step it copies the initial weights.

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
        return updating.update(self._average, batches, samples, tokens, epochs, due)

    def attach(
        self, optimizer: object, *, call: Callable[[], object] | None = None, overlap: bool = False
    ) -> RemovableHandle:
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
            overlap: run updates of weights on a CUDA device on a stream of their own, beside the next forward pass. The
                next step of any torch optimizer waits for them, on the device; so does every call here. Between two
                steps nothing else may write the averaged parameters without ``wait()`` before. If it does, and torch
                counts the write, the average cannot be used: the next call raises EMAStateError until ``reset()`` or
                ``load()``. Not for optimizer steps that are replayed from a CUDA graph, whose hooks do not run. Where
                weights are in host memory it changes nothing, which is logged once. Not with ``into=``,
                ``offload="cpu"`` or ``call=`` (EMAConfigError).
        """
        return updating.attach(self._average, optimizer, self.update, call, overlap)

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
        updating.warn_of_length(self._average, {unit: float(value) for unit, value in length.items() if value})

    def reset(self) -> None:
        """Forgets the averages; the next due update copies the weights again, as the model is then. Local.

        Reads anew which parameters there are and which are trained. The clock goes on. After a failure inside
        ``average_parameters()`` that left the live weights torn, load them first. Raises EMAStateError inside
        ``average_parameters()``.
        """
        self._average.reset()

    # The average in a model: collective where parameters are replicated or the engine has to gather.

    def average_parameters(
        self, name: str | None = None, *, held_by: str | None = None
    ) -> AbstractContextManager[None]:
        """Lets the live model compute with the average in the block; afterwards the live weights are back bit for bit.

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
        return visit.average_parameters(self._average, name, held_by or visit.calling_line())

    def copy_to(self, name: str | None = None, *, into: object = None, fraction: float = 1.0) -> None:
        """Writes the average into the live model for good, and into fp32 masters where the engine has them.

        Collective as ``average_parameters``. Raises as it does. Does nothing before the first update. An interrupt is
        raised when all is written.

        With ``fraction`` the model moves only so far toward the average: ``live += fraction * (average - live)``. Use 1
        at the end of each epoch for Switch-EMA, .5 with ``decay=0`` and an interval for Lookahead, some .25 every few
        steps to pull the training toward its average. Afterwards the training goes on from the new weights with the
        optimizer's state as it is, and ``update()`` averages them as any others. The blend is computed in fp32 (float64
        if either is) and rounded to nearest in the dtype of the weights: bf16 weights without fp32 masters do not move
        by less than half of their last bit, a 512th. Below 1 copied buffers stay as they are, and averaged ones move on
        each rank toward that rank's average; so for FSDP the call is local.

        Args:
            name: which average; None means the only one.
            into: another model in place of the live one, sharded as this one is and named so (after ``rename``): a
                reference policy, a third teacher. What is averaged or copied is written, and before the first update
                that is what the live model has; frozen and excluded weights stay what they are. It may train. With it
                the call is collective, and raises EMAEngineError, on every rank, for a model that does not fit.
            fraction: of the way toward the average, from 0 to 1; 1 copies it, bit for bit.

        Raises:
            EMAConfigError: ``fraction`` is not such a number, or there is no such average.
        """
        visit.copy_to(self._average, name, into, fraction)

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
        rebind(self._average, target)

    # Tensors and numbers of the average: collective.

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
        return tensors.full_state_dict(self._average, name, dtype, include_untracked)

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
        return tensors.iter_full_tensors(self._average, name, dtype, device, layout)

    def fingerprint(self, name: str | None = None, *, include_untracked: bool = True) -> dict[str, int]:
        """A 64-bit digest of each full tensor, by canonical name, which does not depend on how it is sharded.

        Collective, 8 bytes a tensor; the same dict on every rank. Digests the shadow's own dtype. See
        :mod:`dist_ema.kernels.fingerprint` for the formula. ``include_untracked`` and errors as ``full_state_dict``.
        """
        return tensors.fingerprint(self._average, name, include_untracked)

    def metrics(self) -> dict[str, float]:
        """Numbers to log. Collective, a few bytes.

        ``ema/decay`` (fraction kept by the last update), ``ema/num_updates``, ``ema/skipped_elements`` (NaN and Inf
        sources, over all ranks), ``ema/distance`` (L2 norm of shadow minus live). With several averages ``decay`` and
        ``distance`` are ``ema/<name>/decay`` and ``ema/<name>/distance``. Raises EMAStateError, on every rank, inside
        ``average_parameters()``, or if the model has changed.
        """
        return tensors.metrics(self._average)

    # Files: collective.

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        block: bool = True,
        timeout: float = PATIENCE,
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
        files.save(self._average, path, block=block, timeout=timeout, include_untracked=include_untracked)

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
        files.load(self._average, path, strict, verify)

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
        files.export(
            self._average,
            path,
            name=name,
            dtype=dtype,
            max_shard_size=max_shard_size,
            config_from=config_from,
            gather=gather,
            include_untracked=include_untracked,
            layout=layout,
        )

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
        next snapshot moves them into ``FOLDER/abandoned-<number>`` and logs their names. At a URL it renames their
        ``ema.json`` to ``ema.json.abandoned``, so that nothing takes them for checkpoints.

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
        return files.snapshot(self._average, folder, every, keep, dtype)

    def wait(self) -> None:
        """Waits for a save in the background and for an offloaded update, and raises what failed in them. Local."""
        self._average.shadow.drain()
        self._average.background.wait()
        self._average.shadow.raise_failure()

    def close(self) -> None:
        """``wait()``, and gives back what saving and offloading took, but not the average.

        Local. The object stays usable. A failed update is raised if no call has raised it yet. The process groups that
        the library has made are shared by all objects, and end with the process.
        """
        self._average.shadow.drain()
        self._average.background.wait()
        self._average.shadow.close()

    # torch.distributed.checkpoint: collective.

    def state_dict(self, *, full: bool = False, live: bool = False) -> dict[str, Any]:
        """Returns what ``torch.distributed.checkpoint`` saves and loads into: ``dcp.save({"ema": ema})``. Collective.

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
        return stateful.state_dict(self._average, full, live)

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
                and averaged there, goes on being averaged. ``dcp.load`` reads only what ``state_dict()`` of the moment
                has, and CheckpointMismatchError is raised if that is less than was averaged. So before it unfreeze what
                was averaged and call ``reset()``, and give buffers their saved shapes.

        Raises:
            CheckpointMismatchError: lists all that does not fit, on every rank; nothing has changed.
            CheckpointError: it is damaged, or of a later version.
            EMAStateError: inside ``average_parameters()``, or the model has changed.
        """
        stateful.load_state_dict(self._average, state_dict)

    # What there is: local.

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages; ``("ema",)`` where there is one."""
        return self._average.names

    @property
    def num_updates(self) -> int:
        """Counts how often weights were taken into the average, the first copy included."""
        return self._average.num_updates

    @property
    def decays(self) -> dict[str, float]:
        """Returns what the last update kept of each average, by name; 0 before the first one and for the first copy.

        After ``load()`` it is 0 until the next update. Local, so for logs of every step, where ``metrics()`` is
        collective.
        """
        return dict(self._average.track.decays)

    @property
    def decay(self) -> float:
        """Returns ``decays`` of the only average. Raises EMAConfigError if there are several."""
        if len(self.names) > 1:
            names = ", ".join(map(repr, self.names))
            raise EMAConfigError(f"decay: there are several averages ({names}): use decays")
        return self.decays[self.names[0]]

    @property
    def progress(self) -> Progress:
        """The training clock since the first copy, in all units."""
        return self._average.track.progress

    @property
    def clock(self) -> Progress:
        """The training clock, which runs from construction, or from that of the run whose checkpoint was loaded."""
        return self._average.track.training

    @property
    def units(self) -> frozenset[str]:
        """The units of the clock that the options depend on, of ``ba``, ``sp``, ``tok`` and ``ep``."""
        return frozenset(self._average.options.units())

    @property
    def held_by(self) -> str | None:
        """Returns who holds an average in the model now, as ``average_parameters`` was told; None if nobody does."""
        return self._average.condition.held_by

    def memory_report(self) -> str:
        """Returns what the shadow costs on this rank, by device, as a short text. Local."""
        average = self._average
        return memory_report(average.shares, average.options.schedules, average.shadow)

    def __repr__(self) -> str:
        average = vars(self).get("_average")
        if average is None:  # of a construction that failed
            return object.__repr__(self)
        kind, engine = type(self).__name__, type(average.engine).__name__
        return summary(kind, engine, average.shares, average.track, average.skipped())

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuses ``copy`` and ``pickle``: a copy would not follow the model."""
        raise EMAStateError(
            "a ShardedEMA belongs to its model, its process groups and the other ranks, so it cannot be copied or "
            "pickled (nor can a model that holds one as an attribute): save() writes it to disk, state_dict() is for "
            "torch.distributed.checkpoint, and full_state_dict() gives its tensors"
        )
