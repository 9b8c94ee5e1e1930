"""FSDP1 (``FullyShardedDataParallel``), with and without ``use_orig_params``.

Each FSDP unit keeps one ``FlatParameter``: it flattens its parameters, lays them end to end and cuts the result into
equal parts, one for each rank of its process group. So a rank holds at most one run of each parameter. A unit with a
weight of shape (3, 4) and a bias of shape (3,) on two ranks::

    flat parameter       w0 w1 w2 w3 w4 w5 w6 w7 | w8 w9 w10 w11 b0 b1 b2 .      the dot is padding
                         |<-- rank 0's shard ->|   |<---- rank 1's shard --->|
    runs of the weight   (0, 8)                    (8, 4)
    runs of the bias     none                      (0, 3)

With ``use_orig_params`` FSDP1 may also pad between two parameters, to align them. Padding belongs to no parameter, so
it is in no run and in no average.

HYBRID_SHARD cuts in the same way over ``unit.process_group`` and repeats the result over ``unit._inter_node_pg``. With
two shards and two copies, ranks 0 and 2 hold the same shard, and so do ranks 1 and 3::

                         shard 0   shard 1
    copy 0               rank 0    rank 1      one row: process_group
    copy 1               rank 2    rank 3      one column: _inter_node_pg, which shares the shadow of its shard

This file is the only one that reads private attributes of FSDP1. They are as in torch 2.13: ``_flat_param.py`` for the
handle and the flat parameter, ``_init_utils.py`` for the groups, ``_runtime_utils.py`` for ``_reshard``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

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
class _FlattenedParam:
    """One parameter inside a unit's flat parameter.

    Attributes:
        unit: the FSDP1 module.
        handle: the unit's handle, which has the flat parameter.
        index: the parameter's position in the lists of the flat parameter (``_shapes``, ``_shard_param_infos``, ...).
    """

    unit: FullyShardedDataParallel
    handle: FlatParamHandle
    index: int

    @property
    def flat_param(self) -> FlatParameter:
        return self.handle.flat_param

    @property
    def trained(self) -> bool:
        params = self.flat_param._params
        if params is None:  # without use_orig_params a unit is trained or frozen as a whole
            return bool(self.flat_param.requires_grad)
        return bool(params[self.index].requires_grad)

    def local(self) -> Tensor:
        """Returns this rank's elements, a view of the full-precision shard that the optimizer steps. 1D."""
        info = self.flat_param._shard_param_infos[self.index]
        shard = _shard(self.handle)
        if info.offset_in_shard is None or info.numel_in_shard is None:  # all elements are on other ranks
            return shard[:0]
        return shard[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]

    def runs(self) -> Runs:
        """Returns where this rank's elements lie in the full parameter: one run, or none."""
        info = self.flat_param._shard_param_infos[self.index]
        if info.intra_param_start_idx is None or not info.numel_in_shard:
            return ()
        return ((info.intra_param_start_idx, info.numel_in_shard),)


#: What holds a tensor of the model: a position in a flat parameter, or a place in a module (buffers, ignored modules).
_Entry: TypeAlias = _FlattenedParam | Slot


def _shard(handle: FlatParamHandle) -> Tensor:
    """Returns this rank's part of a unit's flat parameter, in full precision. 1D."""
    # _local_shard exists from the first forward on. From then on .data may be the unsharded or the low-precision
    # tensor, so it is the shard only before.
    shard: Tensor = getattr(handle.flat_param, "_local_shard", handle.flat_param.data)
    return shard


