"""Makes an error on one rank an error on every rank, before any rank waits for one that has failed.

``agreed`` is the one tool for this. Ranks work alone inside the block; at its end they exchange a short message:

```
rank 0   work ......... ok ─┐                       ┌─ goes on, or raises "rank 1: OSError: ..."
rank 1   work .. OSError   ─┼─ one gather of notes ─┼─ raises the same
rank 2   work ......... ok ─┘                       └─ raises the same
```

Given a :class:`Call`, it also compares the calls, so ranks that make different calls raise instead of waiting for each
other. Every collective call of the library begins with such a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.distributed as dist

from dist_ema import errors
from dist_ema.comm.collectives import PeerLost, Tag, by_rank, check_same_calls, check_same_tags, gather_objects
from dist_ema.errors import CheckpointError, EMAError, EMAStateError

#: Gathers one ``(tag, value)`` from every rank, in the order of the ranks.
Gather: TypeAlias = "Callable[[tuple[Tag, Any]], list[tuple[Tag, Any]]]"
#: The class and the text of the exception of one rank; None if it raised none.
_Failure: TypeAlias = "tuple[str, str] | None"


@dataclass(frozen=True)
class Call:
    """Describes a collective call of the library as one rank makes it.

    Ranks that make different calls would wait for each other, or mix what they send into one result.

    Attributes:
        name: the method, such as ``"export()"``.
        facts: arguments and options that have to be the same on every rank: name to value, both as text.
        operation: how errors name the call; may differ between ranks, as a path may. Empty means ``name``.
        number: which object's call it is, as in :class:`~dist_ema.comm.collectives.Tag`.
    """

    name: str
    facts: Mapping[str, str]
    operation: str = ""
    number: int = 0

    def __str__(self) -> str:
        return self.operation or self.name

    @property
    def tag(self) -> Tag:
        """Returns the tag of the first message of this call. Its digest is equal for equal names and facts."""
        text = repr((self.name, list(self.facts.items())))
        return Tag(self.name, self.number, hashlib.blake2b(text.encode(), digest_size=8).digest())


class Round:
    """Holds what ranks send each other at the end of one :func:`agreed` block.

    Attributes:
        received: after the block, what each rank sent, in the order of the ranks; None for a rank that sent nothing.
    """

    def __init__(self) -> None:
        self.received: list[Any] = []
        self._sent: Any = None

    def send(self, value: object) -> None:
        """Sets the value that all ranks receive at the end of the block. It is pickled, so keep it small."""
        self._sent = value


@contextmanager
def agreed(group: dist.ProcessGroup | None, operation: str | Call, gather: Gather | None = None) -> Iterator[Round]:
    """Lets each rank work alone inside the block. At its end all ranks go on, or all raise what failed on any rank.

    Collective at the end of the block: one round if the messages are short. The block must not make a collective call
    that other ranks would wait in if this rank fails before it. Anything that is not an ``Exception``, such as
    KeyboardInterrupt, leaves the block at once; the other ranks then wait until the group times out.

    Args:
        group: the ranks that take part; None for a single process.
        operation: names the operation in errors. A :class:`Call` also has to be the same call on every rank.
        gather: gathers the messages of a call in place of ``group``.

    Raises:
        EMAStateError: on every rank, if ranks make different calls, or one call with different arguments.
        EMAError: on every rank, if any rank raised. The class is that of the first failure if it belongs to this
            library, else CheckpointError. The text names the ranks that failed.

    >>> with agreed(None, "adding") as round_:
    ...     round_.send(1 + 1)
    >>> round_.received
    [2]
    """
    round_ = Round()
    failure: Exception | None = None
    try:
        yield round_
    except Exception as error:  # kept until the other ranks know of it
        failure = error
    own = (round_._sent, _describe(failure))
    if isinstance(operation, Call) and gather is not None:
        answers = _gather_for_call(operation, own, gather, failure)
    else:
        answers = gather_objects(own, group)
    _raise_failures([text for _, text in answers], failure, str(operation))
    round_.received = [sent for sent, _ in answers]


def _gather_for_call(call: Call, own: Any, gather: Gather, failure: Exception | None) -> list[Any]:
    """Gathers ``own`` of every rank, and raises EMAStateError on every rank unless all make the same call."""
    found = gather((call.tag, own))
    tags = [tag for tag, _ in found]
    try:
        check_same_calls(tags)
        if len({tag.digest for tag in tags}) > 1:
            # Only ranks that differ spend a second round, in which each learns in what they differ.
            facts = [facts for _, facts in gather((call.tag, dict(call.facts)))]
            raise EMAStateError(f"{_difference(facts)}. Make the same call on every rank")
        check_same_tags(tags)
    except EMAStateError as error:
        raise EMAStateError(f"{call} on this rank: {error}") from failure
    return [value for _, value in found]


def _difference(facts: Sequence[Mapping[str, str]]) -> str:
    """Says in which arguments and options the calls of the ranks differ."""
    names = list(dict.fromkeys(name for found in facts for name in found))
    details = []
    for name in names:
        values = [found.get(name, "not given") for found in facts]
        if len(set(values)) > 1:
            details.append(f"{name}={by_rank(values)}")
    return "ranks differ in " + ("; ".join(details) or "the order of their options")


def _describe(failure: Exception | None) -> _Failure:
    return None if failure is None else (type(failure).__name__, str(failure))


def _raise_failures(found: Sequence[_Failure], own: Exception | None, operation: str) -> None:
    """Raises one error for the failures of all ranks, if there are any.

    Args:
        found: the failure of each rank, in the order of the ranks.
        own: the exception of this rank, which becomes the cause.
        operation: names the operation in the error.
    """
    failed = {rank: failure for rank, failure in enumerate(found) if failure is not None}
    if not failed:
        return
    if own is not None and len(found) == 1 and isinstance(own, EMAError):
        raise own  # a single process needs no list of ranks
    first_class, _ = next(iter(failed.values()))
    kind = getattr(errors, first_class, None)
    if not (isinstance(kind, type) and issubclass(kind, EMAError)):
        kind = CheckpointError
    details = "; ".join(f"rank {rank}: {name}: {text}" for rank, (name, text) in failed.items())
    raise kind(f"{operation} failed: {details}") from own


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
        """Keeps an error that is raised inside the block, unless an earlier one is kept already."""
        try:
            yield
        except Exception as error:
            self._error = self._error or error

    def raise_first(self) -> None:
        """Raises the error that was kept, if there is one."""
        if self._error is not None:
            raise self._error


@contextmanager
def named_operation(operation: str, timeout: float | None = None) -> Iterator[None]:
    """Names the operation in the error of a collective that another rank did not join; also a decorator.

    Args:
        operation: the public call, such as ``"save()"``.
        timeout: seconds that the operation waits for other ranks; None means as long as the process group waits.

    Raises:
        EMAStateError: in place of PeerLost, without a ``timeout``.
        CheckpointError: with a ``timeout``, in place of PeerLost and of any other RuntimeError of torch.distributed.
    """
    try:
        yield
    except RuntimeError as error:
        # EMAStateError is a RuntimeError too: this library's own errors pass, except PeerLost.
        lost = isinstance(error, PeerLost)
        if not lost and (timeout is None or isinstance(error, EMAError)):
            raise
        if timeout is None:
            raise EMAStateError(f"{operation} failed: {error}") from error
        raise CheckpointError(
            f"{operation} failed: a rank did not answer within {timeout:g} s, or is gone: {error}"
        ) from error


def check_same_updates(found: Sequence[int]) -> None:
    """Raises EMAStateError unless all ranks have made the same number of updates. Local.

    Args:
        found: the number of updates of each rank, in the order of the ranks.
    """
    if len(set(found)) > 1:
        raise EMAStateError(
            f"the number of updates differs between ranks: {', '.join(map(str, found))}. Call update() on every "
            "rank with the same counts (samples, tokens and epochs are those of all ranks together). Ranks with fewer "
            "batches make fewer steps under DDP.join(): stop all of them together, with "
            "throw_on_early_termination=True. To go on now, load() a checkpoint or reset() the average"
        )


def check_same_clocks(found: Sequence[Mapping[str, float]]) -> None:
    """Raises EMAStateError unless all ranks have counted the same training progress. Local.

    Args:
        found: the progress of each rank by unit, such as ``{"ba": 10}``, in the order of the ranks.
    """
    for unit in found[0]:
        readings = [f"{reading.get(unit)}{unit}" for reading in found]
        if len(set(readings)) > 1:
            raise EMAStateError(
                f"training progress differs between ranks: {by_rank(readings)}. Call update() on every rank with the "
                "same counts (samples, tokens and epochs are those of all ranks together)"
            )
