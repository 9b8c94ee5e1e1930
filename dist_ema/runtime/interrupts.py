"""Holds signals back while ranks exchange something that must not stop half way.

Python runs signal handlers between any two steps of the main thread, and a handler may raise: KeyboardInterrupt, or
what a trainer raises at SIGTERM. If a rank stops while ranks send each other weights, all of them have a mixture.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from types import FrameType, TracebackType
from typing import Any

#: Reads and sets handlers in a tenth of a microsecond; ``signal`` itself makes enums of them first, which is slower
#: than a small update. It is the part of CPython's ``signal`` that is written in C.
_fast: Any = import_module("_signal")
_NUMBERS = sorted(int(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


class Uninterrupted:
    """Delays signal handlers until the end of a ``with`` block. Local.

    All handlers then run, in the order in which the signals arrived, and the first exception among them is raised. In
    other threads than the main one no handler ever runs, and the block does nothing.
    """

    __slots__ = ("_active", "_block", "_came", "_handlers")

    def __enter__(self) -> None:
        self._active = False
        self._came: list[tuple[int, FrameType | None]] = []
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        self._block = sys._getframe(1)
        try:
            for number in _NUMBERS:
                handler = _fast.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    _fast.signal(number, self._hold)
            self._active = True
        except BaseException:  # of a signal that came before; __exit__ is not called then
            self._active = False
            for number in self._handlers:
                self._give_back(number)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._active = False
        for number in self._handlers:
            self._give_back(number)
        if self._came:
            self._deliver()

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._active and self._is_in_block(frame):
            self._came.append((number, frame))
        else:  # something else raised at the first line of __exit__, so this handler was never removed
            self._give_back(number)
            self._handlers[number](number, frame)

    def _is_in_block(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self._block:
            frame = frame.f_back
        return frame is not None

    def _give_back(self, number: int) -> None:
        if _fast.getsignal(number) == self._hold:  # else another one was set since
            _fast.signal(number, self._handlers[number])

    def _deliver(self) -> None:
        first: BaseException | None = None
        for number, frame in self._came:
            try:
                self._handlers[number](number, frame)
            except BaseException as error:
                first = first if first is not None else error
        if first is not None:
            raise first