class FlatParamEngine(Engine):
    """Averages each rank's part of every flat parameter, without the padding."""

    def __init__(self, model: nn.Module) -> None:
        self.group = dist.group.WORLD
        self._model = model
        self._units = FullyShardedDataParallel.fsdp_modules(model)
        self._entries: list[_Entry] = []

    def ranks(self) -> frozenset[int]:
        """Returns the ranks over which the units are sharded and replicated. Local."""
        groups = [unit.process_group for unit in self._units]
        groups += [unit._inter_node_pg for unit in self._units if hasattr(unit, "_inter_node_pg")]
        return frozenset(rank for group in groups for rank in dist.get_process_group_ranks(group))

    def modules(self) -> list[nn.Module]:
        return [self._model]

    def _read_specs(self) -> list[TensorSpec]:
        refuse_outer_unit(self._model)
        self._units = FullyShardedDataParallel.fsdp_modules(self._model)
        # The original parameters stand in their modules only while the units are sharded.
        self.reshard()
        names_of = self._named_entries()
        self._entries = list(names_of)
        self._names = list(names_of.values())

        # Several parameters have the same handle. Each handle is listed once.
        handles = {id(entry.handle): entry.handle for entry in names_of if isinstance(entry, _FlattenedParam)}
        self._handles = list(handles.values())
        # Addresses of the shards at the last _read_sources(), and the views that were made of them then.
        self._seen: list[tuple[int, int, torch.dtype]] = []
        self._views: dict[_Entry, Tensor] = {}

        # The binding watches only tensors that have a place in a module, so its numbers differ from the specs'.
        places = list(enumerate(self._places(names_of)))
        slots = [slot for _, (_, slot) in places if slot is not None]
        self._numbers = [number for number, (_, slot) in places if slot is not None]  # spec number of each slot
        self._binding = Binding(
            self._model, slots, walk=lambda: self._places(self._named_entries()), ignored=self._ignored
        )
        return [self._spec(entry, names[0], tuple(names[1:])) for entry, names in names_of.items()]

    def _read_spec(self, number: int) -> TensorSpec:
        entry = self._entries[number]
        names = self._names[number]
        if isinstance(entry, Slot) and entry.get() is None:
            return self._removed(number)
        return self._spec(entry, names[0], tuple(names[1:]))

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        found = []
        for number in numbers:
            entry = self._entries[number]
            is_trained = entry.trained if isinstance(entry, _FlattenedParam) else _tensor_in(entry).requires_grad
            if is_trained:
                found.append(number)
        return found

    def _places(self, names_of: dict[_Entry, list[str]]) -> list[Named]:
        """Returns the names of each tensor with its place in a module, or None where it has no place.

        Without ``use_orig_params`` a flattened parameter has none: the module holds a view that FSDP1 makes anew.
        """
        places: list[Named] = []
        for entry, names in names_of.items():
            slot = entry if isinstance(entry, Slot) else None
            if isinstance(entry, _FlattenedParam) and entry.flat_param._params is not None:
                info = entry.flat_param._param_infos[entry.index]
                slot = Slot(names[0], info.module, info.param_name, is_buffer=False)
            places.append((names, slot))
        return places

    def _named_entries(self) -> dict[_Entry, list[str]]:
        """Returns every tensor of the model with all its names, in ``state_dict()`` order."""
        # Step 1: find out which (module, name) belongs to which flattened parameter. Modules cannot be asked: without
        # use_orig_params they do not hold the parameters.
        flattened: dict[tuple[int, str], _FlattenedParam] = {}
        for unit in self._units:
            handle = unit._handle
            if handle is None:  # a unit without parameters of its own
                continue
            in_unit: dict[tuple[int, str], _FlattenedParam] = {}
            for index, info in enumerate(handle.flat_param._param_infos):
                in_unit[id(info.module), info.param_name] = _FlattenedParam(unit, handle, index)
            # Tied parameters are flattened once. FSDP1 lists the other places separately.
            for shared in handle.flat_param._shared_param_infos:
                primary = in_unit[id(shared.prim_module), shared.prim_param_name]
                in_unit[id(shared.module), shared.param_name] = primary
            flattened.update(in_unit)

        # Step 2: walk the modules for names and order, and collect what no unit manages.
        names_of: dict[_Entry, list[str]] = {}
        slots: dict[int, Slot] = {}  # by id of the tensor, so that tied tensors have one slot
        for prefix, owner in walk_modules(self._model):
            for module_id, key in flattened:
                if module_id == id(owner):
                    _add_name(names_of, flattened[module_id, key], prefix, key)
            unmanaged = [
                (key, tensor, False)
                for key, tensor in owner._parameters.items()
                if (id(owner), key) not in flattened and not isinstance(tensor, FlatParameter)
            ]
            buffers = [
                (key, tensor, True)
                for key, tensor in owner._buffers.items()
                if key not in owner._non_persistent_buffers_set
            ]
            for key, tensor, is_buffer in unmanaged + buffers:
                if tensor is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                slot = slots.setdefault(id(tensor), Slot(name, owner, key, is_buffer))
                _add_name(names_of, slot, prefix, key)
        return names_of

    def _spec(self, entry: _Entry, name: str, aliases: tuple[str, ...]) -> TensorSpec:
        if isinstance(entry, Slot):
            tensor = entry.get()
            if tensor is None:
                raise EMAStateError(f"parameter {name!r} was removed while the model was read: do not change it then")
            refuse_declared(name, tensor, tensor.shape, _WRAPPER)
            return TensorSpec.unsharded(name, tensor, kind=kind_of(entry, tensor), partitioned=False, aliases=aliases)
        flat_param = entry.flat_param
        # With use_orig_params FSDP1 keeps the user's own tensor objects, and so the attributes that they declare.
        if flat_param._params is not None:
            refuse_declared(name, flat_param._params[entry.index], flat_param._shapes[entry.index], _WRAPPER)
        # FSDP1 flattens the local tensor of a DTensor, whose place in the full parameter the flat parameter lacks.
        if flat_param._param_extensions[entry.index] is not None:
            raise EMAEngineError(
                f"parameter {name!r} is a DTensor inside FSDP1: use FSDP2 (fully_shard) with tensor parallelism"
            )
        # Runs count elements in row-major order. FSDP1 would have flattened this parameter in the order of its memory.
        if not flat_param._contiguities[entry.index]:
            raise EMAEngineError(
                f"parameter {name!r} is not contiguous, and FSDP1 flattens it in the order of its memory: make it "
                "contiguous before wrapping the model"
            )
        return TensorSpec(
            name,
            flat_param._shapes[entry.index],
            flat_param.dtype,
            entry.runs(),
            kind="parameter" if entry.trained else "frozen",
            lowest_mesh_rank=_lowest_mesh_rank(entry.unit),
            replicas=_replicas(entry.unit, entry.handle),
            aliases=aliases,
        )

    @torch.no_grad()
    def _read_sources(self) -> list[Tensor]:
        self._binding.check()
        self._follow(self._binding, self._numbers)
        # The views are kept as long as the shards stay where they are. To slice each parameter again at every update
        # would take longer than the kernel.
        shards = [(shard.data_ptr(), shard.numel(), shard.dtype) for shard in map(_shard, self._handles)]
        if shards != self._seen:
            self._views = {entry: entry.local() for entry in self._entries if isinstance(entry, _FlattenedParam)}
            self._seen = shards
        return [
            self._views[entry] if isinstance(entry, _FlattenedParam) else self._unmanaged(entry)
            for entry in self._entries
        ]

    def _unmanaged(self, slot: Slot) -> Tensor:
        """Returns the tensor in a slot, or an empty one for an ignored tensor that was removed. Local."""
        tensor = slot.get()
        is_removed = tensor is None and self._ignored(slot.name, slot.is_buffer)
        return torch.empty(0) if is_removed else _tensor_in(slot)

    def write_counts(self) -> list[int]:
        """See :meth:`Engine.write_counts`. Local.

        The flat parameter, its shard and the original parameters share memory, but each has its own counter. A write
        through any of them counts, so the counters are added up.
        """
        counts = []
        for entry, source in zip(self._entries, self.sources(), strict=True):
            count = write_count(source)
            if isinstance(entry, _FlattenedParam):
                count += write_count(entry.flat_param)
                if entry.flat_param._params is not None:
                    count += write_count(entry.flat_param._params[entry.index])
            counts.append(count)
        return counts

    def reshard(self) -> None:
        """Frees the full copies that a forward without backward leaves in memory. Local.

        Such a forward keeps the copy of the root unit; under SHARD_GRAD_OP it keeps those of all units. The flat
        parameter may already be back at its shard. The copy still counts: until its memory is freed, the next forward
        uses it and ignores what was written to the shard.

        Raises EMAStateError inside ``summon_full_params()``.
        """
        for unit in self._units:
            handle = unit._handle
            if handle is not None and handle._training_state is HandleTrainingState.SUMMON_FULL_PARAMS:
                # Resharding here would free the copies that the context writes back when it ends.
                raise EMAStateError(
                    "inside FullyShardedDataParallel.summon_full_params() the weights are full copies, which are "
                    "written back at its end: use the average before or after it"
                )
            # Without a sharded strategy, or before the first forward, there is no full copy.
            if handle is None or not handle.uses_sharded_strategy or not hasattr(handle.flat_param, "_local_shard"):
                continue
            # FSDP1 skips the sharded views after a forward of SHARD_GRAD_OP with use_orig_params. The modules then
            # hold views of the full copy, although the flat parameter is its shard.
            has_sharded_views = handle.is_sharded(handle.flat_param) and not handle._skipped_use_sharded_views
            is_freed = handle.needs_unshard()
            if not (has_sharded_views and is_freed):
                _reshard(unit, handle, True)


