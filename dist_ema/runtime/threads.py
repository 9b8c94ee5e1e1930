"""Runs threads that take their work from one iterator, so memory does not grow with the amount of work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def work_through(items: Iterable[T], work: Callable[[T], None], threads: int, name: str) -> None:
    """Calls ``work`` with every item, in several threads. Local.

    A thread takes the next item when it has finished one. So the items may come from a generator of any length: there
    are never more of them in memory than there are threads. (A future for each range of a 70 B merge took 539 MiB.)

    Args:
        items: the items, in the order in which work on them begins.
        work: called from any of the threads.
        threads: the number of threads.
        name: the name of the threads, for debuggers.

    Raises:
        Exception: the first failure. It is raised when all threads have ended. Items that no thread has begun are
            skipped.

    >>> done = []
    >>> work_through(range(5), done.append, 2, "example")
    >>> sorted(done)
    [0, 1, 2, 3, 4]
    """
    iterator = iter(items)
    turn = threading.Lock()  # generators are not safe for threads
    stopped = threading.Event()

    def loop() -> None:
        try:
            while not stopped.is_set():
                with turn:
                    try:
                        item = next(iterator)
                    except StopIteration:
                        return
                work(item)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(threads, name) as pool:
        try:
            jobs = [pool.submit(loop) for _ in range(threads)]
            for job in jobs:
                job.result()
        finally:  # also after an interrupt of this thread
            stopped.set()
