"""DeepSpeed: ZeRO stages 0 to 3 in fp32, bf16 and fp16, with or without optimizer offload to the CPU.

The source of a trained parameter is its fp32 master weights wherever DeepSpeed keeps some. An average of the bf16
weights that the model computes with would stop moving from a decay of .99 on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema.engines.base import Engine, RemovableHandle, Replicas, TensorSpec
from dist_ema.engines.walk import Binding, Slot, walk_slots
from dist_ema.engines.zero_masters import MasterSlice, find_masters, require_world, stage3_runs, stage3_shard
from dist_ema.errors import EMAConfigError, EMAEngineError
from dist_ema.geometry import whole


class ZeroEngine(Engine):
    """A ``deepspeed.DeepSpeedEngine``.

    Raises EMAEngineError for what it cannot average: no optimizer under ZeRO, an optimizer that it does not know
    (ZenFlow, SuperOffload, MiCS), offload to NVMe, mixture-of-experts, tensor and pipeline parallelism.
    """

    def __init__(self, engine: Any) -> None:
        # DeepSpeedEngine's attributes as read in deepspeed 0.19.8, runtime/engine.py.
        if getattr(engine, "pipeline_parallelism", False):
            raise EMAEngineError(
                "a DeepSpeed pipeline engine is not supported: average the stages as a list of modules, "
                "ShardedEMA([stage, ...])"
            )
        if getattr(engine, "has_moe_layers", False):
            raise EMAEngineError(
                "the DeepSpeed engine has mixture-of-experts layers, whose ranks hold different experts under one "
                "name: not supported"
            )
        if dist.is_initialized():
            self.group = dist.group.WORLD
            require_world(engine.seq_data_parallel_group, "the data-parallel group")
        self._engine = engine
        self._masters = find_masters(engine.optimizer, int(engine.zero_optimization_stage()))
        self.publish_is_collective = not self._masters.replicated
        self._steps = _StepCounter(engine)
        self._entries: list[tuple[Slot, MasterSlice | None]] = []

    def _read_specs(self) -> list[TensorSpec]:
        """See :meth:`Engine.specs`. Local.

        A parameter that no optimizer trains counts as frozen, whatever its ``requires_grad``: under ZeRO one that was
        unfrozen after ``deepspeed.initialize()`` has no master and never changes.
        """
        slots = walk_slots(self._engine.module)
        slices = self._masters.slices()
        self._binding = Binding(self._engine.module, slots, _full_shape)
        self._entries = [(slot, self._slice_of(slot, slices)) for slot in slots]
        return [self._spec(slot, piece) for slot, piece in self._entries]

    def _read_sources(self) -> list[Tensor]:
        """See :meth:`Engine.sources`: slices of the fp32 masters where there are some. Local; no copy, no host sync."""
        self._binding.check()
        self._masters.check_resident()
        flats = [flat.detach() for flat in self._masters.flats()]
        return [self._source(slot, piece, flats) for slot, piece in self._entries]

    def ranks(self) -> frozenset[int]:
        """All of them: DeepSpeed partitions over the world."""
        return frozenset(range(dist.get_world_size())) if dist.is_initialized() else frozenset()

    def modules(self) -> list[nn.Module]:
        """The model that DeepSpeed wraps. Local."""
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
                return _StepWrapper(engine, callback)
            inner = getattr(inner, "optimizer", None)
        raise EMAConfigError(
            f"attach(optimizer={type(optimizer).__name__}): pass the DeepSpeed engine, its .optimizer or the torch "
            "optimizer that was given to deepspeed.initialize()"
        )

    def _slice_of(self, slot: Slot, slices: dict[int, MasterSlice]) -> MasterSlice | None:
        tensor = slot.get()
        return slices.get(id(tensor)) if tensor is not None and tensor.requires_grad else None

    def _spec(self, slot: Slot, piece: MasterSlice | None) -> TensorSpec:
        tensor: Any = slot.get()
        if slot.is_buffer:
            return TensorSpec.unsharded(slot.name, tensor, kind="buffer", partitioned=False, aliases=slot.aliases)
        shape = _full_shape(tensor)
        if piece is not None:
            replicas = self._replicas() if self._masters.replicated else None
            return TensorSpec(slot.name, shape, tensor.dtype, piece.runs, replicas=replicas, aliases=slot.aliases)
        if self._masters.shards_frozen:
            return TensorSpec(slot.name, shape, tensor.dtype, stage3_runs(tensor), kind="frozen", aliases=slot.aliases)
        if tensor.requires_grad and not self._masters.flats():
            # Stage 0 in fp32: the live weights are what the optimizer steps, the same on every rank.
            return TensorSpec(
                slot.name, shape, tensor.dtype, whole(shape.numel()), replicas=self._replicas(), aliases=slot.aliases
            )
        return TensorSpec.unsharded(slot.name, tensor, kind="frozen", partitioned=False, aliases=slot.aliases)

    def _source(self, slot: Slot, piece: MasterSlice | None, flats: list[Tensor]) -> Tensor:
        tensor: Any = slot.get()
        if piece is not None:
            flat = flats[piece.flat]
            length = sum(size for _, size in piece.runs)
            return flat if length == flat.numel() else flat.narrow(0, piece.start, length)
        if not slot.is_buffer and self._masters.shards_frozen:
            return stage3_shard(slot.name, tensor)
        live: Tensor = tensor.detach()
        return live

    def _replicas(self) -> Replicas | None:
        if self.group is None or dist.get_world_size() == 1:
            return None
        return Replicas(self.group, dist.get_rank(), dist.get_world_size())


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

        def note(*_: object) -> None:
            counter = me()
            if counter is not None:
                counter._stepped = True

        weakref.finalize(self, optimizer.register_step_post_hook(note).remove)

    def take(self) -> bool:
        """Was there a step since this was last asked? Always yes without an optimizer: then the caller steps."""
        stepped, self._stepped = self._stepped, False
        return stepped or not self._optimizers


class _StepWrapper:
    """An ``engine.step`` that calls back after each call; ``remove()`` puts the original back."""

    def __init__(self, engine: Any, callback: Callable[[], object]) -> None:
        self._engine = engine
        self._inner = engine.step
        self._was_patched = "step" in vars(engine)
        self._callback: Callable[[], object] | None = callback
        self._wrapper = self._step
        engine.step = self._wrapper

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        result = self._inner(*args, **kwargs)
        if self._callback is not None:
            self._callback()
        return result

    def remove(self) -> None:
        """Stops the calls. Where another wrapper came on top, this one stays below it and only passes on. Local."""
        self._callback = None
        if vars(self._engine).get("step") is not self._wrapper:
            return
        if self._was_patched:
            self._engine.step = self._inner
        else:
            del self._engine.step
