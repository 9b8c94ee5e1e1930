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


class Background:
    """At most one piece of work at a time, with a moment from which on the shadow may be changed again."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._read = Event()
        self._error: BaseException | None = None
        self._registered = False
        self._process = os.getpid()

    def _notice_fork(self) -> None:
        """A forked child has no thread: the save is the parent's, and so is what fails in it.

        The event may have been copied while it was locked. The shadow is whole, since a save only reads it.
        """
        if os.getpid() != self._process:
            self._process = os.getpid()
            self._thread = self._error = None
            self._read = Event()

    def start(self, read: Callable[[], None], finish: Callable[[], None], undo: Callable[[], None]) -> None:
        """Runs ``read``, which reads the shadow, then ``finish``; ``undo`` if one of them raised. Does not wait."""
        self.wait()
        self._read.clear()
        if not self._registered:
            self._registered = True
            atexit.register(self._at_exit)

        def work() -> None:
            try:
                read()
                self._read.set()
                finish()
            except BaseException as error:
                self._error = error
                undo()
            finally:
                self._read.set()

        with Uninterrupted():
            self._thread = Thread(target=work, name="dist_ema save")
            self._thread.start()

    def settle(self) -> None:
        """Waits until the shadow may be changed. Local; raises nothing, since other ranks may not have failed yet."""
        self._notice_fork()
        if self._thread is not None and self._thread.ident is not None:  # None: interrupted before it could start
            self._read.wait()

    def report(self) -> None:
        """Raises what failed in work that has ended. Local; does not wait."""
        self._notice_fork()
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def drain(self) -> None:
        """Waits for the end of the work; raises nothing. Local."""
        self._notice_fork()
        if self._thread is not None:
            if self._thread.ident is not None:
                self._thread.join()
            self._thread = None

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
