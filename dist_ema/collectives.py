"""The few collective calls of the library, with bounded memory and with errors that reach every rank.

Everything takes ``group=None`` for a run without a process group, and is then local.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema import errors
from dist_ema.errors import EMAStateError

T = TypeVar("T")
#: Bytes of one message, and of the scratch that each rank holds for it.
WINDOW_BYTES = 16 << 20
#: Bytes of a short message, its length included: most that ranks tell each other fits.
_NOTE_BYTES = 256
_LENGTH_BYTES = 8


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This rank's place in ``group``."""
    return 0 if group is None else dist.get_rank(group)


def size_of(group: dist.ProcessGroup | None) -> int:
    """Ranks in ``group``."""
    return 1 if group is None else dist.get_world_size(group)


def device_for(group: dist.ProcessGroup | None) -> torch.device:
    """Where a tensor must lie to be sent through ``group``: the accelerator under NCCL, else the CPU."""
    if group is not None and "nccl" in str(dist.get_backend_config(group)):
        return getattr(group, "bound_device_id", None) or torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _note_device(group: dist.ProcessGroup) -> torch.device:
    """The CPU where the group can, so that a rank may tell that its accelerator has no memory left."""
    return torch.device("cpu") if "cpu:" in str(dist.get_backend_config(group)) else device_for(group)


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """``value`` of every rank, in the order of the ranks. Collective. For small things only: they are pickled.

    One round where all values are short; ``all_gather_object`` would first exchange their lengths.
    """
    if group is None:
        return [value]
    text = pickle.dumps(value)
    own = (len(text).to_bytes(_LENGTH_BYTES, "little") + text)[:_NOTE_BYTES].ljust(_NOTE_BYTES)
    note = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(_note_device(group))
    notes = note.new_empty(size_of(group), _NOTE_BYTES)
    dist.all_gather(list(notes.unbind()), note, group=group)
    messages = [row.tobytes() for row in notes.cpu().numpy()]
    lengths = [_LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "little") for message in messages]
    if max(lengths) <= _NOTE_BYTES:
        whole = zip(messages, lengths, strict=True)
        return [pickle.loads(message[_LENGTH_BYTES:length]) for message, length in whole]
    values: list[T | None] = [None] * size_of(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def broadcast_object(value: T, group: dist.ProcessGroup | None) -> T:
    """Rank 0's ``value``. Collective. For small things only: it is pickled."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def agree(action: Callable[[], T], group: dist.ProcessGroup | None, doing: str) -> T:
    """Runs ``action`` on every rank; if it raised anywhere, raises everywhere. Collective.

    The error has the class of the first failure where that is one of this library's, else it is a CheckpointError, and
    names the ranks that failed.
    """
    results: list[T] = []
    exchange(lambda: results.append(action()), group, doing)
    return results[0]


def exchange(action: Callable[[], T], group: dist.ProcessGroup | None, doing: str) -> list[T]:
    """As :func:`agree`, and gives what ``action`` returned on every rank, in the order of the ranks. For small things.

    Collective, in one round where what is returned is short.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    found = gather_objects((result, None if failure is None else (type(failure).__name__, str(failure))), group)
    failed = {rank: what for rank, (_, what) in enumerate(found) if what is not None}
    if not failed:
        return [result for result, _ in found]  # type: ignore[misc]
    if failure is not None and size_of(group) == 1 and isinstance(failure, errors.EMAError):
        raise failure
    first_class, _ = next(iter(failed.values()))
    kind = getattr(errors, first_class, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.EMAError)):
        kind = errors.CheckpointError
    details = "; ".join(f"rank {rank}: {name}: {text}" for rank, (name, text) in failed.items())
    raise kind(f"{doing} failed: {details}") from failure


@contextmanager
def answering(doing: str, timeout: float) -> Iterator[None]:
    """Turns the error of a collective call that a rank did not join in time into one that says so."""
    try:
        yield
    except errors.EMAError:
        raise
    except RuntimeError as error:  # what torch.distributed raises; the group is of no use afterwards
        raise errors.CheckpointError(
            f"{doing} failed: a rank did not answer within {timeout:g} s, or is gone: {error}"
        ) from error


