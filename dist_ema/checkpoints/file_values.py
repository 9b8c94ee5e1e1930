"""Provides full tensors that one process reads from a file while it writes them into another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.gather import LocalValues
from dist_ema.geometry.runs import whole
from dist_ema.geometry.shares import Share
from dist_ema.geometry.spec import TensorSpec

#: Told how many more bytes of tensors are done; may be called from any thread.
Advance = Callable[[int], None]


def no_advance(_: int) -> None:
    """Does nothing. Use it where no progress is reported."""


class Source(Protocol):
    """Reads a full tensor in a file.

    Attributes:
        dtype: the dtype in the file.
    """

    dtype: torch.dtype

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copies elements ``[start, stop)`` into ``out``, a 1D CPU tensor, converted to its dtype."""


@dataclass(frozen=True)
class FileValues(LocalValues):
    """Implements :class:`LocalValues` for a full tensor that is read from a file when it is needed; ``values`` is
    empty.

    Attributes:
        source: reads the elements.
        advance: called with the number of bytes that were read, in the dtype of ``share``.
    """

    source: Source
    advance: Advance

    @classmethod
    def of(cls, entry: FullTensor, source: Source, advance: Advance) -> FileValues:
        """Returns the values of ``entry`` for a single process, which holds all of it."""
        shape = torch.Size(entry.shape)
        spec = TensorSpec(entry.name, shape, source.dtype, whole(entry.numel), partitioned=False, aliases=entry.aliases)
        share = Share(spec, entry.mode, 0, entry.numel, entry.dtype, split=False, first_replica=True)
        return cls(share, torch.empty(0, dtype=source.dtype), 0, source, advance)

    def read(self, start: int, stop: int, out: Tensor, non_blocking: bool = False) -> None:
        """Implements :meth:`LocalValues.read`; in ascending order, without gaps."""
        self.source.read(start, stop, out)
        self.advance((stop - start) * self.share.dtype.itemsize)
