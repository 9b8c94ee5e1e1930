"""FSDP1 (``FullyShardedDataParallel``), with and without ``use_orig_params``.

Each FSDP unit keeps one ``FlatParameter``: its parameters flattened, padded, laid end to end and cut into equal parts.
So a rank holds at most one run of each parameter. All private attributes of FSDP1 are touched here; read in torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import HandleTrainingState, _is_fsdp_flattened
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
from torch.distributed.fsdp._runtime_utils import _reshard

from dist_ema.engines.base import Engine, write_count
from dist_ema.engines.binding import Binding, Named
from dist_ema.engines.declared import refuse_declared
from dist_ema.engines.names import Slot, kind_of, walk_modules
from dist_ema.errors import EMAEngineError, EMAStateError
from dist_ema.geometry.runs import Runs
from dist_ema.geometry.spec import Replicas, TensorSpec

_WRAPPER = "FullyShardedDataParallel"


@dataclass(eq=False)
class _Flat:
    """Parameter number ``index`` of a unit's flat parameter."""

    unit: FullyShardedDataParallel
    handle: FlatParamHandle
    index: int

    @property
    def flat_param(self) -> FlatParameter:
        return self.handle.flat_param

    @property
    def trained(self) -> bool:
        params = self.flat_param._params  # None without use_orig_params: then the unit is trained or frozen as one
        return bool((self.flat_param if params is None else params[self.index]).requires_grad)

    def local(self) -> Tensor:
        """Returns this rank's elements, a view of the full-precision shard that the optimizer steps."""
        info = self.flat_param._shard_param_infos[self.index]
        shard = _shard(self.handle)
        if info.offset_in_shard is None or info.numel_in_shard is None:
            return shard[:0]
        return shard[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]

    def runs(self) -> Runs:
        """Returns where the elements lie in the full parameter."""
        info = self.flat_param._shard_param_infos[self.index]
        if info.intra_param_start_idx is None or not info.numel_in_shard:
            return ()
        return ((info.intra_param_start_idx, info.numel_in_shard),)


def _shard(handle: FlatParamHandle) -> Tensor:
    """Returns this rank's part of a unit's flat parameter, in full precision. 1D."""
    # _local_shard exists from the first forward on; .data may be the unsharded or the low-precision tensor then.
    shard: Tensor = getattr(handle.flat_param, "_local_shard", handle.flat_param.data)
    return shard