def check_same_updates(found: Sequence[int]) -> None:
    """Raises EMAStateError unless all ranks have averaged equally often. Local; ``found`` is what each rank says."""
    if len(set(found)) > 1:
        raise EMAStateError(
            f"ranks have averaged different numbers of times: {', '.join(map(str, found))}. Call update() on every "
            "rank with the same counts (samples, tokens and epochs are those of all ranks together)"
        )


def sum_integers(values: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    """Element-wise sum over the ranks, modulo 2**64, as unsigned integers. Collective."""
    if group is None:
        return [value % (1 << 64) for value in values]
    signed = [value - (1 << 64) if value >> 63 else value for value in (value % (1 << 64) for value in values)]
    tensor = torch.tensor(signed, dtype=torch.int64, device=device_for(group))
    dist.all_reduce(tensor, group=group)
    return [value % (1 << 64) for value in tensor.tolist()]


def sum_floats(values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Element-wise sum over the ranks in float64. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device_for(group))
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return [float(value) for value in tensor.tolist()]


class Window:
    """A buffer that the ranks fill in parts, no two the same bytes, and that rank 0 then has whole.

    The parts are added up as integers: a byte that one rank wrote and the others left at zero arrives unchanged, be it
    of a NaN or of a negative zero, and nobody has to know who holds what.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._words = torch.zeros(WINDOW_BYTES // 8, dtype=torch.int64, device=device_for(group))

    def clear(self, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` elements of zero bits, at most ``capacity(dtype)``, to be filled in place."""
        self._used = -(-count * dtype.itemsize // 8)
        self._words[: self._used].zero_()
        return self._words.view(torch.uint8)[: count * dtype.itemsize].view(dtype)

    @staticmethod
    def capacity(dtype: torch.dtype) -> int:
        """Elements that fit."""
        return WINDOW_BYTES // dtype.itemsize

    def collect(self) -> None:
        """Brings the parts together on rank 0. Collective; elsewhere the contents are undefined afterwards."""
        if self._group is not None and size_of(self._group) > 1 and self._used:
            dist.reduce(self._words[: self._used], group=self._group, group_dst=0)


@torch.no_grad()
def broadcast_flat(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    owner: int,
    group: dist.ProcessGroup,
    read: Callable[[int, int, int, Tensor], None],
    write: Callable[[int, int, int, Tensor], None],
) -> None:
    """Sends flat tensors from rank ``owner`` of ``group`` to its other ranks, packed into windows. Collective.

    Args:
        sizes: elements of each tensor, the same on all ranks.
        dtypes: dtype of each.
        owner: who sends, by its place in the group.
        read: ``read(index, start, stop, out)`` puts elements of tensor ``index`` into ``out``; called on the owner.
        write: ``write(index, start, stop, values)`` takes them; called on the others.
    """
    device = device_for(group)
    buffer = torch.empty(WINDOW_BYTES // 8, dtype=torch.int64, device=device).view(torch.uint8)
    mine = rank_in(group) == owner
    for parts, used in _packed(sizes, dtypes):
        views = [
            (index, start, stop, buffer[offset : offset + (stop - start) * dtypes[index].itemsize].view(dtypes[index]))
            for index, start, stop, offset in parts
        ]
        if mine:
            for index, start, stop, view in views:
                read(index, start, stop, view)
        dist.broadcast(buffer[:used], group=group, group_src=owner)
        if not mine:
            for index, start, stop, view in views:
                write(index, start, stop, view)


def _packed(sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[tuple[list[tuple[int, int, int, int]], int]]:
    """Windows of ``(index, start, stop, byte offset)``, each offset a multiple of 8, and the bytes used."""
    windows: list[tuple[list[tuple[int, int, int, int]], int]] = []
    parts: list[tuple[int, int, int, int]] = []
    used = 0
    for index, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True)):
        start = 0
        while start < size:
            stop = min(size, start + (WINDOW_BYTES - used) // dtype.itemsize)
            if stop > start:
                parts.append((index, start, stop, used))
                used = -(-(used + (stop - start) * dtype.itemsize) // 8) * 8
                start = stop
            if WINDOW_BYTES - used < 8:
                windows.append((parts, used))
                parts, used = [], 0
    if parts:
        windows.append((parts, used))
    return windows
