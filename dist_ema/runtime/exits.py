"""A failure in a thread of ours that nobody has seen by the end of the program."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress

logger = logging.getLogger(__name__)


def fail_at_exit(message: str) -> None:
    """Ends a process that is ending anyway, with a status of 1, and says why: silence would look like success."""
    logger.critical(message)
    with suppress(Exception):  # a stream may be closed, or missing
        sys.stderr.write(f"dist_ema: {message}\n")
    for stream in (sys.stdout, sys.stderr):  # os._exit() does not flush them
        with suppress(Exception):
            stream.flush()
    os._exit(1)
