"""Describes tensors of a file that are read when they are needed, and the other contents of an opened file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from dist_ema import kernels
from dist_ema.errors import CheckpointCorruptError

#: Puts elements ``[start, stop)`` of a flattened tensor into a flat CPU tensor of its dtype. From any thread.
Read: TypeAlias = "Callable[[int, int, Tensor], None]"
_loading = threading.Lock()


@dataclass(frozen=True)
class ReadableTensor:
    """Reads a full tensor of an opened file. Any range of its elements can be read, by several threads at a time.

    Attributes:
        shape, dtype: those of the full tensor.
        read: reads a range.
        aliases: other names of the same (tied) tensor.
        digest: its fingerprint; None if the file has none.
        untracked: whether the file holds an average that this tensor is not part of.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Read
    aliases: tuple[str, ...] = ()
    digest: int | None = None
    untracked: bool = False

    @property
    def numel(self) -> int:
        """Returns the number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Returns the number of bytes in the file."""
        return self.numel * self.dtype.itemsize


class LazyTensor:
    """Represents a tensor of a foreign file. It is loaded at the first read and released after its last element was
    read.

    Attributes:
        shape, dtype: those of the full tensor.
        place: equal for two tensors of one file that share their memory (tied weights); None if that is not known.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, load: Callable[[], Tensor], place: object = None
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.place = place
        self._load = load
        self._loaded: Tensor | None = None

    @classmethod
    def of(cls, name: str, value: Any) -> LazyTensor:
        """Returns a tensor, mapped or in memory. Raises CheckpointCorruptError unless it is plain and all of it
        there.
        """
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_nested:
            raise CheckpointCorruptError(f"{name!r} is a {type(value).__name__} where a plain tensor is expected")
        value = value.detach()
        if value.device.type != "cpu" or value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise CheckpointCorruptError(f"{name!r} has {value.numel()} elements, more than the file holds for it")
        # Two tensors with all of this in common are one; views of one memory with other shapes are not.
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        return cls(value.shape, value.dtype, lambda: value, place if value.numel() else None)

    @property
    def numel(self) -> int:
        """Returns the number of elements of the full tensor."""
        return torch.Size(self.shape).numel()

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copies elements ``[start, stop)`` into ``out``, 1D, converted to its dtype. Ranges must come in ascending
        order.
        """
        if self._loaded is None:
            self._loaded = self._load()
        kernels.read(self._loaded, start, stop, out)
        if stop == self.numel:
            self._loaded = None

    def read_range(self, start: int, stop: int, out: Tensor) -> None:
        """Copies elements ``[start, stop)`` into ``out``, 1D and of its dtype. In any order, from any thread.

        The tensor stays loaded. For a mapped file that takes no memory.
        """
        with _loading:
            if self._loaded is None:
                self._loaded = self._load()
        kernels.read(self._loaded, start, stop, out)


Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Content:
    """Holds an opened foreign file or directory.

    Attributes:
        kind: a ``"file"`` of torch.save, a ``"pretrained"`` directory of safetensors files and a configuration, or a
            ``"dcp"`` directory of torch.distributed.checkpoint.
        values: everything in a file; the configuration of a pretrained directory; the entries of a DCP directory that
            are not tensors.
        tensors: the tensors of a directory, by name.
        notes: which part was taken, if a directory holds more than one thing.
        chosen: whether the user has named the file of the directory.
    """

    kind: Literal["file", "pretrained", "dcp"]
    values: Mapping[str, Any]
    tensors: Tensors = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    chosen: bool = False
