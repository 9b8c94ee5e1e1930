"""Finds this rank's elements of averages and live weights, whether they are in a shadow or in the model.

Where the elements are depends on the moment, since ``average_parameters()`` exchanges shadow and model (``swap.py``)::

                                  average            live weights
    before the first update       the model          the model       (the live weights are the average)
    after the first update        its shadow         the model
    inside average_parameters()   the model          its shadow, or the copy that the swap has kept
      another average             its shadow
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_ema import kernels
from dist_ema.comm.gather import LocalValues
from dist_ema.core.condition import Condition
from dist_ema.errors import EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.shadow.device import Shadow


class View:
    """Gives one call access to this rank's values, without copying them. Local.

    It is valid until the next update, swap or load.

    Args:
        shares: what this rank keeps of each tensor.
        shadow: the averages.
        sources: the model's own tensors, one for each share. Inside ``average_parameters()`` they hold the average.
        condition: says whether an average is in the model.
    """

    def __init__(
        self, shares: Sequence[Share], shadow: Shadow, sources: Sequence[Tensor], condition: Condition
    ) -> None:
        self._shares = shares
        self._shadow = shadow
        self.sources = sources
        self._condition = condition

    def average(self, name: str, include_untracked: bool = True) -> dict[str, LocalValues]:
        """Returns this rank's values of each tensor of an average, by canonical name.

        Tensors that are not averaged have their live values; without ``include_untracked`` they are left out.

        Raises:
            EMAStateError: a tensor is on the meta device.
        """
        shadows = self._shadow.tensors(name) if self._shadow.started else [None] * len(self._shares)
        found = {}
        for index, (share, shadow, source) in enumerate(zip(self._shares, shadows, self.sources, strict=True)):
            if share.mode == "live" and not include_untracked:
                continue
            if shadow is None or self._in_model(name, index):
                values, start = source, share.start  # the source may hold more than this rank averages
            else:
                values, start = shadow, 0
            if values.is_meta:
                raise EMAStateError(
                    f"{share.spec.name!r} is on the meta device: materialize the model first, for example with "
                    "to_empty() and its own initialization"
                )
            found[share.spec.name] = LocalValues(share, values, start)
        return found

    def live(self) -> list[LocalValues | None]:
        """Returns this rank's live values of each share that is averaged or copied; None for the others.

        A buffer that was resized since the last update also gives None, because its live values do not fit its share.
        """
        condition = self._condition
        swap = condition.swap if condition.visit is not None and condition.visit.open else None
        found: list[LocalValues | None] = []
        for index, (share, source) in enumerate(zip(self._shares, self.sources, strict=True)):
            if share.mode == "live" or self._was_resized(index):
                found.append(None)
                continue
            kept = None if swap is None else swap.live(index)
            if kept is None:
                found.append(LocalValues(share, source, share.start))
            else:
                found.append(LocalValues(share, kept, 0))
        return found

    def flat(self, name: str) -> list[Tensor | None]:
        """Returns an average's elements of each share, 1D; None for a share that is not averaged or copied.

        They are views, except where the elements are in the model and not contiguous.
        """
        flat = list(self._shadow.tensors(name))
        for index, (share, source) in enumerate(zip(self._shares, self.sources, strict=True)):
            if flat[index] is not None and self._in_model(name, index):
                flat[index] = LocalValues(share, source, share.start).flat()
        return flat

    def whole_average(self, name: str) -> list[Tensor | None]:
        """Returns ``flat(name)``; before the first update the live elements of the same shares."""
        if self._shadow.started:
            return self.flat(name)
        return [None if values is None else values.flat() for values in self.live()]

    def squared_distance(self, name: str, writes: Sequence[bool]) -> float:
        """Returns this rank's part of the sum of (shadow - live)^2 over all averaged elements, in float64.

        Args:
            name: the average.
            writes: for each share, whether this rank counts it. Of replicas only one does.
        """
        if not self._shadow.started:
            return 0.0
        totals: dict[torch.device, Tensor] = {}  # added up on each device, so the host waits once for each
        shadows = self._shadow.tensors(name)
        for index, (share, shadow, mine) in enumerate(zip(self._shares, shadows, writes, strict=True)):
            source = self.sources[index]
            if mine and share.mode == "average" and shadow is not None and not self._was_resized(index):
                found = kernels.squared_distance(shadow, source, share.start, share.stop)
                totals[found.device] = totals.get(found.device, 0) + found
        return sum(map(float, totals.values()))

    def resized(self) -> list[str]:
        """Returns the names of averaged and copied buffers that were resized since the last update."""
        tracked = [index for index, share in enumerate(self._shares) if share.mode != "live"]
        return [self._shares[index].spec.name for index in tracked if self._was_resized(index)]

    def _was_resized(self, index: int) -> bool:
        """Returns whether a share is of a buffer whose shape has changed since the last update."""
        share = self._shares[index]
        # Only whole buffers can be resized: the source of a parameter is one rank's shard, of another shape anyway.
        is_whole = share.spec.kind == "buffer" and not share.spec.partitioned
        return is_whole and self.sources[index].shape != share.spec.shape

    def _in_model(self, name: str, index: int) -> bool:
        """Returns whether an average's elements of a share are in the model, exchanged with the live ones."""
        visit = self._condition.visit
        swap = self._condition.swap
        if visit is None or swap is None or not visit.open:
            return False
        is_common = self._shares[index].mode == "copy"  # all averages have one copy of such a buffer
        return swap.in_model(index) and (is_common or name == visit.name)
