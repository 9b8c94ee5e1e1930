"""Gives a ``ShardedEMA`` the process groups that it needs beside the group in which the model trains.

All objects on the same ranks share two process groups: one for calls of the user's threads, and one for the library's
own threads, which save in the background. Each group serves one call at a time::

    user's threads    metrics() | save(block=False): makes the files | export() | update() ...
    own threads                   in the order of the calls: save of object 1 | snapshot of object 2 | ...

Closing an object leaves nothing behind. The groups end with the process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any
from weakref import ref

import torch.distributed as dist

from dist_ema.comm.channels import Channel
from dist_ema.comm.collectives import Tag, rank_in
from dist_ema.errors import EMAStateError

#: Assumed disk bandwidth of each rank in bytes per second. It extends the timeout, so that a slow write is no hang.
_SLOW_DISK = 50e6
#: Seconds that a call without a timeout of its own waits for a rank.
_PATIENCE = 1800.0


class _Team:
    """Holds what all objects on the same ranks share.

    Attributes:
        front: the channel for calls of the user's threads.
        back: the channel for the library's threads.
        line: the order in which these threads use ``back``.
    """

    def __init__(self, world: dist.ProcessGroup, ranks: tuple[int, ...], rank: int) -> None:
        self._world = ref(world)
        self.front = Channel("calls", self._store, ranks, rank)
        self.back = Channel("background", self._store, ranks, rank)
        self.line = Line()
        self._counts: dict[str, int] = {}

    def number(self, kind: str) -> int:
        """Returns the number of the next object of one kind. It is the same on all ranks that make their objects in one
        order.
        """
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return self._counts[kind]

    @property
    def is_gone(self) -> bool:
        """Returns whether the program has destroyed the process groups in which this was made."""
        return not dist.is_initialized() or dist.group.WORLD is not self._world()

    def _store(self) -> dist.Store:
        world = self._world()
        if world is None:
            raise EMAStateError("the process group is gone")
        return world.get_group_store()

    def close(self) -> None:
        self.front.close()
        self.back.close()


#: The teams of this process, by the global ranks.
_teams: dict[tuple[int, ...], _Team] = {}


def _team_of(group: dist.ProcessGroup) -> _Team:
    world = dist.group.WORLD
    if world is None:
        raise EMAStateError("there is no process group any more")
    for ranks in [ranks for ranks, team in _teams.items() if team.is_gone]:
        del _teams[ranks]  # its threads end when the last reference is dropped
    ranks = tuple(dist.get_process_group_ranks(group))
    if ranks not in _teams:
        _teams[ranks] = _Team(world, ranks, rank_in(group))
    return _teams[ranks]


class Line:
    """Lets threads take turns in the order in which their work was requested. Local."""

    def __init__(self) -> None:
        self._places: deque[object] = deque()
        self._moved = Condition()

    def join(self, place: object) -> None:
        """Adds ``place`` at the end."""
        with self._moved:
            self._places.append(place)

    def wait(self, place: object) -> None:
        """Waits until ``place`` is the first."""
        with self._moved:
            self._moved.wait_for(lambda: self._places[0] is place)

    def leave(self, place: object) -> None:
        """Removes ``place``, if it is in the line."""
        with self._moved:
            if place in self._places:
                self._places.remove(place)
                self._moved.notify_all()


class Turn:
    """Holds the place of one background call in the line: a context manager that waits for its turn and gives the
    group.

    It is in the line from construction on. A caller that does not enter it has to call :meth:`leave`.
    """

    def __init__(self, groups: OwnGroups, call: str, timeout: float) -> None:
        self._groups = groups
        self._call = call
        self._timeout = timeout
        self._team = groups.team()
        self._stack: Any = None
        if self._team is not None:
            self._team.line.join(self)

    def __enter__(self) -> dist.ProcessGroup | None:
        if self._team is None:
            return None
        self._team.line.wait(self)
        back = self._team.back
        self._stack = back.turn(self._call, self._groups.number)
        self._stack.__enter__()
        try:
            return back.group(self._call, self._timeout)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(self, *error: Any) -> None:
        stack, self._stack = self._stack, None
        try:
            if stack is not None:
                stack.__exit__(*error)
        finally:
            self.leave()

    def leave(self) -> None:
        """Gives up the place in the line. Local."""
        if self._team is not None:
            self._team.line.leave(self)


class OwnGroups:
    """Holds the process groups that one :class:`ShardedEMA` uses beside the one that trains.

    Args:
        group: the ranks that hold the model; None for a single process.
        kind: objects with equal options have the same kind, and are told apart by their numbers.

    Attributes:
        number: the number of this object among those of its kind.
    """

    def __init__(self, group: dist.ProcessGroup | None, kind: str) -> None:
        self.group = group
        self._team = None if group is None else _team_of(group)
        self.number = 0 if self._team is None else self._team.number(kind)
        self.place = (0, 1) if group is None else (group.rank(), group.size())

    @property
    def is_gone(self) -> bool:
        """Returns whether the program has destroyed the process group in which the average was made. Local."""
        return self._team is not None and self._team.is_gone

    def check(self, call: str) -> None:
        """Raises EMAStateError if the process group is gone. Local."""
        if self.is_gone:
            raise EMAStateError(
                f"{call}: the process group that the average was made in is gone, as after destroy_process_group(). If "
                "there is a new one of the same ranks, wrap the model again and call rebind(model), which goes on with "
                "this average (without group= and into=). Otherwise make a new ShardedEMA and load() a checkpoint"
            )

    def check_same_place(self, before: OwnGroups, call: str) -> None:
        """Raises EMAStateError if this process had another rank, or other peers, ``before``. Local."""
        if before.group is not None and self.place != before.place:
            (rank, size), (old_rank, old_size) = self.place, before.place
            raise EMAStateError(
                f"{call}: this process is rank {rank} of {size} in the new process group, and was rank {old_rank} of "
                f"{old_size} when the average was made, of which each rank holds a part. Make a new ShardedEMA and "
                "load() a checkpoint"
            )

    def team(self) -> _Team | None:
        """Returns what the objects on these ranks share; None for a single process."""
        return self._team

    @contextmanager
    def turn(self, call: str) -> Iterator[None]:
        """Makes one collective call of the user's thread; calls of other threads wait. Local.

        Raises EMAStateError if the process group is gone.
        """
        if self._team is None:
            yield
            return
        self.check(call)
        with self._team.front.turn(call, self.number):
            yield

    def gather(self, message: tuple[Tag, Any], timeout: float | None) -> list[Any]:
        """Gathers ``(tag, value)`` of every rank, at the beginning of a call. Collective."""
        if self._team is None:
            return [message]
        return self._team.front.gather(*message, _PATIENCE if timeout is None else timeout)

    def files(self, call: str, timeout: float, nbytes: int) -> dist.ProcessGroup | None:
        """Returns a group on the CPU for a call in which each rank writes or reads ``nbytes``, during that call's turn.

        Its timeout is ``timeout`` seconds plus the time that the disk takes, so a rank that hangs is noticed. In the
        group that trains, NCCL's watchdog would end the job after 10 minutes of a slow disk.
        """
        return None if self._team is None else self._team.front.group(call, timeout + nbytes / _SLOW_DISK)

    def line_up(self, call: str, timeout: float, nbytes: int) -> Turn:
        """Returns a turn for one of the library's threads, after all that were requested before. Local."""
        return Turn(self, call, timeout + nbytes / _SLOW_DISK)
