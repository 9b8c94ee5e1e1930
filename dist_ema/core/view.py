"""Finds this rank's elements of averages and live weights, wherever they are at the moment."""

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
    """One look at this rank's values, for one call. Local; copies nothing.

    Inside ``average_parameters()`` an average's elements are where the live ones were, and the reverse. Before the
    first update the live weights are the average.

    Args:
        shares: what this rank keeps of each tensor.
        shadow: the averages.
        sources: the live tensors, one for each share, in the model's order.
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

        Raises EMAStateError if one is on the meta device.
        """
        shadows = self._shadow.tensors(name) if self._shadow.started else [None] * len(self._shares)
        found = {}
        for index, (share, shadow, source) in enumerate(zip(self._shares, shadows, self.sources, strict=True)):
            if share.mode == "live" and not include_untracked:
                continue
            in_model = shadow is None or self._in_model(name, index)
            values, start = (source, share.start) if in_model or shadow is None else (shadow, 0)
            if values.is_meta:
                raise EMAStateError(f"{share.spec.name!r} is on the meta device: materialise the model first")
            found[share.spec.name] = LocalValues(share, values, start)
        return found

    def live(self) -> list[LocalValues | None]:
        """Returns this rank's live values of what is averaged or copied, for each share; None for what is not.

        Also None for a buffer that was resized since the last update: its live values do not fit its share.
        """
        condition = self._condition
        swap = condition.swap if condition.visit is not None and condition.visit.open else None
        found: list[LocalValues | None] = []
        for index, (share, source) in enumerate(zip(self._shares, self.sources, strict=True)):
            kept = None if swap is None else swap.live(index)
            values = LocalValues(share, source, share.start) if kept is None else LocalValues(share, kept, 0)
            found.append(None if share.mode == "live" or self._was_resized(index) else values)
        return found

    def flat(self, name: str) -> list[Tensor | None]:
        """Returns an average's elements of each share, flat; None where it is live. Views where they lie together."""
        flat = list(self._shadow.tensors(name))
        for index, (share, source) in enumerate(zip(self._shares, self.sources, strict=True)):
            if flat[index] is not None and self._in_model(name, index):
                flat[index] = LocalValues(share, source, share.start).flat()
        return flat

    def whole_average(self, name: str) -> list[Tensor | None]:
        """Returns ``flat``, or before the first update the live elements of what will be averaged or copied."""
        if self._shadow.started:
            return self.flat(name)
        return [None if values is None else values.flat() for values in self.live()]

    def squared_distance(self, name: str, writes: Sequence[bool]) -> float:
        """Returns the sum of (shadow - live)^2 over the averaged elements that this rank ``writes``, by share, in
        float64.
        """
        if not self._shadow.started:
            return 0.0
        totals: dict[torch.device, Tensor] = {}  # so that each device is waited for once
        shadows = self._shadow.tensors(name)
        for index, (share, shadow, mine) in enumerate(zip(self._shares, shadows, writes, strict=True)):
            source = self.sources[index]
            if mine and share.mode == "average" and shadow is not None and not self._was_resized(index):
                found = kernels.squared_distance(shadow, source, share.start, share.stop)
                totals[found.device] = totals.get(found.device, 0) + found
        return sum(map(float, totals.values()))

    def resized(self) -> list[str]:
        """Names of buffers that were resized since the last update, of those that are averaged or copied."""
        tracked = [index for index, share in enumerate(self._shares) if share.mode != "live"]
        return [self._shares[index].spec.name for index in tracked if self._was_resized(index)]

    def _was_resized(self, index: int) -> bool:
        """Returns whether a buffer has another shape than at the last update."""
        share = self._shares[index]
        is_whole = share.spec.kind == "buffer" and not share.spec.partitioned
        return is_whole and self.sources[index].shape != share.spec.shape

    def _in_model(self, name: str, index: int) -> bool:
        """Returns whether an average's elements of a share have changed places with the live ones."""
        visit = self._condition.visit
        swap = self._condition.swap
        if visit is None or swap is None or not visit.open:
            return False
        shared = self._shares[index].mode == "copy"  # all averages have these in common
        return swap.in_model(index) and (shared or name == visit.name)
