"""File systems of a test's own, where the machine allows it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

UNSHARE = ["unshare", "--mount", "--map-root-user"]


def can_mount(directory: Path) -> bool:
    if not shutil.which("unshare"):
        return False
    script = f'mount -t tmpfs none "{directory}"'
    return subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True, check=False).returncode == 0
