"""Makes process groups on the CPU for the library's own calls, one call at a time in each.

They are made from the store of the job, without ``torch.distributed.new_group()``. That function numbers the groups of
a process, so it would hang if ranks are in different numbers of groups, and it waits without a message for a missing
rank. Private methods of torch are used here as they are in torch 2.9 to 2.13.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import RLock
from time import monotonic, sleep
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist

from dist_ema.comm.attendance import ARRIVAL, Attendance
from dist_ema.comm.collectives import PeerLost, Tag, exchange, own_groups, peer_errors, tagged

T = TypeVar("T")
_READY = "ready"
#: Seconds that each rank has to connect once all ranks are there; less if the call may not wait that long.
_CONNECT = 60.0
#: Seconds that gloo may take longer than its timeout to report it.
_MARGIN = 5.0
_all: WeakSet[Channel] = WeakSet()


class Channel:
    """Holds one gloo group, which is made at first use, and made anew after a failure.

    Args:
        name: the same on all ranks, and different from the names of other channels.
        store: returns the store of the job.
        ranks: the global ranks of the group.
        rank: the place of this rank among them.

    Keys in the store::

        0, 1, 2, ...     where each rank waits, if it has waited long (Attendance)
        <generation>/    how many ranks have come to make the group, and the addresses of gloo
    """

    def __init__(self, name: str, store: Callable[[], dist.Store], ranks: Sequence[int], rank: int) -> None:
        self._name = name
        self._make_store = store
        self._ranks = ranks
        self._rank = rank
        self._lock = RLock()
        self._group: dist.ProcessGroup | None = None
        self._backend: Any = None
        self._generation = 1
        self._round = 0
        self._pending: dist.Work | None = None  # the number of the last round that was begun
        self._process = os.getpid()
        _all.add(self)

    @contextmanager
    def turn(self, call: str, number: int) -> Iterator[None]:
        """Makes one call of one object: other threads wait until the block is left. Local.

        If a rank is lost, or a signal interrupts the block, the group is given up, because other ranks may still wait
        in it. Any other exception is known to all ranks, or comes at a moment when no rank communicates.
        """
        with self._lock, tagged(call, number):
            try:
                yield
            except BaseException as error:
                if isinstance(error, PeerLost) or not isinstance(error, Exception):
                    self.drop()
                raise

    def group(self, call: str, timeout: float) -> dist.ProcessGroup:
        """Returns the process group, whose operations wait for ``timeout`` seconds from now on. Collective if it has to
        be made.
        """
        if self._group is None:
            self._group = self._make(call, timeout)
        self._backend._set_default_timeout(timedelta(seconds=timeout))
        return self._group

    def gather(self, tag: Tag, value: T, timeout: float) -> list[tuple[Tag, T]]:
        """Gathers ``value`` of every rank with its tag; logs after some seconds which ranks are missing. Collective."""
        group = self.group(tag.call, timeout)
        self._round += 1
        return exchange(tag, value, group, timeout, lambda work: self._wait(work, tag.call, timeout))

    def _wait(self, work: dist.Work, call: str, timeout: float) -> None:
        """Waits for the other ranks in a round. Raises its failure; PeerLost, naming the missing ranks, after
        ``timeout``.
        """
        self._pending = work
        attendance = self._attendance()
        place = (self._generation, self._round)
        begin = monotonic()
        for seconds in attendance.waits(call, place, timeout + _MARGIN):
            try:
                work.wait(timedelta(seconds=seconds))
                return
            except RuntimeError:  # it is not complete yet, or it has failed
                if not work.is_completed():
                    continue
                if monotonic() - begin >= timeout:
                    break
                work.wait()  # raises what failed
                return
        raise PeerLost(attendance.missed(call, place, timeout))

    def drop(self) -> None:
        """Gives the group up; the next call makes another one. Local. Ranks that still use this one get an error."""
        if self._group is None:
            return
        if self._pending is not None and not self._pending.is_completed():
            self._keep_for_ever()  # a signal interrupted the round
        self._group = self._backend = self._pending = None
        self._generation += 1
        self._round = 0

    def _keep_for_ever(self) -> None:
        """Keeps a group from being destroyed after a round that no rank answers: destroying it would wait for its
        threads.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))

    def close(self) -> None:
        """Ends the threads and connections of the group. Local. No rank may be in a call."""
        if os.getpid() != self._process:  # a forked child has no such threads
            self._keep_for_ever()
        self.drop()

    def _attendance(self) -> Attendance:
        return Attendance(self._store(), self._ranks, self._rank)

    def _store(self) -> dist.Store:
        return dist.PrefixStore(f"dist_ema/{self._name}/{_digest(self._ranks)}", self._make_store())

    def _make(self, call: str, timeout: float) -> dist.ProcessGroup:
        """Waits until all ranks are there, then connects them. Collective."""
        store = dist.PrefixStore(str(self._generation), self._store())
        with peer_errors():
            self._assemble(store, call, timeout)
        # A rank may die now. gloo notices that only by this time, and may wait several times as long.
        connect = timedelta(seconds=min(timeout, _CONNECT))
        try:
            with peer_errors():
                backend = dist.ProcessGroupGloo(store, self._rank, len(self._ranks), connect)
        except PeerLost:
            self._generation += 1
            raise
        group = dist.ProcessGroup(store, self._rank, len(self._ranks))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        own_groups.add(group)
        self._backend = backend
        return group

    def _assemble(self, store: dist.Store, call: str, timeout: float) -> None:
        """Returns when all ranks have called it. Raises PeerLost, and takes this rank back, after the timeout."""
        size = len(self._ranks)
        if size == 1:
            return
        attendance = self._attendance()
        place = (self._generation, 0)
        attendance.arrive(place)  # at once: this happens only once, and some stores are slow to wait in
        if store.add("here", 1) == size:
            store.set(_READY, "")
            return
        try:
            for seconds in attendance.waits(call, place, timeout):
                with suppress(RuntimeError):  # not yet
                    store.wait([_READY], timedelta(seconds=seconds))
                    return
            problem = PeerLost(attendance.missed(call, place, timeout))
            if size > 2:
                sleep(ARRIVAL)  # other ranks that give up now see that this rank was there
            raise problem
        except BaseException:
            store.add("here", -1)
            attendance.leave()
            raise


def _digest(ranks: Sequence[int]) -> str:
    return hashlib.blake2b(",".join(map(str, ranks)).encode(), digest_size=8).hexdigest()


def _close_all() -> None:
    """Closes all channels at the end of the program, where threads that still run might abort it."""
    for channel in list(_all):
        channel.close()


atexit.register(_close_all)
