"""Describes how one rank holds one tensor of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.geometry.runs import Runs, count, whole
from dist_ema.geometry.subclasses import hidden_type


@dataclass(frozen=True)
class Replicas:
    """Describes ranks that hold the same elements of a tensor, so that they can split its shadow.

    Attributes:
        group: the process group of these ranks.
        index: this rank's place in it.
        size: the number of ranks.
    """

    group: dist.ProcessGroup
    index: int
    size: int


@dataclass(frozen=True)
class TensorSpec:
    """Describes one parameter or buffer of the model as this rank holds it.

    Attributes:
        name: canonical name.
        shape: shape of the full tensor.
        dtype: dtype of the live tensor (not of fp32 masters), to which ``export`` casts.
        runs: this rank's elements, in the row-major flattening of the full tensor.
        kind: ``"parameter"`` if it is trained, ``"frozen"`` if not; a ``"buffer"`` is always whole.
        partitioned: True if the runs of a mesh of ranks, one of each set of replicas, make up the full tensor; False if
            each rank that has this name holds it whole and the ranks are not known to agree (buffers, plain modules).
        lowest_mesh_rank: the lowest rank of the mesh over which the tensor is spread. If several meshes hold one tensor
            (FSDP2 on one dimension, with tensor parallelism for other tensors on the next), the mesh with the smallest
            such rank writes it.
        replicas: the ranks that hold the same runs and may split the shadow; None if there are none.
        primary: False on a rank whose runs belong to another rank although ``replicas`` does not say so (a second
            replicated dimension of a mesh). Such a rank averages but never writes or sends.
        aliases: other canonical names of the same (tied) tensor.
        hidden: the class of a tensor whose memory does not hold its elements (quantized weights), so that it can
            neither be averaged nor be read in place; "" for all others.
        declared: whether the runs are what a plain tensor declares about itself. The tensor does not say which other
            ranks hold the same runs; :func:`dist_ema.comm.catalogue.catalogue` finds out.

    >>> spec = TensorSpec("layer.weight", torch.Size([4, 6]), torch.bfloat16, runs=((6, 12),))  # rows 1 and 2 of 4
    >>> spec.numel, spec.local_numel
    (24, 12)
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    runs: Runs
    kind: Literal["parameter", "frozen", "buffer"] = "parameter"
    partitioned: bool = True
    lowest_mesh_rank: int = 0
    replicas: Replicas | None = None
    primary: bool = True
    aliases: tuple[str, ...] = field(default=())
    hidden: str = ""
    declared: bool = False

    @property
    def numel(self) -> int:
        """Returns the number of elements of the full tensor."""
        return self.shape.numel()

    @property
    def local_numel(self) -> int:
        """Returns the number of elements on this rank."""
        return count(self.runs)

    @classmethod
    def unsharded(cls, name: str, tensor: Tensor, **options: object) -> TensorSpec:
        """Returns the spec of a tensor that this rank holds whole."""
        options.setdefault("hidden", hidden_type(tensor))
        return cls(name, tensor.shape, tensor.dtype, whole(tensor.numel()), **options)  # type: ignore[arg-type]
