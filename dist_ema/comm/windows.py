"""Sends tensors between ranks in windows of bounded size, so the number of collective calls depends on the bytes only.

Thousands of small tensors are packed into one window, and a large tensor is cut into several::

    tensors    | a | b |        c        | d |
    windows    [ a b c c c ][ c c c c c ][ c d ]

:func:`packed` makes this layout. It depends only on sizes and dtypes, which all ranks know, so all ranks make the same
collective calls. ``Window`` brings parts from all ranks together, ``broadcast_flat`` sends from one rank to all, and
``all_gather_flat`` from all ranks to all. What is sent is decided in ``gather.py`` and by the callers of the two
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.comm.collectives import device_for, peer_errors, rank_in, size_of

#: Bytes of one window, which each rank allocates.
WINDOW_BYTES = 16 << 20
#: On the CPU, ranks send their parts to rank 0 one by one if a window has at least this many bytes. Smaller windows
#: are reduced, which takes one call instead of several messages.
_SENT_FROM = 1 << 20
#: They do so only up to this many ranges on all ranks together. A message has 16 bytes beside each range, so for the
#: short ranges of a matrix's columns a reduction is cheaper.
_SENT_RANGES = 1 << 12
#: Bytes of a header entry of a message: offset and length of a range, two int64.
_RANGE_BYTES = 16
#: A range of a window: offset and length in bytes.
Range = tuple[int, int]
#: A range of a tensor's elements and its place in a window: tensor, start, stop, byte offset.
Placed: TypeAlias = tuple[int, int, int, int]
#: Bytes of the widest element, complex128.
_WIDEST = 16
#: Called with the index of a tensor, ``start`` and ``stop`` of a range of its elements, and a 1D tensor of these.
Access: TypeAlias = "Callable[[int, int, int, Tensor], None]"


class Window:
    """Holds a buffer that each rank fills in part, and brings the parts together on rank 0 or on every rank.

    ::

                 rank 0         rank 1         after collect(), on rank 0
        window   [ a a 0 0 ]    [ 0 0 b b ]    [ a a b b ]

    No two ranks fill the same bytes, and no rank has to know which rank fills which bytes. There are two ways to bring
    the parts together:

    * On accelerators, and if every rank wants the result, the windows are summed as integers. A byte that one rank
      wrote and all others left at zero arrives unchanged, even if it belongs to a NaN or a negative zero.
    * On the CPU (gloo) each rank sends its parts to rank 0. 16 MiB took 8 ms with 8 processes on 2 cores, where a
      reduction took 36 ms; with 2 processes 4 ms and 14 ms.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        # One buffer, seen as int64 for sums and as bytes for parts of any dtype.
        self._words = torch.zeros(WINDOW_BYTES // 8, dtype=torch.int64, device=device_for(group))
        self._bytes = self._words.view(torch.uint8)

    def clear(self, nbytes: int) -> None:
        """Sets the first ``nbytes`` of the window, at most ``WINDOW_BYTES``, to zero. Local."""
        # A sum leaves a part unchanged only if all other ranks have zeros there.
        self._used = -(-nbytes // 8)
        self._words[: self._used].zero_()

    def part(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """Returns a part of the window to fill or to read: a 1D view of ``count`` elements. Local.

        Args:
            offset: the first byte, a multiple of 8.
            count: the number of elements.
            dtype: their dtype.
        """
        return self._bytes[offset : offset + count * dtype.itemsize].view(dtype)

    def collect(self, filled: Sequence[Range], everywhere: bool = False) -> None:
        """Brings the parts together on rank 0, or on every rank. Collective.

        Afterwards the window is undefined on ranks that do not get the result.

        Args:
            filled: the ranges that this rank has filled, in rising order.
            everywhere: bring the parts together on every rank.
        """
        if self._group is None or size_of(self._group) == 1 or not self._used:
            return
        words = self._words[: self._used]
        with peer_errors():
            if everywhere:
                dist.all_reduce(words, group=self._group)
            elif self._words.is_cpu and self._used * 8 >= _SENT_FROM:
                self._send(_merged(filled))
            else:
                dist.reduce(words, group=self._group, group_dst=0)

    def _send(self, filled: Sequence[Range]) -> None:
        """Sends the filled ranges of each rank to rank 0, or reduces the windows if there are too many ranges.

        Args:
            filled: the ranges that this rank has filled; no two of them touch.
        """
        # Every rank learns how many ranges and bytes each rank sends. All of them therefore take the same way below,
        # and rank 0 knows how long each message is.
        mine = torch.tensor([len(filled), sum(length for _, length in filled)])
        counts = torch.empty(size_of(self._group), 2, dtype=torch.int64)  # a row for each rank: ranges, bytes
        dist.all_gather(list(counts.unbind()), mine, group=self._group)
        if int(counts[:, 0].sum()) > _SENT_RANGES:
            dist.reduce(self._words[: self._used], group=self._group, group_dst=0)
        elif rank_in(self._group) == 0:
            self._receive(counts.tolist())
        elif filled:
            dist.send(self._message(filled), group=self._group, group_dst=0)

    def _receive(self, counts: Sequence[Sequence[int]]) -> None:
        """Receives the messages of all other ranks, and writes their ranges into the window. Called on rank 0.

        Args:
            counts: for each rank the number of its ranges and of their bytes. A rank without ranges sends no message.
        """
        # All receives start before the first one is waited for, so that a slow rank does not delay the others.
        pending = []
        for sender, (ranges, nbytes) in enumerate(counts):
            if sender == 0 or ranges == 0:
                continue
            message = torch.empty(_RANGE_BYTES * ranges + nbytes, dtype=torch.uint8)
            work = dist.irecv(message, group=self._group, group_src=sender)
            pending.append((work, message, ranges))
        for work, message, ranges in pending:
            if work is not None:
                work.wait()
            self._unpack(message, ranges)

    def _message(self, filled: Sequence[Range]) -> Tensor:
        """Returns the ranges, as pairs of int64, followed by their bytes. 1D, uint8."""
        header = torch.tensor(filled).view(torch.uint8).view(-1)
        return torch.cat([header, *(self._bytes[offset : offset + length] for offset, length in filled)])

    def _unpack(self, message: Tensor, ranges: int) -> None:
        """Copies the bytes of a message into the ranges of the window that its header names."""
        position = _RANGE_BYTES * ranges
        for offset, length in message[:position].view(torch.int64).view(ranges, 2).tolist():
            self._bytes[offset : offset + length] = message[position : position + length]
            position += length


def _merged(ranges: Sequence[Range]) -> list[Range]:
    """Joins ranges that touch, and leaves out empty ones. The ranges are in rising order."""
    merged: list[Range] = []
    for offset, length in ranges:
        last_offset, last_length = merged[-1] if merged else (0, 0)
        if merged and last_offset + last_length == offset:
            merged[-1] = (last_offset, last_length + length)
        elif length:
            merged.append((offset, length))
    return merged


@torch.no_grad()
def broadcast_flat(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    owner: int,
    group: dist.ProcessGroup,
    read: Access,
    write: Access,
) -> None:
    """Sends 1D tensors from rank ``owner`` of ``group`` to its other ranks, packed into windows. Collective.

    Args:
        sizes: number of elements of each tensor, the same on all ranks.
        dtypes: dtype of each tensor.
        owner: the sender's place in the group.
        read: ``read(index, start, stop, out)`` copies elements of tensor ``index`` into ``out``; called on the owner.
        write: ``write(index, start, stop, values)`` stores them; called on the other ranks.
    """
    device = device_for(group)
    # Allocated as int64: the buffer is then aligned for views of any dtype.
    buffer = torch.empty(WINDOW_BYTES // 8, dtype=torch.int64, device=device).view(torch.uint8)
    is_owner = rank_in(group) == owner
    for parts, used in packed(sizes, dtypes):
        if is_owner:
            for index, start, stop, offset in parts:
                read(index, start, stop, _view(buffer, offset, stop - start, dtypes[index]))
        with peer_errors():
            dist.broadcast(buffer[:used], group=group, group_src=owner)
        if not is_owner:
            for index, start, stop, offset in parts:
                write(index, start, stop, _view(buffer, offset, stop - start, dtypes[index]))


@torch.no_grad()
def all_gather_flat(
    parts: Sequence[Sequence[tuple[int, int, int]]],
    dtypes: Sequence[torch.dtype],
    group: dist.ProcessGroup,
    read: Access,
    write: Access,
) -> None:
    """Sends each rank's part of 1D tensors to all other ranks of ``group``. Collective, one call for each window.

    A window has one slot for each rank, all of the same size, because ``all_gather`` wants the same size from every
    rank. A rank whose part needs fewer windows than the largest part sends undefined bytes, which no rank reads::

        rank 0 sends 5, rank 1 sends 2        window 0              window 1
        received by every rank                [ 0 0 0 | 1 1 . ]     [ 0 0 | . . ]

    Args:
        parts: for each rank the ranges ``(index, start, stop)`` that it sends; the same on all ranks.
        dtypes: dtype of each tensor.
        group: the ranks.
        read: ``read(index, start, stop, out)`` copies elements of tensor ``index`` into ``out``; called for own ranges.
        write: ``write(index, start, stop, values)`` stores them; called for the ranges of other ranks.
    """
    device = device_for(group)
    rank = rank_in(group)
    ranks = size_of(group)
    # A multiple of the widest element, and room for at least one.
    slot_bytes = max(WINDOW_BYTES // ranks // _WIDEST * _WIDEST, _WIDEST)
    sent = torch.empty(slot_bytes, dtype=torch.uint8, device=device)
    received = torch.empty(slot_bytes * ranks, dtype=torch.uint8, device=device)
    windows_of_ranks = [_windows_of(ranges, dtypes, slot_bytes) for ranges in parts]
    for number in range(max(map(len, windows_of_ranks))):
        # For each rank the parts in its slot of this window, and the bytes that they take.
        slots = [windows[number] if number < len(windows) else ([], 0) for windows in windows_of_ranks]
        # The largest part decides. Rounding up to the widest element aligns every slot for any dtype.
        used = -(-max(nbytes for _, nbytes in slots) // _WIDEST) * _WIDEST
        own_parts, _ = slots[rank]
        for index, start, stop, offset in own_parts:
            read(index, start, stop, _view(sent, offset, stop - start, dtypes[index]))
        with peer_errors():
            dist.all_gather(list(received[: used * ranks].view(ranks, used).unbind()), sent[:used], group=group)
        for sender, (sent_parts, _) in enumerate(slots):
            if sender == rank:
                continue
            for index, start, stop, offset in sent_parts:
                write(index, start, stop, _view(received, sender * used + offset, stop - start, dtypes[index]))


def _windows_of(
    ranges: Sequence[tuple[int, int, int]], dtypes: Sequence[torch.dtype], limit: int
) -> list[tuple[list[Placed], int]]:
    """Packs ranges ``(index, start, stop)`` of tensors as :func:`packed` packs whole tensors.

    Indices and elements in the result are those of the tensors.
    """
    sizes = [stop - start for _, start, stop in ranges]
    windows = []
    for parts, used in packed(sizes, [dtypes[index] for index, _, _ in ranges], limit):
        placed = []
        for number, start, stop, offset in parts:
            index, first, _ = ranges[number]
            # packed() counts from the start of the range, and the result from the start of the tensor.
            placed.append((index, first + start, first + stop, offset))
        windows.append((placed, used))
    return windows


def _view(buffer: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """Returns ``count`` elements of a buffer of bytes, from byte ``offset`` on: a 1D view."""
    return buffer[offset : offset + count * dtype.itemsize].view(dtype)


def packed(
    sizes: Sequence[int], dtypes: Sequence[torch.dtype], limit: int | None = None
) -> list[tuple[list[Placed], int]]:
    """Lays 1D tensors out in windows, in order. Pure.

    Args:
        sizes: number of elements of each tensor.
        dtypes: dtype of each tensor.
        limit: bytes of a window; None means ``WINDOW_BYTES``.

    Returns:
        For each window its parts ``(index, start, stop, byte offset)``, with offsets that are multiples of 8 and of the
        dtype's size; and the bytes used.

    >>> packed([3, 5], [torch.float32, torch.float64])
    [([(0, 0, 3, 0), (1, 0, 5, 16)], 56)]
    """
    limit = WINDOW_BYTES if limit is None else limit
    windows: list[tuple[list[Placed], int]] = []
    parts: list[Placed] = []
    used = 0
    for index, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True)):
        start = 0
        while start < size:
            # The part begins at the next multiple of its element size, and has what the rest of the window can hold.
            offset = -(-used // dtype.itemsize) * dtype.itemsize
            stop = min(size, start + (limit - offset) // dtype.itemsize)
            if stop > start:
                parts.append((index, start, stop, offset))
                # The next part begins at a multiple of 8, so that a window can be summed as int64.
                used = -(-(offset + (stop - start) * dtype.itemsize) // 8) * 8
                start = stop
            is_full = start < size or limit - used < 8
            if is_full:
                windows.append((parts, used))
                parts = []
                used = 0
    if parts:
        windows.append((parts, used))
    return windows
