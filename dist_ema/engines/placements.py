"""Computes which elements of a DTensor a rank holds, from its mesh and placements.

Pure: no process group and no wrapper is needed, so any rank can work out the elements of every other rank.

A DTensor has one placement for each dimension of its mesh. Three classes are known::

    Replicate()                 every rank along this mesh dimension holds the same elements
    Shard(d)                    one contiguous piece of tensor dimension d, cut as torch.chunk cuts
    _StridedShard(d, factor)    two meanings, see below

``_StridedShard`` is private to torch and means one of two things:

* *Packed tensor parallelism.* A layer that fuses ``factor`` matrices (gate and up projection) is cut such that each
  rank holds a piece of each matrix. The kept indices are cut into ``factor`` groups, and a rank takes its piece of each
  group.
* *FSDP2 over tensor parallelism.* FSDP2 cuts the local tensors that tensor parallelism has made, so it cuts last. But
  its mesh dimension stands first, and placements are read from left to right. ``factor`` is then the number of pieces
  that the mesh dimensions further right make, and each rank holds one contiguous piece of the local tensor.

The factor alone does not tell which meaning it has: over a packed layer, FSDP2's factor counts ranks and the factor of
the layer counts matrices. FSDP2 knows its own mesh dimensions, and callers pass them as ``fsdp_dims``. For a tensor
without an FSDP2 unit both meanings are worked out for every rank of the mesh. If they differ on any rank, the tensor is
refused.

Eight rows on a mesh of 2 (FSDP2) x 2 (tensor parallelism), rows by rank::

    placements                                    (0, 0)    (0, 1)    (1, 0)    (1, 1)
    Shard(0), Shard(0)                            0 1       2 3       4 5       6 7       left dimension first
    _StridedShard(0, 2), Shard(0)    FSDP2 last   0 1       4 5       2 3       6 7       over column-wise TP
    _StridedShard(0, 2) twice        FSDP2 last   0 1       2 3       4 5       6 7       over packed column-wise TP
    Replicate(), _StridedShard(0, 2)              0 1 4 5   2 3 6 7   0 1 4 5   2 3 6 7   packed TP, two copies

The third line in two steps, for rows 0 to 3 of a gate and 4 to 7 of an up projection::

    tensor parallelism, packed:   tp rank 0 keeps 0 1 | 4 5    tp rank 1 keeps 2 3 | 6 7
    then FSDP2, contiguous:       0 1 to FSDP2 rank 0          2 3 to FSDP2 rank 0
                                  4 5 to FSDP2 rank 1          6 7 to FSDP2 rank 1
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

# This class is private in torch 2.9 to 2.14, and no public name leads to it.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from dist_ema.errors import EMAEngineError
from dist_ema.geometry.runs import Runs, box_runs, chunk, strided_chunk, whole


class Cut(NamedTuple):
    """Describes how one mesh dimension cuts one tensor dimension.

    Attributes:
        parts: number of ranks along the mesh dimension.
        factor: the strided shard's split factor; 0 for a plain shard.
        by_fsdp: whether FSDP2 makes this cut. FSDP2 cuts after all others.
    """

    parts: int
    factor: int
    by_fsdp: bool


def placed_runs(
    shape: Sequence[int],
    sizes: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
    name: str,
    fsdp_dims: Collection[int] = (),
) -> Runs:
    """Returns the runs of the rank at ``coordinate`` of a mesh. Pure.

    Raises EMAEngineError if a placement is not known, or if it could mean two different things.

    Args:
        shape: shape of the full tensor.
        sizes: size of each mesh dimension.
        coordinate: the rank's place along each mesh dimension.
        placements: one for each mesh dimension.
        name: of the tensor, for messages.
        fsdp_dims: mesh dimensions of the FSDP2 unit that manages the tensor; empty if no unit does.

    >>> packed = (StridedShard(0, split_factor=2),)  # gate and up projection of four rows each, on two ranks
    >>> tuple(placed_runs((8,), (2,), (1,), packed, "gate_up"))
    ((2, 2), (6, 2))
    >>> over_packed = (StridedShard(0, split_factor=2), *packed)
    >>> placed_runs((8,), (2, 2), (1, 0), over_packed, "gate_up", fsdp_dims={0})
    ((4, 2),)
    """
    check_placements(placements, len(shape), name)
    kept: list[Runs] = []
    for dim, size in enumerate(shape):
        # The mesh dimensions that cut this tensor dimension, from left to right.
        mesh_dims = [mesh_dim for mesh_dim, placement in enumerate(placements) if _cuts(placement, dim, len(shape))]
        cuts = tuple(
            Cut(sizes[mesh_dim], getattr(placements[mesh_dim], "split_factor", 0), mesh_dim in fsdp_dims)
            for mesh_dim in mesh_dims
        )
        if not _has_one_meaning(size, cuts):
            raise EMAEngineError(
                f"parameter {name!r} of shape {tuple(shape)} is placed as {tuple(placements)} on a mesh of shape "
                f"{tuple(sizes)}, and no FSDP2 unit manages it. The strided shard of dimension {dim} may have been cut "
                "last, as FSDP2 does over tensor parallelism, or in the order of the mesh, as distribute_tensor does: "
                "each leaves other elements on the ranks. Shard it with fully_shard, or redistribute it to Shard or "
                "Replicate"
            )
        kept.append(_kept(size, cuts, [coordinate[mesh_dim] for mesh_dim in mesh_dims]))
    return box_runs(shape, kept)


def check_placements(placements: Sequence[Placement], ndim: int, name: str) -> None:
    """Raise EMAEngineError unless each placement is of a class whose meaning is known exactly.

    A class derived from ``Shard`` may cut in another way, so it counts as unknown.
    """
    for mesh_dim, placement in enumerate(placements):
        if type(placement) not in (Shard, StridedShard, Replicate):
            kind = type(placement)
            raise EMAEngineError(
                f"parameter {name!r} is placed as {placement} on mesh dimension {mesh_dim}, of class "
                f"{kind.__module__}.{kind.__qualname__}: only torch's own Shard, _StridedShard and Replicate are "
                "known. Redistribute it first"
            )
        if isinstance(placement, (Shard, StridedShard)) and not -ndim <= placement.dim < ndim:
            raise EMAEngineError(
                f"parameter {name!r} is placed as {placement} on mesh dimension {mesh_dim}, but has {ndim} dimensions"
            )


def _cuts(placement: Placement, dim: int, ndim: int) -> bool:
    """Returns whether a placement cuts tensor dimension ``dim``; the placement may count from the end."""
    return isinstance(placement, (Shard, StridedShard)) and placement.dim % ndim == dim


def _kept(size: int, cuts: Sequence[Cut], coordinate: Sequence[int]) -> Runs:
    """Returns the indices of one tensor dimension that a rank keeps.

    Args:
        size: of the tensor dimension.
        cuts: in the order of the mesh dimensions, from left to right.
        coordinate: the rank's place along the mesh dimension of each cut.
    """
    kept = whole(size)
    # Step 1: all cuts but FSDP2's, from left to right.
    for cut, index in zip(cuts, coordinate, strict=True):
        if cut.by_fsdp:
            continue
        if not cut.factor:
            kept = chunk(kept, cut.parts, index)
        else:
            kept = strided_chunk(kept, cut.factor, cut.parts, index, one_step=_cuts_in_one_step())
    # Step 2: FSDP2 cuts what is left into contiguous pieces. Its placement may be a strided shard, but that only says
    # where the pieces lie in the full tensor. From right to left: a cut further left was made later.
    for cut, index in reversed(list(zip(cuts, coordinate, strict=True))):
        if cut.by_fsdp:
            kept = chunk(kept, cut.parts, index)
    return kept


@lru_cache(maxsize=4096)
def _has_one_meaning(size: int, cuts: tuple[Cut, ...]) -> bool:
    """Returns whether the cuts that are not FSDP2's leave the same elements on each rank in both meanings.

    A strided shard may come from ``distribute_tensor``, or from a library that cuts last as FSDP2 does without being
    FSDP2. In the second case its factor is the number of pieces that the mesh dimensions further right make. Where
    sizes divide evenly, both usually leave the same elements on each rank, and the difference does not matter.
    """
    others = tuple(cut for cut in cuts if not cut.by_fsdp)
    # Which of these cuts may have been made last: those whose factor is the number of pieces further right.
    may_be_last: list[bool] = []
    for place, cut in enumerate(others):
        pieces_further_right = prod(further.parts for further in others[place + 1 :])
        may_be_last.append(cut.factor > 1 and cut.factor == pieces_further_right)
    if not any(may_be_last):
        return True
    # Compare the two meanings for every rank of the mesh, not for this rank alone, so that all ranks raise or none.
    cut_last = [cut._replace(by_fsdp=is_last) for cut, is_last in zip(others, may_be_last, strict=True)]
    coordinates = product(*(range(cut.parts) for cut in others))
    return all(_kept(size, others, coordinate) == _kept(size, cut_last, coordinate) for coordinate in coordinates)


@lru_cache(maxsize=1)
def _cuts_in_one_step() -> bool:
    """Returns whether this version of torch cuts a strided shard's dimension in one step (2.9) instead of two (2.13).

    Both give the same pieces where sizes divide evenly. The function cuts nine elements with torch and looks at the
    result, because the version in which torch changed is not known exactly.
    """
    pieces, _ = StridedShard(0, split_factor=2)._split_tensor(torch.arange(9, device="cpu"), 4, with_padding=False)
    return bool(pieces[0].numel() == 3 and int(pieces[0][2]) == 8)  # 0, 1, 8 in one step; 0, 1, 5 in two


def shared_dimension(
    sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> tuple[int | None, bool]:
    """Returns the mesh dimension whose ranks share a DTensor's shadow, and whether this rank may write its elements.

    That is the largest dimension over which the tensor is replicated; None if there is none. If the tensor is
    replicated over further dimensions, only the ranks that are first in those may write::

        placements Replicate(), Replicate(), Shard(0) on a mesh of shape (2, 4, 2): the shared dimension is 1

        coordinate (0, *, s)    share a shadow, and write it
        coordinate (1, *, s)    share a second shadow with the same values, which nobody writes
    """
    replicated = [
        dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate) and sizes[dim] > 1
    ]
    if not replicated:
        return None, True
    # A mesh has a process group for each of its dimensions, but none for several together. So the shadow is split along
    # one of them, and the largest one saves most memory.
    shared = max(replicated, key=lambda dim: sizes[dim])
    is_first_in_others = all(coordinate[dim] == 0 for dim in replicated if dim != shared)
    return shared, is_first_in_others
