"""Notices whether other code writes to the weights while an average is in the model.

Average and live weights have exchanged places then, so such a write changes the average. torch counts the writes to
every tensor on the host (``Tensor._version``). The counts are taken after the average has come in and compared before
it goes out, without waiting for a device.

torch does not count writes through ``.data``, and writes by kernels that get an address. Tensors made in inference mode
have no counter. Of BatchNorm's buffers torch counts only writes to ``num_batches_tracked``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from dist_ema.engines.base import Engine
from dist_ema.engines.names import walk_modules
from dist_ema.errors import EMAStateError
from dist_ema.geometry.shares import Share

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """Records what was written inside ``average_parameters()``.

    Attributes:
        names: the parameters, in the order of the model.
        changed: whether a write has changed the average. If not, the writes were undone at the end of the block.
    """

    names: tuple[str, ...]
    changed: bool

    def __str__(self) -> str:
        others = f" and {len(self.names) - 1} more parameters were" if len(self.names) > 1 else " was"
        fate = "The average has not changed, but the model has computed with the written values."
        if self.changed:
            fate = "This has changed the average, which cannot be used any more: call reset(), or load() a checkpoint."
        return (
            f"{self.names[0]!r}{others} written inside average_parameters(), where the model holds the average: "
            "by an optimizer's step(), eval() or train(), by a layer that changes its weights in forward, or by other "
            f"code. The live weights have the values of before the block. {fate} Write weights before or after the "
            "block"
        )

    def error(self, operation: str) -> EMAStateError:
        """Returns the error to raise from ``operation``."""
        return EMAStateError(f"{operation}: {self}")


class Watch:
    """Compares write counts of one visit of an average to a model. Local.

    Args:
        engine: of the model.
        shares: what this rank keeps of each tensor.
    """

    def __init__(self, engine: Engine, shares: Sequence[Share]) -> None:
        self._engine = engine
        self._shares = shares
        self._excused = own_writers(engine, shares)
        self._before: list[int] | None = None

    @property
    def excused(self) -> frozenset[int]:
        """Returns the shares that their own module may write in a forward pass, as :func:`own_writers` finds them."""
        return self._excused

    def begin(self) -> None:
        """Starts to count writes. Call it when the average has come into the model."""
        self._before = self._engine.write_counts()

    def accept_buffers(self) -> None:
        """Excuses the writes to buffers so far: this library made them and has undone them."""
        if self._before is not None:
            self._engine.reshard()  # a forward pass may have left full weights in place of the shards
            now = self._engine.write_counts()
            is_buffer = [share.spec.kind == "buffer" for share in self._shares]
            self._before = [
                after if buffer else before for before, after, buffer in zip(self._before, now, is_buffer, strict=True)
            ]

    def parameters(self, in_average: Callable[[int], bool]) -> Written | None:
        """Returns the parameters that were written since ``begin()``; None if none was.

        Args:
            in_average: returns whether a write to the share of this index changes the average.
        """
        found = [index for index in self._changed() if self._shares[index].spec.kind != "buffer"]
        if not found:
            return None
        return Written(tuple(self._shares[index].spec.name for index in found), any(map(in_average, found)))

    def warn_of_buffers(self, in_average: Callable[[int], bool]) -> None:
        """Logs buffers that were written since ``begin()``."""
        ignored = self._engine.rewritten_by_forward()
        changed = [index for index in self._changed() if self._shares[index].spec.kind == "buffer"]
        found = [index for index in changed if index not in ignored]
        if found:
            is_changed = any(map(in_average, found))
            fate = "The buffers of the average have changed." if is_changed else "Their values are restored."
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            logger.warning(
                "The buffer %r%s was written inside average_parameters(), as BatchNorm does in training "
                "mode: was model.eval() forgotten? %s",
                self._shares[found[0]].spec.name,
                others,
                fate,
            )

    def _changed(self) -> list[int]:
        """Returns the indices of shares that were written since ``begin()`` and are not excused."""
        if self._before is None:
            return []
        now = self._engine.write_counts()
        # A count only grows. If it has shrunk, the tensor was replaced in inference mode, as FSDP1 replaces tensors
        # without elements.
        grown = [after > before for before, after in zip(self._before, now, strict=True)]
        return [
            index
            for index, share in enumerate(self._shares)
            if grown[index] and share.mode != "live" and share.spec.local_numel and index not in self._excused
        ]


def own_writers(engine: Engine, shares: Sequence[Share]) -> frozenset[int]:
    """Returns the shares that a module writes in every forward pass, also in eval mode: embeddings with ``max_norm``.

    Such a module scales down rows whose norm is too large, and writes even if there are none. This is how the model
    uses its weights, so it is no error. The average itself is not put into the model, but copied (``Swap.fixed``).
    """
    names = {
        f"{prefix}.weight" if prefix else "weight"
        for root in engine.modules()
        for prefix, module in walk_modules(root)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    }
    if not names:
        return frozenset()
    return frozenset(
        index
        for index, share in enumerate(shares)
        if share.mode == "average" and not names.isdisjoint((share.spec.name, *share.spec.aliases))
    )
