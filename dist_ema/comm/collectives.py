"""The few collective calls of the library, with bounded memory and with errors that reach every rank.

Everything takes ``group=None`` for a run without a process group, and is then local.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

# What dist.all_gather() fills in itself, without a timeout (torch 2.13).
from torch._C._distributed_c10d import AllgatherOptions

from dist_ema import errors
from dist_ema.errors import EMAStateError

T = TypeVar("T")
#: Bytes of a short message, its length included: most that ranks tell each other fits.
_NOTE_BYTES = 256
_LENGTH_BYTES = 8
_OF_THE_CPU = ("gloo", "mpi", "ucc", "fake")
#: Waits for one operation of a process group; raises PeerLost if it does not end in time.
Wait: TypeAlias = "Callable[[dist.Work], None]"
#: Gathers one value from every rank, in the order of the ranks.
Gather: TypeAlias = "Callable[[Any], list[Any]]"
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
    """Another rank did not take part in what torch.distributed was asked for; the group is of no use afterwards."""


@contextmanager
def answered() -> Iterator[None]:
    """Around calls of torch.distributed: what they raise becomes PeerLost."""
    try:
        yield
    except errors.EMAError:
        raise
    except ValueError as error:  # of a group that it does not know
        # torch logs a failure by the name of its group. Groups of our own have none there, which hides the failure.
        if isinstance(error.__context__, RuntimeError):
            raise PeerLost(f"a rank did not answer in time, or is gone: {error.__context__}") from error
        raise PeerLost(f"the process group is gone, as after destroy_process_group(): {error}") from error
    except RuntimeError as error:  # also DistBackendError, DistNetworkError, DistStoreError
        raise PeerLost(f"a rank did not answer in time, or is gone: {error}") from error


def rank_in(group: dist.ProcessGroup | None) -> int:
    """Returns this rank's place in ``group``."""
    return 0 if group is None else group.rank()


def size_of(group: dist.ProcessGroup | None) -> int:
    """Returns the ranks in ``group``."""
    return 1 if group is None else group.size()


def device_for(group: dist.ProcessGroup | None) -> torch.device:
    """Returns where a tensor must lie to be sent through ``group``: on the accelerator under NCCL, XCCL and their like,
    else on the CPU.
    """
    pairs = [] if group is None else [pair.split(":") for pair in _backends(group).split(",")]
    # Under gloo and MPI alone torch lists accelerators as well, which they reach through the CPU.
    kinds = [device for device, backend in pairs if device != "cpu" and backend not in _OF_THE_CPU]
    if group is None or not kinds:
        return torch.device("cpu")
    bound: torch.device | None = getattr(group, "bound_device_id", None)
    return bound or torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def _note_device(group: dist.ProcessGroup) -> torch.device:
    """Returns the CPU where the group can, so that a rank may tell that its accelerator has no memory left."""
    return torch.device("cpu") if "cpu:" in _backends(group) else device_for(group)


def _backends(group: dist.ProcessGroup) -> str:
    if group in own_groups:
        return "cpu:gloo"
    with answered():
        dist.get_backend(group)  # raises ValueError for a group that is gone, where the next raises TypeError
        return str(dist.get_backend_config(group))


@contextmanager
def speaking(call: str, number: int) -> Iterator[None]:
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
    text = pickle.dumps((tuple(tag), value))
    own = (len(text).to_bytes(_LENGTH_BYTES, "little") + text)[:_NOTE_BYTES].ljust(_NOTE_BYTES)
    # The clone lies in memory of torch's own: gloo's threads may use it after Python has freed the bytes.
    note = torch.frombuffer(bytearray(own), dtype=torch.uint8).clone().to(_note_device(group))
    notes = note.new_empty(size_of(group), _NOTE_BYTES)
    with answered():
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
        found = [None] * size_of(group)
        with answered():
            dist.all_gather_object(found, (tuple(tag), value), group=group)
    return [(Tag(*told), received) for told, received in found]


def check_same_tags(tags: Sequence[Tag]) -> None:
    """Raises EMAStateError if ranks are in different calls, or in calls of different objects. Local."""
    _check_same_calls(tags)
    if len({tag.number for tag in tags}) > 1:
        objects = by_rank([f"number {tag.number}" for tag in tags])
        raise EMAStateError(
            f"{tags[0].call}: ranks make it on different objects: {objects}, in the order in which each rank has made "
            f"its ShardedEMA objects of these options. {_ALIKE}"
        )


