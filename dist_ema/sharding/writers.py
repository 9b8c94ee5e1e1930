"""Who writes an element: of all ranks that hold one, the one whose value goes into files and gathered tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from dist_ema.collectives import gather_objects, rank_in
from dist_ema.errors import EMAEngineError
from dist_ema.sharding.shares import Mode, Share


@dataclass(frozen=True)
class FullTensor:
    """One full tensor of an average; the same on every rank.

    Attributes:
        name: canonical name.
        aliases: other names of the same tensor.
        shape: of the full tensor.
        dtype: of the average; where there is none, of the live tensor.
        live_dtype: of the live tensor.
        mode: whether it is averaged, copied or live.
        partitioned: whether its elements are spread over several ranks.
        lowest_mesh_rank: lowest rank of the mesh that writes it; where it is not partitioned, the writer.
        buffer: whether it is a buffer.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    live_dtype: torch.dtype
    mode: Mode
    partitioned: bool
    lowest_mesh_rank: int = 0
    buffer: bool = False

    @property
    def numel(self) -> int:
        """Elements of the full tensor."""
        return torch.Size(self.shape).numel()

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (self.name, *self.aliases)

    def cast(self, dtype: torch.dtype | None) -> torch.dtype:
        """``dtype`` for floating-point tensors, their own for others and where ``dtype`` is None."""
        return dtype if dtype is not None and self.dtype.is_floating_point else self.dtype


def catalogue(shares: Sequence[Share], group: dist.ProcessGroup | None) -> list[FullTensor]:
    """Every full tensor of the model, in an order that all ranks share: rank 0's, then what the next ranks add.

    Collective. Ranks first compare a hash of what they hold, and exchange the lists only where they differ (pipeline
    stages). Raises EMAEngineError, on all ranks, if two of them disagree on a tensor.
    """
    mine = [_entry(share) for share in shares]
    common = [
        replace(entry, lowest_mesh_rank=share.spec.lowest_mesh_rank) for entry, share in zip(mine, shares, strict=True)
    ]
    digest = hashlib.blake2b(repr(common).encode(), digest_size=16).digest()
    if len(set(gather_objects(digest, group))) == 1:
        return common  # one team each; and where everyone holds a tensor whole, rank 0 does, which is heard
    teams = [_team(share, group) for share in shares]
    entries: dict[str, FullTensor] = {}
    for rank, found in enumerate(gather_objects(list(zip(mine, teams, strict=True)), group)):
        for entry, team in found:
            known = entries.setdefault(entry.name, replace(entry, lowest_mesh_rank=team))
            if replace(known, lowest_mesh_rank=0) != entry:
                raise EMAEngineError(
                    f"ranks must hold parts of one model, but rank {rank} has {entry} and a lower rank {known}"
                )
            entries[entry.name] = replace(known, lowest_mesh_rank=min(known.lowest_mesh_rank, team))
    return list(entries.values())


def _entry(share: Share) -> FullTensor:
    spec = share.spec
    return FullTensor(
        spec.name,
        spec.aliases,
        tuple(spec.shape),
        share.dtype,
        spec.dtype,
        share.mode,
        spec.partitioned,
        buffer=spec.kind == "buffer",
    )


def _team(share: Share, group: dist.ProcessGroup | None) -> int:
    return share.spec.lowest_mesh_rank if share.spec.partitioned else rank_in(group)


def is_writer(entry: FullTensor, share: Share, group: dist.ProcessGroup | None) -> bool:
    """Whether what this rank holds goes into collective output."""
    return share.first_replica and _team(share, group) == entry.lowest_mesh_rank
