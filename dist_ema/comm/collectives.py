"""Exchanges short messages between ranks, and adds up numbers over ranks. Tensors are sent by ``windows.py``.

Each function takes ``group=None`` for a run without a process group, and is then local. A message carries a tag that
names the call it belongs to, so ranks that are in different calls get an error rather than each other's answers.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

# dist.all_gather() takes no timeout. This is the options object that it makes itself (torch 2.13).
from torch._C._distributed_c10d import AllgatherOptions

from dist_ema import errors
from dist_ema.errors import EMAStateError

T = TypeVar("T")
#: Bytes of a short message, its length included. Most messages fit, and then need one round instead of two.
_NOTE_BYTES = 256
_LENGTH_BYTES = 8
_ALIKE = "Make the same calls on every rank, in the same order, and one at a time"
#: Ranks that by_rank() lists for one value; it counts the others.
_MOST_RANKS = 4
#: Backends that send from the CPU only.
_CPU_BACKENDS = ("gloo", "mpi", "ucc", "fake")
#: Waits for one operation of a process group; raises PeerLost if it does not end in time.
Wait: TypeAlias = "Callable[[dist.Work], None]"
#: Groups that the library has made for itself. torch.distributed keeps no record of them.
own_groups: WeakSet[dist.ProcessGroup] = WeakSet()


class Tag(NamedTuple):
    """Identifies the call of a message between ranks, so that the answers of two calls are never mixed up.

    Attributes:
        call: the call that sends it, such as ``"save()"``.
        number: which object's call it is: 1 for the first ShardedEMA of these ranks. 0 where there is only one.
        digest: of the arguments, in the first message of a call; empty in the others.
    """

    call: str = ""
    number: int = 0
    digest: bytes = b""


_NO_CALL = Tag()
_current: ContextVar[Tag] = ContextVar("dist_ema call", default=_NO_CALL)


class PeerLost(EMAStateError):
    """Raised when another rank did not join a collective of torch.distributed. The group cannot be used afterwards."""


@contextmanager
def peer_errors() -> Iterator[None]:
    """Raises PeerLost in place of what calls of torch.distributed raise inside the block."""
    try:
        yield
    except errors.EMAError:
        raise
    except ValueError as error:  # torch does not know the group
        # After a failure torch looks the group's name up for its log. Our own groups have none there, and that lookup
        # raises the ValueError. The failure itself is its context.
        if isinstance(error.__context__, RuntimeError):
            raise PeerLost(f"a rank did not answer in time, or is gone: {error.__context__}") from error
        raise PeerLost(f"the process group is gone, as after destroy_process_group(): {error}") from error
    except RuntimeError as error:  # also DistBackendError, DistNetworkError, DistStoreError
        raise PeerLost(f"a rank did not answer in time, or is gone: {error}") from error


def rank_in(group: dist.ProcessGroup | None) -> int:
    """Returns this rank's place in ``group``."""
    return 0 if group is None else group.rank()


def size_of(group: dist.ProcessGroup | None) -> int:
    """Returns the number of ranks in ``group``."""
    return 1 if group is None else group.size()


def device_for(group: dist.ProcessGroup | None) -> torch.device:
    """Returns the device that ``group`` sends from: the accelerator under NCCL, XCCL and the like, else the CPU."""
    pairs = [] if group is None else [pair.split(":") for pair in _backends(group).split(",")]
    # torch lists accelerators under gloo and MPI as well, but these backends copy through the CPU.
    kinds = [device for device, backend in pairs if device != "cpu" and backend not in _CPU_BACKENDS]
    if group is None or not kinds:
        return torch.device("cpu")
    bound: torch.device | None = getattr(group, "bound_device_id", None)
    return bound or torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def _note_device(group: dist.ProcessGroup) -> torch.device:
    """Returns the device for short messages: the CPU where the group can, as the accelerator may be out of memory."""
    return torch.device("cpu") if "cpu:" in _backends(group) else device_for(group)


def _backends(group: dist.ProcessGroup) -> str:
    if group in own_groups:
        return "cpu:gloo"
    with peer_errors():
        dist.get_backend(group)  # raises ValueError for a group that is gone; the next line would raise TypeError
        return str(dist.get_backend_config(group))


@contextmanager
def tagged(call: str, number: int) -> Iterator[None]:
    """Marks all messages that this thread sends inside the block as those of one call of one object. Local."""
    token = _current.set(Tag(call, number))
    try:
        yield
    finally:
        _current.reset(token)


def gather_objects(value: T, group: dist.ProcessGroup | None, timeout: float | None = None) -> list[T]:
    """Gathers ``value`` of every rank, in the order of the ranks. Collective. For small things only: they are pickled.

    One round where all values are short; ``all_gather_object`` would first exchange their lengths. Waits for the others
    for ``timeout`` seconds; None means as long as the group waits. After a timeout the group cannot be used again.

    Raises:
        EMAStateError: on every rank, if some ranks are in another call, or in a call of another object.
    """
    if group is None:
        return [value]
    found = exchange(_current.get(), value, group, timeout)
    check_same_tags([tag for tag, _ in found])
    return [value for _, value in found]


