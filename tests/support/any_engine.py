"""An average on any engine, of weights that change by the same bits on any shard."""

from __future__ import annotations

from support.models import CASES, build
from support.zero_models import make_engine

import torch
from torch import nn

from dist_ema import ShardedEMA, schedules
from dist_ema.formats.manifest import Manifest

AVERAGES = {"fast": 0.5, "slow": schedules.PowerFunction(sigma_rel=0.1)}


def make_ema(case: str) -> ShardedEMA:
    model = build(scalar=False, hidden=12)
    target = make_engine(int(case[-1]), model=model) if case.startswith("zero") else CASES[case].wrap(model)
    return ShardedEMA(target, averages=AVERAGES, buffers="average")


@torch.no_grad()
def perturb_ema(ema: ShardedEMA, step: int) -> None:
    """Multiplies every trained element by the same number: the same bits on any shard."""
    engine = ema._average.engine
    for share, source in zip(ema._average.shares, engine.sources(), strict=True):
        if share.spec.kind == "parameter":
            source.mul_(1.0 + 0.25 * (step + 1))
    engine.publish()


def average_ema(ema: ShardedEMA, steps: range) -> None:
    for step in steps:
        perturb_ema(ema, step)
        if ema._average.engine.stepped() or not type(ema._average.engine).__name__.startswith("Zero"):
            ema.update()
        else:  # nothing was stepped: this is about files, not about DeepSpeed's steps
            ema._average.engine.stepped = lambda: True  # type: ignore[method-assign]
            ema.update()


def reference_digests(steps: int) -> list[dict[str, int]]:
    ema = make_ema("plain")
    average_ema(ema, range(steps))
    return [ema.fingerprint(name) for name in AVERAGES]


def digests_of(manifest: Manifest, name: str) -> dict[str, int]:
    """What :meth:`ShardedEMA.fingerprint` gives, out of the manifest."""
    stored = {**manifest.averages[name], **manifest.live}
    return {key: tensor.digest for key, tensor in stored.items()}


def small_ema(updates: int = 1, size: int = 5) -> ShardedEMA:
    """One process's, other weights for each number of updates."""
    torch.manual_seed(updates)
    ema = ShardedEMA(nn.Sequential(nn.Linear(size, 3), nn.BatchNorm1d(3)), decay=0.5)
    for _ in range(updates):
        ema.update()
    return ema
