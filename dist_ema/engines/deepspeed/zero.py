"""DeepSpeed engines: ZeRO stages 0 to 3 in fp32, bf16 and fp16, with or without optimizer offload to the CPU.

The source of a trained parameter is this rank's part of its fp32 masters, wherever DeepSpeed keeps masters::

    step()                 gradient -> master (fp32) -> live weights (bf16), all-gathered
    update()               shadow <- master
    average_parameters()   master <-> shadow, then live weights <- master; the same on the way back

The bf16 weights that the model computes with are rounded masters. Their average would lack what the rounding drops.

Which rank has which masters is drawn in ``masters.py``. ``groups.py`` finds the ranks that hold a parameter, and
``marks.py`` refuses modules that were given without their engine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema.engines.base import Engine, RemovableHandle
from dist_ema.engines.binding import Binding
from dist_ema.engines.declared import refuse_declared
from dist_ema.engines.deepspeed.groups import Groups
from dist_ema.engines.deepspeed.masters import Masters, MasterSlice, find_masters, stage3_runs, stage3_shard
from dist_ema.engines.names import Slot
from dist_ema.engines.wrappers import is_training_step
from dist_ema.errors import EMAConfigError, EMAEngineError
from dist_ema.geometry.runs import whole
from dist_ema.geometry.spec import TensorSpec
from dist_ema.runtime.untraced import untraced


class ZeroEngine(Engine):
    """Averages the model of a ``deepspeed.DeepSpeedEngine``.

    A ``PipelineEngine`` is allowed; its stages have tensors of different names. MoE layers are allowed; experts have
    the names that they would have if one rank held all of them, such as ``....deepspeed_experts.5.weight``.

    Raises EMAEngineError for an engine that it cannot average: without an optimizer under ZeRO, with an unknown
    optimizer (ZenFlow, SuperOffload, MiCS), with offload to NVMe, with tensor parallelism, or with AutoEP.
    """

    def __init__(self, engine: Any, masters: Masters | None = None) -> None:
        # The attributes of DeepSpeedEngine that this file uses were read in deepspeed 0.19.8, runtime/engine.py.
        self.group = dist.group.WORLD
        self._engine = engine
        self._groups = Groups(engine)
        if masters is None:
            masters = find_masters(engine.optimizer, int(engine.zero_optimization_stage()))
        self._masters = masters
        for group in self._masters.partition_groups():
            self._groups.check(group, engine.optimizer)
        self.publish_is_collective = not self._masters.replicated
        self._steps = _StepCounter(engine)
        self._entries: list[tuple[Slot, MasterSlice | None]] = []

    def _read_specs(self) -> list[TensorSpec]:
        """See :meth:`Engine.specs`. Local.

        Under ZeRO a parameter is trained if it is in a group of DeepSpeed's optimizer, whatever its ``requires_grad``
        is: a parameter that is frozen after ``deepspeed.initialize()`` keeps its master, and one that is unfrozen then
        gets none and never changes. At stage 0 a parameter has to be in a group and to have ``requires_grad``, because
        groups may hold frozen parameters there.
        """
        slots = self._groups.slots()
        slices = self._masters.slices()
        self._stepped = self._masters.stepped()
        self._binding = Binding(self._engine.module, slots, _full_shape, ignored=self._ignored)
        self._entries = [(slot, self._slice_of(slot, slices)) for slot in slots]
        # Addresses of the flat masters at the last _read_sources(), and the views that were made of them then.
        self._seen: list[tuple[int, int, torch.dtype]] = []
        self._views: list[Tensor | None] = [None] * len(slots)
        return [self._spec(slot, piece) for slot, piece in self._entries]

    def _read_sources(self) -> list[Tensor]:
        """See :meth:`Engine.sources`: slices of the fp32 masters where there are some. Local; no copy, no host sync."""
        self._binding.check()
        self._follow(self._binding)
        self._masters.check_resident()
        flats = self._masters.flats()
        # The views are kept as long as the masters stay where they are. To slice each parameter again at every update
        # would take longer than the kernel.
        seen = [(flat.data_ptr(), flat.numel(), flat.dtype) for flat in flats]
        if seen != self._seen:
            self._views = [None if piece is None else _view(piece, flats) for _, piece in self._entries]
            self._seen = seen
        return [
            self._live_source(slot) if view is None else view
            for (slot, _), view in zip(self._entries, self._views, strict=True)
        ]

    def _read_spec(self, number: int) -> TensorSpec:
        slot, piece = self._entries[number]
        return self._removed(number) if slot.get() is None else self._spec(slot, piece)

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        held = self._binding.held
        flagged = [number for number in numbers if held[number].requires_grad]
        if not flagged or not self._masters.replicated:
            return []  # under ZeRO a parameter that has no master at first never gets one
        self._stepped = self._masters.stepped()
        return [number for number in flagged if self._is_trained(self._entries[number][1], held[number])]

    def _is_trained(self, piece: MasterSlice | None, tensor: Tensor) -> bool:
        """Returns whether DeepSpeed's optimizer changes a parameter. Local."""
        if not self._masters.replicated:
            return piece is not None
        in_group = piece is not None or self._stepped is None or id(tensor) in self._stepped
        return in_group and tensor.requires_grad

    @property
    def is_part(self) -> bool:
        """Returns True for a pipeline and for a model with MoE layers. Local."""
        return self._groups.is_part

    def ranks(self) -> frozenset[int]:
        """Returns all ranks of the run, because DeepSpeed partitions over the world. Local."""
        return frozenset(range(dist.get_world_size())) if dist.is_initialized() else frozenset()

    def modules(self) -> list[nn.Module]:
        """Returns the model that DeepSpeed wraps. Local."""
        return [self._engine.module]

    def stepped(self) -> bool:
        """Returns False on accumulation micro-steps and on steps that DeepSpeed skipped for an overflow. Local."""
        return self._steps.take()

    def publish(self) -> None:
        """Casts the masters into the live weights and gathers these as DeepSpeed's own step does.

        Collective at stages 1 to 3, local at stage 0. Accumulated gradients stay as they are. A write to the live
        weights that never reached the masters is lost here, as it would be in DeepSpeed's next step.
        """
        # The binding is not checked here. sources() has done that, and an error here would keep the live weights from
        # being restored at the end of average_parameters().
        self._masters.check_resident()
        self._masters.publish()

    def attach(self, optimizer: object, callback: Callable[[], object]) -> RemovableHandle:
        """Calls ``callback`` after every ``engine.step()``, or ``train_batch()`` of a pipeline engine. Local.

        :meth:`stepped` then tells whether that was a real step. ``optimizer`` is the DeepSpeed engine, its
        ``.optimizer``, the torch optimizer inside, or a wrapper of one of them.
        """
        # A step hook of the torch optimizer would not do: it is called once for each parameter group, and before the
        # live weights have been made of the masters.
        engine = self._engine
        if engine.basic_optimizer is None and optimizer is not engine:
            return super().attach(optimizer, callback)
        # Look through the wrappers for an optimizer of this engine.
        known = [engine, engine.optimizer, engine.basic_optimizer]
        inner: object = optimizer
        while inner is not None:
            if any(inner is one for one in known):
                return _StepWrapper(engine, "train_batch" if engine.pipeline_parallelism else "step", callback)
            inner = getattr(inner, "optimizer", None)
        raise EMAConfigError(
            f"attach(optimizer={type(optimizer).__name__}): pass the DeepSpeed engine, its .optimizer or the torch "
            "optimizer that was given to deepspeed.initialize()"
        )

    def _slice_of(self, slot: Slot, slices: dict[int, MasterSlice]) -> MasterSlice | None:
        tensor = slot.get()
        return None if tensor is None else slices.get(id(tensor))

    def _spec(self, slot: Slot, piece: MasterSlice | None) -> TensorSpec:
        """Returns the spec of one tensor. ``piece`` is its master slice, None if it has no master. Local.

        ========================================  ============================================================
        tensor                                    runs
        ========================================  ============================================================
        buffer                                    whole, each rank its own
        trained, ZeRO-1 to 3                      those of the master slice
        frozen, ZeRO-3                            those of the live piece
        trained, stage 0                          whole, with all ranks that hold the parameter as replicas
        frozen, stage 0 to 2                      whole, each rank its own
        ========================================  ============================================================
        """
        tensor: Any = slot.get()
        refuse_declared(slot.name, tensor, _full_shape(tensor), "DeepSpeed")
        if piece is not None and tensor.is_complex() and not self._masters.replicated:
            raise EMAEngineError(
                f"parameter {slot.name!r} is {tensor.dtype}: DeepSpeed keeps only the real parts, so training loses "
                "the imaginary parts. Store both parts in a real parameter, or use FSDP2 or DDP"
            )
        if slot.is_buffer:
            return TensorSpec.unsharded(slot.name, tensor, kind="buffer", partitioned=False, aliases=slot.aliases)
        shape = _full_shape(tensor)
        holders = self._groups.holders_of(slot.name, tensor)
        known: dict[str, Any] = {"lowest_mesh_rank": min(holders.ranks), "aliases": slot.aliases}
        if piece is not None and piece.group is not None:
            # The elements of a parameter lie on the ranks over which its optimizer group is partitioned. These have to
            # be the ranks that hold the parameter.
            if dist.get_process_group_ranks(piece.group) != holders.ranks:
                raise EMAEngineError(
                    f"expert parameter {slot.name!r} is in an optimizer group that DeepSpeed partitions over all "
                    "ranks, but other ranks have other experts under that name: make the optimizer's groups with "
                    "deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer"
                )
            return TensorSpec(slot.name, shape, tensor.dtype, piece.runs, **known)
        if piece is None and self._masters.shards_frozen:
            return TensorSpec(slot.name, shape, tensor.dtype, stage3_runs(tensor), kind="frozen", **known)
        # At stage 0 each of these ranks has all masters. In fp32 there are none: the optimizer steps the live weights.
        if self._is_trained(piece, tensor):
            return TensorSpec(slot.name, shape, tensor.dtype, whole(shape.numel()), replicas=holders.replicas, **known)
        return TensorSpec.unsharded(slot.name, tensor, kind="frozen", partitioned=False, aliases=slot.aliases)

    def _live_source(self, slot: Slot) -> Tensor:
        """Returns this rank's elements of a tensor without masters. Local; no copy."""
        tensor: Any = slot.get()
        if tensor is None:  # an ignored tensor that was removed
            return torch.empty(0)
        if slot.is_buffer:
            buffer: Tensor = tensor
            return buffer
        if self._masters.shards_frozen:
            return stage3_shard(slot.name, tensor)
        live: Tensor = tensor.detach()
        return live