def refuse_outer_unit(model: nn.Module) -> None:
    """Raises EMAEngineError if a unit outside of the model has flattened one of its weights. Local.

    The model then holds some elements of the weight, or none, and nothing in it leads to the unit that has the rest.
    """
    # What the units inside the model manage.
    flat_params: set[int] = set()
    managed: set[tuple[int, str]] = set()
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        handle = unit._handle
        if handle is not None:
            flat_params.add(id(handle.flat_param))
            managed.update((id(info.module), info.param_name) for info in handle.flat_param._param_infos)
            managed.update((id(info.module), info.param_name) for info in handle.flat_param._shared_param_infos)

    # A weight that was flattened by any other unit.
    for prefix, owner in walk_modules(model):
        # Without use_orig_params, and during a forward, weights are plain attributes of their module.
        for key, value in (*owner._parameters.items(), *vars(owner).items()):
            if not isinstance(value, Tensor) or id(value) in flat_params or (id(owner), key) in managed:
                continue
            base = value._base
            is_view_of_other = isinstance(base, FlatParameter) and id(base) not in flat_params
            if is_view_of_other or _is_fsdp_flattened(value):
                name = f"{prefix}.{key}" if prefix else key
                raise EMAEngineError(
                    f"{name!r} belongs to a FullyShardedDataParallel unit outside of the {type(model).__name__} that "
                    "was given, which holds only a part of it: pass the outer module, with include= for the names to "
                    "average"
                )