def _check_same_calls(tags: Sequence[Tag]) -> None:
    if len({tag.call for tag in tags}) > 1:
        raise EMAStateError(f"ranks make different calls: {by_rank([tag.call or 'none' for tag in tags])}. {_ALIKE}")
    if len({bool(tag.digest) for tag in tags}) > 1:
        moments = by_rank(["the beginning" if tag.digest else "a later moment" for tag in tags])
        raise EMAStateError(f"{tags[0].call}: ranks are at different moments of it: {moments}. {_ALIKE}")


_ALIKE = "Make the same calls on every rank, in the same order, and one at a time"


def broadcast_object(value: T, group: dist.ProcessGroup | None, owner: int = 0) -> T:
    """Returns the ``value`` of rank ``owner``. Collective. For small things only: it is pickled."""
    if group is None:
        return value
    values = [value]
    with answered():
        dist.broadcast_object_list(values, group=group, group_src=owner)
    return values[0]


class Round:
    """Holds what ranks send each other at the end of one :func:`agreed` or :func:`same_call` block.

    Attributes:
        received: after the block, what each rank sent, in the order of the ranks; None for one that sent nothing.
    """

    def __init__(self) -> None:
        self._sent: Any = None
        self.received: list[Any] = []

    def send(self, value: object) -> None:
        """Inside the block: what the others are told. A small thing: it is pickled, and short ones cost no round."""
        self._sent = value


@contextmanager
def agreed(group: dist.ProcessGroup | None, operation: str) -> Iterator[Round]:
    """Lets each rank work alone inside the block. At its end all ranks go on, or all raise what failed on any.

    Collective at the end of the block, in one round where what is sent is short. The block must make no collective call
    that another rank would miss when it fails. What is no ``Exception``, such as KeyboardInterrupt, leaves at once: the
    other ranks then wait until the group gives up.

    Args:
        group: the ranks; None for one process.
        operation: for the error.

    Raises:
        EMAError: of the class of the first failure where that is one of this library's, else a CheckpointError; it
            names the ranks that failed.

    >>> with agreed(None, "adding") as round_:
    ...     round_.send(1 + 1)
    >>> round_.received
    [2]
    """
    round_ = Round()
    failure: Exception | None = None
    try:
        yield round_
    except Exception as error:  # the other ranks wait to be told
        failure = error
    found = gather_objects((round_._sent, _told(failure)), group)
    _raise_failures([told for _, told in found], failure, operation)
    round_.received = [sent for sent, _ in found]


class FirstFailure:
    """Keeps the first error of a rank that must go on sending and receiving, until an ``agreed`` block may raise it.

    >>> failure = FirstFailure()
    >>> with failure.kept():
    ...     raise OSError("a bad block")
    >>> failure.found
    True
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    @property
    def found(self) -> bool:
        """Returns whether there was an error."""
        return self._error is not None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps what is raised inside the block, unless there was an error before."""
        try:
            yield
        except Exception as error:
            self._error = self._error or error

    def raise_first(self) -> None:
        """Raises the error, if there was one."""
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class Call:
    """A collective call of the library as one rank makes it.

    Ranks that make different calls would wait for each other, or mix what they send into one result.

    Attributes:
        name: the method, such as ``"export()"``.
        facts: arguments and options that have to be the same on every rank, by name, in words.
        operation: for errors; may differ from rank to rank, as a path may. Empty means ``name``.
        number: which object's call it is, as :class:`Tag` has it.
    """

    name: str
    facts: Mapping[str, str]
    operation: str = ""
    number: int = 0

    def __str__(self) -> str:
        return self.operation or self.name

    @property
    def digest(self) -> bytes:
        """Returns 8 bytes that are equal for equal calls."""
        return hashlib.blake2b(repr((self.name, list(self.facts.items()))).encode(), digest_size=8).digest()


@contextmanager
def same_call(call: Call, gather: Gather) -> Iterator[Round]:
    """Agrees as :func:`agreed`, and raises EMAStateError on every rank unless all make the same ``call``. Collective.

    Every collective call of the library begins with this, among all ranks of the model, so that also a ``metrics()``
    and a ``save()`` meet here. In one round where what is sent is short; only ranks that differ tell each other how.

    Args:
        call: the call of this rank.
        gather: brings ``(tag, value)`` of every rank to every rank.
    """
    round_ = Round()
    failure: Exception | None = None
    try:
        yield round_
    except Exception as error:
        failure = error
    tag = Tag(call.name, call.number, call.digest)
    found = gather((tag, (round_._sent, _told(failure))))
    tags = [tag for tag, _ in found]
    try:
        _check_same_calls(tags)
        if len({tag.digest for tag in tags}) > 1:
            facts = [facts for _, facts in gather((tag, dict(call.facts)))]
            raise EMAStateError(f"{_difference(facts)}. Make the same call on every rank")
        check_same_tags(tags)
    except EMAStateError as error:
        raise EMAStateError(f"{call} on this rank: {error}") from failure
    answers = [answer for _, answer in found]
    _raise_failures([told for _, told in answers], failure, str(call))
    round_.received = [sent for sent, _ in answers]


