"""Finds the ranks of a DeepSpeed run that hold the same parameter: data, pipeline and expert parallelism.

DeepSpeed partitions or copies each parameter over one group of ranks. Which group that is depends on the parameter.
Eight ranks as a pipeline of 2 stages, and four ranks with 8 experts in groups of 2::

    pipeline, 2 stages x 4 ranks         layers of stage 0: ranks 0 1 2 3       layers of stage 1: ranks 4 5 6 7

    experts, ep_size 2 on 4 ranks        dense parameters:  ranks 0 1 2 3
                                         experts 0 to 3:    ranks 0 2           experts 4 to 7:    ranks 1 3

The private attributes of the engine, the pipeline module and the MoE layers were read in deepspeed 0.19.8:
runtime/engine.py, runtime/pipe/module.py, runtime/pipe/topology.py, utils/groups.py, moe/experts.py and
moe/sharded_moe.py.
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
class Holders:
    """The ranks that hold a parameter, either partitioned over them or whole on each.

    Attributes:
        ranks: global ranks, in the order of their group.
        replicas: the same ranks as a Replicas; None for a single rank.
    """

    ranks: list[int]
    replicas: Replicas | None

    @classmethod
    def from_group(cls, group: dist.ProcessGroup) -> Holders:
        """Returns the ranks of a process group. Local."""
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        replicas = Replicas(group, dist.get_rank(group), len(ranks)) if len(ranks) > 1 else None
        return cls(ranks, replicas)


class Groups:
    """The groups of ranks over which a DeepSpeed engine partitions or copies its parameters.

    Most parameters belong to the data-parallel group, which has all ranks or those of one pipeline stage. Experts of a
    mixture-of-experts layer belong to a smaller group, of the ranks that hold the same experts.

    Raises EMAEngineError for layouts that only the layers know: AutoTP, AutoEP, and an ``mpu`` with tensor or pipeline
    parallelism.

    Attributes:
        is_part: whether other ranks have parameters with other names.
    """

    def __init__(self, engine: Any) -> None:
        if int(engine.autotp_size()) > 1:
            raise EMAEngineError(
                f"DeepSpeed's AutoTP (tensor_parallel.autotp_size={engine.autotp_size()}) is not supported: each layer "
                "cuts its weights by its own rules, and some biases are stored divided by the number of ranks. Set "
                "autotp_size to 1, or use torch's tensor parallelism (parallelize_module, with fully_shard)"
            )
        is_pipeline = bool(engine.pipeline_parallelism)
        if is_pipeline and engine.grid.get_slice_parallel_world_size() > 1:
            raise EMAEngineError(
                f"tensor parallelism inside a DeepSpeed pipeline is not supported: each stage is cut over "
                f"{engine.grid.get_slice_parallel_world_size()} ranks (the axis 'model' of its topology), and only its "
                "layers know how. Use a topology whose axes are 'pipe' and 'data'"
            )
        # With sequence parallelism (Ulysses) ZeRO partitions over sequence and data ranks together.
        self._dense = Holders.from_group(engine.seq_data_parallel_group)
        if not is_pipeline:
            self._require_world()

        layers = list(engine.moe_layers)
        names = {layer.ep_group_name for layer in layers}
        self._experts = {name: Holders.from_group(engine.expert_data_parallel_group[name]) for name in names}
        # Each rank's list of experts begins at 0. For each list: the number of its first expert among those of all
        # ranks.
        self._first_numbers: dict[nn.Module, int] = {}
        for layer in layers:
            first_number = dist.get_rank(layer.ep_group) * int(layer.num_local_experts)
            self._first_numbers[layer.experts.deepspeed_experts] = first_number
        self._numbered = {id(parameter) for experts in self._first_numbers for parameter in experts.parameters()}

        self._model: Any = engine.module
        self._is_pipeline = is_pipeline
        self.is_part = is_pipeline or bool(layers)

    def slots(self) -> list[Slot]:
        """Returns the model's parameters and buffers, with names that mean the same tensor on every rank. Local.

        The names are those of DeepSpeed's checkpoints. They differ from the module's names in two cases::

                                                                       in the module            returned
            expert 1 of 4 on the rank with expert-parallel index 1     deepspeed_experts.1      deepspeed_experts.5
            bias of a layer that stages 0 and 3 share, on stage 3      tied_modules.embed.bias  12.bias

        Stages that share a layer (``TiedLayerSpec``) have only some of its weights in common. The other tensors belong
        to each stage alone, so on all but the lowest rank they get the number of the layer as their name.
        """
        slots = walk_slots(self._model, self._first_numbers)
        tied = self._model.tied_comms if self._is_pipeline else {}
        for key, shared in tied.items():
            if dist.get_rank() == min(shared["ranks"]):
                continue
            old = f"tied_modules.{key}."
            new = f"{self._layer_number(key)}."
            common = {f"{old}{attribute}" for attribute in shared["weight_attr"]}
            for slot in slots:
                names = [slot.name, *slot.aliases]
                if not slot.name.startswith(old) or not common.isdisjoint(names):
                    continue
                slot.name, *others = [new + name[len(old) :] if name.startswith(old) else name for name in names]
                slot.aliases = tuple(others)
        return slots

    def _layer_number(self, key: str) -> int:
        """Returns the number of this stage's first layer that is tied under ``key``. Local."""
        specs = enumerate(self._model._layer_specs)
        numbers = [number for number, spec in specs if getattr(spec, "key", None) == key]
        return next(number for number in numbers if self._model.stage_owner(number) == self._model.stage_id)

    def holders_of(self, name: str, parameter: Tensor) -> Holders:
        """Returns the ranks that hold this parameter. Local.

        Raises EMAEngineError for an expert outside of DeepSpeed's MoE layers.
        """
        if not is_expert(parameter):
            return self._dense
        if id(parameter) not in self._numbered:
            raise EMAEngineError(
                f"parameter {name!r} belongs to an expert outside of DeepSpeed's own MoE layers (AutoEP packs several "
                "experts into one tensor), which is not supported: other ranks have other experts under that name. Use "
                "deepspeed.moe.layer.MoE, or set expert_parallel.enabled to false"
            )
        return self._experts[parameter.group_name]  # type: ignore[attr-defined]

    def check(self, group: dist.ProcessGroup | None, optimizer: object) -> None:
        """Raises EMAEngineError unless a group over which the optimizer partitions is one of these groups. Local.

        ``group`` None means all ranks.
        """
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        if all(ranks != holders.ranks for holders in (self._dense, *self._experts.values())):
            raise EMAEngineError(
                f"a partition group of {type(optimizer).__name__} has {len(ranks)} of {dist.get_world_size()} ranks, "
                "and is neither the data-parallel group nor the group of an expert. Parameters that are partitioned "
                "over another part of the world (MiCS, an mpu with tensor parallelism) are not supported"
            )

    def _require_world(self) -> None:
        """Raises EMAEngineError if the data-parallel group does not have all ranks. Local."""
        found = len(self._dense.ranks)
        size = dist.get_world_size()
        if found != size:
            raise EMAEngineError(
                f"the data-parallel group has {found} of {size} ranks: the engine was given an mpu with tensor or "
                "pipeline parallelism. This is not supported under DeepSpeed, because only the model knows how it cuts "
                "parameters. Use a data-parallel group that has all ranks, or DeepSpeed's own PipelineModule"
            )
