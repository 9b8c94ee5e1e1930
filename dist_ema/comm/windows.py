"""Sends tensors between ranks in windows of bounded size, so the number of collective calls depends on the bytes only.

Thousands of small tensors are packed into one window, and a large tensor is cut into several::

    tensors    | a | b |        c        | d |
    windows    [ a b c c c ][ c c c c c ][ c d ]

Each function takes ``group=None`` for a run without a process group, and is then local.
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
#: Bytes and places from and up to which the ranks send rank 0 what they have, each for itself; else all is added up.
_SENT_FROM = 1 << 20
_SENT_PLACES = 1 << 12
Range = tuple[int, int]
#: A range of a tensor's elements and its place in a window: tensor, start, stop, byte offset.
Placed: TypeAlias = tuple[int, int, int, int]
#: Bytes of the widest element, complex128.
_WIDEST = 16
#: Called with the index of a tensor, ``start`` and ``stop`` of a range of its elements, and a 1D tensor of these.
Access: TypeAlias = "Callable[[int, int, int, Tensor], None]"


class Window:
    """Holds a buffer that the ranks fill in parts, no two of them the same bytes, and that rank 0 then has complete.

    No rank has to know which rank fills what. On accelerators, and if every rank wants the result, the parts are added
    up
    as integers: a byte that one rank wrote and the others left at zero arrives unchanged, also of a NaN or a negative
    zero. On the CPU (gloo) each rank sends rank 0 its parts instead: 16 MiB of 8 processes on 2 cores took 8 ms instead
    of 36 (2
    processes: 4 instead of 14).
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._words = torch.zeros(WINDOW_BYTES // 8, dtype=torch.int64, device=device_for(group))
        self._bytes = self._words.view(torch.uint8)

    def clear(self, nbytes: int) -> None:
        """Sets the first ``nbytes`` to zero, at most ``WINDOW_BYTES``: those that the ranks will fill."""
        self._used = -(-nbytes // 8)
        self._words[: self._used].zero_()

    def part(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """Returns a 1D view of ``count`` elements from byte ``offset`` on, a multiple of 8, to be filled or read in
        place.
        """
        return self._bytes[offset : offset + count * dtype.itemsize].view(dtype)

    def collect(self, filled: Sequence[Range], everywhere: bool = False) -> None:
        """Brings the parts together on rank 0, or on every rank. Collective. Contents on the other ranks are undefined
        then.

        Args:
            filled: ``(offset, length)`` in bytes of what this rank has filled, in rising order.
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
        """Sends rank 0 what each rank has filled, with its places; or adds all up if there are too many places."""
        rank = rank_in(self._group)
        ranks = size_of(self._group)
        mine = torch.tensor([len(filled), sum(length for _, length in filled)])
        told = torch.empty(ranks, 2, dtype=torch.int64)
        dist.all_gather(list(told.unbind()), mine, group=self._group)
        if int(told[:, 0].sum()) > _SENT_PLACES:  # columns of a matrix
            dist.reduce(self._words[: self._used], group=self._group, group_dst=0)
        elif rank:
            if filled:
                dist.send(self._message(filled), group=self._group, group_dst=0)
        else:
            senders = [(sender, *map(int, told[sender])) for sender in range(1, ranks) if told[sender, 0]]
            messages = [torch.empty(16 * places + size, dtype=torch.uint8) for _, places, size in senders]
            waiting = [
                dist.irecv(message, group=self._group, group_src=sender)
                for (sender, _, _), message in zip(senders, messages, strict=True)
            ]
            for work, (_, places, _), message in zip(waiting, senders, messages, strict=True):
                if work is not None:
                    work.wait()
                self._take(message, places)

    def _message(self, filled: Sequence[Range]) -> Tensor:
        """Returns the places, as pairs of int64, and the bytes there. 1D, uint8."""
        places = torch.tensor(filled).view(torch.uint8).view(-1)
        return torch.cat([places, *(self._bytes[offset : offset + length] for offset, length in filled)])

    def _take(self, message: Tensor, places: int) -> None:
        """Puts the bytes of a message where they belong."""
        position = 16 * places
        for offset, length in message[:position].view(torch.int64).view(places, 2).tolist():
            self._bytes[offset : offset + length] = message[position : position + length]
            position += length


def _merged(ranges: Sequence[Range]) -> list[Range]:
    """Joins ranges that touch."""
    merged: list[Range] = []
    for offset, length in ranges:
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
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
    buffer = torch.empty(WINDOW_BYTES // 8, dtype=torch.int64, device=device).view(torch.uint8)
    mine = rank_in(group) == owner
    for parts, used in packed(sizes, dtypes):
        if mine:
            for index, start, stop, offset in parts:
                read(index, start, stop, _view(buffer, offset, stop - start, dtypes[index]))
        with peer_errors():
            dist.broadcast(buffer[:used], group=group, group_src=owner)
        if not mine:
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

    A window has one slot for each rank, all of the same size, so that all ranks make the same number of calls.

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
    slot_bytes = max(WINDOW_BYTES // ranks // _WIDEST * _WIDEST, _WIDEST)
    sent = torch.empty(slot_bytes, dtype=torch.uint8, device=device)
    received = torch.empty(slot_bytes * ranks, dtype=torch.uint8, device=device)
    of_ranks = [_windows_of(ranges, dtypes, slot_bytes) for ranges in parts]
    for number in range(max(map(len, of_ranks))):
        now = [windows[number] if number < len(windows) else ([], 0) for windows in of_ranks]
        # The largest part decides. Rounding up to the widest element aligns every slot for any dtype.
        used = -(-max(nbytes for _, nbytes in now) // _WIDEST) * _WIDEST
        for index, start, stop, offset in now[rank][0]:
            read(index, start, stop, _view(sent, offset, stop - start, dtypes[index]))
        with peer_errors():
            dist.all_gather(list(received[: used * ranks].view(ranks, used).unbind()), sent[:used], group=group)
        for sender, (ranges, _) in enumerate(now):
            for index, start, stop, offset in ranges if sender != rank else ():
                write(index, start, stop, _view(received, sender * used + offset, stop - start, dtypes[index]))


def _windows_of(
    ranges: Sequence[tuple[int, int, int]], dtypes: Sequence[torch.dtype], limit: int
) -> list[tuple[list[Placed], int]]:
    """Packs ranges of tensors as :func:`packed` does. The parts are ``(index, start, stop, byte offset)`` of these
    tensors.
    """
    sizes = [stop - start for _, start, stop in ranges]
    windows = []
    for parts, used in packed(sizes, [dtypes[index] for index, _, _ in ranges], limit):
        placed = []
        for number, start, stop, offset in parts:
            index, first, _ = ranges[number]
            placed.append((index, first + start, first + stop, offset))
        windows.append((placed, used))
    return windows


def _view(buffer: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    return buffer[offset : offset + count * dtype.itemsize].view(dtype)


def packed(
    sizes: Sequence[int], dtypes: Sequence[torch.dtype], limit: int | None = None
) -> list[tuple[list[Placed], int]]:
    """Lays 1D tensors out in windows.

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
            offset = -(-used // dtype.itemsize) * dtype.itemsize
            stop = min(size, start + (limit - offset) // dtype.itemsize)
            if stop > start:
                parts.append((index, start, stop, offset))
                used = -(-(offset + (stop - start) * dtype.itemsize) // 8) * 8
                start = stop
            if start < size or limit - used < 8:
                windows.append((parts, used))
                parts = []
                used = 0
    if parts:
        windows.append((parts, used))
    return windows
