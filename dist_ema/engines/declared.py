"""Tensors that declare which part of a full tensor they are. What a tensor declares comes before any arithmetic.

Two forms are read:

* Since torch 2.14 a plain tensor may carry the attributes of ``torch.distributed.checkpoint``'s
  ``CheckpointableTensor``: ``global_shape``, and for each of its chunks ``global_offsets``, ``local_offsets`` and
  ``local_sizes``.
* The local part of a DTensor may have ``__create_chunk_list__()``, which returns chunks with ``offsets`` and ``sizes``
  in the full tensor. Megatron-FSDP sets it, since its DTensors are rows of a packed buffer and not what their
  ``Shard(0)`` says (read in megatron-fsdp 0.6.1).

Two chunks of 2 rows in a local tensor of 5 rows, the last of which is padding::

    local_offsets ((0, 0), (2, 0))     local rows 0 1 2 3 4      source of the average: local rows 0 to 3
    local_sizes   ((2, 4), (2, 4))      |   |  \\   \\
    global_offsets ((0, 0), (6, 0))    rows 0 1    6 7           runs of the full tensor (8, 4): (0, 8), (24, 8)

Nothing here asks other ranks. That all declarations together are the full tensor, each element once, is checked where
ranks meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from dist_ema.errors import EMAEngineError
from dist_ema.geometry.runs import Box, Run, Runs, as_rows, box_runs, merge

#: The attributes of torch 2.14's CheckpointableTensor. A tensor that has the first or the second declares a shard.
FIELDS = ("global_shape", "global_offsets", "local_offsets", "local_sizes")


@dataclass(frozen=True)
class Declaration:
    """Holds what a tensor declares.

    Attributes:
        shape: shape of the full tensor.
        runs: where the elements lie in it.
        inside: the part of the local tensor that holds these elements; None if all of it does.
    """

    shape: torch.Size
    runs: Runs
    inside: tuple[slice, ...] | None = None


def declaration(
    name: str, tensor: Tensor, full_shape: Sequence[int] | None = None, outer: object = None
) -> Declaration | None:
    """Return what a tensor declares about its place in a full tensor; None if it declares nothing. Local.

    Raises EMAEngineError for a declaration that is incomplete, or contradicts the tensor or itself.

    Args:
        name: of the parameter or buffer, for messages.
        tensor: this rank's plain tensor, or the local part of a DTensor.
        full_shape: the DTensor's shape; None for a plain tensor.
        outer: the DTensor, which may have the attributes in place of its local part.
    """
    holder: Any = tensor
    if outer is not None and any(hasattr(outer, field) for field in FIELDS[:2]):
        holder = outer
    present = [field for field in FIELDS if hasattr(holder, field)]
    chunk_list = getattr(tensor, "__create_chunk_list__", None)
    if any(field in present for field in FIELDS[:2]):
        if len(present) < len(FIELDS):
            missing = ", ".join(field for field in FIELDS if field not in present)
            raise _refusal(name, f"it has the attributes {', '.join(present)}, but not {missing}")
        return _from_attributes(name, tuple(tensor.shape), holder, full_shape)
    if chunk_list is None:
        return None
    if full_shape is None:
        raise _refusal(name, "it has __create_chunk_list__(), which does not tell the shape of the full tensor")
    return _from_chunk_list(name, tensor, full_shape, chunk_list())


def refuse_declared(name: str, tensor: Tensor, shape: Sequence[int], wrapper: str) -> None:
    """Raise EMAEngineError if a tensor declares to be a part of a larger one. Local.

    For engines whose wrapper takes every tensor for a whole one, so that the declaration cannot hold any more.

    Args:
        name: of the parameter or buffer.
        tensor: what carries the declaration; the wrapper may have emptied or flattened it.
        shape: what the wrapper takes for the full shape.
        wrapper: its name, for the message.
    """
    if not any(hasattr(tensor, field) for field in (*FIELDS[:2], "__create_chunk_list__")):
        return
    declared = getattr(tensor, "global_shape", None)
    if declared is None or _numbers(name, "global_shape", declared) != tuple(shape):
        raise EMAEngineError(
            f"{name!r} declares to be a part of a larger tensor (global_shape={declared}), but {wrapper} takes its "
            f"shape {tuple(shape)} for the whole. Keep such parameters out of {wrapper} (in a plain module, or under "
            "fully_shard), or delete the attributes if the tensor is whole"
        )


def _from_attributes(
    name: str, local_shape: tuple[int, ...], holder: Any, full_shape: Sequence[int] | None
) -> Declaration:
    shape = _numbers(name, "global_shape", holder.global_shape)
    if full_shape is not None and tuple(full_shape) != shape:
        raise _refusal(name, f"its global_shape is {shape}, and the DTensor's shape is {tuple(full_shape)}")
    lists: list[list[tuple[int, ...]]] = []
    for field in FIELDS[1:]:
        lists.append([_numbers(name, field, numbers) for numbers in getattr(holder, field)])
    offsets, local_offsets, sizes = lists
    if not len(offsets) == len(local_offsets) == len(sizes):
        raise _refusal(name, "global_offsets, local_offsets and local_sizes have different lengths")
    # torch takes an empty local offset for the whole local tensor.
    local_offsets = [offset or (0,) * len(local_shape) for offset in local_offsets]
    inner = list(zip(local_offsets, sizes, strict=True))
    outer = list(zip(offsets, sizes, strict=True))
    return _declared(name, local_shape, shape, inner, outer)


def _from_chunk_list(name: str, tensor: Tensor, full_shape: Sequence[int], chunks: Sequence[Any]) -> Declaration:
    # Chunks that hold nothing may have any offsets.
    filled = [chunk for chunk in chunks if prod(chunk.sizes)]
    if len(filled) > 1:
        raise _refusal(name, f"its __create_chunk_list__() returns {len(filled)} chunks, of which one is allowed")
    outer = [(_numbers(name, "offsets", c.offsets), _numbers(name, "sizes", c.sizes)) for c in filled]
    # The chunk is all of the local tensor, which may not have padding: nothing would say where.
    inner = [((0,) * tensor.ndim, tuple(tensor.shape)) for _ in filled]
    for (_, sizes), (_, local_sizes) in zip(outer, inner, strict=True):
        if sizes != local_sizes:
            raise _refusal(name, f"its chunk has the sizes {sizes}, and the tensor has {local_sizes}")
    return _declared(name, tuple(tensor.shape), tuple(full_shape), inner, outer)


def _declared(
    name: str, local_shape: tuple[int, ...], shape: tuple[int, ...], inner: Sequence[Box], outer: Sequence[Box]
) -> Declaration:
    """Return the declaration of chunks that lie at the boxes ``inner`` of the local tensor, ``outer`` of the full."""
    pairs = [(a, b) for a, b in zip(inner, outer, strict=True) if prod(a[1])]
    for local_box, full_box in pairs:
        _check_box(name, "local tensor", local_box, local_shape)
        _check_box(name, "full tensor", full_box, shape)
    if not pairs:
        if prod(local_shape):
            raise _refusal(name, f"it holds {prod(local_shape)} elements on this rank and declares none")
        return Declaration(torch.Size(shape), ())

    # What no chunk declares may surround the chunks (padding), but not lie between them.
    starts = tuple(min(box[0][dim] for box, _ in pairs) for dim in range(len(local_shape)))
    stops = tuple(max(box[0][dim] + box[1][dim] for box, _ in pairs) for dim in range(len(local_shape)))
    held = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    moved = [(tuple(o - s for o, s in zip(box[0], starts, strict=True)), box[1]) for box, _ in pairs]
    runs = _joined(name, held, shape, list(zip(moved, [full_box for _, full_box in pairs], strict=True)))
    inside = tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
    return Declaration(torch.Size(shape), runs, None if held == local_shape else inside)


def _joined(name: str, held: tuple[int, ...], shape: tuple[int, ...], pairs: Sequence[tuple[Box, Box]]) -> Runs:
    """Return the runs of all chunks, in the row-major order of the local tensor."""
    if len(pairs) == 1:
        return box_runs(shape, _intervals(pairs[0][1]))
    pieces: list[tuple[int, int, int]] = []  # local start, start in the full tensor, length
    for local_box, full_box in pairs:
        pieces.extend(_aligned(box_runs(held, _intervals(local_box)), box_runs(shape, _intervals(full_box))))
    pieces.sort()
    position = 0
    for local_start, _, length in pieces:
        if local_start < position:
            raise _refusal(name, "its chunks overlap in the local tensor")
        if local_start > position:
            raise _refusal(name, "elements between its chunks belong to no chunk")
        position += length
    found = [(start, length) for _, start, length in pieces]
    for (start, length), (following, _) in pairwise(found):
        if following < start + length:
            raise _refusal(name, "its chunks overlap in the full tensor, or stand in another order than there")
    return as_rows(merge(tuple(found)))


def _aligned(local: Runs, full: Runs) -> Iterator[tuple[int, int, int]]:
    """Yield ``(local start, full start, length)`` of elements that follow each other in both lists of runs."""
    outer = iter(full)
    # what is left of the present run of the full tensor
    start = 0
    left = 0
    for local_start, length in local:
        while length:
            if not left:
                start, left = next(outer)
            step = min(length, left)
            yield local_start, start, step
            local_start = local_start + step
            start = start + step
            length = length - step
            left = left - step


def _intervals(box: Box) -> list[tuple[Run, ...]]:
    return [((offset, size),) for offset, size in zip(*box, strict=True)]


def _check_box(name: str, where: str, box: Box, shape: Sequence[int]) -> None:
    offsets, sizes = box
    if len(offsets) != len(shape) or len(sizes) != len(shape):
        raise _refusal(name, f"a chunk has {len(offsets)} offsets and {len(sizes)} sizes in a {where} of {len(shape)}")
    for offset, size, limit in zip(offsets, sizes, shape, strict=True):
        if offset < 0 or size < 0 or offset + size > limit:
            raise _refusal(name, f"a chunk at {offsets} of size {sizes} lies outside of the {where} of {tuple(shape)}")


def _numbers(name: str, field: str, values: Any) -> tuple[int, ...]:
    try:
        numbers = tuple(int(value) for value in values)
    except (TypeError, ValueError):
        raise _refusal(name, f"{field} holds {values!r} instead of numbers") from None
    return numbers


def _refusal(name: str, why: str) -> EMAEngineError:
    return EMAEngineError(f"{name!r} declares to be a part of a full tensor, but {why}. It cannot be averaged")
