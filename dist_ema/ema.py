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

    Each rank averages the elements that it holds, so ``update()`` makes no collective call. Where several ranks hold
    the same elements (DDP, HSDP, ZeRO-0), each averages a part of them. The averaged values are called the shadow. The
    shadow is fp32 by default. Under DeepSpeed it follows the fp32 master weights.

    Give one of ``decay``, ``half_life``, ``smoothing``, ``schedule`` and ``averages``. Without any of them the half
    life is 1000 batches. Trained parameters are averaged. Frozen parameters take no memory here, but are part of every
    full state dict and export.

    The first update that is due at or after ``ema_start`` copies the weights, and ``progress`` counts from there. Until
    then every call treats the live model as the average. Weights may therefore be materialized or loaded after
    construction.

    Args:
        target: the model. A module (plain, DDP, FSDP, FSDP2, HSDP, tensor parallel); a DeepSpeed engine (not the module
            inside it); what Accelerate's ``prepare()`` or Fabric's ``setup()`` return; a ``PipelineStage``; or a list
            of modules or stages, which is this rank's part of a pipeline. A submodule of a plain, DDP or FSDP2 model is
            allowed too. For a part of an FSDP1 or DeepSpeed model pass the whole model and use ``include``.
        decay: fraction kept per batch, in [0, 1).
        half_life: amount of training after which half is kept: ``"1000ba"``, ``"10000000tok"``, ``"50000sp"``,
            ``"2ep"``.
        smoothing: fraction kept per update, in [0, 1), independent of ``update_interval`` (Composer's ``smoothing``).
        schedule: an object of :mod:`dist_ema.schedules`, or of a class that was given to ``schedules.register()``.
        averages: several averages from one read of the weights: ``{"fast": .99, "slow": HalfLife("1ep")}``.
        update_interval: time between updates. An update is due when the clock passes a multiple of it.
        ema_start: when averaging begins. ``"0.1dur"`` needs ``max_duration``.
        max_duration: length of the training, for values in ``dur``. If start or interval exceed it, a warning says that
            there will be no average.
        dtype: dtype of the shadow. None keeps the dtype of each parameter. ``torch.bfloat16`` takes half the memory of
            fp32 and uses stochastic rounding, so that slow averages keep moving (see :mod:`dist_ema.kernels.rounding`).
            Complex parameters are averaged as pairs of real numbers and kept as complex64. Other dtypes are refused.
        offload: ``"cpu"`` keeps the shadow in host memory. ``update()`` then only starts copies of the weights to the
            host, in their own dtype, and a thread averages them while training continues. The next optimizer step waits
            for the copies. Call ``wait()`` before you write weights by hand after ``update()``. Every other call here
            waits for the thread. If the thread fails, every call raises until ``reset()`` or ``load()``. The copies
            take as much host memory as the weights.
        offload_threads: number of threads for the averaging with ``offload``. None means a quarter of
            ``torch.get_num_threads()``, at least 1.
        shard_replicas: divide the shadow over the replicas where parameters are replicated.
        include, exclude: regular expressions, or lists of them, that are searched for in canonical names.
        buffers: ``"copy"`` copies buffers at each update. ``"average"`` averages floating-point buffers and copies the
            others. ``"ignore"`` leaves buffers to the live model. A dict maps regular expressions to these values:
            ``{"expert_bias$": "average", "running_": "ignore"}``. The first expression that is found in a name decides.
            Buffers without a match are copied. Use a dict where some buffers are learned, as the biases of an MoE
            router are, and others are caches.
        skip_nonfinite: leave a shadow element unchanged if its source element is NaN or Inf, and count it. The first
            update has no earlier value and copies it. This is logged: immediately for weights in host memory, and for
            weights on a GPU by the next call that reads a number from it (``save``, ``metrics``, ``state_dict``).
        seed: seed for stochastic rounding. Results do not depend on the sharding. ``load()`` restores the saved seed.
        group: the process group of the ranks that hold this model, if they are a part of the world. All collective
            calls run in it, and "rank 0" means its first rank. None means all ranks.
        into: a second model, the teacher, whose weights are the average. You may run it between any two steps. It may
            have any wrapper, and under DeepSpeed may be a ZeRO-3 engine without an optimizer. Each rank must hold the
            same elements of the same names in both models. Teacher tensors of the shadow's dtype are used as the
            shadow, without a copy. A bf16 teacher is written from the fp32 shadow by each update. The teacher must not
            be trained, and has one average. Until the first update copies the weights, it keeps the values that you
            gave it. Call ``ema.update(batches=0, due=True)`` to copy them immediately. Its frozen and excluded weights
            stay yours. Each replica then averages everything, whatever ``shard_replicas`` says, so that ``update()``
            stays local. With ``into`` the constructor is collective.
        rename: how the teacher's names follow from the model's: regular expressions and replacements (``re.sub``),
            applied in order: ``{r"^backbone[.]": ""}``.
        sync: ``"gather"`` allows a teacher that is sharded differently from the model, as every teacher is under ZeRO-1
            and 2. ``update()`` then sends the whole average to all ranks, and is collective. The shadow is divided over
            the ranks as without a teacher.
        masters: the optimizer, if it keeps fp32 master weights of bf16 parameters (``FusedAdam`` of TransformerEngine
            or apex with master weights), or a function from a parameter to its master, or to None where it has none.
            The masters are averaged. An average of the bf16 parameters would miss what their rounding drops. For
            plain modules, DDP, FSDP2 and tensor parallelism. Not with ``into``. Until the first step there are no
            masters, and the parameters are taken.

    Raises:
        EMAConfigError: an option is wrong.
        EMAEngineError: the target cannot be averaged.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> ema = ShardedEMA(model, decay=0.75)
    >>> ema.update()  # the first update copies the weights
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
        masters: object = None,
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
            masters=masters,
        )
        self._average = Average(target, options, group, into, masters)
        if options.duration is not None:
            updating.warn_of_length(self._average, {options.duration.unit: options.duration.value})

    # Averaging: local.

    @untraced
    def update(
        self, *, batches: int = 1, samples: int = 0, tokens: int = 0, epochs: float = 0, due: bool | None = None
    ) -> bool:
        """Advances the training clock, and updates the average if an update is due.

        Local: no collective call, no host sync, no memory beyond the shadow and one chunk. Only with ``sync="gather"``
        it is collective when an update is due. Every rank must call it, since each rank averages its own part.

        Args:
            batches: optimizer steps since the last call.
            samples: samples since the last call, over all ranks.
            tokens: tokens since the last call, over all ranks.
            epochs: epochs since the last call. Fractions are allowed.
            due: True or False decides whether this call averages, for a trainer with a rule of its own. The clock
                advances in any case. None leaves the decision to ``update_interval`` and ``ema_start``.

        Returns:
            True if the average was updated. Under DeepSpeed a call after a micro-step or after a skipped step
            (overflow) does nothing and returns False. ``update(batches=0, due=True)`` does not count a step, and always
            averages: before the first step it copies the initial weights.

        Raises:
            EMAStateError: inside ``average_parameters()``; or a parameter or buffer was added or removed, or a
                parameter was replaced or resized, since the average was created; or an offloaded update has failed.
                Parameters and buffers that ``exclude`` and ``buffers="ignore"`` leave out are not checked.
            EMAEngineError: an unfrozen parameter cannot be averaged, or the teacher (``into=``) does not have it.
            EMAConfigError: a count is negative or not a number.

        ``requires_grad`` may change at any time, on all ranks alike. A parameter that is frozen later stays in the
        average. A frozen parameter that is trained when an update is due joins the average with its present value. This
        takes memory and is logged. Before the first update the flags decide what is averaged.

        Signal handlers run after the average has moved. An update that raises is not counted. If it fails half way,
        every call that needs the average raises EMAStateError until ``reset()`` or ``load()``.
        """
        return updating.update(self._average, batches, samples, tokens, epochs, due)

    def attach(
        self, optimizer: object, *, call: Callable[[], object] | None = None, overlap: bool = False
    ) -> RemovableHandle:
        """Calls ``update()`` after every real step of ``optimizer``. Local.

        Under DeepSpeed it calls ``update()`` after every step of the engine. ``optimizer`` may be wrapped by
        Accelerate, Lightning or Fabric; the torch optimizer inside is found. Steps that a GradScaler skips for overflow
        are not counted. Neither is the step with a learning rate of zero that ``torch.distributed.checkpoint`` makes to
        create optimizer state. Run warm-up steps before calling ``attach()``.

        The average takes the weights as they are when ``step()`` returns. If you change weights after ``step()``
        (clipping, clamping, normalization, a projection onto constraints), do not attach: call ``update()`` yourself
        after that change. If several optimizers step in turn, attach the one that steps last, so that each update sees
        the weights of one step. A warning is logged if the attached optimizer lacks some of the averaged parameters.

        Args:
            optimizer: the optimizer whose steps count.
            call: callback used instead of ``update()``, for callers that do their own counting. It may call
                ``update()`` immediately or later. Several optimizers may be attached this way. Under DeepSpeed it is
                also called after micro-steps, where ``update()`` does nothing.
            overlap: run updates of weights on a CUDA device on a separate stream, beside the next forward pass. The
                next step of any torch optimizer waits for them on the device, as does every call here. If you write
                averaged parameters between two steps, call ``wait()`` first; otherwise the next call raises
                EMAStateError until ``reset()`` or ``load()``, if torch has counted the write. It does not work for
                optimizer steps that a CUDA graph replays, because hooks do not run there. For weights in host memory it
                changes nothing, which is logged once.

        Returns:
            A handle whose ``remove()`` ends the calls.

        Raises:
            EMAConfigError: the schedule, the interval or the start counts in other units than batches, so that
                ``update()`` needs counts; or ``overlap`` is combined with ``into=``, ``offload="cpu"`` or ``call=``.
            EMAStateError: an optimizer is already attached.
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

        Use it where the length of the training is known in several units. ``max_duration`` gives it to the constructor
        in one unit. Nothing else changes.

        Args:
            batches, samples, tokens, epochs: the training clock at the end of training. None where it is not known.
        """
        length = {"ba": batches, "sp": samples, "tok": tokens, "ep": epochs}
        updating.warn_of_length(self._average, {unit: float(value) for unit, value in length.items() if value})

    def reset(self) -> None:
        """Discards the averages. The next update that is due copies the weights again. Local.

        Also reads again which parameters exist and which are trained. The clock continues. If a failure inside
        ``average_parameters()`` has left the live weights incomplete, load the model first.

        Raises:
            EMAStateError: inside ``average_parameters()``.
        """
        self._average.reset()

    # The average in a model: collective where parameters are replicated or the engine has to gather.

    def average_parameters(
        self, name: str | None = None, *, held_by: str | None = None
    ) -> AbstractContextManager[None]:
        """Puts the average into the live model for the block, and restores the live weights bit for bit afterwards.

        The live weights also come back if the body raises. Live weights and shadow are exchanged in place; no second
        copy of the model is made. It is collective for DDP, HSDP and DeepSpeed, and where a model that is divided over
        ranks has buffers in its average: all ranks then compute with the buffers that ``export`` writes. Otherwise it
        is local, and every rank must pass the same ``name``. Where it is collective, the body must raise on every rank
        or on none. It is not reentrant. A trainer may hold it open from one event to another with
        ``contextlib.ExitStack.enter_context``.

        Do not train inside. When the block ends and the live weights are back, EMAStateError is raised if weights were
        written inside. Writes through ``.data`` are not noticed. If such a write has changed the average, every call
        that reads the average raises until ``reset()`` or ``load()``. A write to a buffer, as BatchNorm does in
        training mode, is logged as a warning. Modules in eval mode that override ``train()`` or ``eval()`` are switched
        once in each direction, so that they drop values cached from their weights.

        Inside, ``save``, ``export``, ``full_state_dict``, ``state_dict`` and ``fingerprint`` give the same results as
        outside. ``update``, ``load`` and the others raise EMAStateError.

        Args:
            name: which average. None means the only one.
            held_by: who holds the block open, for error messages ("Lightning's validation"). None means the calling
                line.

        Raises:
            EMAStateError: already inside. Where the call is collective, also for any reason that keeps another rank
                from taking part. If a rank is lost inside, and the ranks need each other to restore their live weights,
                these weights are incomplete and must not be saved. Every call then raises until the model was loaded
                and ``load()`` or ``reset()`` was called.
            EMAConfigError: there is no such average, or there are several and ``name`` is None.

        Signal handlers run before or after weights are exchanged, never in between. Live weights are restored even if
        an exception is raised inside this method.
        """
        return visit.average_parameters(self._average, name, held_by or visit.calling_line())

    def copy_to(self, name: str | None = None, *, into: object = None, fraction: float = 1.0) -> None:
        """Writes the average into the live model permanently, and into fp32 master weights where the engine has them.

        Collective in the same cases as ``average_parameters``, and raises as it does. Before the first update it does
        nothing. An interrupt is raised after everything has been written.

        With ``fraction`` the model moves a part of the way toward the average: ``live += fraction * (average - live)``.
        Use 1 at the end of each epoch for Switch-EMA, .5 with ``decay=0`` and an interval for Lookahead, and about .25
        every few steps to pull the training toward its average. Training then continues from the new weights with the
        optimizer state as it is, and ``update()`` averages them as usual. The result is computed in fp32 (in float64 if
        either operand is float64) and rounded to nearest in the dtype of the weights. So bf16 weights without fp32
        masters do not move by less than about 1/512 of their value. With a fraction below 1, copied buffers keep their
        values, and averaged buffers move toward the average of their own rank; for FSDP the call is then local.

        Args:
            name: which average. None means the only one.
            into: another model to write into, sharded and named as this one (after ``rename``), such as a reference
                policy or a second teacher. Averaged and copied tensors are written. Before the first update they get
                the live values. Frozen and excluded weights keep their values. The model may be trained. With ``into``
                the call is collective.
            fraction: part of the way toward the average, from 0 to 1. 1 copies the average bit for bit.

        Raises:
            EMAConfigError: ``fraction`` is not such a number, or there is no such average.
            EMAEngineError: on every rank: the model of ``into`` does not fit.
        """
        visit.copy_to(self._average, name, into, fraction)

    def rebind(self, target: object) -> None:
        """Continues the average with another wrapping of the same model, under any engine. Collective.

        Use it where a trainer wraps the model again, around an evaluation for instance, or where a parameter was
        replaced: ``rebind(model)`` continues with the new parameter. The new model must have everything that is
        averaged, with the same names and shapes. Trained parameters that were not averaged (a new head, a second
        adapter, an unfrozen layer) join with their present values. Buffers may have other shapes.

        The average moves in memory to where the new wrapping needs it: without communication where each rank already
        holds those elements, otherwise through one window of 16 MiB at a time. Clocks and counts continue. Call
        ``attach()`` again if there is a new optimizer or DeepSpeed engine.

        It also works after ``destroy_process_group()`` and a new ``init_process_group()`` in the same processes: wrap
        the model again, then call ``rebind``. Every process must have the rank that it had, because each holds a part
        of the average. Otherwise create a new ShardedEMA and ``load()`` a checkpoint.

        Args:
            target: as for the constructor, with the same ``group``.

        Raises:
            EMAEngineError: the target cannot be averaged, or is not the same model (all differences are listed).
            EMAStateError: inside ``average_parameters()``, or an offloaded update has failed, or the ranks have
                changed. Nothing has changed then.
        """
        rebind(self._average, target)

    # Tensors and numbers of the average: collective.

    def full_state_dict(
        self, name: str | None = None, *, dtype: torch.dtype | None = None, include_untracked: bool = True
    ) -> dict[str, Tensor]:
        """Returns full CPU tensors by canonical name on rank 0, and ``{}`` on the other ranks. Collective.

        Tensors are gathered one at a time through windows of 16 MiB, which is all the memory that the other ranks need.
        Tied names share one tensor.

        Args:
            name: which average. None means the only one.
            dtype: dtype of floating-point tensors. None keeps the shadow's dtype, and for what is not averaged its own.
            include_untracked: include frozen and excluded parameters and ignored buffers, with their values in the
                model.

        Raises:
            EMAStateError: the model has changed; or the model holds the average of another object; or an untracked
                tensor cannot be read by ranges (a quantized base model).
            EMAConfigError: there is no such average, or ``dtype`` is not a floating-point dtype.
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
        """Yields full averaged tensors with their canonical names, on every rank. Each step of the loop is collective.

        Use it for pushing weights to an inference server's ``load_weights``. All ranks get the same order. Tensors that
        are not averaged come with their values in the model, and a tied tensor comes under each of its names. At any
        time one tensor is in memory (or as many small ones as 16 MiB hold), and a window of 16 MiB. Every rank must
        iterate to the end, or all must stop at the same tensor.

        All averaged tensors are of one moment. If the average is updated, loaded or reset before the last tensor,
        tensors that were already gathered still come, and the next one raises EMAStateError; start again then. Tensors
        that are not averaged, and all tensors before the first update, are read from the model when they are yielded.

        Args:
            name: which average. None means the only one.
            dtype: dtype of floating-point tensors. None keeps the shadow's dtype, and for what is not averaged its own.
            device: device of the tensors. None means the CPU.
            layout: None yields the module's own names. ``"transformers"`` yields the names and shapes of the Hub's
                files, as ``export(layout="transformers")`` writes them: one tensor for each expert, and tied tensors
                once. vLLM's and SGLang's ``load_weights`` take these. All tensors that come from one tensor of the
                module are then in memory at once, besides the window.

        Raises:
            CheckpointError: on every rank: the names of ``layout`` cannot be produced by ranges.
            EMAConfigError: there is no such average, ``dtype`` is not a floating-point dtype, or ``layout`` is unknown.
            EMAStateError: on every rank, as for ``full_state_dict()``; also if the average has moved since the first
                tensor, or another rank makes a different call.
        """
        return tensors.iter_full_tensors(self._average, name, dtype, device, layout)

    def fingerprint(self, name: str | None = None, *, include_untracked: bool = True) -> dict[str, int]:
        """Returns a 64-bit digest of each full tensor by canonical name, on every rank. Collective, 8 bytes a tensor.

        The digest does not depend on the sharding. It is computed in the shadow's dtype. The formula is in
        :mod:`dist_ema.kernels.fingerprint`.

        Args:
            name: which average. None means the only one.
            include_untracked: include frozen and excluded parameters and ignored buffers.

        Raises:
            EMAStateError, EMAConfigError: as for ``full_state_dict()``.
        """
        return tensors.fingerprint(self._average, name, include_untracked)

    def metrics(self) -> dict[str, float]:
        """Returns numbers for logs. Collective, a few bytes.

        - ``ema/decay``: fraction kept by the last update
        - ``ema/num_updates``
        - ``ema/skipped_elements``: NaN and Inf source elements so far, over all ranks
        - ``ema/distance``: L2 norm of shadow minus live weights

        With several averages the first and the last are ``ema/<name>/decay`` and ``ema/<name>/distance``.

        Raises:
            EMAStateError: on every rank, inside ``average_parameters()`` or if the model has changed.
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

        Every rank writes its own elements in place, in the shadow's dtype. Tensors that are not averaged are written
        too, so that the checkpoint is a whole model. An existing checkpoint is replaced atomically: at every moment the
        old or the new one is complete on disk. This takes a few MiB of memory on each rank.

        Only one run may save to a path at a time. If two do, the later one raises. On stores without conditional writes
        (S3 has them) the checkpoint may become unreadable; the save then raises.

        Args:
            path: the directory, or a URL that fsspec opens. Missing parents are created. An existing directory must be
                empty or a checkpoint, which may be damaged.
            block: wait until everything is on disk. With False the next due update waits until the shadow has been read
                (for a URL: until it has been sent). A failure is raised by the next ``update``, ``save``, ``load``,
                ``reset``, ``wait`` or ``close`` on every rank. At the end of the program it is logged, and the exit
                status is 1.
            timeout: seconds to wait for a rank that does not answer, in addition to the time that writing its part
                takes at 50 MB/s.
            include_untracked: include frozen and excluded parameters and ignored buffers. Without them the checkpoint
                says which tensors it lacks. ``load`` accepts it, because ``load`` never writes tensors that are not
                averaged.

        Raises:
            CheckpointError: on every rank, whichever rank failed; nothing is left behind. Also if ``path`` holds
                something else than a checkpoint, or another run has saved there in the meantime.
            EMAConfigError: ``path`` is empty or not a path.
            EMAStateError: the model has changed; or the model holds the average of another object; or an untracked
                tensor cannot be read by ranges (a quantized base model). Nothing has been written.
        """
        files.save(self._average, path, block=block, timeout=timeout, include_untracked=include_untracked)

    def load(self, path: str | os.PathLike[str], *, strict: bool = True, verify: bool = True) -> None:
        """Reads a checkpoint of any engine and world size, by ranges of its files. Collective.

        Afterwards the average equals the saved one bit for bit, and training continues as if it had not stopped. The
        clock is restored. Schedules stay those of this object; differences are logged.

        Args:
            path: the checkpoint, a directory or a URL.
            strict: require that every tensor fits. With False, tensors that do not fit are logged and start from the
                live weights. A parameter that is frozen here and averaged in the checkpoint fits, and continues to be
                averaged. A parameter that is trained here and was frozen in the checkpoint starts from its stored
                value. A buffer may have another shape; its average has the stored shape until the next update.
            verify: compare checksums of what is read.

        Raises:
            CheckpointMismatchError: lists all missing, unexpected and mismatched tensors. Nothing has changed.
            CheckpointCorruptError: names the damaged file and tensor. Nothing has changed.
            CheckpointError: there is no checkpoint, or it has another format version.
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

        Every rank writes its own elements in place into the same files. Nothing is gathered, and no rank holds a full
        tensor. The directory appears under its name when it is complete and on disk. ``README.md`` is a model card with
        the schedule, the half life and the training behind the average, unless ``config_from`` brings one.

        Args:
            path: the directory, which must not exist. Missing parents are created.
            name: which average. None means the only one.
            dtype: dtype of floating-point tensors. None means that of the live weights.
            max_shard_size: maximum size of a file in bytes, as an int or as ``"5GB"``. A larger tensor gets a file of
                its own. An adapter is always one file.
            config_from: what to write beside the weights, one item or a list. A file is copied. Of a directory the
                configuration files are copied, and no weights. An object with ``save_pretrained``, such as a config or
                a tokenizer of transformers, is saved. None means the model's own configuration, if it has one and no
                adapters, as its ``save_pretrained`` writes it, with ``architectures``, dtype and generation config;
                ``[model.config, tokenizer]`` does the same and adds the tokenizer. ``[]`` writes nothing.
            gather: True sends everything to rank 0, which alone writes. False never does. None checks whether all ranks
                see the same disk as rank 0.
            include_untracked: include frozen and excluded parameters and ignored buffers, with their values in the
                model.
            layout: ``"transformers"``, ``"diffusers"`` and ``"peft"`` write the files of their ``save_pretrained``.
                ``"peft"`` writes the active adapter alone, with ``adapter_config.json``. None names files as
                transformers does. A transformers model gets the names and shapes of its ``save_pretrained``: one tensor
                for each expert where the module has one for all, and tied tensors once. Any other model gets tied
                tensors under all of their names, so that ``load_state_dict`` takes them. If the names of
                ``save_pretrained`` cannot be written by ranges, None logs this and writes the module's own names, and
                ``"transformers"`` raises.

        Raises:
            CheckpointError: on every rank, whichever rank failed; nothing is left behind.
            EMAStateError: the model has changed; or the model holds the average of another object; or a tensor cannot
                be read by ranges (a quantized base model). Nothing has been written.
            EMAConfigError: there is no such average, or an option has a value that is not allowed.
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
        """Makes ``update()`` save the averages regularly from now on. Collective, once.

        A snapshot is a checkpoint of the averaged tensors alone, which ``load``, ``merge`` and ``synthesize`` read. It
        is written in the background, as by ``save(block=False)``: the next due update waits until the shadow has been
        read, and a failure is raised by a later call. The training thread makes no collective call.

        If a run continues from an earlier moment, after ``load()`` for instance, snapshots beyond that moment belong to
        an abandoned run. The next snapshot moves them into ``FOLDER/abandoned-<number>`` and logs their names. At a URL
        it renames their ``ema.json`` to ``ema.json.abandoned``, so that nothing takes them for checkpoints.

        Args:
            folder: a directory or a URL. Snapshots lie in ``FOLDER/<progress>``, such as ``FOLDER/20000ba``.
            every: ``"1000ba"``, ``"10000000tok"``, ``"0.5ep"``: a snapshot at each multiple on the training clock.
            keep: how many of the newest snapshots to keep. None means all.
            dtype: dtype of floating-point averages on disk, rounded to nearest. ``torch.bfloat16`` takes half the space
                of fp32. None means the shadow's dtype.

        Returns:
            An object whose ``paths()`` lists the snapshots, and whose ``remove()`` ends them.

        Raises:
            EMAConfigError: an option has a value that is not allowed.
        """
        return files.snapshot(self._average, folder, every, keep, dtype)

    def wait(self) -> None:
        """Waits for a background save and an offloaded update, and raises if one of them has failed. Local."""
        self._average.shadow.drain()
        self._average.background.wait()
        self._average.shadow.raise_failure()

    def close(self) -> None:
        """Waits as ``wait()`` does, and releases what saving and offloading use. Keeps the average. Local.

        The object stays usable. A failed update is raised if no call has raised it yet. The process groups of the
        library are shared by all objects, and end with the process.
        """
        self._average.shadow.drain()
        self._average.background.wait()
        self._average.shadow.close()

    # torch.distributed.checkpoint: collective.

    def state_dict(self, *, full: bool = False, live: bool = False) -> dict[str, Any]:
        """Returns what ``torch.distributed.checkpoint`` saves and loads: ``dcp.save({"ema": ema})``. Collective.

        The dict holds this rank's parts of the averages, and clocks and schedules as text. Parts have the names and
        shapes of the full tensors. They can be saved and copied, but not computed with (see ``dist_ema.dcp.boxed``).
        Parts are views of the shadow, or of the model inside ``average_parameters()``. They keep their values while you
        hold them: a later write by this library waits up to 30 s for a thread that reads them, and then copies what is
        still held. Live weights are views of the model, and change with each optimizer step as ``model.state_dict()``
        does. Before the first update the parts are a copy of the live weights, as large as the shadow, until the dict
        is dropped.

        Every rank must call it, and each rank's dict has that rank's part only. A ``torch.save`` of rank 0's dict is
        therefore not the average. For one file from rank 0 call ``state_dict(full=True)`` on every rank.

        Args:
            full: return whole CPU tensors on rank 0, gathered one at a time, and a dict without tensors on the other
                ranks. Use it for a file that one rank writes with ``torch.save``.
            live: add the live weights of the averaged parameters under ``"live"``, also while the average is in the
                model. A checkpoint whose model is the average needs them to continue training.

        Raises:
            EMAStateError: on every rank: the model has changed, or it holds the average of another object.
        """
        return stateful.state_dict(self._average, full, live)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a ``state_dict()`` that ``torch.distributed.checkpoint`` has filled. Collective.

        Afterwards the average equals the saved one bit for bit. The clock is restored, and schedules stay those of this
        object, as after ``load``. Values are copied, so the dict can be used again. ``dcp.load`` reads into memory of
        its own, as large as the shadow. If it fails, nothing has changed. With ``"live"`` in the dict, as from
        ``state_dict(live=True)``, the live weights are written back into the model, and into fp32 masters where the
        engine has them.

        Args:
            state_dict: from ``dcp.load``; or written by ``torch.save`` on this rank, with the same engine and world
                size; or with full tensors on every rank, as ``state_dict(full=True)`` and
                ``torch.distributed.checkpoint.format_utils.dcp_to_torch_save`` produce. A parameter that is frozen here
                and was averaged there continues to be averaged. ``dcp.load`` reads only what the present
                ``state_dict()`` has, and CheckpointMismatchError is raised if that is less than was saved. So before
                ``dcp.load`` unfreeze what was averaged, call ``reset()``, and give buffers their saved shapes.

        Raises:
            CheckpointMismatchError: lists everything that does not fit, on every rank. Nothing has changed.
            CheckpointError: the dict is damaged, or of a later version.
            EMAStateError: inside ``average_parameters()``, or the model has changed.
        """
        stateful.load_state_dict(self._average, state_dict)

    # What there is: local.

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the averages; ``("ema",)`` if there is one."""
        return self._average.names

    @property
    def num_updates(self) -> int:
        """Returns the number of updates, including the first copy."""
        return self._average.num_updates

    @property
    def decays(self) -> dict[str, float]:
        """Returns the fraction that the last update kept of each average, by name. Local.

        It is 0 before the first update, for the first copy, and after ``load()`` until the next update. Use it for logs
        of every step, where ``metrics()`` would be collective.
        """
        return dict(self._average.track.decays)

    @property
    def decay(self) -> float:
        """Returns the fraction that the last update kept of the only average. Local.

        Raises:
            EMAConfigError: there are several averages.
        """
        if len(self.names) > 1:
            names = ", ".join(map(repr, self.names))
            raise EMAConfigError(f"decay: there are several averages ({names}): use decays")
        return self.decays[self.names[0]]

    @property
    def progress(self) -> Progress:
        """Returns the training clock since the first copy, in all units."""
        return self._average.track.progress

    @property
    def clock(self) -> Progress:
        """Returns the training clock since construction, or since the start of the run whose checkpoint was loaded."""
        return self._average.track.training

    @property
    def units(self) -> frozenset[str]:
        """Returns the units of the clock that the options depend on, of ``ba``, ``sp``, ``tok`` and ``ep``."""
        return frozenset(self._average.options.units())

    @property
    def held_by(self) -> str | None:
        """Returns who holds an average in the model now (see ``average_parameters``), or None."""
        return self._average.condition.held_by

    def memory_report(self) -> str:
        """Returns what the shadow costs on this rank, by device, as a short text. Local."""
        average = self._average
        return memory_report(average.shares, average.options.schedules, average.shadow)

    def __repr__(self) -> str:
        average = vars(self).get("_average")
        if average is None:  # of a construction that failed
            return object.__repr__(self)
        kind = type(self).__name__
        engine = type(average.engine).__name__
        return summary(kind, engine, average.shares, average.track, average.skipped())

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuses ``copy`` and ``pickle``, because a copy would not follow the model."""
        raise EMAStateError(
            "a ShardedEMA belongs to its model, its process groups and the other ranks, so it cannot be copied or "
            "pickled (nor can a model that holds one as an attribute): save() writes it to disk, state_dict() is for "
            "torch.distributed.checkpoint, and full_state_dict() gives its tensors"
        )
