"""Makes ``import composer`` work beside a torch that mosaicml does not pin.

mosaicml 0.32.1 asks for torch < 2.7.1 and the torchvision of that torch, and for MosaicML's command line, of which
nothing is used here. It is installed with ``--no-deps``, and empty modules take their places. torchmetrics, which looks
whether there is a torchvision, has to be imported before.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock


def install() -> None:
    """Puts the stand-ins where the real ones are not installed."""
    import torchmetrics  # noqa: F401

    for name in ("torchvision", "mcli"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            _stand_in(name)


def _stand_in(name: str) -> None:
    parts = ("transforms", "transforms.functional", "models", "models.resnet", "datasets", "ops", "utils", "io")
    for full in (name, *(f"{name}.{part}" for part in parts)):
        module = ModuleType(full)
        module.__spec__ = importlib.util.spec_from_loader(full, loader=None)
        module.__path__ = []
        module.__version__ = "0"
        module.__getattr__ = lambda attribute: _missing(attribute)  # type: ignore[method-assign]
        sys.modules[full] = module


def _missing(attribute: str) -> MagicMock:
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return MagicMock(name=attribute)
