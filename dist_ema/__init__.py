"""Exponential moving averages of sharded models.

Everything is imported when it is first used, so that ``import dist_ema`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_ema import errors as errors
    from dist_ema import schedules as schedules
    from dist_ema.ema import ShardedEMA as ShardedEMA
    from dist_ema.functional import compute_ema as compute_ema
    from dist_ema.functional import update_bn as update_bn
    from dist_ema.offline.merging.merge import merge as merge
    from dist_ema.offline.merging.synthesize import synthesize as synthesize
    from dist_ema.offline.read import read_checkpoint as read_checkpoint
    from dist_ema.offline.verify import verify_checkpoint as verify_checkpoint
    from dist_ema.schedules import ConstantDecay as ConstantDecay
    from dist_ema.schedules import Cosine as Cosine
    from dist_ema.schedules import Debiased as Debiased
    from dist_ema.schedules import HalfLife as HalfLife
    from dist_ema.schedules import HalfLifeFraction as HalfLifeFraction
    from dist_ema.schedules import Linear as Linear
    from dist_ema.schedules import NumUpdatesWarmup as NumUpdatesWarmup
    from dist_ema.schedules import PowerFunction as PowerFunction
    from dist_ema.schedules import Ramp as Ramp
    from dist_ema.schedules import Smoothing as Smoothing
    from dist_ema.schedules import Uniform as Uniform
    from dist_ema.schedules import Warmup as Warmup
    from dist_ema.schedules import Window as Window

__version__ = "0.2.0"

_SCHEDULES = (
    "ConstantDecay",
    "Cosine",
    "Debiased",
    "HalfLife",
    "HalfLifeFraction",
    "Linear",
    "NumUpdatesWarmup",
    "PowerFunction",
    "Ramp",
    "Smoothing",
    "Uniform",
    "Warmup",
    "Window",
)
_HOMES = {
    "ShardedEMA": "dist_ema.ema",
    "compute_ema": "dist_ema.functional",
    "update_bn": "dist_ema.functional",
    "merge": "dist_ema.offline.merging.merge",
    "synthesize": "dist_ema.offline.merging.synthesize",
    "read_checkpoint": "dist_ema.offline.read",
    "verify_checkpoint": "dist_ema.offline.verify",
    **dict.fromkeys(_SCHEDULES, "dist_ema.schedules"),
}
__all__ = ["errors", "schedules", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"dist_ema.{name}")
    raise AttributeError(f"module 'dist_ema' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
