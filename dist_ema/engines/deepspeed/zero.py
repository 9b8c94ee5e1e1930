"""DeepSpeed: ZeRO stages 0 to 3 in fp32, bf16 and fp16, with or without optimizer offload to the CPU.

The source of a trained parameter is its fp32 master weights wherever DeepSpeed keeps some. An average of the bf16
weights that the model computes with would stop moving from a decay of .99 on.
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
    """A ``deepspeed.DeepSpeedEngine``.

    Also a ``PipelineEngine``, whose stages hold different names, and MoE layers, whose experts have the names that they
    would have if one rank held them all: ``....deepspeed_experts.5.weight``.

    Raises EMAEngineError for what it cannot average: no optimizer under ZeRO, an optimizer that it does not know
    (ZenFlow, SuperOffload, MiCS), offload to NVMe, tensor parallelism, AutoEP.
    """

    def __init__(self, engine: Any, masters: Masters | None = None) -> None:
        # DeepSpeedEngine's attributes as read in deepspeed 0.19.8, runtime/engine.py.
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

        A parameter is trained if it is in a group of DeepSpeed's optimizer. Under ZeRO its ``requires_grad`` does not
        matter: one that is frozen later keeps its master, and one that was unfrozen after ``deepspeed.initialize()``
        has none and never changes. At stage 0 groups may hold frozen parameters, so that the flag counts as well.
        """
        slots = self._groups.slots()
        slices = self._masters.slices()
        self._stepped = self._masters.stepped()
        self._binding = Binding(self._engine.module, slots, _full_shape, ignored=self._ignored)
        self._entries = [(slot, self._slice_of(slot, slices)) for slot in slots]
        self._seen: list[tuple[int, int, torch.dtype]] = []
        self._views: list[Tensor | None] = [None] * len(slots)
        return [self._spec(slot, piece) for slot, piece in self._entries]

    def _read_sources(self) -> list[Tensor]:
        """See :meth:`Engine.sources`: slices of the fp32 masters where there are some. Local; no copy, no host sync."""
        self._binding.check()
        self._follow(self._binding)
        self._masters.check_resident()
        flats = self._masters.flats()
        # Views of masters that lie where they lay: a slice for each parameter would take longer than the kernel.
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
            return []  # under ZeRO, what had no master at first never gets one
        self._stepped = self._masters.stepped()
        return [number for number in flagged if self._is_trained(self._entries[number][1], held[number])]

    def _is_trained(self, piece: MasterSlice | None, tensor: Tensor) -> bool:
        """Returns whether an optimizer of DeepSpeed's changes a parameter. Local."""
        if not self._masters.replicated:
            return piece is not None
        in_group = piece is not None or self._stepped is None or id(tensor) in self._stepped
        return in_group and tensor.requires_grad

    @property
    def is_part(self) -> bool:
        """True for a pipeline, and for MoE layers. Local."""
        return self._groups.is_part

    def ranks(self) -> frozenset[int]:
        """Returns all of them: DeepSpeed partitions over the world."""
        return frozenset(range(dist.get_world_size())) if dist.is_initialized() else frozenset()

    def modules(self) -> list[nn.Module]:
        """Returns the model that DeepSpeed wraps. Local."""
        return [self._engine.module]

    def stepped(self) -> bool:
        """False on accumulation micro-steps and on steps that DeepSpeed skipped for an overflow. Local."""
        return self._steps.take()

    def publish(self) -> None:
        """Casts the masters into the live weights and gathers those as DeepSpeed's own step does.

        Collective at stages 1 to 3, local at stage 0. Accumulated gradients are left alone. A write to the live weights
        that never reached the masters is lost here, as it would be in DeepSpeed's next step.
        """
        # No look at what was replaced or frozen: sources() has looked, and the way back must not be barred.
        self._masters.check_resident()
        self._masters.publish()

    def attach(self, optimizer: object, callback: Callable[[], object]) -> RemovableHandle:
        """Calls ``callback`` after every ``engine.step()``; :meth:`stepped` tells the real steps. Local.

        A pipeline engine has ``train_batch()`` in its place.

        ``optimizer`` is the DeepSpeed engine, its ``.optimizer``, the torch optimizer inside, or a wrapper of one of
        them. The inner optimizer's own step hook would come before the live weights are made, once per group.
        """
        engine = self._engine
        if engine.basic_optimizer is None and optimizer is not engine:
            return super().attach(optimizer, callback)
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
        tensor: Any = slot.get()
        refuse_declared(slot.name, tensor, _full_shape(tensor), "DeepSpeed")
        if piece is not None and tensor.is_complex() and not self._masters.replicated:
            raise EMAEngineError(
                f"parameter {slot.name!r} is {tensor.dtype}: DeepSpeed keeps real numbers of it only, so its training "
                "loses the imaginary parts. Keep the two parts as a real parameter, or use FSDP2 or DDP"
            )
        if slot.is_buffer:
            return TensorSpec.unsharded(slot.name, tensor, kind="buffer", partitioned=False, aliases=slot.aliases)
        shape = _full_shape(tensor)
        team = self._groups.of(slot.name, tensor)
        known: dict[str, Any] = {"lowest_mesh_rank": min(team.ranks), "aliases": slot.aliases}
        if piece is not None and piece.group is not None:
            if dist.get_process_group_ranks(piece.group) != team.ranks:
                raise EMAEngineError(
                    f"expert parameter {slot.name!r} is in a group of the optimizer that DeepSpeed partitions over all "
                    "ranks, which have other experts of that name: make the optimizer's groups with "
                    "deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer"
                )
            return TensorSpec(slot.name, shape, tensor.dtype, piece.runs, **known)
        if piece is None and self._masters.shards_frozen:
            return TensorSpec(slot.name, shape, tensor.dtype, stage3_runs(tensor), kind="frozen", **known)
        # At stage 0 each rank of the team has the masters whole; in fp32 the live weights are what the optimizer steps.
        if self._is_trained(piece, tensor):
            return TensorSpec(slot.name, shape, tensor.dtype, whole(shape.numel()), replicas=team.replicas, **known)
        return TensorSpec.unsharded(slot.name, tensor, kind="frozen", partitioned=False, aliases=slot.aliases)

    def _live_source(self, slot: Slot) -> Tensor:
        """Returns the live source of a tensor without masters."""
        tensor: Any = slot.get()
        if tensor is None:  # an ignored one that was removed
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
    """Stage 3 empties a parameter between uses, and keeps its shape beside it."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


class _StepCounter:
    """Notices the steps that the torch optimizer inside the engine really takes.

    The engine's own counters do not serve: ``load_checkpoint()`` moves them both ways, and ``was_step_applied()``
    only knows the last call. The inner optimizer is not called at all on micro-steps and overflows.
    """

    def __init__(self, engine: Any) -> None:
        self._stepped = False
        # The second optimizer steps what stays on the device under a partial offload (stage 3, offload ratio below 1).
        inner = [engine.basic_optimizer, getattr(engine.optimizer, "backup_optimizer", None)]
        self._optimizers = [optimizer for optimizer in inner if optimizer is not None]
        for optimizer in self._optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise EMAEngineError(
                    f"the optimizer inside the DeepSpeed engine is a {type(optimizer).__name__}, not a "
                    "torch.optim.Optimizer, so its steps cannot be seen"
                )
            self._listen(optimizer)

    def _listen(self, optimizer: torch.optim.Optimizer) -> None:
        """Hooks that go when this object goes."""
        me = weakref.ref(self)

        @untraced
        def note(stepped: torch.optim.Optimizer, *_: object) -> None:
            counter = me()
            if counter is not None and is_training_step(stepped):
                counter._stepped = True

        weakref.finalize(self, optimizer.register_step_post_hook(note).remove)

    def take(self) -> bool:
        """Was there a step since this was last asked? Always yes without an optimizer: then the caller steps."""
        stepped, self._stepped = self._stepped, False
        return stepped or not self._optimizers


class _StepWrapper:
    """A method of the engine that calls back after each call; ``remove()`` puts the original back."""

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
        """Stops the calls. Where another wrapper came on top, this one stays below it and only passes on. Local."""
        self._callback = None
        if vars(self._engine).get(self._method) is not self._wrapper:
            return
        if self._was_patched:
            setattr(self._engine, self._method, self._inner)
        else:
            delattr(self._engine, self._method)