def exchange(
    tag: Tag, value: T, group: dist.ProcessGroup, timeout: float | None = None, wait: Wait | None = None
) -> list[tuple[Tag, T]]:
    """Gathers ``value`` of every rank with the tag of each, without a check of the tags. Collective.

    ``wait`` waits for the first round; None means that this blocks until the group gives up.
    """
    # A short message is (length, text, padding), so that one round of equal sizes is enough:
    #   | 8 bytes: length | the pickled text ... | padding to 256 bytes |
    text = pickle.dumps((tuple(tag), value))
    own = (len(text).to_bytes(_LENGTH_BYTES, "little") + text)[:_NOTE_BYTES].ljust(_NOTE_BYTES)
    # The clone owns its memory. gloo's threads may read it after Python has freed the bytearray.
    note = torch.frombuffer(bytearray(own), dtype=torch.uint8).clone().to(_note_device(group))
    notes = note.new_empty(size_of(group), _NOTE_BYTES)
    with peer_errors():
        if timeout is None:
            dist.all_gather(list(notes.unbind()), note, group=group)
        else:
            options = AllgatherOptions()
            options.timeout = timedelta(seconds=timeout)
            work = group.allgather([list(notes.unbind())], [note], options)
            if wait is None:
                work.wait(options.timeout)
            else:
                wait(work)
    messages = [row.tobytes() for row in notes.cpu().numpy()]
    lengths = [_LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "little") for message in messages]
    found: list[Any]
    if max(lengths) <= _NOTE_BYTES:
        whole = zip(messages, lengths, strict=True)
        found = [pickle.loads(message[_LENGTH_BYTES:length]) for message, length in whole]
    else:
        # One message did not fit. All ranks see its length, so all of them repeat the exchange at full length.
        found = [None] * size_of(group)
        with peer_errors():
            dist.all_gather_object(found, (tuple(tag), value), group=group)
    return [(Tag(*fields), received) for fields, received in found]


def check_same_tags(tags: Sequence[Tag]) -> None:
    """Raises EMAStateError if ranks are in different calls, or in calls of different objects. Local."""
    check_same_calls(tags)
    if len({tag.number for tag in tags}) > 1:
        objects = by_rank([f"number {tag.number}" for tag in tags])
        raise EMAStateError(
            f"{tags[0].call}: ranks make it on different objects: {objects}, in the order in which each rank has made "
            f"its ShardedEMA objects of these options. {_ALIKE}"
        )


def check_same_calls(tags: Sequence[Tag]) -> None:
    """Raises EMAStateError if ranks are in different calls, or at different moments of one call. Local."""
    if len({tag.call for tag in tags}) > 1:
        raise EMAStateError(f"ranks make different calls: {by_rank([tag.call or 'none' for tag in tags])}. {_ALIKE}")
    if len({bool(tag.digest) for tag in tags}) > 1:
        moments = by_rank(["the beginning" if tag.digest else "a later moment" for tag in tags])
        raise EMAStateError(f"{tags[0].call}: ranks are at different moments of it: {moments}. {_ALIKE}")


def by_rank(values: Sequence[str]) -> str:
    """Lists values with the ranks that have them, on one line for any number of ranks. Local.

    >>> by_rank(["a", "b", "b"])
    'a on rank 0, b on ranks 1, 2'
    """
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    shown = []
    for value, holders in ranks.items():
        listed = ", ".join(map(str, holders[:_MOST_RANKS]))
        if len(holders) > _MOST_RANKS:
            listed += f" and {len(holders) - _MOST_RANKS} more"
        shown.append(f"{value} on rank{'s' if len(holders) > 1 else ''} {listed}")
    return ", ".join(shown)


def broadcast_object(value: T, group: dist.ProcessGroup | None, owner: int = 0) -> T:
    """Returns the ``value`` of rank ``owner``. Collective. For small things only: it is pickled."""
    if group is None:
        return value
    values = [value]
    with peer_errors():
        dist.broadcast_object_list(values, group=group, group_src=owner)
    return values[0]


def sum_integers(values: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    """Returns the element-wise sum over the ranks, modulo 2**64, as unsigned integers. Collective."""
    if group is None:
        return [value % (1 << 64) for value in values]
    # all_reduce adds int64 and wraps around, as two's complement does: the same bits as unsigned sums modulo 2**64.
    unsigned = [value % (1 << 64) for value in values]
    signed = [value - (1 << 64) if value >> 63 else value for value in unsigned]
    tensor = torch.tensor(signed, dtype=torch.int64, device=device_for(group))
    with peer_errors():
        dist.all_reduce(tensor, group=group)
    return [value % (1 << 64) for value in tensor.tolist()]


def sum_floats(values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Returns the element-wise sum over the ranks in float64. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device_for(group))
    if group is not None:
        with peer_errors():
            dist.all_reduce(tensor, group=group)
    return [float(value) for value in tensor.tolist()]


def sum_tensor(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the element-wise sum over the ranks, on the CPU, in the dtype of ``values``. Collective."""
    tensor = values.to(device_for(group))
    if group is not None:
        with peer_errors():
            dist.all_reduce(tensor, group=group)
    return tensor.cpu()
