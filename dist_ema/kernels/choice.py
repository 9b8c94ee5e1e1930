"""Chooses compiled or eager kernels, once for each kind of device. Logs the choice; ``DIST_EMA_KERNEL`` forces it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from dist_ema.errors import EMAConfigError
from dist_ema.kernels.compiler import BuildError

Kernels = TypeVar("Kernels")
_lock = threading.Lock()


def choose(
    decided: list[Kernels | None], device: str, build: Callable[[], Kernels], logger: logging.Logger
) -> Kernels | None:
    """Returns the kernels, or None for the eager route. Decides and logs at the first call.

    Args:
        decided: empty before the decision, and holds it afterwards. The caller keeps it.
        device: its name in messages.
        build: makes and checks the kernels. Raises BuildError or OSError.
        logger: gets the messages.

    Raises:
        EMAConfigError: ``DIST_EMA_KERNEL`` has another value than those allowed, or asks for a kernel that is not
            available.
    """
    if not decided:
        with _lock:
            if not decided:
                decided.append(_decide(os.environ.get("DIST_EMA_KERNEL", ""), device, build, logger))
    return decided[0]


def _decide(wish: str, device: str, build: Callable[[], Kernels], logger: logging.Logger) -> Kernels | None:
    if wish not in ("", "eager", "compiled"):
        raise EMAConfigError(f"DIST_EMA_KERNEL={wish!r}: it can be 'eager' or 'compiled', or unset for what is there")
    if wish == "eager":
        logger.info("Averages on %s: eager route (DIST_EMA_KERNEL=eager)", device)
        return None
    try:
        kernels = build()
    except (BuildError, OSError) as error:
        _fall_back(wish, device, error, logger)
        return None
    logger.info("Averages on %s: compiled kernels, %s", device, kernels)
    return kernels


def give_up(decided: list[Kernels | None], device: str, error: Exception, logger: logging.Logger) -> None:
    """Switches to the eager route, for kernels that fail later. Raises as :func:`choose` does."""
    with _lock:
        _fall_back(os.environ.get("DIST_EMA_KERNEL", ""), device, error, logger)
        decided[:] = [None]


def _fall_back(wish: str, device: str, error: Exception, logger: logging.Logger) -> None:
    if wish == "compiled":
        raise EMAConfigError(f"DIST_EMA_KERNEL=compiled, but there is no compiled kernel: {error}") from error
    logger.warning("Averages on %s: eager route, at about half the speed. No compiled kernel: %s", device, error)
