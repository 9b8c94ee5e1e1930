"""Finds the ranks of a DeepSpeed run that hold a parameter together: data, pipeline and expert parallelism.

Read in deepspeed 0.19.8: runtime/engine.py, runtime/pipe/module.py, runtime/pipe/topology.py, utils/groups.py,
moe/experts.py and moe/sharded_moe.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from dist_ema.engines.deepspeed.marks import is_expert
from dist_ema.engines.names import Slot, walk_slots
from dist_ema.errors import EMAEngineError
from dist_ema.geometry.spec import Replicas


@dataclass(frozen=True)
class Team:
    """The ranks that hold a parameter, divided among them or whole on each.

    Attributes:
        ranks: in the order of their group.
        replicas: the same ranks as a Replicas; None for a single rank.
    """

    ranks: list[int]
    replicas: Replicas | None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Team:
        """Returns the ranks of a process group. Local."""
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        return cls(ranks, Replicas(group, dist.get_rank(group), len(ranks)) if len(ranks) > 1 else None)


class Groups:
    """The groups of ranks over which a DeepSpeed engine spreads or copies its parameters.

    Most parameters have the data-parallel group: all ranks, or those of one pipeline stage. Each expert of a
    mixture-of-experts layer has a smaller one, of the ranks that hold the same experts.

    Raises EMAEngineError where parameters are cut in a way that only their layers know: AutoTP, AutoEP, an ``mpu``.

    Attributes:
        is_part: whether other ranks have parameters of other names.
    """

    def __init__(self, engine: Any) -> None:
        if int(engine.autotp_size()) > 1:
            raise EMAEngineError(
                f"DeepSpeed's AutoTP (tensor_parallel.autotp_size={engine.autotp_size()}) is not supported: it cuts "
                "weights by rules of each layer, and keeps some biases divided by the number of ranks. Set "
                "autotp_size to 1, or use tensor parallelism of torch (parallelize_module, with fully_shard)"
            )
        is_pipeline = bool(engine.pipeline_parallelism)
        if is_pipeline and engine.grid.get_slice_parallel_world_size() > 1:
            raise EMAEngineError(
                f"each stage of the DeepSpeed pipeline is cut over {engine.grid.get_slice_parallel_world_size()} ranks "
                "(the axis 'model' of its topology), as only its layers know: not supported. Use a topology whose axes "
                "are 'pipe' and 'data'"
            )
        self._dense = Team.of(engine.seq_data_parallel_group)
        if not is_pipeline:
            self._require_world()
        layers = list(engine.moe_layers)
        names = {layer.ep_group_name for layer in layers}
        self._experts = {name: Team.of(engine.expert_data_parallel_group[name]) for name in names}
        # Of each layer's list of experts, the number of this rank's first one.
        self._first_numbers: dict[nn.Module, int] = {
            layer.experts.deepspeed_experts: dist.get_rank(layer.ep_group) * int(layer.num_local_experts)
            for layer in layers
        }
        self._numbered = {id(parameter) for experts in self._first_numbers for parameter in experts.parameters()}
        self._model: Any = engine.module
        self._is_pipeline = is_pipeline
        self.is_part = is_pipeline or bool(layers)

    def slots(self) -> list[Slot]:
        """Returns the model's parameters and buffers, under names that mean the same on every rank that has them.
        Local.

        They are those of DeepSpeed's checkpoints. There experts have numbers that count those of all ranks, while in
        the module every rank begins at 0. A layer that several pipeline stages share has one name in the module, and
        one weight in common; its other tensors are each stage's own, and have the number of the layer.
        """
        slots = walk_slots(self._model, self._first_numbers)
        for key, shared in (self._model.tied_comms if self._is_pipeline else {}).items():
            if dist.get_rank() == min(shared["ranks"]):
                continue
            old = f"tied_modules.{key}."
            new = f"{self._layer_number(key)}."
            common = {f"{old}{attribute}" for attribute in shared["weight_attr"]}
            for slot in slots:
                if slot.name.startswith(old) and not common.intersection((slot.name, *slot.aliases)):
                    names = [slot.name, *slot.aliases]
                    slot.name, *others = [new + name[len(old) :] if name.startswith(old) else name for name in names]
                    slot.aliases = tuple(others)
        return slots

    def _layer_number(self, key: str) -> int:
        """Returns the first layer of this stage that is the shared one of that key. Local."""
        specs = enumerate(self._model._layer_specs)
        numbers = [number for number, spec in specs if getattr(spec, "key", None) == key]
        return next(number for number in numbers if self._model.stage_owner(number) == self._model.stage_id)

    def of(self, name: str, parameter: Tensor) -> Team:
        """Returns the ranks that hold this parameter. Local."""
        if not is_expert(parameter):
            return self._dense
        if id(parameter) not in self._numbered:
            raise EMAEngineError(
                f"parameter {name!r} is of an expert outside of DeepSpeed's own MoE layers (AutoEP packs several into "
                "one tensor), and other ranks have other experts of that name: not supported. Use "
                "deepspeed.moe.layer.MoE, or set expert_parallel.enabled to false"
            )
        return self._experts[parameter.group_name]  # type: ignore[attr-defined]

    def check(self, group: dist.ProcessGroup | None, optimizer: object) -> None:
        """Raises EMAEngineError unless the ranks of a partition group (None: the world) are a team. Local."""
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        if all(ranks != team.ranks for team in (self._dense, *self._experts.values())):
            raise EMAEngineError(
                f"a partition group of {type(optimizer).__name__} has {len(ranks)} of {dist.get_world_size()} ranks, "
                "which are neither the data-parallel group nor one of experts. Parameters that are partitioned over "
                "another part of the world (MiCS, an mpu with tensor parallelism) are not supported under DeepSpeed"
            )

    def _require_world(self) -> None:
        found = len(self._dense.ranks)
        size = dist.get_world_size()
        if found != size:
            raise EMAEngineError(
                f"the data-parallel group has {found} of {size} ranks: the engine was given an mpu with tensor or "
                "pipeline parallelism, which cuts parameters as only the model knows: not supported under DeepSpeed. "
                "Use a data-parallel group that spans all ranks, or DeepSpeed's own PipelineModule"
            )
