"""Reads which part of a full tensor a tensor declares to be.

A declaration takes precedence over what a DTensor's placements say. Two forms are read:

* Since torch 2.14 a plain tensor may carry the attributes of ``torch.distributed.checkpoint``'s
  ``CheckpointableTensor``: ``global_shape``, and for each of its chunks ``global_offsets``, ``local_offsets`` and
  ``local_sizes``.
* The local part of a DTensor may have ``__create_chunk_list__()``, which returns chunks with ``offsets`` and ``sizes``
  in the full tensor. Megatron-FSDP sets it, because its DTensors are rows of a packed buffer and differ from what their
  ``Shard(0)`` means (read in megatron-fsdp 0.6.1).

Two chunks of 2 rows in a local tensor of 5 rows, of which the last row is padding::

    local_offsets ((0, 0), (2, 0))     local rows 0 1 2 3 4      source of the average: local rows 0 to 3
    local_sizes   ((2, 4), (2, 4))      |   |  \\   \\
    global_offsets ((0, 0), (6, 0))    rows 0 1    6 7           runs of the full tensor (8, 4): (0, 8), (24, 8)

Everything here is local. ``comm/catalogue.py`` checks that the declarations of all ranks make up the full tensor, with
each element once.
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
    """The declaration of one tensor.

    Attributes:
        shape: shape of the full tensor.
        runs: where the declared elements lie in the full tensor.
        inside: the part of the local tensor that holds these elements; None if the whole local tensor does.
    """

    shape: torch.Size
    runs: Runs
    inside: tuple[slice, ...] | None = None


def declaration(
    name: str, tensor: Tensor, full_shape: Sequence[int] | None = None, outer: object = None
) -> Declaration | None:
    """Return what a tensor declares about its place in a full tensor; None if it declares nothing. Local.

    Raises EMAEngineError for a declaration that is incomplete, or that contradicts the tensor or itself.

    Args:
        name: of the parameter or buffer, for messages.
        tensor: this rank's plain tensor, or the local part of a DTensor.
        full_shape: the DTensor's shape; None for a plain tensor.
        outer: the DTensor, which may have the attributes instead of its local part.
    """
    # The object that has the attributes.
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

    For engines whose wrapper shards every tensor as if it were whole. A declaration is then no longer true.

    Args:
        name: of the parameter or buffer.
        tensor: the tensor with the attributes; the wrapper may have emptied or flattened it.
        shape: the shape that the wrapper uses as the full shape.
        wrapper: name of the wrapper, for the message.
    """
    if not any(hasattr(tensor, field) for field in (*FIELDS[:2], "__create_chunk_list__")):
        return
    # A whole tensor may declare its own shape, which does no harm.
    declared = getattr(tensor, "global_shape", None)
    if declared is None or _numbers(name, "global_shape", declared) != tuple(shape):
        raise EMAEngineError(
            f"{name!r} declares to be a part of a larger tensor (global_shape={declared}), but {wrapper} uses its "
            f"shape {tuple(shape)} as the full shape. Keep such parameters out of {wrapper} (in a plain module, or "
            "under fully_shard), or delete the attributes if the tensor is whole"
        )


def _from_attributes(
    name: str, local_shape: tuple[int, ...], holder: Any, full_shape: Sequence[int] | None
) -> Declaration:
    """Return the declaration in the attributes of ``holder``. Raises EMAEngineError if they contradict each other."""
    shape = _numbers(name, "global_shape", holder.global_shape)
    if full_shape is not None and tuple(full_shape) != shape:
        raise _refusal(name, f"its global_shape is {shape}, but the DTensor's shape is {tuple(full_shape)}")
    # Each of the other attributes has one tuple for each chunk.
    lists: list[list[tuple[int, ...]]] = []
    for field in FIELDS[1:]:
        lists.append([_numbers(name, field, numbers) for numbers in getattr(holder, field)])
    offsets, local_offsets, sizes = lists
    if not len(offsets) == len(local_offsets) == len(sizes):
        raise _refusal(name, "global_offsets, local_offsets and local_sizes have different lengths")
    # For torch an empty local offset means that the chunk is the whole local tensor.
    local_offsets = [offset or (0,) * len(local_shape) for offset in local_offsets]
    local_boxes = list(zip(local_offsets, sizes, strict=True))
    full_boxes = list(zip(offsets, sizes, strict=True))
    return _from_boxes(name, local_shape, shape, local_boxes, full_boxes)


def _from_chunk_list(name: str, tensor: Tensor, full_shape: Sequence[int], chunks: Sequence[Any]) -> Declaration:
    """Return the declaration in the result of ``__create_chunk_list__()``. Raises EMAEngineError if it does not fit."""
    # Empty chunks are left out, because their offsets may have any value.
    filled = [chunk for chunk in chunks if prod(chunk.sizes)]
    if len(filled) > 1:
        raise _refusal(name, f"its __create_chunk_list__() returns {len(filled)} chunks, but only one is allowed")
    full_boxes: list[Box] = []
    for chunk in filled:
        full_boxes.append((_numbers(name, "offsets", chunk.offsets), _numbers(name, "sizes", chunk.sizes)))
    # A chunk does not tell where it lies in the local tensor. So it has to be the whole of it, without padding.
    local_boxes: list[Box] = [((0,) * tensor.ndim, tuple(tensor.shape)) for _ in filled]
    for (_, sizes), (_, local_sizes) in zip(full_boxes, local_boxes, strict=True):
        if sizes != local_sizes:
            raise _refusal(name, f"its chunk has the sizes {sizes}, but the tensor has {local_sizes}")
    return _from_boxes(name, tuple(tensor.shape), tuple(full_shape), local_boxes, full_boxes)


