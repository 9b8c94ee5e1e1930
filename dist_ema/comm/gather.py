"""Brings full tensors from the parts of all ranks to rank 0, or to every rank, one window at a time.

Which rank sends which elements is decided by ``catalogue.is_writer``. How a window is sent is in ``windows.py``.
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
        overwrites: so chunks stay in the processor's cache, and one comes from a device while the caller works on the
        previous one.
        """
        parts = chunks(self.runs, limit)
        values = self.values.detach()
        sizes = [min(limit, self.share.numel - low) for low in range(0, self.share.numel, limit)]
        if values.is_cuda:
            yield from zip(parts, read_ahead(sizes, dtype, partial(self.read, non_blocking=True)), strict=True)
            return
        last = self.start + self.share.numel
        lies_there = values.is_cpu and values.dtype == dtype and values.is_contiguous() and values.numel() >= last
        scratch = None if lies_there else torch.empty(max(sizes, default=0), dtype=dtype)
        low = 0
        for part, size in zip(parts, sizes, strict=True):
            if scratch is None:
                yield part, values.view(-1)[self.start + low : self.start + low + size]  # 1D
            else:
                self.read(low, low + size, scratch[:size])
                yield part, scratch[:size]
            low += size


def check_readable(held: Iterable[LocalValues]) -> None:
    """Raises EMAStateError for a tensor that is more than its elements in a row. Local.

    Quantized weights under an adapter are such tensors: their class computes as if it had the elements of the shape.
    """
    for one in held:
        if one.share.spec.hidden or not _is_readable(one.values):
            raise EMAStateError(
                f"{one.share.spec.name!r} is not averaged and is a {type(one.values).__name__}, which cannot be read "
                "by ranges of its elements: pass include_untracked=False, which leaves out what is not averaged"
            )


def _is_readable(values: Tensor) -> bool:
    if type(values) in (Tensor, nn.Parameter):  # not a sparse tensor, and none of torch's own quantized dtypes
        return values.layout == torch.strided and not values.is_quantized
    # bitsandbytes (0.49) keeps the scales of its packed weights in these attributes.
    scales = (getattr(values, name, None) for name in ("quant_state", "SCB"))
    if values.layout != torch.strided or values.is_quantized or any(scale is not None for scale in scales):
        return False
    try:
        values.untyped_storage().data_ptr()
    except RuntimeError:  # its class keeps other tensors instead of memory (torchao)
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

    A rank that fails in reading or in ``take`` goes on sending and receiving, so that no other rank waits for it. Its
    error is raised on every rank at the end.

    Args:
        entries: the tensors.
        held: returns what this rank has of the tensor of a name; None if nothing.
        dtypes: the dtype of each result, by name. Values are converted before they are sent.
        group: the ranks.
        take: called on rank 0 with a tensor, the index of the first element of a part of it, and the values of that
            part.
        operation: names the operation in errors.
        everywhere: call ``take`` on every rank.
    """
    with agreed(group, operation):  # one rank may be out of memory
        window = Window(group)
    rank = rank_in(group)
    failure = FirstFailure()
    # Neighbours that are sent, and neighbours that rank 0 has anyway, go through windows of their own; entries are the
    # same on every rank, so all of them make the same windows.
    for sent, group_of in groupby(entries, lambda entry: everywhere or not entry.only_rank_0_writes):
        alike = list(group_of)
        for parts, used in packed([entry.numel for entry in alike], [dtypes[entry.name] for entry in alike]):
            window.clear(used)  # parts are added up, so what a rank does not write has to be zero
            pieces = [
                (alike[index], start, window.part(offset, stop - start, dtypes[alike[index].name]))
                for index, start, stop, offset in parts
            ]
            filled: list[Range] = []
            with failure.kept():
                if not failure.found:
                    for (entry, start, values), (_, _, _, offset) in zip(pieces, parts, strict=True):
                        filled += _read_window(entry, held(entry.name), start, values, offset, rank)
            if sent:
                window.collect(filled, everywhere)
            with failure.kept():
                if not failure.found and (everywhere or rank == 0):
                    for entry, start, values in pieces:
                        take(entry, start, values)
    with agreed(group, operation):  # every rank has sent and received everything by now
        failure.raise_first()


def _read_window(
    entry: FullTensor, held: LocalValues | None, start: int, out: Tensor, offset: int, rank: int
) -> list[Range]:
    """Copies this rank's elements of a full tensor into a window, and returns what it filled.

    The window is ``out``, which begins at byte ``offset`` and has room for the elements from ``start`` on. Returns the
    filled ranges in bytes.
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
            for entry in entries:
                state.update(dict.fromkeys(entry.names, torch.empty(entry.shape, dtype=dtypes[entry.name])))
    gather_each(entries, held, dtypes, group, take, operation)
    return state


def in_windows(entries: Sequence[FullTensor], dtypes: Mapping[str, torch.dtype]) -> Iterator[list[FullTensor]]:
    """Yields the tensors in order, as many at a time as fit into one window; a larger tensor alone. Pure."""
    batch: list[FullTensor] = []
    used = 0
    for entry in entries:
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
    """Yields these tensors whole on every rank, with their names; tied names share one tensor. Collective."""
    with agreed(group, operation):  # one rank may be out of memory
        full = {entry.name: torch.empty(entry.shape, dtype=dtypes[entry.name], device=device) for entry in entries}

    def take(entry: FullTensor, start: int, values: Tensor) -> None:
        full[entry.name].view(-1)[start : start + values.numel()].copy_(values)

    gather_each(entries, held, dtypes, group, take, operation, everywhere=True)
    return [(name, full[entry.name]) for entry in entries for name in entry.names]
