"""Process groups of the library's own, beside the one in which the model trains."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from weakref import ref

import torch.distributed as dist

from dist_ema.collectives import answered, size_of
from dist_ema.errors import EMAStateError

#: Assumed disk bandwidth of each rank, bytes a second: extends the timeout, so that no slow write passes for a hang.
_SLOW_DISK = 50e6


class OwnGroups:
    """The two groups of one :class:`ShardedEMA`: where calls begin, and where ranks wait for each other's disks.

    Args:
        group: the ranks that hold the model; None for one process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._is_world = group is not None and size_of(group) == dist.get_world_size()
        # Weak, so that destroy_process_group() ends its threads: at the end of the interpreter they may abort it.
        self._meeting: ref[dist.ProcessGroup] | None = None
        self._background: dist.ProcessGroup | None = None
        self._timeout = 0.0  # of the background group, seconds

    def meeting(self, timeout: float | None) -> dist.ProcessGroup | None:
        """Where ranks meet at the beginning of every collective call. Collective at the first one, whichever it is.

        A group of our own, so that a rank may give up after ``timeout`` seconds without leaving half a collective call
        in the group that trains. A part of the world meets in its own group: a further one has to be named alike on all
        of its ranks, which torch counts up from how many groups each of them is in.
        """
        if not self._is_world:
            return self._group
        group = None if self._meeting is None else self._meeting()
        if group is None and self._meeting is not None:
            raise EMAStateError("the process group that the average was made in is gone: make a new ShardedEMA")
        if group is None:
            wait = None if timeout is None else timedelta(seconds=timeout)
            with answered():
                group = dist.new_group(backend="gloo", timeout=wait)
            self._meeting = ref(group)
        return group

    def files(self, timeout: float, nbytes: int) -> dist.ProcessGroup | None:
        """A group on the CPU, in which each rank writes or reads ``nbytes``. Collective if ``timeout`` is new.

        Its timeout is ``timeout`` seconds beside what the disk takes, so a rank that hangs is noticed. In the group
        that trains, NCCL's watchdog would end the job after 10 minutes of a slow disk.
        """
        if self._group is None:
            return None
        if self._background is None or self._timeout != timeout:
            self.close()
            self._timeout = timeout
            self._background = self.another(timeout, nbytes)
        return self._background

    def another(self, timeout: float, nbytes: int) -> dist.ProcessGroup | None:
        """As :meth:`files`, a new one at each call, which belongs to the caller. Collective."""
        if self._group is None:
            return None
        group: dist.ProcessGroup = dist.new_group(
            dist.get_process_group_ranks(self._group),
            backend="gloo",
            timeout=timedelta(seconds=timeout + nbytes / _SLOW_DISK),
            use_local_synchronization=not self._is_world,  # ranks that hold another model make no such call
        )
        return group

    def close(self) -> None:
        """Destroys the background group. Collective if there is one."""
        group, self._background = self._background, None
        # torch names the group of a part of the world by its ranks and the number of groups that there are. The next
        # one would be called like this one, and find the addresses that its ranks have left in the store.
        if group is not None and dist.is_initialized() and self._is_world:
            with suppress(ValueError):  # the program has destroyed all groups and made others since
                dist.destroy_process_group(group)
