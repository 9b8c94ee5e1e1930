"""A save that goes on while training does.

What is saved is one moment's average, without a second copy of it: the shadow is read in place, and whoever wants to
change it (the next due update, a swap) waits until it has been read. Reading takes as long as the system takes to copy
it to its page cache; bringing that to the disk, comparing notes with the other ranks and putting the checkpoint in its
place happen while training goes on. The thread talks to other ranks through a group of its own.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread

from dist_ema.interrupts import Uninterrupted

logger = logging.getLogger(__name__)


class _Work:
    """One piece of work.

    Attributes:
        read: the shadow may be changed again.
        done: the work is over. (Not ``Thread.join()``: where a signal's handler raises in it, Python 3.11 takes the
            thread for ended, and the save would be forgotten while it goes on.)
        error: what failed in it.
    """

    def __init__(self) -> None:
        self.read = Event()
        self.done = Event()
        self.error: BaseException | None = None

    def run(self, read: Callable[[], None], finish: Callable[[], None], undo: Callable[[], None]) -> None:
        """In the thread."""
        try:
            read()
            self.read.set()
            finish()
        except BaseException as error:
            self.error = error
            undo()
        finally:
            self.end()

    def end(self) -> None:
        """Nobody has to wait any more."""
        self.read.set()
        self.done.set()


class Background:
    """At most one piece of work at a time, with a moment from which on the shadow may be changed again."""

    def __init__(self) -> None:
        self._work: _Work | None = None
        self._error: BaseException | None = None  # of work that has ended
        self._registered = False
        self._process = os.getpid()

    def _notice_fork(self) -> None:
        """A forked child has no thread: the save is the parent's, and so is what fails in it.

        The shadow is whole, since a save only reads it.
        """
        if os.getpid() != self._process:
            self._process = os.getpid()
            self._work = self._error = None

    def start(self, read: Callable[[], None], finish: Callable[[], None], undo: Callable[[], None]) -> None:
        """Runs ``read``, which reads the shadow, then ``finish``; ``undo`` if one of them raised. Does not wait."""
        self.wait()
        if not self._registered:
            self._registered = True
            atexit.register(self._at_exit)
        with Uninterrupted():
            work = _Work()
            thread = Thread(target=work.run, args=(read, finish, undo), name="dist_ema save")
            self._work = work
            try:
                thread.start()
            finally:
                if thread.ident is None:  # it could not be started
                    work.end()

    def wait_until_read(self) -> None:
        """Waits until the shadow may be changed. Local; raises nothing, since other ranks may not have failed yet."""
        self._notice_fork()
        if self._work is not None:
            self._work.read.wait()

    def raise_failure(self) -> None:
        """Raises what failed in work that has ended. Local; does not wait."""
        self._notice_fork()
        if self._work is not None and self._work.done.is_set():
            self.wait()

    def drain(self) -> None:
        """Waits for the end of the work; raises nothing. Local."""
        self._notice_fork()
        if self._work is not None:
            self._work.done.wait()
            self._error, self._work = self._work.error, None

    def wait(self) -> None:
        """Waits for the end of the work; raises what failed in it, once. Local."""
        self.drain()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _at_exit(self) -> None:
        """A failure that nobody has seen ends the process with a status of 1: silence would look like success."""
        try:
            self.wait()
        except BaseException as error:
            fail_at_exit(f"A save in the background failed and nobody waited for it: {error}")


def fail_at_exit(message: str) -> None:
    """Ends a process that is ending anyway, with a status of 1, and says why."""
    logger.critical(message)
    with suppress(Exception):  # a stream may be closed, or missing
        sys.stderr.write(f"dist_ema: {message}\n")
    for stream in (sys.stdout, sys.stderr):  # os._exit() does not
        with suppress(Exception):
            stream.flush()
    os._exit(1)
