"""A benchmark's own program on several processes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def torchrun(arguments: Sequence[str], ranks: int) -> dict[str, Any]:
    """What rank 0 of ``benchmark.py ARGUMENTS`` on so many processes prints as its last line, which is JSON.

    With ``ranks`` and the ``load_average`` before. The cores are shared evenly. Ends the program if it failed.
    """
    program = [str(Path(__file__).parent.with_name("benchmark.py")), *arguments]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    load = os.getloadavg()[0]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"ranks": ranks, "load_average": load}
