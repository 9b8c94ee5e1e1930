"""Exchanges parts between replicas when an average is swapped into their model, and when it is swapped out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from dist_ema import kernels
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.collectives import gather_objects
from dist_ema.comm.windows import Access, all_gather_flat, broadcast_flat
from dist_ema.engines.base import Engine
from dist_ema.errors import EMAStateError
from dist_ema.geometry.runs import whole
from dist_ema.geometry.shares import Share, parts_of_replicas, replica_sets
from dist_ema.geometry.spec import Replicas
from dist_ema.kernels.fingerprint import Part, partial_digests


def swaps_together(engine: Engine, shares: Sequence[Share], buffers: bool = True) -> bool:
    """Returns whether a swap is collective in the engine's group.

    It is if replicas send each other their parts, if the engine publishes by communication, or if ranks send each other
    buffers. With ``buffers=False`` each rank keeps its own buffers.
    """
    if engine.group is None:
        return False
    several = buffers and spreads(engine)
    return engine.publish_is_collective or any(share.split or (several and is_own(share)) for share in shares)


def spreads(engine: Engine) -> bool:
    """Returns whether other ranks hold the same model. Under DDP all do; ranks with a plain module may."""
    return len(engine.ranks()) > 1


def is_own(share: Share) -> bool:
    """Returns whether a share is a buffer that each rank has for itself and that belongs to the average."""
    return share.spec.kind == "buffer" and share.mode != "live" and not share.spec.partitioned


class Broadcast:
    """Sends each replica's part to the other replicas, and buffers from the rank that writes them to all ranks.

    Args:
        engine: the engine of the model.
        shares: what this rank averages of each tensor.

    Attributes:
        several: whether other ranks hold the same model.
        sets: for each group of replicas that split a shadow, the indices of the shares.
    """

    def __init__(self, engine: Engine, shares: Sequence[Share]) -> None:
        self._engine = engine
        self._shares = shares
        self.several = spreads(engine)
        self.sets = replica_sets(shares)

    def replicas_agree(self, members: Sequence[int], sources: Sequence[Tensor]) -> bool:
        """Returns whether all replicas hold the same bits, by a 64-bit digest of each tensor. Collective among them.

        A plain sum of the bits is not enough: it does not change if two weights change places, or if one grows by one
        bit and another shrinks by one. The digest weighs each element by its position.
        """
        parts = [Part(sources[index], whole(sources[index].numel())) for index in members]
        digest = hashlib.blake2b(repr(partial_digests(parts)).encode(), digest_size=16).digest()
        return len(set(gather_objects(digest, self._group_of(members).group))) == 1

    def spread(self, sources: Sequence[Tensor]) -> None:
        """Gathers into all replicas the parts that each of them averages. Collective among the replicas."""
        for members in self.sets:
            replicas = self._group_of(members)
            held = [sources[index] for index in members]
            parts = parts_of_replicas([self._shares[index] for index in members], replicas)
            all_gather_flat(parts, [source.dtype for source in held], replicas.group, *_access(held))

    def send_buffers(self, sources: Sequence[Tensor], entries: Sequence[FullTensor]) -> None:
        """Broadcasts buffers that each rank has for itself from the rank that writes them in an export to all ranks.

        That is the first rank that has them (``catalogue.is_writer``). Collective if there are such buffers.
        """
        group = self._engine.group
        if group is None or not self.several:
            return
        own = [entry for entry in entries if entry.buffer and entry.mode != "live" and not entry.partitioned]
        places = {share.spec.name: index for index, share in enumerate(self._shares)}
        for owner in sorted({entry.lowest_mesh_rank for entry in own}):
            theirs = [entry for entry in own if entry.lowest_mesh_rank == owner]
            here = [places.get(entry.name) for entry in theirs]
            held = [None if place is None else sources[place] for place in here]
            sizes = [entry.numel for entry in theirs]
            dtypes = [entry.live_dtype for entry in theirs]
            broadcast_flat(sizes, dtypes, owner, group, *_access(held))

    def _group_of(self, members: Sequence[int]) -> Replicas:
        replicas = self._shares[members[0]].spec.replicas
        if replicas is None:
            raise EMAStateError(f"{self._shares[members[0]].spec.name!r} has no replicas")
        return replicas


def _access(tensors: Sequence[Tensor | None]) -> tuple[Access, Access]:
    """Returns functions that read and write ranges of tensors, for :mod:`dist_ema.comm.windows`; None is skipped."""

    def read(index: int, start: int, stop: int, out: Tensor) -> None:
        tensor = tensors[index]
        if tensor is not None:
            kernels.read(tensor, start, stop, out)

    def write(index: int, start: int, stop: int, values: Tensor) -> None:
        tensor = tensors[index]
        if tensor is not None:
            kernels.write(tensor, start, stop, values)

    return read, write
