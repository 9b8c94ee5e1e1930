"""Repeats with element numbers how torch cuts a DTensor, to check the arithmetic of ``engines/placements.py``.

One dimension of a tensor is cut at a time: cuts of different dimensions do not depend on each other. So the indices
along one dimension stand for the whole, and even the largest tensor takes some MiB at most. They are cut by torch's own
functions, in the order in which torch cuts::

    distribute_tensor, parallelize_module    mesh dimensions from left to right
    fully_shard                              after these, the local tensor is cut into one contiguous piece a rank

No weight is read, and no rank is asked. Private functions and attributes of torch that are used here were read in torch
2.9 and 2.13.
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
        pieces: how many there are.
        index: which of them this rank keeps.
        placement: the placement that divides, by its own function; None for one contiguous piece, as FSDP2 cuts.
    """

    dim: int
    pieces: int
    index: int
    placement: Placement | None

    def apply(self, numbers: Tensor) -> Tensor:
        """Return this rank's piece of indices that lie along ``dim``. Local."""
        if self.placement is None:
            return _chunk_with_empty(numbers, self.pieces, dim=self.dim)[self.index]
        pieces, _ = self.placement._split_tensor(numbers, self.pieces, with_padding=False, contiguous=False)  # type: ignore[attr-defined]
        found: Tensor = pieces[self.index]
        return found


@dataclass(frozen=True, eq=False)
class Placed:
    """A DTensor as it was read: what the library takes it for, and how torch cut it.

    Attributes:
        name: canonical name.
        shape: of the full tensor.
        local_shape: of this rank's part.
        runs: this rank's elements, as the library reads them.
        divisions: torch's way to this rank's part; None where that is not known, and nothing can be compared.
        mesh, placements: as the DTensor has them, for errors.
    """

    name: str
    shape: torch.Size
    local_shape: torch.Size
    runs: Runs
    divisions: tuple[Division, ...] | None
    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def __str__(self) -> str:
        names = ", ".join(map(repr, self.mesh.mesh_dim_names or ()))
        return f"{self.placements} on a mesh of shape {tuple(self.mesh.shape)}" + (
            f" with dimensions {names}" * bool(names)
        )


def check_placed(tensors: Iterable[Placed]) -> None:
    """Compare the runs of each tensor with its element numbers, cut as torch cuts. Local.

    One comparison for each distinct layout. Raises EMAEngineError, naming the first tensor that differs.
    """
    proven: dict[tuple[object, ...], Runs] = {}
    for tensor in tensors:
        if tensor.divisions is None:
            continue
        layout = tensor.shape, tensor.local_shape, tensor.divisions
        if layout in proven and proven[layout] == tensor.runs:
            continue
        kept = kept_indices(tensor.shape, tensor.divisions)
        same_shape = tuple(map(len, kept)) == tensor.local_shape
        empty = any(len(indices) == 0 for indices in kept) and tensor.local_shape.numel() == 0
        if not (same_shape or empty) or not holds(tensor.runs, tensor.shape, kept):
            raise EMAEngineError(
                f"{tensor.name!r} of shape {tuple(tensor.shape)} is sharded as {tensor}. Torch leaves other "
                "elements on this rank than this library would read there: it does not know this layout. Shard the "
                "model in another way, and please report this"
            )
        proven[layout] = tensor.runs


def divisions_of(tensor: DTensor, parameter: FSDPParam | None) -> tuple[Division, ...] | None:
    """Return the cuts that made this rank's part of a DTensor, in torch's order. None where torch's way is not known.

    Args:
        tensor: as it is sharded.
        parameter: what FSDP2 knows of it; None if no FSDP2 unit manages it.
    """
    if parameter is None:
        return _placed(tensor.device_mesh, tensor.placements)
    before: tuple[Division, ...] | None = ()
    if parameter.is_dtensor:  # it was sharded when FSDP2 took it
        # `_tp_spec` until torch 2.11
        spec = getattr(parameter, "_unsharded_dtensor_spec", None) or getattr(parameter, "_tp_spec", None)
        before = None if spec is None else _placed(spec.mesh, spec.placements)
    if before is None or not isinstance(parameter.mesh_info, FSDPMeshInfo):
        return before  # FSDP2 only replicates it
    mesh = parameter.mesh_info
    return (*before, Division(parameter.fsdp_placement.dim, mesh.shard_mesh_size, mesh.shard_mesh_rank, None))


def _placed(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[Division, ...] | None:
    """Return the cuts of ``distribute_tensor``; None on a rank outside of the mesh, and where it is not clear."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    sharded = [dim for dim, placement in enumerate(placements) if isinstance(placement, (Shard, _StridedShard))]
    return tuple(
        Division(placements[dim].dim, mesh.size(dim), coordinate[dim], placements[dim])  # type: ignore[attr-defined]
        for dim in sharded
    )


def kept_indices(shape: Sequence[int], divisions: Sequence[Division]) -> list[Indices]:
    """Return the indices along each dimension of a tensor of ``shape`` that are left after the cuts. Local."""
    kept = []
    for dim, size in enumerate(shape):
        # Torch's functions take a tensor of all dimensions; along the others it has one element.
        numbers = torch.arange(size).view([size if other == dim else 1 for other in range(len(shape))])
        for division in divisions:
            if division.dim == dim:
                numbers = division.apply(numbers)
        kept.append(numbers.reshape(-1).numpy())
    return kept
