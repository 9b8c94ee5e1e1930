"""Computes which elements of a DTensor a rank holds, from mesh and placements. Pure: no process group, no wrapper.

A DTensor names one placement for each dimension of its mesh. Three classes are known::

    Replicate()                 every rank along this mesh dimension holds the same elements
    Shard(d)                    one contiguous piece of tensor dimension d, cut as torch.chunk cuts
    _StridedShard(d, factor)    two meanings, see below

``_StridedShard`` is private to torch and means one of two things:

* *Packed tensor parallelism.* A layer that fuses ``factor`` matrices (gate and up projection) is cut such that each
  rank holds a piece of each. The kept indices are cut into ``factor`` groups, and a rank takes its piece of each group.
* *FSDP2 over tensor parallelism.* FSDP2 cuts what tensor parallelism has left, so it cuts last. But its mesh dimension
  stands first in the placements, which torch reads from left to right. ``factor`` is then the number of pieces that the
  dimensions further right had made, and each rank holds one contiguous piece of what those left.

The factor alone does not tell which: over a packed layer FSDP2 writes a factor that counts ranks beside one that counts
matrices. FSDP2 knows its own mesh dimensions, and whoever calls this module passes them as ``fsdp_dims``. Where nobody
knows, both meanings are worked out for every rank of the mesh. If they differ anywhere, the tensor is refused.

Eight rows on a mesh of 2 (FSDP2) x 2 (tensor parallelism), rows by rank::

    placements                                    (0, 0)    (0, 1)    (1, 0)    (1, 1)
    Shard(0), Shard(0)                            0 1       2 3       4 5       6 7       left dimension first
    _StridedShard(0, 2), Shard(0)    FSDP2 last   0 1       4 5       2 3       6 7       over columns of a layer
    _StridedShard(0, 2) twice        FSDP2 last   0 1       2 3       4 5       6 7       over a packed layer
    Replicate(), _StridedShard(0, 2)              0 1 4 5   2 3 6 7   0 1 4 5   2 3 6 7   packed, the copies share
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

# Private in torch 2.9 to 2.14; there is no public way to name this placement.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from dist_ema.errors import EMAEngineError
from dist_ema.geometry.runs import Runs, box_runs, chunk, strided_chunk, whole


class Cut(NamedTuple):
    """Describes how one mesh dimension cuts one tensor dimension.

    Attributes:
        parts: ranks along the mesh dimension.
        factor: the strided shard's; 0 for a plain shard.
        by_fsdp: whether FSDP2 made this cut, which it does after all others.
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
    """Runs of the rank at ``coordinate`` of a mesh. Pure: every rank can work out the elements of every other.

    Raises EMAEngineError if a placement is not known, or if it could mean two things.

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
        mesh_dims = [mesh_dim for mesh_dim, placement in enumerate(placements) if _cuts(placement, dim, len(shape))]
        cuts = tuple(
            Cut(sizes[mesh_dim], getattr(placements[mesh_dim], "split_factor", 0), mesh_dim in fsdp_dims)
            for mesh_dim in mesh_dims
        )
        if not _is_clear(size, cuts):
            raise EMAEngineError(
                f"parameter {name!r} of shape {tuple(shape)} is placed as {tuple(placements)} on a mesh of shape "
                f"{tuple(sizes)}, which no FSDP2 unit manages. The strided shard of dimension {dim} may have been cut "
                "last, as FSDP2 does over tensor parallelism, or in the order of the mesh, as distribute_tensor does. "
                "The ranks would hold different elements. Shard it with fully_shard, or redistribute it to Shard or "
                "Replicate"
            )
        kept.append(_kept(size, cuts, [coordinate[mesh_dim] for mesh_dim in mesh_dims]))
    return box_runs(shape, kept)


def check_placements(placements: Sequence[Placement], ndim: int, name: str) -> None:
    """Raise EMAEngineError unless each placement is of a class whose meaning is known exactly.

    A class derived from ``Shard`` may cut otherwise, so it is not known.
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
    """Returns the indices of one tensor dimension that the rank keeps. Cuts stand in the order of the mesh
    dimensions.
    """
    kept = whole(size)
    for cut, index in zip(cuts, coordinate, strict=True):
        if cut.by_fsdp:
            continue
        if not cut.factor:
            kept = chunk(kept, cut.parts, index)
        else:
            kept = strided_chunk(kept, cut.factor, cut.parts, index, one_step=_cuts_in_one_step())
    # FSDP2 cuts what is left, into contiguous pieces whatever its placement says.
    for cut, index in reversed(list(zip(cuts, coordinate, strict=True))):
        if cut.by_fsdp:
            kept = chunk(kept, cut.parts, index)
    return kept


@lru_cache(maxsize=4096)
def _is_clear(size: int, cuts: tuple[Cut, ...]) -> bool:
    """Returns whether the cuts that no FSDP2 unit made have one meaning.

    A strided shard may come from a library that cuts as FSDP2 does without being FSDP2 (then its factor is the number
    of pieces that the mesh dimensions further right make), or from ``distribute_tensor``. Where sizes divide evenly
    both usually leave the same elements on each rank, and nothing has to be known.
    """
    own = tuple(cut for cut in cuts if not cut.by_fsdp)
    further_right = [prod(cut.parts for cut in own[place + 1 :]) for place in range(len(own))]
    last = [cut.factor > 1 and cut.factor == pieces for cut, pieces in zip(own, further_right, strict=True)]
    if not any(last):
        return True
    # The issue is decided for the whole mesh, not for this rank alone, so that all ranks raise or none.
    as_fsdp = [cut._replace(by_fsdp=is_last) for cut, is_last in zip(own, last, strict=True)]
    everyone = product(*(range(cut.parts) for cut in own))
    return all(_kept(size, own, place) == _kept(size, as_fsdp, place) for place in everyone)


@lru_cache(maxsize=1)
def _cuts_in_one_step() -> bool:
    """Returns whether this version of torch cuts a strided shard's dimension in one step (2.9) instead of two (2.13).

    Both are the same where sizes divide evenly. torch is asked, as the change came between releases.
    """
    pieces, _ = StridedShard(0, split_factor=2)._split_tensor(torch.arange(9, device="cpu"), 4, with_padding=False)
    return bool(pieces[0].numel() == 3 and int(pieces[0][2]) == 8)  # 0, 1, 8 in one step; 0, 1, 5 in two


def shared_dimension(
    sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> tuple[int | None, bool]:
    """Returns the largest mesh dimension over which a DTensor is replicated, and whether this rank is first in the
    others.
    """
    replicated = [
        dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate) and sizes[dim] > 1
    ]
    if not replicated:
        return None, True
    # A process group runs along one dimension. The ranks along the other replicated dimensions average the same
    # elements again, and of them only the first writes.
    shared = max(replicated, key=lambda dim: sizes[dim])
    return shared, all(coordinate[dim] == 0 for dim in replicated if dim != shared)
