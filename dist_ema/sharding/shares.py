"""What this rank keeps of each tensor: which elements it averages, and which it writes.

Where ranks hold the same elements (DDP, HSDP, ZeRO-0), each averages an equal part of them, in bytes, and only the
gathering calls bring the parts together. Knows no wrapper and makes no collective call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from dist_ema.errors import EMAConfigError, EMAEngineError
from dist_ema.options import Options
from dist_ema.sharding.runs import Box, Runs, boxes, cut, split_evenly
from dist_ema.sharding.spec import Replicas, TensorSpec

Mode = Literal["average", "copy", "live"]


@dataclass(frozen=True)
class Share:
    """This rank's part of one tensor.

    Attributes:
        spec: the tensor, as the engine describes it.
        mode: ``"average"`` it, ``"copy"`` it at every update (buffers), or take what is ``"live"``.
        start, stop: the local elements, of those that ``spec.runs`` lists, that this rank keeps a shadow of.
        dtype: of the shadow; of a live tensor, its own.
        split: the other replicas keep the other elements.
        first_replica: of the ranks that keep these same elements this one writes them. Of a tensor that is not
            partitioned every holder says so, and the lowest rank writes it.

    >>> spec = TensorSpec("w", torch.Size([4, 6]), torch.float32, runs=((6, 12),))
    >>> share = Share(spec, "average", 0, 6, torch.float32, split=True, first_replica=True)  # of two replicas the first
    >>> share.runs, share.boxes
    (((6, 6),), (((1, 0), (1, 6)),))
    """

    spec: TensorSpec
    mode: Mode
    start: int
    stop: int
    dtype: torch.dtype
    split: bool
    first_replica: bool

    @property
    def numel(self) -> int:
        """Elements kept."""
        return self.stop - self.start

    @property
    def runs(self) -> Runs:
        """Where the kept elements lie in the full tensor."""
        return cut(self.spec.runs, self.start, self.stop)

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The same as boxes; there may be a thousand runs to one of them."""
        return tuple(boxes(self.runs, self.spec.shape))


def assign_shares(specs: Sequence[TensorSpec], options: Options) -> list[Share]:
    """One share for each spec, in order. Local.

    Raises EMAConfigError if a trained dtype cannot be averaged, EMAEngineError if a tensor's elements cannot be read.

    >>> (share,) = assign_shares([TensorSpec.unsharded("w", torch.zeros(2, 3))], Options.parse())
    >>> share.mode, share.dtype, share.runs
    ('average', torch.float32, ((0, 6),))
    """
    modes = [_mode(spec, options) for spec in specs]
    for spec, mode in zip(specs, modes, strict=True):
        if spec.hidden and mode != "live":
            advice = "buffers='ignore'" if spec.kind == "buffer" else f"exclude={spec.name!r}, or freeze it"
            raise EMAEngineError(
                f"{spec.kind} {spec.name!r} is a {spec.hidden}, a tensor subclass that does not hold its elements as "
                f"they are: it cannot be averaged. Give {advice}"
            )
    dtypes = [_dtype(spec, mode, options) for spec, mode in zip(specs, modes, strict=True)]
    ranges = [(0, spec.local_numel) for spec in specs]  # all of the local shard, unless replicas split it
    split = [mode == "average" and spec.replicas is not None for spec, mode in zip(specs, modes, strict=True)]
    split = [wanted and options.shard_replicas for wanted in split]
    # One cut through all tensors of a replica set laid end to end, not one a tensor: with hundreds of small tensors the
    # rounding of each would add up, and most ranks would hold a sliver of every one.
    for members in replica_sets([spec if wanted else None for spec, wanted in zip(specs, split, strict=True)]):
        replicas = specs[members[0]].replicas
        if replicas is not None:
            parts = split_over([specs[i] for i in members], [dtypes[i] for i in members], replicas, replicas.index)
            for index, part in zip(members, parts, strict=True):
                ranges[index] = part
    # Of a split tensor every replica is the only holder of its part, so each of them writes.
    return [
        Share(spec, mode, *range_, dtype, is_split, spec.primary and (is_split or _first(spec.replicas)))
        for spec, mode, range_, dtype, is_split in zip(specs, modes, ranges, dtypes, split, strict=True)
    ]


def replica_sets(specs: Sequence[TensorSpec | None]) -> list[list[int]]:
    """Indices of the specs that have replicas, one list for each process group."""
    # By identity: engines give the same group object to all its tensors, and two groups of the same ranks are rare
    # (then each set is split for itself, on all ranks alike).
    sets: dict[int, list[int]] = {}
    for index, spec in enumerate(specs):
        if spec is not None and spec.replicas is not None:
            sets.setdefault(id(spec.replicas.group), []).append(index)
    return list(sets.values())


def split_over(
    specs: Sequence[TensorSpec], dtypes: Sequence[torch.dtype], replicas: Replicas, index: int
) -> list[tuple[int, int]]:
    """The local elements of each tensor of one replica set that replica ``index`` keeps. The same on all of them."""
    sizes = [spec.local_numel for spec in specs]
    return split_evenly(sizes, [dtype.itemsize for dtype in dtypes], replicas.size, index)


def _mode(spec: TensorSpec, options: Options) -> Mode:
    if spec.kind == "frozen" or not options.selects(spec.name):
        return "live"
    if spec.kind == "parameter":
        return "average"
    if options.buffers == "ignore":
        return "live"
    # Counters and masks (integers, bools) have no mean.
    return "average" if options.buffers == "average" and spec.dtype.is_floating_point else "copy"


def _dtype(spec: TensorSpec, mode: Mode, options: Options) -> torch.dtype:
    if mode != "average":
        return spec.dtype
    if not spec.dtype.is_floating_point:
        raise EMAConfigError(
            f"parameter {spec.name!r} is {spec.dtype}, which cannot be averaged: "
            f"give exclude={spec.name!r}, or freeze it"
        )
    return spec.dtype if options.dtype is None else options.dtype


def _first(replicas: Replicas | None) -> bool:
    return replicas is None or replicas.index == 0
