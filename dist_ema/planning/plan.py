"""Predicts what an average will cost: memory, bytes moved and time for each rank, and the size of the checkpoint.

The prediction uses the code of a real run. :mod:`dist_ema.planning.layouts` computes the specs that an engine would
have, :mod:`dist_ema.geometry.shares` computes the shares of each rank from them, and
:class:`dist_ema.checkpoints.contents.Contents` computes the files.
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

#: Number of ranks that a prediction for a larger run looks at: at equal distances, with the first and the last.
SAMPLE = 64
#: Temporary chunks that an update has in memory at a time on an accelerator: each of its operations makes a new tensor.
_ACCELERATOR_CHUNKS = 4


@dataclass(frozen=True)
class Speeds:
    """Speeds in bytes per second.

    Attributes:
        memory: of the memory that has the shadow, for one rank.
        link: from the accelerator to the host, for one rank; used only with offload.
        disk: of the file system, for all ranks together.
    """

    memory: float
    link: float
    disk: float


@dataclass(frozen=True)
class RankCost:
    """The cost of one rank, in bytes.

    Attributes:
        rank: number of the rank.
        shadow: memory of the averages, during the whole run.
        buffers: memory of the last copy of the model's buffers, during the whole run.
        staging: with offload, copies of the weights in host memory, from which the thread averages.
        scratch: temporary memory of an update, at most.
        in_use: additional memory while the live model computes with an average (``average_parameters()``).
        update: bytes that one update reads and writes, in the memory that has the shadow.
        link: bytes that one update sends to the host.
        checkpoint: bytes that this rank writes for a checkpoint.
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
        """Returns the time of an update, if the copy to the host and the averaging do not overlap. Seconds."""
        return self.update / speeds.memory + self.link / speeds.link


@dataclass(frozen=True)
class Prediction:
    """The cost of a run.

    Attributes:
        ranks: costs of the ranks in the sample, in ascending order, beginning with rank 0.
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
        """Returns the bytes of the checkpoint's manifest. It may grow by a few bytes as counters grow."""
        return self.files[NAME]

    def worst(self, cost: Callable[[RankCost], float]) -> RankCost:
        """Returns the rank with the highest cost, the first one if there are several."""
        return max(self.ranks, key=cost)

    def mean(self, cost: Callable[[RankCost], float]) -> float:
        """Returns the mean of a cost over the ranks in the sample."""
        return sum(map(cost, self.ranks)) / len(self.ranks)


def make_options(
    *, averages: int = 1, dtype: torch.dtype | None = torch.float32, offload: str | None = None, shard: bool = True
) -> Options:
    """Returns options of :class:`ShardedEMA`, with defaults for all options that do not change the cost.

    Args:
        averages: number of averages.
        dtype: dtype of the shadows; None for the dtype of each parameter.
        offload: None or ``"cpu"``.
        shard: whether the shadows of replicated parameters are spread over the replicas.
    """
    if averages < 1:
        raise EMAConfigError(f"averages={averages}: must be at least 1")
    schedule = HalfLife("1000ba")
    names = [ONLY] if averages == 1 else [f"{ONLY}{number}" for number in range(1, averages + 1)]
    return Options.parse(averages=dict.fromkeys(names, schedule), dtype=dtype, offload=offload, shard_replicas=shard)


def predict(model: Architecture, layout: Layout, options: Options) -> Prediction:
    """Predicts the cost of all ranks, or of a sample of them. Pure.

    Raises EMAConfigError if the model cannot be spread in this way.
    """
    ranks = [rank_cost(model, layout, options, rank) for rank in sample(layout.world_size)]
    files = checkpoint_files(rank_shares(model, layout, options, 0), options)
    return Prediction(ranks, files, options.offload)


def sample(world_size: int) -> list[int]:
    """Returns all ranks if there are at most ``SAMPLE``, else ``SAMPLE`` of them with the first and the last."""
    number = min(world_size, SAMPLE)
    return [index * (world_size - 1) // max(number - 1, 1) for index in range(number)]


def rank_shares(model: Architecture, layout: Layout, options: Options, rank: int) -> list[Share]:
    """Returns the shares of one rank: for each tensor the part that it averages. Pure."""
    return assign_shares(simulate(model.tensors, layout, rank, model.styles), options)


def rank_cost(model: Architecture, layout: Layout, options: Options, rank: int) -> RankCost:
    """Returns the costs of one rank whose weights are on an accelerator. Pure."""
    shares = rank_shares(model, layout, options, rank)
    number = len(options.schedules)
    lowest_mesh_rank = 0  # rank 0 has a part of every tensor, so its mesh writes
    shadow = buffers = staging = in_use = update = checkpoint = widest = 0
    for share in shares:
        if share.mode == "live":
            # Not averaged: only copied into the checkpoint.
            checkpoint += share.spec.local_numel * share.dtype.itemsize if writes(share, rank, lowest_mesh_rank) else 0
            continue
        kept = share.numel * share.dtype.itemsize
        source = layout.source_dtype(share.spec)
        read = share.numel * source.itemsize
        staging += read if options.offload else 0
        if share.mode == "average":
            shadow += number * kept
            update += read + 2 * number * kept  # each average is read and written
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
    """Returns the bytes of every file of a checkpoint, by its path. Pure; the same for the shares of every rank."""
    state = EMAState(True, Progress(batches=1), Progress(batches=1), Progress(updates=1))
    views = dict.fromkeys(options.schedules, lambda _: None)
    return Contents(state, options.schedules, catalogue(shares, None), views).sizes()
