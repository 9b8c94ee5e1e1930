"""Classes of packages that nobody has to have imported."""

from __future__ import annotations

import sys
from typing import Any


def loaded(module: str, name: str) -> Any:
    """For ``isinstance``: the class, or () as long as nobody has imported its module. Local.

    Whoever has an object of the class has imported it, and importing it for the others would cost them seconds
    (DeepSpeed, torch.distributed.fsdp), or a package that they may not have (Lightning).
    """
    return getattr(sys.modules.get(module), name, ())