def _from_boxes(
    name: str,
    local_shape: tuple[int, ...],
    shape: tuple[int, ...],
    local_boxes: Sequence[Box],
    full_boxes: Sequence[Box],
) -> Declaration:
    """Return the declaration of chunks. Raises EMAEngineError if they do not fit the tensors or each other.

    Args:
        name: of the tensor, for messages.
        local_shape: shape of the local tensor.
        shape: shape of the full tensor.
        local_boxes: where each chunk lies in the local tensor.
        full_boxes: where each chunk lies in the full tensor.
    """
    # Empty chunks are left out.
    pairs = [(local, full) for local, full in zip(local_boxes, full_boxes, strict=True) if prod(local[1])]
    for local_box, full_box in pairs:
        _check_box(name, "local tensor", local_box, local_shape)
        _check_box(name, "full tensor", full_box, shape)
    if not pairs:
        if prod(local_shape):
            raise _refusal(name, f"it holds {prod(local_shape)} elements on this rank and declares none")
        return Declaration(torch.Size(shape), ())

    # Padding may surround the chunks, but may not lie between them. So the source is the smallest box of the local
    # tensor that has all chunks, and _join_chunks() refuses gaps inside of it.
    starts = tuple(min(box[0][dim] for box, _ in pairs) for dim in range(len(local_shape)))
    stops = tuple(max(box[0][dim] + box[1][dim] for box, _ in pairs) for dim in range(len(local_shape)))
    source_shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    # The chunks' places, counted from the corner of that box.
    in_source: list[tuple[Box, Box]] = []
    for (offsets, sizes), full_box in pairs:
        moved = tuple(offset - start for offset, start in zip(offsets, starts, strict=True))
        in_source.append(((moved, sizes), full_box))
    runs = _join_chunks(name, source_shape, shape, in_source)
    inside = tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
    return Declaration(torch.Size(shape), runs, None if source_shape == local_shape else inside)


def _join_chunks(
    name: str, source_shape: tuple[int, ...], shape: tuple[int, ...], chunks: Sequence[tuple[Box, Box]]
) -> Runs:
    """Return the runs of all chunks, in the row-major order of the source.

    Args:
        name: of the tensor, for messages.
        source_shape: shape of the source, which has no padding.
        shape: shape of the full tensor.
        chunks: the place of each chunk in the source, and its place in the full tensor.
    """
    if len(chunks) == 1:
        return box_runs(shape, _intervals(chunks[0][1]))
    # Cut all chunks into pieces that are contiguous both in the source and in the full tensor.
    pieces: list[tuple[int, int, int]] = []  # start in the source, start in the full tensor, length
    for local_box, full_box in chunks:
        local_runs = box_runs(source_shape, _intervals(local_box))
        pieces.extend(_common_pieces(local_runs, box_runs(shape, _intervals(full_box))))
    pieces.sort()

    # In the source the pieces have to follow each other without gap or overlap.
    position = 0
    for local_start, _, length in pieces:
        if local_start < position:
            raise _refusal(name, "its chunks overlap in the local tensor")
        if local_start > position:
            raise _refusal(name, "elements between its chunks belong to no chunk")
        position += length

    # In the full tensor they have to be in ascending order, because runs are.
    runs = [(start, length) for _, start, length in pieces]
    for (start, length), (following, _) in pairwise(runs):
        if following < start + length:
            raise _refusal(name, "its chunks overlap in the full tensor, or are in another order than there")
    return as_rows(merge(tuple(runs)))


def _common_pieces(local: Runs, full: Runs) -> Iterator[tuple[int, int, int]]:
    """Yield ``(local start, full start, length)`` of pieces that are contiguous in both lists of runs.

    Both lists have the same number of elements.

    >>> list(_common_pieces(((0, 4),), ((10, 3), (20, 1))))
    [(0, 10, 3), (3, 20, 1)]
    """
    outer = iter(full)
    # The rest of the present run of the full tensor.
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
    """Return the indices of a box along each dimension, in the form that :func:`box_runs` takes."""
    return [((offset, size),) for offset, size in zip(*box, strict=True)]


def _check_box(name: str, where: str, box: Box, shape: Sequence[int]) -> None:
    """Raise EMAEngineError unless a chunk lies inside of a tensor of ``shape``. ``where`` names that tensor."""
    offsets, sizes = box
    if len(offsets) != len(shape) or len(sizes) != len(shape):
        chunk = f"a chunk has {len(offsets)} offsets and {len(sizes)} sizes"
        raise _refusal(name, f"{chunk}, but the {where} has {len(shape)} dimensions")
    for offset, size, limit in zip(offsets, sizes, shape, strict=True):
        if offset < 0 or size < 0 or offset + size > limit:
            chunk = f"a chunk at {offsets} of size {sizes}"
            raise _refusal(name, f"{chunk} lies outside of the {where} of shape {tuple(shape)}")


def _numbers(name: str, field: str, values: Any) -> tuple[int, ...]:
    """Return a declared shape or offset as a tuple of int. Raises EMAEngineError if it holds anything else."""
    try:
        numbers = tuple(int(value) for value in values)
    except (TypeError, ValueError):
        raise _refusal(name, f"{field} holds {values!r} instead of numbers") from None
    return numbers


def _refusal(name: str, why: str) -> EMAEngineError:
    return EMAEngineError(f"{name!r} declares to be a part of a full tensor, but {why}. It cannot be averaged")