class FlatParamEngine(Engine):
    """Each rank averages its part of every flat parameter; padding is left out."""

    def __init__(self, model: nn.Module) -> None:
        self.group = dist.group.WORLD
        self._model = model
        self._units = FullyShardedDataParallel.fsdp_modules(model)
        self._held: list[_Flat | Slot] = []

    def ranks(self) -> frozenset[int]:
        groups = [unit.process_group for unit in self._units]
        groups += [unit._inter_node_pg for unit in self._units if hasattr(unit, "_inter_node_pg")]
        return frozenset(rank for group in groups for rank in dist.get_process_group_ranks(group))

    def modules(self) -> list[nn.Module]:
        return [self._model]

    def _read_specs(self) -> list[TensorSpec]:
        refuse_outer_unit(self._model)
        self._units = FullyShardedDataParallel.fsdp_modules(self._model)
        self.reshard()  # original parameters stand in their modules only while the units are sharded
        names = self._walk()
        self._held = list(names)
        self._handles = list({id(held.handle): held.handle for held in names if isinstance(held, _Flat)}.values())
        self._seen: list[tuple[int, int, torch.dtype]] = []
        self._views: dict[_Flat | Slot, Tensor] = {}
        places = list(enumerate(self._places(names)))
        slots = [slot for _, (_, slot) in places if slot is not None]
        self._numbers = [number for number, (_, slot) in places if slot is not None]  # of the slots, among the specs
        self._binding = Binding(self._model, slots, walk=lambda: self._places(self._walk()), ignored=self._ignored)
        self._names = list(names.values())
        return [self._spec(held, aliases[0], tuple(aliases[1:])) for held, aliases in names.items()]

    def _read_spec(self, number: int) -> TensorSpec:
        held = self._held[number]
        names = self._names[number]
        if isinstance(held, Slot) and held.get() is None:
            return self._removed(number)
        return self._spec(held, names[0], tuple(names[1:]))

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        found = []
        for number in numbers:
            held = self._held[number]
            if held.trained if isinstance(held, _Flat) else _local(held).requires_grad:
                found.append(number)
        return found

    def _places(self, names: dict[_Flat | Slot, list[str]]) -> list[Named]:
        """Returns the names of each tensor, and its place in a module; without ``use_orig_params`` it has none."""
        places: list[Named] = []
        for held, aliases in names.items():
            slot = held if isinstance(held, Slot) else None
            if isinstance(held, _Flat) and held.flat_param._params is not None:
                info = held.flat_param._param_infos[held.index]
                slot = Slot(aliases[0], info.module, info.param_name, is_buffer=False)
            places.append((aliases, slot))
        return places

    def _walk(self) -> dict[_Flat | Slot, list[str]]:
        """Lists what the model holds, each tensor with its names, in ``state_dict()`` order."""
        flats: dict[tuple[int, str], _Flat] = {}
        for unit in self._units:
            handle = unit._handle
            if handle is None:
                continue
            by_place: dict[tuple[int, str], _Flat] = {}
            for index, info in enumerate(handle.flat_param._param_infos):
                by_place[id(info.module), info.param_name] = _Flat(unit, handle, index)
            for shared in handle.flat_param._shared_param_infos:
                primary = by_place[id(shared.prim_module), shared.prim_param_name]
                by_place[id(shared.module), shared.param_name] = primary
            flats.update(by_place)
        names: dict[_Flat | Slot, list[str]] = {}
        slots: dict[int, Slot] = {}
        for prefix, owner in walk_modules(self._model):
            for key in [key for place, key in flats if place == id(owner)]:
                _add(names, flats[id(owner), key], prefix, key)
            unmanaged = [
                (key, tensor, False)
                for key, tensor in owner._parameters.items()
                if (id(owner), key) not in flats and not isinstance(tensor, FlatParameter)
            ]
            buffers = [
                (key, tensor, True)
                for key, tensor in owner._buffers.items()
                if key not in owner._non_persistent_buffers_set
            ]
            for key, tensor, is_buffer in unmanaged + buffers:
                if tensor is not None:
                    slot = slots.setdefault(
                        id(tensor), Slot(f"{prefix}.{key}" if prefix else key, owner, key, is_buffer)
                    )
                    _add(names, slot, prefix, key)
        return names

    def _spec(self, held: _Flat | Slot, name: str, aliases: tuple[str, ...]) -> TensorSpec:
        if isinstance(held, Slot):
            tensor = held.get()
            if tensor is None:
                raise EMAStateError(f"parameter {name!r} went away while the model was read")
            refuse_declared(name, tensor, tensor.shape, _WRAPPER)
            return TensorSpec.unsharded(name, tensor, kind=kind_of(held, tensor), partitioned=False, aliases=aliases)
        flat_param = held.flat_param
        # With use_orig_params the user's own tensor objects are kept, and with them what they declare.
        if flat_param._params is not None:
            refuse_declared(name, flat_param._params[held.index], flat_param._shapes[held.index], _WRAPPER)
        if flat_param._param_extensions[held.index] is not None:
            raise EMAEngineError(
                f"parameter {name!r} is a DTensor inside FSDP1: use FSDP2 (fully_shard) with tensor parallelism"
            )
        if not flat_param._contiguities[held.index]:
            raise EMAEngineError(
                f"parameter {name!r} is not contiguous, and FSDP1 flattens it in the order of its memory: make it "
                "contiguous before wrapping the model"
            )
        return TensorSpec(
            name,
            flat_param._shapes[held.index],
            flat_param.dtype,
            held.runs(),
            kind="parameter" if held.trained else "frozen",
            lowest_mesh_rank=_team(held.unit),
            replicas=_replicas(held.unit, held.handle),
            aliases=aliases,
        )

    @torch.no_grad()
    def _read_sources(self) -> list[Tensor]:
        self._binding.check()
        self._follow(self._binding, self._numbers)
        # Views of shards that lie where they lay: a slice for each parameter would take longer than the kernel.
        shards = [(shard.data_ptr(), shard.numel(), shard.dtype) for shard in map(_shard, self._handles)]
        if shards != self._seen:
            self._views = {held: held.local() for held in self._held if isinstance(held, _Flat)}
            self._seen = shards
        return [self._views[held] if isinstance(held, _Flat) else self._unmanaged(held) for held in self._held]

    def _unmanaged(self, slot: Slot) -> Tensor:
        """Returns what a slot holds; an empty tensor for an ignored one that was removed. Local."""
        tensor = slot.get()
        is_removed = tensor is None and self._ignored(slot.name, slot.is_buffer)
        return torch.empty(0) if is_removed else _local(slot)

    def write_counts(self) -> list[int]:
        """See :meth:`Engine.write_counts`. The flat parameter, its shard and the original parameters lie in one memory,
        and each has a counter of its own."""
        counts = []
        for held, source in zip(self._held, self.sources(), strict=True):
            count = write_count(source)
            if isinstance(held, _Flat):
                count += write_count(held.flat_param)
                if held.flat_param._params is not None:
                    count += write_count(held.flat_param._params[held.index])
            counts.append(count)
        return counts

    def reshard(self) -> None:
        """A forward without backward keeps the full copy of the root unit (with SHARD_GRAD_OP of all units) in memory.

        The flat parameter may be back at its shard by then: what counts is the full copy, which the next forward takes
        as it is as long as its memory is not freed.
        """
        for unit in self._units:
            handle = unit._handle
            if handle is not None and handle._training_state is HandleTrainingState.SUMMON_FULL_PARAMS:
                # To reshard here would free what the context writes back at its end.
                raise EMAStateError(
                    "inside FullyShardedDataParallel.summon_full_params() the weights are full copies, which are "
                    "written back at its end: use the average before or after it"
                )
            if handle is None or not handle.uses_sharded_strategy or not hasattr(handle.flat_param, "_local_shard"):
                continue
            sharded = handle.is_sharded(handle.flat_param) and not handle._skipped_use_sharded_views
            if not sharded or not handle.needs_unshard():
                _reshard(unit, handle, True)


