"""Cuts element numbers as torch cuts a DTensor, to check the arithmetic of ``engines/placements.py``.

Cuts of different tensor dimensions do not depend on each other, so it is enough to cut the indices along each dimension
by themselves. Even for the largest tensors these take some MiB at most. torch's own functions cut them, in torch's
order::

    distribute_tensor, parallelize_module    along the mesh dimensions, from left to right
    fully_shard                              after these: one contiguous piece of the local tensor for each rank

    rows 0 to 7, packed TP (factor 2) on 2 ranks, then FSDP2 on 2 ranks; the rank with TP index 1 and FSDP2 index 0:

    0 1 2 3 4 5 6 7   --_StridedShard._split_tensor-->   2 3 6 7   --_chunk_with_empty-->   2 3

Local: no weight is read, and no other rank is involved. The private functions and attributes of torch in this file were
read in torch 2.9 and 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, _chunk_with_empty
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

from dist_ema.errors import EMAEngineError
from dist_ema.geometry.positions import holds
from dist_ema.geometry.runs import Runs

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Division:
    """One division of a tensor dimension into pieces, of which this rank keeps one.

    Attributes:
        dim: the tensor dimension.
        pieces: number of pieces.
        index: number of the piece that this rank keeps.
        placement: the placement whose own function divides; None for FSDP2, which cuts contiguous pieces.
    """

    dim: int
    pieces: int
    index: int
    placement: Placement | None

    def apply(self, numbers: Tensor) -> Tensor:
        """Return this rank's piece of a tensor of indices, cut along ``dim``. Local."""
        if self.placement is None:
            return _chunk_with_empty(numbers, self.pieces, dim=self.dim)[self.index]
        pieces, _ = self.placement._split_tensor(numbers, self.pieces, with_padding=False, contiguous=False)  # type: ignore[attr-defined]
        found: Tensor = pieces[self.index]
        return found


@dataclass(frozen=True, eq=False)
class Placed:
    """The layout of one DTensor: the runs that this library computed for it, and how torch cut it.

    Attributes:
        name: canonical name.
        shape: shape of the full tensor.
        local_shape: shape of this rank's part.
        runs: this rank's elements, as the library computed them.
        divisions: the cuts by which torch made this rank's part; None where they are not known, so that nothing can be
            compared.
        mesh, placements: the DTensor's own, for errors.
    """

    name: str
    shape: torch.Size
    local_shape: torch.Size
    runs: Runs
    divisions: tuple[Division, ...] | None
    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def __str__(self) -> str:
        text = f"{self.placements} on a mesh of shape {tuple(self.mesh.shape)}"
        names = ", ".join(map(repr, self.mesh.mesh_dim_names or ()))
        return f"{text} with dimensions {names}" if names else text


def check_placed(tensors: Iterable[Placed]) -> None:
    """Compare the runs of each tensor with the element numbers that torch's functions leave on this rank. Local.

    Raises EMAEngineError, naming the first tensor that differs.
    """
    # Models repeat layers, so few layouts are distinct. Each is compared once.
    proven: dict[tuple[object, ...], Runs] = {}
    for tensor in tensors:
        if tensor.divisions is None:
            continue
        layout = tensor.shape, tensor.local_shape, tensor.divisions
        if layout in proven and proven[layout] == tensor.runs:
            continue
        kept = kept_indices(tensor.shape, tensor.divisions)
        has_same_shape = tuple(map(len, kept)) == tensor.local_shape
        # _chunk_with_empty gives an empty piece the shape (0,), whatever the tensor's other dimensions are.
        are_both_empty = any(len(indices) == 0 for indices in kept) and tensor.local_shape.numel() == 0
        has_same_elements = holds(tensor.runs, tensor.shape, kept)
        if not (has_same_shape or are_both_empty) or not has_same_elements:
            raise EMAEngineError(
                f"{tensor.name!r} of shape {tuple(tensor.shape)} is sharded as {tensor}. This library computes other "
                "elements for this rank than torch puts there, so it does not know this layout. Shard the model in "
                "another way, and please report this"
            )
        proven[layout] = tensor.runs


def divisions_of(tensor: DTensor, parameter: FSDPParam | None) -> tuple[Division, ...] | None:
    """Return the cuts that made this rank's part of a DTensor, in torch's order. None where they are not known.

    Args:
        tensor: the sharded DTensor.
        parameter: FSDP2's object for it; None if no FSDP2 unit manages it.
    """
    if parameter is None:
        return _placed(tensor.device_mesh, tensor.placements)
    # First the cuts that were made before fully_shard, by tensor parallelism.
    before: tuple[Division, ...] | None = ()
    if parameter.is_dtensor:  # the parameter was a DTensor when fully_shard was applied
        # FSDP2 keeps the earlier layout in `_unsharded_dtensor_spec`, which was `_tp_spec` until torch 2.11.
        spec = getattr(parameter, "_unsharded_dtensor_spec", None) or getattr(parameter, "_tp_spec", None)
        before = None if spec is None else _placed(spec.mesh, spec.placements)
    if before is None or not isinstance(parameter.mesh_info, FSDPMeshInfo):
        return before  # FSDP2 only replicates it (DDPMeshInfo)
    # Then FSDP2's own cut.
    mesh = parameter.mesh_info
    return (*before, Division(parameter.fsdp_placement.dim, mesh.shard_mesh_size, mesh.shard_mesh_rank, None))


def _placed(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[Division, ...] | None:
    """Return the cuts of ``distribute_tensor`` for these placements; None on a rank outside of the mesh."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    sharded = [dim for dim, placement in enumerate(placements) if isinstance(placement, (Shard, _StridedShard))]
    return tuple(
        Division(placements[dim].dim, mesh.size(dim), coordinate[dim], placements[dim])  # type: ignore[attr-defined]
        for dim in sharded
    )


def kept_indices(shape: Sequence[int], divisions: Sequence[Division]) -> list[Indices]:
    """Return for each dimension of a tensor of ``shape`` the indices that are left after the cuts. Local."""
    kept = []
    for dim, size in enumerate(shape):
        # torch's functions cut a tensor along one of its dimensions. So the indices get as many dimensions as the
        # tensor has, with one element along each of the others.
        numbers = torch.arange(size).view([size if other == dim else 1 for other in range(len(shape))])
        for division in divisions:
            if division.dim == dim:
                numbers = division.apply(numbers)
        kept.append(numbers.reshape(-1).numpy())
    return kept
