"""Puts an average into the live model, and the live weights back, without a second model.

Where shadow and source have one dtype they change places, so nothing else is held. Where they differ (an fp32 shadow of
bf16 weights) the live elements that this rank averages are kept beside. Replicas each write the part that they average
and then send it to each other; on the way back they send the live weights in the same manner, which restores them bit
for bit because replicas hold the same bits. That is checked on the way in, and where it does not hold each rank keeps
what it had.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.arithmetic import kernels
from dist_ema.collectives import broadcast_flat, gather_objects
from dist_ema.engines.base import Engine, Replicas
from dist_ema.errors import EMAError, EMAStateError
from dist_ema.shares import Share, replica_sets, split_over

logger = logging.getLogger(__name__)


def swaps_together(engine: Engine, shares: Sequence[Share]) -> bool:
    """Whether a swap is collective, in the engine's group: replicas send each other their parts, or it publishes."""
    return engine.group is not None and (engine.publish_is_collective or any(share.split for share in shares))


class Swap:
    """One visit of an average to the live model: ``enter()``, then ``leave()``."""

    def __init__(
        self,
        engine: Engine,
        shares: Sequence[Share],
        shadows: Sequence[Tensor | None],
        scratch: kernels.Scratch,
    ) -> None:
        self._engine = engine
        self._shares = shares
        self._shadows = shadows
        self._scratch = scratch
        self._sets = replica_sets([share.spec if share.split else None for share in shares])
        self._kept: dict[int, Tensor] = {}
        self._diverged: dict[int, Tensor] = {}
        self._swapped: list[int] = []
        self._sources: list[Tensor] = []

    def prepare(self, keep: bool) -> None:
        """Looks whether this rank can take part; with ``keep`` takes the memory that ``enter()`` needs. Local.

        Raises EMAStateError. To be called first, and where the swap is collective by all ranks, which then agree to go
        on: the others would wait for one that cannot.
        """
        try:
            self._engine.reshard()
            sources = self._engine.sources()
            if keep:
                self._kept = self._spare(sources)
        except EMAError:
            raise
        except Exception as error:  # no memory, for one
            raise EMAStateError(f"{type(error).__name__}: {error}") from error

    @torch.no_grad()
    def enter(self) -> None:
        """The live model computes with the average afterwards. Collective where parameters are replicated, or where
        the engine's ``publish`` is. If it raises, ``leave()`` undoes what was done."""
        self._engine.reshard()
        self._sources = self._engine.sources()
        self._settle()
        self._keep()
        for index, share in enumerate(self._shares):
            shadow, source = self._shadows[index], self._sources[index]
            if shadow is None:
                continue
            if index in self._kept:
                kernels.write(source, share.start, share.stop, shadow)
            else:
                kernels.exchange(shadow, source, share.start, share.stop, self._scratch)
            self._swapped.append(index)
        self._spread()
        self._engine.publish()
        torch.clear_autocast_cache()  # it holds casts of the weights that were

    @torch.no_grad()
    def leave(self) -> None:
        """The live weights are bit for bit what they were, and the shadow too. Collective as ``enter``."""
        self._engine.reshard()
        replaced: EMAStateError | None = None
        try:
            sources = self._engine.sources()
        except EMAStateError as error:  # the shadow is still in the tensors that there were
            replaced, sources = error, self._sources
        self._sources = sources
        self._settle()
        for index in self._swapped:
            share, shadow = self._shares[index], self._shadows[index]
            if index in self._kept:
                kernels.write(sources[index], share.start, share.stop, self._kept[index])
            elif shadow is not None:
                kernels.exchange(shadow, sources[index], share.start, share.stop, self._scratch)
        if self._swapped:
            self._spread()
            for index, whole in self._diverged.items():
                kernels.write(sources[index], 0, self._shares[index].spec.local_numel, whole)
            self._engine.publish()
        torch.clear_autocast_cache()
        if replaced is not None:
            raise replaced

    @torch.no_grad()
    def copy(self) -> None:
        """Writes the average into the live model for good; the shadow stays. Collective as ``enter``."""
        self._engine.reshard()
        self._sources = self._engine.sources()
        self._settle()
        for share, shadow, source in zip(self._shares, self._shadows, self._sources, strict=True):
            if shadow is not None:
                kernels.write(source, share.start, share.stop, shadow)
        self._spread()
        self._engine.publish()
        torch.clear_autocast_cache()

    def _settle(self) -> None:
        """Waits for copies to the device that still read weights in host memory (CPU offload): they are written now."""
        if torch.cuda.is_available() and any(source.device.type == "cpu" for source in self._sources):
            torch.cuda.synchronize()

    def _spare(self, sources: Sequence[Tensor]) -> dict[int, Tensor]:
        """Memory for live weights that cannot change places with their shadow, whose dtype is another."""
        return {
            index: torch.empty(share.numel, dtype=source.dtype, device=shadow.device)
            for index, (share, shadow, source) in enumerate(zip(self._shares, self._shadows, sources, strict=True))
            if shadow is not None and shadow.dtype != source.dtype
        }

    def _keep(self) -> None:
        """Copies what could not be brought back, before anything is changed."""
        for index, kept in self._kept.items():
            kernels.read(self._sources[index], self._shares[index].start, self._shares[index].stop, kept)
        for members in self._sets:
            if not self._replicas_agree(members):
                logger.warning(
                    "Replicas of %r and %d more parameters differ between ranks: each rank keeps a copy of its own "
                    "while the average is in use.",
                    self._shares[members[0]].spec.name,
                    len(members) - 1,
                )
                for index in members:
                    source = self._sources[index]
                    self._diverged[index] = torch.empty(source.numel(), dtype=source.dtype, device="cpu")
                    kernels.read(source, 0, source.numel(), self._diverged[index])

    def _replicas_agree(self, members: Sequence[int]) -> bool:
        """Whether all replicas hold the same bits, by the sum of those bits as integers. Collective among them."""
        totals: dict[torch.device, Tensor] = {}
        for index in members:
            source = self._sources[index]
            total = totals.setdefault(source.device, torch.zeros((), dtype=torch.int64, device=source.device))
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
            for _, piece in kernels.pieces(source, 0, source.numel(), kernels.chunk_size(source.device)):
                total += piece.view(bits).sum(dtype=torch.int64)
        digest = sum(int(total) for total in totals.values())
        return len(set(gather_objects(digest, self._group_of(members).group))) == 1

    def _spread(self) -> None:
        """Replicas send each other the parts that they average. Collective among them."""
        for members in self._sets:
            replicas = self._group_of(members)
            specs = [self._shares[index].spec for index in members]
            dtypes = [self._shares[index].dtype for index in members]
            for owner in range(replicas.size):
                ranges = split_over(specs, dtypes, replicas, owner)
                self._send(members, ranges, owner, replicas.group)

    def _send(
        self, members: Sequence[int], ranges: Sequence[tuple[int, int]], owner: int, group: dist.ProcessGroup
    ) -> None:
        sources = [self._sources[index] for index in members]

        def read(index: int, start: int, stop: int, out: Tensor) -> None:
            kernels.read(sources[index], ranges[index][0] + start, ranges[index][0] + stop, out)

        def write(index: int, start: int, stop: int, values: Tensor) -> None:
            kernels.write(sources[index], ranges[index][0] + start, ranges[index][0] + stop, values)

        sizes = [stop - start for start, stop in ranges]
        broadcast_flat(sizes, [source.dtype for source in sources], owner, group, read, write)

    def _group_of(self, members: Sequence[int]) -> Replicas:
        replicas = self._shares[members[0]].spec.replicas
        if replicas is None:
            raise EMAStateError(f"{self._shares[members[0]].spec.name!r} has no replicas")
        return replicas