def refuse_outer_unit(model: nn.Module) -> None:
    """Raises EMAEngineError if a weight of the model was flattened by a unit outside of it. Local.

    A rank finds some elements of such a weight in the model, or nothing at all, and the unit cannot be found from it.
    """
    flat_params: set[int] = set()
    managed: set[tuple[int, str]] = set()
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        handle = unit._handle
        if handle is not None:
            flat_params.add(id(handle.flat_param))
            managed.update((id(info.module), info.param_name) for info in handle.flat_param._param_infos)
            managed.update((id(info.module), info.param_name) for info in handle.flat_param._shared_param_infos)
    for prefix, owner in walk_modules(model):
        # Without use_orig_params, and during a forward, weights are plain attributes.
        for key, value in (*owner._parameters.items(), *vars(owner).items()):
            if not isinstance(value, Tensor) or id(value) in flat_params or (id(owner), key) in managed:
                continue
            base = value._base
            viewed = isinstance(base, FlatParameter) and id(base) not in flat_params
            if viewed or _is_fsdp_flattened(value):
                name = f"{prefix}.{key}" if prefix else key
                raise EMAEngineError(
                    f"{name!r} belongs to a FullyShardedDataParallel unit outside of the {type(model).__name__} that "
                    "was given, which holds only a part of it: pass the outer module, with include= for the names to "
                    "average"
                )


def _local(slot: Slot) -> Tensor:
    tensor = slot.get()
    if tensor is None:
        raise EMAStateError(f"parameter {slot.name!r} was removed from the model")
    return tensor


def _add(names: dict[_Flat | Slot, list[str]], held: _Flat | Slot, prefix: str, key: str) -> None:
    name = f"{prefix}.{key}" if prefix else key
    known = names.setdefault(held, [])
    if name not in known:
        known.append(name)


def _team(unit: FullyShardedDataParallel) -> int:
    """Returns the lowest of the ranks over which a unit is sharded and replicated."""
    lowest = min(dist.get_process_group_ranks(unit.process_group))
    replicas = getattr(unit, "_inter_node_pg", None)
    if replicas is None:
        return lowest
    # Replicas lie at equal distances, so the first one's lowest rank is as far below ours as its copy of us is.
    return lowest - (dist.get_rank() - min(dist.get_process_group_ranks(replicas)))


def _replicas(unit: FullyShardedDataParallel, handle: FlatParamHandle) -> Replicas | None:
    """HYBRID_SHARD replicates over its second group, NO_SHARD (and a shard group of one rank) over its only one."""
    group = unit._inter_node_pg if hasattr(unit, "_inter_node_pg") else None
    if group is None and not handle.uses_sharded_strategy:
        group = unit.process_group
    if group is None or dist.get_world_size(group) == 1:
        return None
    return Replicas(group, dist.get_rank(group), dist.get_world_size(group))
