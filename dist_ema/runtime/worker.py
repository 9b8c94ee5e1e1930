"""Runs the jobs of an offloaded average in a thread: one at a time, and no failure is lost."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from weakref import WeakSet

import torch

from dist_ema.errors import EMAStateError

logger = logging.getLogger(__name__)


class Worker:
    """Runs jobs that change an average, in the order in which they are given.

    A job that fails has left the average half changed, so its failure is kept: every later call raises it.

    Args:
        threads: number of threads that torch and the compiled kernels use for a job; None means a quarter of the
            caller's, at least one.
    """

    def __init__(self, threads: int | None) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._job: Future[None] | None = None
        self._error: BaseException | None = None
        self._unseen = False
        self._process = os.getpid()
        #: Whether a job is under way. A plain attribute, since a forked child may find any lock taken for ever.
        self.busy = False
        _workers.add(self)

    def start(self, work: Callable[[], None]) -> None:
        """Runs ``work`` in the thread, after the previous job has ended. Raises as ``raise_failure`` does."""
        self.wait()
        if self._pool is None:
            self._pool = self._make_pool()
        self.busy = True
        self._job = self._pool.submit(self._run, work)

    def _make_pool(self) -> ThreadPoolExecutor:
        """Returns a pool of one thread, in which torch uses the limited number of threads."""
        pool = ThreadPoolExecutor(1, "dist_ema offload")
        callers = torch.get_num_threads()
        pool.submit(_limit, self._threads or max(1, callers // 4)).result()
        # The number is a thread's own, but the last one set is also what threads that start later begin with.
        torch.set_num_threads(callers)
        return pool

    def _run(self, work: Callable[[], None]) -> None:
        """Runs a job in the thread, and keeps and logs its failure."""
        try:
            work()
        except BaseException as error:
            self._error, self._unseen = error, True
            logger.exception("An update of the average failed in the background.")
        finally:
            self.busy = False

    def drain(self) -> None:
        """Waits for the end of the job; raises nothing."""
        self._notice_fork()
        job = self._job
        if job is not None:
            job.result()
            self._job = None

    def raise_failure(self) -> None:
        """Raises EMAStateError if a job has failed; does not wait."""
        self._notice_fork()
        if self._error is not None:
            self._unseen = False
            raise EMAStateError(
                f"an update of the average failed in the background, so the average cannot be used: {self._error!r}. "
                "Call reset() to start anew from the live weights, or load() a checkpoint"
            ) from self._error

    def wait(self) -> None:
        """Waits for the end of the job. Raises as ``raise_failure`` does."""
        self.drain()
        self.raise_failure()

    @property
    def failed(self) -> bool:
        """Returns whether ``raise_failure`` would raise."""
        self._notice_fork()
        return self._error is not None

    def close(self) -> None:
        """Ends the thread; the next job starts another one. Raises a failure that no call has raised yet."""
        unseen = self._end()
        if unseen:
            self.raise_failure()

    def discard(self) -> None:
        """Ends the thread for good, and forgets its failure."""
        self._end()
        self._unseen = False

    def _end(self) -> bool:
        """Waits for the job, ends the thread, and returns whether there is a failure that no call has raised."""
        self.drain()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        return self._unseen

    def _notice_fork(self) -> None:
        """Marks the average as broken in a forked child if a job was changing it: the child has no thread to finish the
        job.
        """
        if os.getpid() == self._process:
            return
        self._process = os.getpid()
        self._pool = self._job = None
        self._unseen = False
        if self.busy:
            self.busy = False
            self._error = EMAStateError("the process was forked while an update was under way; call wait() before")

    def unseen(self) -> BaseException | None:
        """Returns a failure that was never raised; None if there is none. Waits."""
        self.drain()
        return self._error if self._unseen else None


def _limit(threads: int) -> None:
    """Limits torch's threads in this thread. Reads the process's number first, because a new thread starts with it."""
    torch.get_num_threads()
    torch.set_num_threads(threads)


_workers: WeakSet[Worker] = WeakSet()


@atexit.register
def _at_exit() -> None:
    """Ends the process with status 1 if a failure was never raised. Status 0 would look like success."""
    for worker in list(_workers):
        error = worker.unseen()
        if error is not None:
            fail_at_exit(f"An update of an average failed in the background and nobody looked: {error!r}")


def fail_at_exit(message: str) -> None:
    """Logs why, and ends a process that is ending anyway with status 1."""
    logger.critical(message)
    with suppress(Exception):  # a stream may be closed, or missing
        sys.stderr.write(f"dist_ema: {message}\n")
    for stream in (sys.stdout, sys.stderr):  # os._exit() does not flush them
        with suppress(Exception):
            stream.flush()
    os._exit(1)
