"""Notices what others write into the weights while an average is in the model.

Average and live weights have changed places there, so what is written becomes a part of the average. torch counts the
writes to every tensor, on the host. The counts are taken when the average has come in and compared before it leaves:
nothing waits for a device.

Not counted are writes through ``.data``, and by kernels that get an address. A tensor made in inference mode has no
counter. Of BatchNorm torch counts only ``num_batches_tracked``, and not the statistics beside it.
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
        names: of the parameters, in the model's order.
        changed: whether the average has changed by it. If not, what was written is gone with the block.
    """

    names: tuple[str, ...]
    changed: bool

    def __str__(self) -> str:
        others = f" and {len(self.names) - 1} more parameters were" if len(self.names) > 1 else " was"
        fate = "The average has not changed, but the model did not compute with it alone."
        if self.changed:
            fate = "The average has changed by it and cannot be used any more: call reset(), or load() a checkpoint."
        return (
            f"{self.names[0]!r}{others} written inside average_parameters(), where the model holds the average: "
            "by an optimizer's step(), eval() or train(), by a layer that changes its weights in forward, or by other "
            f"code. The live weights are what they were before the block. {fate} Write weights before or after the "
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
        """Shares that their own module may write in a forward pass, without a meaning for the average."""
        return self._excused

    def begin(self) -> None:
        """The average is in the model: what is written from now on counts."""
        self._before = self._engine.write_counts()

    def accept_buffers(self) -> None:
        """Notes that the writes into buffers so far were our own, and have been put back."""
        if self._before is not None:
            self._engine.reshard()  # a forward pass may have left full weights in the place of the shards
            now = self._engine.write_counts()
            is_buffer = [share.spec.kind == "buffer" for share in self._shares]
            self._before = [
                after if buffer else before for before, after, buffer in zip(self._before, now, is_buffer, strict=True)
            ]

    def parameters(self, in_average: Callable[[int], bool]) -> Written | None:
        """Returns the parameters that were written since ``begin()``; None if none was.

        Args:
            in_average: whether what was written into a share becomes a part of the average.
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
            fate = "The average's buffers have changed by it." if any(map(in_average, found)) else "They are put back."
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            logger.warning(
                "The buffer %r%s was written inside average_parameters(), as BatchNorm does in training "
                "mode: was model.eval() forgotten? %s",
                self._shares[found[0]].spec.name,
                others,
                fate,
            )

    def _changed(self) -> list[int]:
        """Shares of the average that were written and are not excused."""
        if self._before is None:
            return []
        now = self._engine.write_counts()
        # Counts only grow. One that has shrunk is of a tensor that was replaced inside of inference mode, as FSDP1
        # replaces those without elements.
        grown = [after > before for before, after in zip(self._before, now, strict=True)]
        return [
            index
            for index, share in enumerate(self._shares)
            if grown[index] and share.mode != "live" and share.spec.local_numel and index not in self._excused
        ]


def own_writers(engine: Engine, shares: Sequence[Share]) -> frozenset[int]:
    """Shares that a module writes in every forward pass, also in eval mode: embeddings with ``max_norm``.

    They scale rows that are too long, and write even where none is. Such rows of an average are as the model needs
    them, so that is no reason to stop; the average itself is kept out of it.
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
