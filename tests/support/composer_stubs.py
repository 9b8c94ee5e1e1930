"""Makes ``import composer`` work beside a torch that mosaicml does not pin.

mosaicml 0.32.1 asks for torch < 2.7.1 with its torchvision, and for MosaicML's command line, of which nothing is used
here. It is installed with ``--no-deps``, and while it is imported empty modules take the places of the two.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

_PARTS = (
    "mcli",
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.resnet",
    "torchvision.ops",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


def import_composer() -> None:
    """Imports it, and takes the stand-ins away again: other libraries would find them and believe in them."""
    import torchmetrics  # noqa: F401  (it looks for torchvision when it is imported)
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # and remembers the answer

    missing = [part for part in _PARTS if importlib.util.find_spec(part.partition(".")[0]) is None]
    sys.modules.update({part: _stand_in(part) for part in missing})
    try:
        import composer
        import composer.algorithms
        import composer.functional  # noqa: F401
    finally:
        for part in missing:
            del sys.modules[part]


def _stand_in(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    module.__path__ = []
    module.__getattr__ = _anything  # type: ignore[method-assign]
    return module


def _anything(attribute: str) -> MagicMock:
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return MagicMock(name=attribute)
