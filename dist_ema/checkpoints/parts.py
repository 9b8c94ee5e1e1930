"""Reads one rank's part of a checkpoint: its own elements by ranges, or what rank 0 reads and sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoints.reader import RunReader
from dist_ema.comm.agreement import FirstFailure, agreed
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.collectives import device_for, peer_errors, rank_in
from dist_ema.comm.windows import WINDOW_BYTES, packed
from dist_ema.formats.dtypes import DTYPES, WIDEST
from dist_ema.formats.manifest import Key, Manifest
from dist_ema.formats.stored import StoredTensor
from dist_ema.geometry.runs import Runs, chunks, count, overlap
from dist_ema.geometry.shares import Share
from dist_ema.kernels.fingerprint import partial_digest
from dist_ema.runtime.streams import Handover, Relay
from dist_ema.runtime.threads import work_through
from dist_ema.storage.paths import StrPath

#: Number of elements that are read, digested and converted at a time.
IO_CHUNK = 1 << 19


@dataclass(frozen=True)
class Part:
    """Describes what this rank reads of one stored tensor.

    Attributes:
        key: the tensor's folder and name in the checkpoint.
        stored: its entry in the manifest.
        entry: the tensor of the model.
        share: what this rank averages of it; None on a rank that does not hold the tensor.
        out: the memory to read into, 1D; None if the elements are read only to be verified.
    """

    key: Key
    stored: StoredTensor
    entry: FullTensor
    share: Share | None
    out: Tensor | None

    @property
    def runs(self) -> Runs:
        """Returns the runs of these elements in the full tensor."""
        return self.share.runs if self.share is not None else ()

    def __str__(self) -> str:
        return f"{self.stored.file}: {self.key[1]!r}"


def read_own(path: StrPath, manifest: Manifest, parts: Sequence[Part], verify: bool) -> list[int]:
    """Reads this rank's elements, with as many threads as torch has. Local.

    Returns:
        For each part the sum for its fingerprint; 0 unless ``verify`` is set.
    """
    own = threading.local()  # one buffer for each thread; two pinned ones if they are copied to a device
    sums = [0] * len(parts)
    lock = threading.Lock()

    def take(piece: _Piece) -> None:
        """Reads one piece: through pinned memory to a device, directly into place, or converted from a buffer."""
        number, part, runs, low = piece
        numel = count(runs)
        dtype = reader.dtype(part.key)
        out = part.out[low : low + numel] if part.out is not None else None
        if out is not None and out.is_cuda:
            with handover.taken():  # ordered with the work of the caller's stream on the shadow
                if not hasattr(own, "relay"):
                    own.relay = Relay(IO_CHUNK * WIDEST)
                values = own.relay.buffer(numel, dtype)
                reader.read(part.key, runs, values)
                out.copy_(values, non_blocking=True)
                own.relay.asked()
        elif out is not None and out.dtype == dtype:  # directly into its place
            values = out
            reader.read(part.key, runs, values)
        else:
            if not hasattr(own, "bytes"):
                own.bytes = torch.empty(IO_CHUNK * WIDEST, dtype=torch.uint8)
            values = own.bytes[: numel * dtype.itemsize].view(dtype)
            reader.read(part.key, runs, values)
            if out is not None:
                out.copy_(values)
        if verify:
            digest = partial_digest(values, runs)
            with lock:
                sums[number] += digest

    handover = Handover(part.out for part in parts if part.out is not None)
    with RunReader.of(path, manifest) as reader:
        try:
            work_through(_pieces(parts), take, torch.get_num_threads(), "dist_ema load")
        finally:  # before the files are closed, and the buffers are reused
            handover.join()
    return sums


#: The index of a part, the part, some of its runs, and the number of its elements before these runs.
_Piece = tuple[int, Part, Runs, int]


def _pieces(parts: Sequence[Part]) -> Iterator[_Piece]:
    """Yields the parts in pieces of at most :data:`IO_CHUNK` elements, lazily."""
    for number, part in enumerate(parts):
        low = 0
        for runs in chunks(part.runs, IO_CHUNK):
            yield number, part, runs, low
            low += count(runs)


def read_sent(
    path: StrPath,
    manifest: Manifest,
    parts: Sequence[Part],
    verify: bool,
    group: dist.ProcessGroup | None,
    operation: str,
) -> list[int]:
    """Reads all elements on rank 0, which sends them, window by window. Collective; returns what :func:`read_own`
    returns.

    A rank that fails goes on sending and receiving, so that no other rank waits for it.
    """
    with agreed(group, operation):
        opened = RunReader.of(path, manifest) if rank_in(group) == 0 else nullcontext()
        buffer = torch.empty(WINDOW_BYTES, dtype=torch.uint8)  # here, because one rank may be out of memory
    failure = FirstFailure()
    dtypes = [DTYPES[part.stored.dtype] for part in parts]
    sums = [0] * len(parts)
    filled = [0] * len(parts)  # number of elements that this rank has taken of each part
    with opened as reader:
        for pieces, used in packed([part.entry.numel for part in parts], dtypes):
            views = [
                (index, start, buffer[offset : offset + (stop - start) * dtypes[index].itemsize].view(dtypes[index]))
                for index, start, stop, offset in pieces
            ]
            with failure.kept():
                if reader is not None and not failure.found:
                    for index, start, window in views:
                        reader.read(parts[index].key, ((start, window.numel()),), window)
            _broadcast_bytes(buffer[:used], group)  # meaningless after a failure, but the other ranks wait for it
            with failure.kept():
                for index, start, window in views:
                    part = parts[index]
                    for _, inside, length in overlap(part.runs, start, start + window.numel()):
                        values = window[inside : inside + length]
                        low = filled[index]
                        sums[index] += partial_digest(values, ((start + inside, length),)) if verify else 0
                        if part.out is not None:
                            part.out[low : low + length].copy_(values)
                        filled[index] = low + length
    with agreed(group, operation):
        failure.raise_first()
    return sums


def _broadcast_bytes(values: Tensor, group: dist.ProcessGroup | None) -> None:
    """Sends bytes from rank 0 to every rank. Collective."""
    sent = values.to(device_for(group))  # NCCL sends from the accelerator only
    with peer_errors():
        dist.broadcast(sent, group=group, group_src=0)
    values.copy_(sent)
