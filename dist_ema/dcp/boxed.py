"""Represents a full tensor of which this rank holds some elements, for ``torch.distributed.checkpoint`` (DCP).

DCP's planner asks a tensor for three things: what this rank writes of it, which parts this rank wants to read, and the
memory of a part. It calls three methods for that (``torch/distributed/_checkpointable.py``, read in torch 2.13), in
which parts are boxes of the full tensor. So the shards of every engine have one form, including shards that are cut
within a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dist_ema.errors import EMAStateError
from dist_ema.geometry.runs import Box

_aten = torch.ops.aten
#: The operations of staging, ``copy.deepcopy`` and moves to another device. Each treats every element alike.
_ELEMENTWISE = {
    _aten.clone.default,
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten._to_copy.default,
}


class BoxedTensor(Tensor):
    """Represents a full tensor by its ``size()``; ``held`` is this rank's part. It can be copied, but not computed
    with.

    Attributes:
        held: this rank's elements, 1D: those of the first box, then those of the second, and so on.
        boxes: their places in the full tensor, each box as ``(offsets, sizes)``.
        is_writer: whether this rank writes them.
        spare: whether a read may overwrite ``held``. If not, ``held`` is copied as soon as a read is planned, so that a
            failed read has changed nothing.
        joined: the number of the update at which the tensor became averaged; 0 for the first copy, and in files that an
            earlier version wrote. Replicas split what has joined at one update, so their parts follow from it.
    """

    # __torch_dispatch__ sees all operations and returns the class that it means: no layer above it is needed.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    held: Tensor
    boxes: tuple[Box, ...]
    is_writer: bool
    spare: bool
    joined: int = 0

    @staticmethod
    def __new__(
        cls: type[BoxedTensor],
        shape: Sequence[int],
        held: Tensor,
        boxes: Sequence[Box],
        *,
        is_writer: bool,
        spare: bool,
        joined: int = 0,
    ) -> BoxedTensor:
        # A tensor without memory of its own, as torch's DTensor is.
        made: BoxedTensor = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=held.dtype, device=held.device)
        made.held = held
        made.boxes = tuple(boxes)
        made.is_writer = is_writer
        made.spare = spare
        made.joined = joined
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        first = args[0]
        if func is _aten.detach.default:
            # Not a copy. With the same tensor inside, a part that gets memory of its own does so for both.
            return first._with(first.held, spare=first.spare)
        if func in _ELEMENTWISE:
            return first._with(func(first.held, *args[1:], **options))
        # DCP makes empty tensors of the same size to load into; of this rank's part, no more memory is needed.
        if func is _aten.new_empty.default and torch.Size(args[1]) == first.size():
            return first._with(first.held.new_empty(first.held.shape, **options))
        if func is _aten.copy_.default and isinstance(args[1], BoxedTensor):
            # FileSystemWriter's staging copies a 0-d tensor into a plain one that it has made.
            target = first.held if isinstance(first, BoxedTensor) else first
            if target.numel() == args[1].held.numel():
                target.copy_(args[1].held.view(target.shape), *args[2:], **options)
                return first
        raise EMAStateError(  # not a TypeError, which Python's operators replace by one of their own
            f"{func} on a part of an average from ShardedEMA.state_dict(), which can only be saved, loaded and copied "
            "(by torch.distributed.checkpoint). ShardedEMA.full_state_dict() gives whole tensors to compute with"
        )

    def _with(self, held: Tensor, spare: bool = True) -> BoxedTensor:
        # A copy belongs to nobody else, so a read may overwrite it.
        return BoxedTensor(self.size(), held, self.boxes, is_writer=self.is_writer, spare=spare, joined=self.joined)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"BoxedTensor(shape={tuple(self.size())}, boxes={self.boxes}, held={self.held})"

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        """Returns what this rank writes, for DCP: all boxes, or none if another rank writes them."""
        if not self.is_writer:
            return []
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(self.held), self.size()),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Returns what this rank reads, for DCP, which calls this only in a load."""
        if not self.spare:
            self.held, self.spare = self.held.clone(), True
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Returns the memory of one box, for DCP to write from or to read into."""
        low = 0
        for offsets, sizes in self.boxes:
            high = low + prod(sizes)
            if index.offset == torch.Size(offsets):
                return self.held[low:high].view(sizes)
            low = high
        raise ValueError(f"{index.fqn}: this rank holds no box at {index.offset}; it holds {self.boxes}")

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.boxes]


# So that torch.load(weights_only=True) reads what torch.save() has written of it.
torch.serialization.add_safe_globals([BoxedTensor])
