"""Predicts what an average will cost: memory, bytes moved and time per rank, and the checkpoint.

It uses no separate formula: :mod:`dist_ema.geometry.shares` computes the shares of each rank from the geometry that an
engine would have, and :class:`dist_ema.checkpoints.contents.Contents` the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dist_ema.checkpoints.contents import Contents
from dist_ema.comm.catalogue import catalogue, writes
from dist_ema.errors import EMAConfigError
from dist_ema.formats.manifest import NAME
from dist_ema.geometry.shares import Share, assign_shares
from dist_ema.kernels import ACCELERATOR_CHUNK, CACHE_CHUNK
from dist_ema.options import ONLY, Options
from dist_ema.planning.architecture import Architecture
from dist_ema.planning.layouts import Layout, simulate
from dist_ema.schedules import HalfLife
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.state import EMAState

#: Of larger runs this many ranks are looked at, at equal distances, the first and the last among them.
SAMPLE = 64
#: Chunks that an update holds at a time on an accelerator, where each step of it leaves a tensor behind.
_ACCELERATOR_CHUNKS = 4


@dataclass(frozen=True)
class Speeds:
    """Holds bandwidths in bytes per second.

    Attributes:
        memory: of the memory that holds the shadow, for one rank.
        link: from the accelerator to the host, for one rank; used with offload only.
        disk: of the file system, for all ranks together.
    """

    memory: float
    link: float
    disk: float


@dataclass(frozen=True)
class RankCost:
    """Holds the cost of one rank, in bytes.

    Attributes:
        rank: the rank.
        shadow: the averages, during the whole run.
        buffers: the last copy of the model's buffers.
        staging: with offload, copies of the weights in host memory, which the thread averages.
        scratch: the maximum that an update allocates in addition.
        in_use: what is kept in addition while the live model computes with an average.
        update: bytes that one update reads and writes, in the memory that holds the shadow.
        link: bytes that one update sends to the host.
        checkpoint: bytes that this rank writes.
    """

    rank: int
    shadow: int
    buffers: int
    staging: int
    scratch: int
    in_use: int
    update: int
    link: int
    checkpoint: int

    def update_seconds(self, speeds: Speeds) -> float:
        """Returns the time of an update. Copies to the host and averaging there are counted one after the other."""
        return self.update / speeds.memory + self.link / speeds.link


@dataclass(frozen=True)
class Prediction:
    """Holds the cost of a run.

    Attributes:
        ranks: the ranks that were computed, in order; rank 0 is the first.
        files: bytes of each file of the checkpoint, by its path.
        offload: whether the shadow is in host memory.
    """

    ranks: list[RankCost]
    files: dict[str, int]
    offload: bool

    @property
    def checkpoint(self) -> int:
        """Returns the bytes of the checkpoint."""
        return sum(self.files.values())

    @property
    def manifest(self) -> int:
        """Returns the bytes of the manifest. Its clocks may take a few more bytes as they grow."""
        return self.files[NAME]

    def worst(self, cost: Callable[[RankCost], float]) -> RankCost:
        """Returns the most expensive rank; the first of several."""
        return max(self.ranks, key=cost)

    def mean(self, cost: Callable[[RankCost], float]) -> float:
        """Returns the mean over the ranks that were computed."""
        return sum(map(cost, self.ranks)) / len(self.ranks)


def make_options(
    *, averages: int = 1, dtype: torch.dtype | None = torch.float32, offload: str | None = None, shard: bool = True
) -> Options:
    """Returns options of :class:`ShardedEMA` that change the cost; all others have their defaults.

    Args:
        averages: number of averages.
        dtype: dtype of the shadows; None means that of each parameter.
        offload: None or ``"cpu"``.
        shard: split shadows of replicated parameters among the replicas.
    """
    if averages < 1:
        raise EMAConfigError(f"averages={averages}: must be at least 1")
    schedule = HalfLife("1000ba")
    names = [ONLY] if averages == 1 else [f"{ONLY}{number}" for number in range(1, averages + 1)]
    return Options.parse(averages=dict.fromkeys(names, schedule), dtype=dtype, offload=offload, shard_replicas=shard)


def predict(model: Architecture, layout: Layout, options: Options) -> Prediction:
    """Computes all ranks, or a sample of them. Pure. Raises EMAConfigError if the model cannot be spread in
    this way.
    """
    ranks = [rank_cost(model, layout, options, rank) for rank in sample(layout.world_size)]
    files = checkpoint_files(rank_shares(model, layout, options, 0), options)
    return Prediction(ranks, files, options.offload)


def sample(world_size: int) -> list[int]:
    """Returns all ranks if there are at most ``SAMPLE``; else that many, including the first and the last."""
    number = min(world_size, SAMPLE)
    return [index * (world_size - 1) // max(number - 1, 1) for index in range(number)]


def rank_shares(model: Architecture, layout: Layout, options: Options, rank: int) -> list[Share]:
    """Returns what one rank keeps of each tensor. Pure."""
    return assign_shares(simulate(model.tensors, layout, rank, model.styles), options)


def rank_cost(model: Architecture, layout: Layout, options: Options, rank: int) -> RankCost:
    """Returns the costs of one rank whose weights are on an accelerator. Pure."""
    shares = rank_shares(model, layout, options, rank)
    number = len(options.schedules)
    lowest_mesh_rank = 0  # of the writing mesh: rank 0 has a part of every tensor
    shadow = buffers = staging = in_use = update = checkpoint = widest = 0
    for share in shares:
        if share.mode == "live":
            checkpoint += share.spec.local_numel * share.dtype.itemsize if writes(share, rank, lowest_mesh_rank) else 0
            continue
        kept = share.numel * share.dtype.itemsize
        source = layout.source_dtype(share.spec)
        read = share.numel * source.itemsize
        staging += read if options.offload else 0
        if share.mode == "average":
            shadow += number * kept
            update += read + 2 * number * kept
            # A buffer keeps its place in memory while the average is in use, so its live values are copied aside.
            in_use += read if source != share.dtype or share.spec.kind == "buffer" else 0
            widest = max(widest, share.dtype.itemsize, 4)  # bf16 averages are blended in fp32
        else:
            buffers += kept
            in_use += read
            update += read + kept
        checkpoint += number * kept if writes(share, rank, lowest_mesh_rank) else 0
    scratch = widest * (CACHE_CHUNK if options.offload else _ACCELERATOR_CHUNKS * ACCELERATOR_CHUNK)
    return RankCost(rank, shadow, buffers, staging, scratch, in_use, update, staging, checkpoint)


def checkpoint_files(shares: Sequence[Share], options: Options) -> dict[str, int]:
    """Returns the bytes of every file of a checkpoint, by its path. Pure: any rank's shares give the same."""
    state = EMAState(True, Progress(batches=1), Progress(batches=1), Progress(updates=1))
    views = dict.fromkeys(options.schedules, lambda _: None)
    return Contents(state, options.schedules, catalogue(shares, None), views).sizes()
