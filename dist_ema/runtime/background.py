"""Saves in the background, while training continues.

The save writes the average of one moment without a second copy of it. It reads the shadow in place, and whatever wants
to change the shadow (the next due update, a swap) waits until it has been read. That takes as long as the system needs
to copy it to its page cache. Writing to the disk, waiting for other ranks and committing happen during training::

    training thread    save(block=False) | steps ... | update() waits here, if it is due | steps ........
    save's thread                        | reads the shadow, writes ...............| fsync, commit |

The thread communicates with other ranks in a process group of its own.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Event, Thread
from typing import TypeAlias

from dist_ema.runtime.interrupts import Uninterrupted
from dist_ema.runtime.streams import Handover
from dist_ema.runtime.worker import fail_at_exit

#: What the thread runs. It enters the context while it reads the shadow.
Work: TypeAlias = "Callable[[AbstractContextManager[None]], None]"


class _Run:
    """Describes one run of the thread.

    Attributes:
        read: set when the shadow may be changed again.
        done: set when the run is over. ``Thread.join()`` is not enough: if a signal handler raises in it, Python 3.11
            regards the thread as ended, and the save would be forgotten while it continues.
        error: the exception that ended it; None if there is none.
    """

    def __init__(self, handover: Handover) -> None:
        self.read = Event()
        self.done = Event()
        self.error: BaseException | None = None
        self._handover = handover

    def run(self, work: Work) -> None:
        """Runs ``work`` and keeps its exception for the call that waits. Called in the thread."""
        try:
            work(self._reading())
        except BaseException as error:
            self.error = error
        finally:
            self.end()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Reads the shadow in the block. At its end, also after an error, the shadow may be changed again."""
        try:
            with self._handover.taken():
                yield
        finally:
            self.read.set()

    def end(self) -> None:
        """Releases everything that waits for this run."""
        self.read.set()
        self.done.set()


class Background:
    """Runs at most one save in the background at a time."""

    def __init__(self) -> None:
        self._run: _Run | None = None
        self._error: BaseException | None = None  # of a run that is over
        self._registered = False
        self._process = os.getpid()

    def _notice_fork(self) -> None:
        """Forgets the thread in a forked child, which does not have it. The save and its failure belong to the parent.

        The child's shadow is intact, because a save only reads it.
        """
        if os.getpid() != self._process:
            self._process = os.getpid()
            self._run = self._error = None

    def start(self, work: Work, handover: Handover) -> None:
        """Runs ``work`` in a thread, and does not wait for it.

        Args:
            work: its exception is raised again by the call that waits.
            handover: orders the thread after kernels that are still queued for the shadow.
        """
        self.wait()
        if not self._registered:
            self._registered = True
            atexit.register(self._at_exit)
        # A signal handler that raised between these lines would leave a thread that no call waits for.
        with Uninterrupted():
            run = _Run(handover)
            thread = Thread(target=run.run, args=(work,), name="dist_ema save")
            self._run = run
            try:
                thread.start()
            finally:
                if thread.ident is None:  # it could not be started
                    run.end()

    def wait_until_read(self) -> None:
        """Waits until the shadow may be changed. Local. Raises nothing, because the save of other ranks may not have
        failed yet.
        """
        self._notice_fork()
        if self._run is not None:
            self._run.read.wait()

    def raise_failure(self) -> None:
        """Raises the failure of a save that is over. Local; does not wait."""
        self._notice_fork()
        if self._run is not None and self._run.done.is_set():
            self.wait()

    def drain(self) -> None:
        """Waits for the end of the save; raises nothing. Local."""
        self._notice_fork()
        if self._run is not None:
            self._run.done.wait()
            self._error, self._run = self._run.error, None

    def wait(self) -> None:
        """Waits for the end of the save, and raises its failure once. Local."""
        self.drain()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _at_exit(self) -> None:
        """Ends the process with status 1 if a failure was never raised. Status 0 would look like success."""
        try:
            self.wait()
        except BaseException as error:
            fail_at_exit(f"A save in the background failed and nobody waited for it: {error}")