def _view(piece: MasterSlice, flats: Sequence[Tensor]) -> Tensor:
    """Returns this rank's masters of one parameter. 1D."""
    flat = flats[piece.flat].detach()
    length = sum(size for _, size in piece.runs)
    return flat if length == flat.numel() else flat.narrow(0, piece.start, length)


def _full_shape(tensor: Tensor) -> torch.Size:
    """Returns the full shape of a parameter, which stage 3 keeps in ``ds_shape`` while the parameter is empty."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


class _StepCounter:
    """Notices the real steps of the torch optimizer inside the engine.

    DeepSpeed does not call that optimizer on micro-steps and overflows. The engine's own counters cannot be used:
    ``load_checkpoint()`` moves them forward and back, and ``was_step_applied()`` knows only the last call.
    """

    def __init__(self, engine: Any) -> None:
        self._stepped = False
        # With partial offload (stage 3, offload ratio below 1) a second optimizer steps the part that stays on the
        # device.
        inner = [engine.basic_optimizer, getattr(engine.optimizer, "backup_optimizer", None)]
        self._optimizers = [optimizer for optimizer in inner if optimizer is not None]
        for optimizer in self._optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise EMAEngineError(
                    f"the optimizer inside the DeepSpeed engine is a {type(optimizer).__name__}, not a "
                    "torch.optim.Optimizer, so its steps cannot be counted: give deepspeed.initialize() an optimizer "
                    "that derives from torch.optim.Optimizer"
                )
            self._listen(optimizer)

    def _listen(self, optimizer: torch.optim.Optimizer) -> None:
        """Registers a step hook, which is removed when this object is garbage collected. Local."""
        # The hook must not keep this object alive, so it has only a weak reference.
        reference = weakref.ref(self)

        @untraced
        def note_step(stepped: torch.optim.Optimizer, *_: object) -> None:
            counter = reference()
            if counter is not None and is_training_step(stepped):
                counter._stepped = True

        weakref.finalize(self, optimizer.register_step_post_hook(note_step).remove)

    def take(self) -> bool:
        """Returns whether there was a real step since the last call; always True without an optimizer. Local."""
        stepped = self._stepped
        self._stepped = False
        return stepped or not self._optimizers


class _StepWrapper:
    """Replaces a method of the engine by one that also calls back; ``remove()`` puts the original back."""

    def __init__(self, engine: Any, method: str, callback: Callable[[], object]) -> None:
        self._engine = engine
        self._method = method
        self._inner = getattr(engine, method)
        self._was_patched = method in vars(engine)
        self._callback: Callable[[], object] | None = callback
        self._wrapper = self._step
        setattr(engine, method, self._wrapper)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        result = self._inner(*args, **kwargs)
        if self._callback is not None:
            self._callback()
        return result

    def remove(self) -> None:
        """Stops the callbacks and puts the original method back. Local.

        If other code has wrapped the method since, this wrapper stays inside of that one and only passes calls on.
        """
        self._callback = None
        if vars(self._engine).get(self._method) is not self._wrapper:
            return
        if self._was_patched:
            setattr(self._engine, self._method, self._inner)
        else:
            delattr(self._engine, self._method)
