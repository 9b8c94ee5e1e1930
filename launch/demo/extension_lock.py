"""A lock that a killed build has left in torch's cache of extensions: every later start waits for it without a word."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)


def warn_of_locks() -> list[Path]:
    """Logs the path and age of each lock there, and returns the paths. Deletes none: a build may be running."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    # torch names the folders ROOT/EXTENSION where the variable is set, else ROOT/PYTHON_DEVICE/EXTENSION (torch 2.13).
    found = sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])
    for path in found:
        try:
            age = time.time() - path.stat().st_mtime
        except OSError:  # a build that has ended since
            continue
        logger.warning(
            "%s is there since %.0f s. If no build of a torch extension runs, a killed one has left it, and DeepSpeed "
            "will wait for it in silence: delete the file then.",
            path,
            age,
        )
    return found
