"""Brings full tensors from the parts of all ranks to rank 0, or to every rank, one window at a time.

``catalogue.is_writer`` decides which rank sends which elements. ``windows.py`` sends a window. ``resharding.py`` brings
elements to the ranks that hold them under another sharding instead. One window of :func:`gather_each`::

    every rank     copies the elements that it writes into the window        local
                   sends the window to rank 0, or to every rank              collective
    rank 0         hands the complete parts to the caller's ``take``         local
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import kernels
from dist_ema.comm.agreement import FirstFailure, agreed
from dist_ema.comm.catalogue import FullTensor, is_writer
from dist_ema.comm.collectives import rank_in
from dist_ema.comm.windows import WINDOW_BYTES, Range, Window, packed
from dist_ema.errors import EMAStateError
from dist_ema.geometry.runs import Runs, chunks, overlap
from dist_ema.geometry.shares import Share
from dist_ema.runtime.streams import read_ahead


@dataclass(frozen=True)
class LocalValues:
    """Holds the values that this rank has of one full tensor.

    Attributes:
        share: the share that they belong to.
        values: a shadow, or a live tensor in any layout.
        start: the index in the flattened ``values`` of the first of the share's ``numel`` elements.
    """

    share: Share
    values: Tensor
    start: int

    @property
    def runs(self) -> Runs:
        """Returns where the elements lie in the full tensor."""
        return self.share.runs

    def read(self, start: int, stop: int, out: Tensor, non_blocking: bool = False) -> None:
        """Copies elements ``[start, stop)`` of the share into ``out``, 1D, and converts them. Local."""
        kernels.read(self.values, self.start + start, self.start + stop, out, non_blocking)

    def flat(self) -> Tensor:
        """Returns all elements, 1D; a view if they are contiguous. Local."""
        return self.values.detach().reshape(-1)[self.start : self.start + self.share.numel]

    def chunks(self, dtype: torch.dtype, limit: int) -> Iterator[tuple[Runs, Tensor]]:
        """Yields all elements in order, at most ``limit`` at a time, with their runs: 1D, on the CPU, in this dtype.

        A chunk is a view if nothing has to be converted or moved. Otherwise it is in a buffer, which the next chunk
        overwrites. The buffer is short, so it stays in the processor's cache. From a device the next chunk is copied
        while the caller works on the present one.
        """
        parts = chunks(self.runs, limit)
        values = self.values.detach()
        # chunks() fills every list but the last, so the values can be cut by the same sizes.
        sizes = [min(limit, self.share.numel - low) for low in range(0, self.share.numel, limit)]
        if values.is_cuda:
            yield from zip(parts, read_ahead(sizes, dtype, partial(self.read, non_blocking=True)), strict=True)
            return
        stop = self.start + self.share.numel
        is_wanted_type = values.is_cpu and values.dtype == dtype
        # A quantized or packed tensor may have fewer elements in memory than its spec says.
        is_in_a_row = values.is_contiguous() and values.numel() >= stop
        can_be_viewed = is_wanted_type and is_in_a_row
        scratch = None if can_be_viewed else torch.empty(max(sizes, default=0), dtype=dtype)
        low = 0
        for part, size in zip(parts, sizes, strict=True):
            if scratch is None:
                yield part, values.view(-1)[self.start + low : self.start + low + size]  # 1D
            else:
                self.read(low, low + size, scratch[:size])
                yield part, scratch[:size]
            low += size


def check_readable(held: Iterable[LocalValues]) -> None:
    """Raises EMAStateError for a tensor whose memory does not hold its elements in a row. Local.

    Quantized weights under an adapter are such tensors: their memory holds packed integers and scales.
    """
    for local in held:
        if local.share.spec.hidden or not _is_readable(local.values):
            raise EMAStateError(
                f"{local.share.spec.name!r} is not averaged and is a {type(local.values).__name__}, which cannot be "
                "read by ranges of its elements: pass include_untracked=False, which leaves out what is not averaged"
            )


def _is_readable(values: Tensor) -> bool:
    """Returns whether the memory of a tensor holds its elements."""
    # Sparse tensors, and those of torch's own quantized dtypes, may be plain Tensors.
    if values.layout != torch.strided or values.is_quantized:
        return False
    if type(values) in (Tensor, nn.Parameter):
        return True
    # bitsandbytes (0.49) keeps the scales of its packed weights in these attributes.
    if any(getattr(values, name, None) is not None for name in ("quant_state", "SCB")):
        return False
    # A wrapper subclass (torchao) keeps other tensors instead of memory, and torch then refuses the pointer.
    try:
        values.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def gather_each(
    entries: Sequence[FullTensor],
    held: Callable[[str], LocalValues | None],
    dtypes: Mapping[str, torch.dtype],
    group: dist.ProcessGroup | None,
    take: Callable[[FullTensor, int, Tensor], None],
    operation: str,
    everywhere: bool = False,
) -> None:
    """Brings full tensors to rank 0, or to every rank, one window at a time. Collective: one call for each 16 MiB.

    A rank whose read or ``take`` fails still sends and receives every window, so that no other rank waits for it
    forever. Its error is raised on every rank at the end.

    Args:
        entries: the tensors.
        held: returns what this rank has of the tensor of a name; None if it has nothing of it.
        dtypes: the dtype of each result, by name. Values are converted before they are sent.
        group: the ranks.
        take: ``take(entry, start, values)`` stores a part of a full tensor; called on rank 0. ``start`` is the index of
            the part's first element in the flattened tensor. The values are valid only during the call.
        operation: names the operation in errors.
        everywhere: call ``take`` on every rank.
    """
    with agreed(group, operation):  # one rank may be out of memory
        window = Window(group)
    rank = rank_in(group)
    failure = FirstFailure()
    # A window is either sent or filled by rank 0 alone, which then sends nothing. Entries that are neighbours and need
    # the same share windows. Entries are the same on every rank, so all ranks make the same windows and calls.
    for must_send, neighbours in groupby(entries, lambda entry: everywhere or not entry.only_rank_0_writes):
        batch = list(neighbours)
        for parts, used in packed([entry.numel for entry in batch], [dtypes[entry.name] for entry in batch]):
            window.clear(used)
            pieces = []  # entry, first element, values in the window, byte offset in the window
            for index, start, stop, offset in parts:
                entry = batch[index]
                pieces.append((entry, start, window.part(offset, stop - start, dtypes[entry.name]), offset))
            # 1. Every rank copies its elements into the window.
            filled: list[Range] = []
            with failure.kept():
                if not failure.found:
                    for entry, start, values, offset in pieces:
                        filled += _read_window(entry, held(entry.name), start, values, offset, rank)
            # 2. The parts are brought together, also by a rank that has failed: the others wait for it here.
            if must_send:
                window.collect(filled, everywhere)
            # 3. The receivers use them before the next window overwrites them.
            with failure.kept():
                if not failure.found and (everywhere or rank == 0):
                    for entry, start, values, _ in pieces:
                        take(entry, start, values)
    with agreed(group, operation):  # every rank has sent and received everything by now
        failure.raise_first()


def _read_window(
    entry: FullTensor, held: LocalValues | None, start: int, out: Tensor, offset: int, rank: int
) -> list[Range]:
    """Copies this rank's elements of a full tensor into a part of a window. Local.

    Args:
        entry: the full tensor.
        held: what this rank has of it; None if it has nothing of it.
        start: the first element of the full tensor that belongs into this part.
        out: the part, 1D.
        offset: the byte of the window at which the part begins.
        rank: this rank's place in the group.

    Returns:
        The ranges of the window that were filled. Elements that another rank writes are left out.
    """
    if held is None or not is_writer(entry, held.share, rank):
        return []
    size = out.element_size()
    filled = []
    for local, inside, length in overlap(held.runs, start, start + out.numel()):
        held.read(local, local + length, out[inside : inside + length])
        filled.append((offset + inside * size, length * size))
    return filled


def full_tensors(
    entries: Sequence[FullTensor],
    held: Callable[[str], LocalValues | None],
    dtype: torch.dtype | None,
    group: dist.ProcessGroup | None,
    operation: str,
) -> dict[str, Tensor]:
    """Returns full CPU tensors by name on rank 0, ``{}`` elsewhere; tied names share one tensor. Collective."""
    dtypes = {entry.name: entry.cast(dtype) for entry in entries}
    state: dict[str, Tensor] = {}

    def take(entry: FullTensor, start: int, values: Tensor) -> None:
        state[entry.name].view(-1)[start : start + values.numel()].copy_(values)

    with agreed(group, operation):  # before anything is sent: one rank may be out of memory
        if rank_in(group) == 0:
            # One tensor under each of its names, so tied names stay tied.
            for entry in entries:
                state.update(dict.fromkeys(entry.names, torch.empty(entry.shape, dtype=dtypes[entry.name])))
    gather_each(entries, held, dtypes, group, take, operation)
    return state


def in_windows(entries: Sequence[FullTensor], dtypes: Mapping[str, torch.dtype]) -> Iterator[list[FullTensor]]:
    """Yields lists of consecutive tensors that fit into one window together. Pure.

    A tensor that is larger than a window is in a list of its own.
    """
    batch: list[FullTensor] = []
    used = 0
    for entry in entries:
        # packed() begins each tensor at a multiple of 8 bytes.
        nbytes = -(-entry.numel * dtypes[entry.name].itemsize // 8) * 8
        if batch and used + nbytes > WINDOW_BYTES:
            yield batch
            batch = []
            used = 0
        batch.append(entry)
        used += nbytes
    if batch:
        yield batch


def everywhere(
    entries: Sequence[FullTensor],
    held: Callable[[str], LocalValues | None],
    dtypes: Mapping[str, torch.dtype],
    group: dist.ProcessGroup | None,
    device: torch.device,
    operation: str,
) -> list[tuple[str, Tensor]]:
    """Returns full tensors and their names on every rank; tied names share one tensor. Collective.

    Args:
        device: the device of the results.
        entries, held, dtypes, group, operation: as for :func:`gather_each`.
    """
    with agreed(group, operation):  # one rank may be out of memory
        full = {entry.name: torch.empty(entry.shape, dtype=dtypes[entry.name], device=device) for entry in entries}

    def take(entry: FullTensor, start: int, values: Tensor) -> None:
        full[entry.name].view(-1)[start : start + values.numel()].copy_(values)

    gather_each(entries, held, dtypes, group, take, operation, everywhere=True)
    return [(name, full[entry.name]) for entry in entries for name in entry.names]