def _tensor_in(slot: Slot) -> Tensor:
    tensor = slot.get()
    if tensor is None:
        raise EMAStateError(f"parameter {slot.name!r} was removed from the model")
    return tensor


def _add_name(names_of: dict[_Entry, list[str]], entry: _Entry, prefix: str, key: str) -> None:
    """Adds the name of one place of a tensor. A module that is registered twice is visited twice under other names."""
    name = f"{prefix}.{key}" if prefix else key
    known = names_of.setdefault(entry, [])
    if name not in known:
        known.append(name)


def _lowest_mesh_rank(unit: FullyShardedDataParallel) -> int:
    """Returns the lowest of the ranks over which a unit is sharded and replicated."""
    lowest_of_own_copy = min(dist.get_process_group_ranks(unit.process_group))
    replicas = getattr(unit, "_inter_node_pg", None)
    if replicas is None:
        return lowest_of_own_copy
    # A rank knows only its own row and column of the drawing above. The rows lie at equal distances, so the lowest rank
    # of the first row is as far below the lowest rank of this row as the first rank of this column is below this rank.
    distance_to_first_copy = dist.get_rank() - min(dist.get_process_group_ranks(replicas))
    return lowest_of_own_copy - distance_to_first_copy


def _replicas(unit: FullyShardedDataParallel, handle: FlatParamHandle) -> Replicas | None:
    """Returns the ranks that hold the same shard as this one; None if there is no other.

    HYBRID_SHARD replicates over its second group. NO_SHARD replicates over its only group, and FSDP1 turns every
    strategy into NO_SHARD where that group has one rank.
    """
    group = unit._inter_node_pg if hasattr(unit, "_inter_node_pg") else None
    if group is None and not handle.uses_sharded_strategy:
        group = unit.process_group
    if group is None or dist.get_world_size(group) == 1:
        return None
    return Replicas(group, dist.get_rank(group), dist.get_world_size(group))
