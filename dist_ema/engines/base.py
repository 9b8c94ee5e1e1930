"""What the rest of the library asks of an engine: the order of the calls, who makes them, and what they may cost.

Kinds of tensor, named once:

- *source*: the tensor that is averaged. The live parameter's local shard, or its slice of the fp32 master weights where
  the engine has them (DeepSpeed). Plain ``torch.Tensor``, never a ``DTensor``.
- *live*: what the model computes with. The same memory as the source, or made from it by :meth:`Engine.publish`.

Call order, for one average:

1. ``specs()`` once, at construction and at ``reset()`` (every rank, local): names, shapes and runs; weights may still
   be on the meta device.
2. ``stepped()`` at each ``update()`` (every rank, local): was there a real optimizer step?
3. ``reshard()`` then ``sources()`` at each update that is due and before any other read or write (every rank, local).
4. ``publish()`` after sources were written (every rank, collective where the layout needs it): afterwards the next
   forward computes with what the sources hold.
5. ``attach()`` at the user's wish (every rank, local).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema.errors import EMAConfigError
from dist_ema.geometry import Runs, count, whole


class RemovableHandle(Protocol):
    """What :meth:`ShardedEMA.attach` returns."""

    def remove(self) -> None: ...


class Attached:
    """A handle that also tells its maker that it was removed."""

    def __init__(self, inner: RemovableHandle, removed: Callable[[], None]) -> None:
        self._inner = inner
        self._removed = removed

    def remove(self) -> None:
        """Stops the updates. Local."""
        self._inner.remove()
        self._removed()


@dataclass(frozen=True)
class Replicas:
    """Ranks that hold the same elements of a tensor, and so may share its shadow between them.

    Attributes:
        group: the process group of those ranks.
        index: this rank's place in it.
        size: how many they are.
    """

    group: dist.ProcessGroup
    index: int
    size: int


@dataclass(frozen=True)
class TensorSpec:
    """One parameter or buffer of the model as this rank holds it.

    Attributes:
        name: canonical name.
        shape: shape of the full tensor.
        dtype: dtype of the live tensor (not of fp32 masters); what ``export`` casts to.
        runs: this rank's elements, in the row-major flattening of the full tensor.
        kind: parameters are trained (``"parameter"``) or not (``"frozen"``); a ``"buffer"`` is always whole.
        partitioned: True if the runs of a team of ranks, one of each set of replicas, make up the full tensor; False if
            each rank that has this name holds it whole and the ranks are not known to agree (buffers, plain modules).
        team: the lowest rank of the team. Several teams may hold one tensor (FSDP2 on one dimension of a mesh, with
            tensor parallelism for other tensors on the next): the one with the lowest number is heard.
        replicas: the ranks that hold the same runs and may split the shadow; None if there are none.
        primary: False on a rank whose runs belong to another rank although no ``replicas`` say so (a second
            replicated dimension of a mesh). Such a rank averages but never writes or sends.
        aliases: other canonical names of the same (tied) tensor.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    runs: Runs
    kind: Literal["parameter", "frozen", "buffer"] = "parameter"
    partitioned: bool = True
    team: int = 0
    replicas: Replicas | None = None
    primary: bool = True
    aliases: tuple[str, ...] = field(default=())

    @property
    def numel(self) -> int:
        """Elements of the full tensor."""
        return self.shape.numel()

    @property
    def local_numel(self) -> int:
        """Elements on this rank."""
        return count(self.runs)

    @classmethod
    def unsharded(cls, name: str, tensor: Tensor, **options: object) -> TensorSpec:
        """The spec of a tensor that this rank holds whole."""
        return cls(name, tensor.shape, tensor.dtype, whole(tensor.numel()), **options)  # type: ignore[arg-type]


class Engine(ABC):
    """One way of sharding a model. Subclasses touch a wrapper's private attributes; nothing else does."""

    #: Ranks that take part in collective calls; None in a run without a process group.
    group: dist.ProcessGroup | None = None
    #: Whether :meth:`publish` is a collective call, of all ranks of ``group``.
    publish_is_collective: bool = False

    @abstractmethod
    def specs(self) -> list[TensorSpec]:
        """Every parameter and persistent buffer once, in the order of the plain model's ``state_dict()``. Local."""

    @abstractmethod
    def sources(self) -> list[Tensor]:
        """This rank's elements of every spec of the last ``specs()`` call, in its order. Local; no copy, no host sync.

        Each has as many elements as the spec's runs, in their order when flattened row-major. Writing into them, then
        calling :meth:`publish`, changes the live model. Raises EMAStateError, naming the parameter, if one was
        replaced, frozen or unfrozen since ``specs()``.
        """

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The modules whose forward pass computes with the weights. Local."""

    def ranks(self) -> frozenset[int]:
        """Global ranks over which the wrapper spreads the weights; empty where it knows of no other rank. Local."""
        return frozenset()

    def stepped(self) -> bool:
        """False if the optimizer was not stepped since the last call that returned True. Local."""
        return True

    def reshard(self) -> None:
        """Drops full copies that a forward pass left behind, so that the sources are what counts. Local."""
        return

    def publish(self) -> None:
        """Makes the live model compute with what the sources hold. Collective where the layout needs it."""
        return

    @contextmanager
    def own_buffers(self) -> Iterator[None]:
        """Inside, no forward pass overwrites this rank's buffers with those of another. Local."""
        yield

    def attach(self, optimizer: object, callback: Callable[[], object]) -> RemovableHandle:
        """Calls ``callback`` after every real step of ``optimizer``. Local."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise EMAConfigError(
                f"attach(optimizer={type(optimizer).__name__}): pass the torch.optim.Optimizer that steps the model"
            )

        def after_step(*_: object) -> None:
            callback()

        return optimizer.register_step_post_hook(after_step)