def _difference(facts: Sequence[Mapping[str, str]]) -> str:
    """Says in which arguments and options the calls of the ranks differ."""
    keys = list(dict.fromkeys(key for found in facts for key in found))
    differing = [key for key in keys if len({found.get(key) for found in facts}) > 1]
    details = [f"{key}={by_rank([found.get(key, 'not given') for found in facts])}" for key in differing]
    return "ranks differ in " + ("; ".join(details) or "the order of their options")


def by_rank(values: Sequence[str]) -> str:
    """``"a on rank 0, b on ranks 1, 2"``, for any number of ranks on one line."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    shown = []
    for value, where in ranks.items():
        listed = ", ".join(map(str, where[:4])) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
        shown.append(f"{value} on rank{'s' if len(where) > 1 else ''} {listed}")
    return ", ".join(shown)


def _told(failure: Exception | None) -> tuple[str, str] | None:
    return None if failure is None else (type(failure).__name__, str(failure))


def _raise_failures(found: Sequence[tuple[str, str] | None], own: Exception | None, operation: str) -> None:
    """Raises what failed on any rank, if anything did. ``found`` is what each rank told, ``own`` is this rank's."""
    failed = {rank: what for rank, what in enumerate(found) if what is not None}
    if not failed:
        return
    if own is not None and len(found) == 1 and isinstance(own, errors.EMAError):
        raise own
    first_class, _ = next(iter(failed.values()))
    kind = getattr(errors, first_class, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.EMAError)):
        kind = errors.CheckpointError
    details = "; ".join(f"rank {rank}: {name}: {text}" for rank, (name, text) in failed.items())
    raise kind(f"{operation} failed: {details}") from own


@contextmanager
def answering(operation: str, timeout: float | None = None) -> Iterator[None]:
    """Names the call in the error of a collective that a rank did not join; also a decorator.

    EMAStateError; with a ``timeout`` CheckpointError, which says how long was waited, and which anything becomes that
    torch.distributed raises.
    """
    try:
        yield
    except RuntimeError as error:  # EMAStateError is one too
        lost = isinstance(error, PeerLost)
        if not lost and (timeout is None or isinstance(error, errors.EMAError)):
            raise
        if timeout is None:
            raise EMAStateError(f"{operation} failed: {error}") from error
        raise errors.CheckpointError(
            f"{operation} failed: a rank did not answer within {timeout:g} s, or is gone: {error}"
        ) from error


def check_same_updates(found: Sequence[int]) -> None:
    """Raises EMAStateError unless all ranks have averaged equally often. Local; ``found`` is what each rank says."""
    if len(set(found)) > 1:
        raise EMAStateError(
            f"the number of updates differs between ranks: {', '.join(map(str, found))}. Call update() on every "
            "rank with the same counts (samples, tokens and epochs are those of all ranks together). Ranks with fewer "
            "batches make fewer steps under DDP.join(): stop all of them together, with "
            "throw_on_early_termination=True. To go on now, load() a checkpoint or reset() the average"
        )


def check_same_clocks(found: Sequence[Mapping[str, float]]) -> None:
    """Raises EMAStateError unless all ranks have counted the same training. Local; ``found`` is what each rank says,
    by unit."""
    for unit in found[0]:
        readings = [f"{reading.get(unit)}{unit}" for reading in found]
        if len(set(readings)) > 1:
            raise EMAStateError(
                f"training progress differs between ranks: {by_rank(readings)}. Call update() on every rank with the "
                "same counts (samples, tokens and epochs are those of all ranks together)"
            )


def sum_integers(values: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    """Returns the element-wise sum over the ranks, modulo 2**64, as unsigned integers. Collective."""
    if group is None:
        return [value % (1 << 64) for value in values]
    signed = [value - (1 << 64) if value >> 63 else value for value in (value % (1 << 64) for value in values)]
    tensor = torch.tensor(signed, dtype=torch.int64, device=device_for(group))
    with answered():
        dist.all_reduce(tensor, group=group)
    return [value % (1 << 64) for value in tensor.tolist()]


def sum_floats(values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Returns the element-wise sum over the ranks in float64. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device_for(group))
    if group is not None:
        with answered():
            dist.all_reduce(tensor, group=group)
    return [float(value) for value in tensor.tolist()]


def sum_tensor(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the element-wise sum over the ranks, on the CPU, in the dtype of ``values``. Collective."""
    tensor = values.to(device_for(group))
    if group is not None:
        with answered():
            dist.all_reduce(tensor, group=group)
    return tensor.cpu()
