"""One training run, and many averages out of it afterwards: over the width of the average, and over merge schemes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from demo.gpt import GPT
from demo.loop import token_losses
from demo.text import Text
from dist_ema import HalfLife, PowerFunction, ShardedEMA, merge, synthesize

CONTEXT, BATCH, WINDOWS = 128, 16, 256
#: Kept while training: EDM2's two, out of which the others are made, and two half lives to compare with.
TWO = {"short": PowerFunction(sigma_rel=0.05), "long": PowerFunction(sigma_rel=0.10)}
ONLINE = {"fast": HalfLife("10ba"), "slow": HalfLife("100ba")}
SIGMAS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.1, 0.12, 0.15, 0.18, 0.22)
COUNTS = (2, 4, 6, 8, 12, 16, 24, 32)
MERGES = ("uniform", "wsm:sqrt", "wsm:cosine")


@dataclass
class Found:
    """Validation losses in nats per byte.

    Attributes:
        live: of the trained weights.
        online: of averages that were kept while training, by their names; of power functions by sigma_rel too.
        synthesized: by sigma_rel, of what was made out of the snapshots; with the residual of the fit.
        merged: by scheme and number of the newest weights that were merged.
    """

    live: float
    online: dict[str, float]
    synthesized: dict[float, tuple[float, float]]
    merged: dict[str, dict[int, float]]


class Sweep:
    """A run of the byte-level GPT on this machine's CPU, in one process."""

    def __init__(self, out: Path, steps: int, every: int, lr: float, data: str | None) -> None:
        self._out, self._steps, self._every, self._lr = out, steps, every, lr
        self._text = Text.read(data, CONTEXT)
        self._windows = self._text.windows(WINDOWS, CONTEXT)

    def train(self) -> tuple[GPT, ShardedEMA, ShardedEMA]:
        """Trains; leaves snapshots of two averages and the live weights of the same moments in the output folder."""
        torch.manual_seed(0)
        model = GPT(4, 96, 4, CONTEXT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self._lr)
        kept, online = ShardedEMA(model, averages=TWO), ShardedEMA(model, averages=ONLINE)
        kept.snapshot(self._out / "snapshots", every=self._every)
        (self._out / "live").mkdir(parents=True)
        for step in range(1, self._steps + 1):
            batch = self._text.batch(step, BATCH, CONTEXT, seed=0)
            optimizer.zero_grad()
            token_losses(model, batch).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            kept.update()
            online.update()
            if step % self._every == 0:
                torch.save(model.state_dict(), self._out / "live" / f"{step:08}.pt")
        kept.wait()
        return model, kept, online

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Of a model, over the validation windows."""
        losses = [token_losses(model, part).double().mean(1) for part in torch.split(self._windows, 64)]
        return float(torch.cat(losses).mean())

    def loss_of(self, model: GPT, folder: Path | str) -> float:
        """Of weights in a Hugging Face directory; the model has them afterwards."""
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return self.loss(model)

    def run(self) -> Found:
        """Everything."""
        model, kept, online = self.train()
        live = self.loss(model)
        points = {}
        for label, ema, name in (
            ("sigma_rel .05", kept, "short"),
            ("sigma_rel .10", kept, "long"),
            ("half life 10ba", online, "fast"),
            ("half life 100ba", online, "slow"),
        ):
            with ema.average_parameters(name):
                points[label] = self.loss(model)
        targets: dict[str, Any] = {f"{sigma}": f"sigma_rel={sigma}" for sigma in SIGMAS}
        made = synthesize(self._out / "snapshots", self._out / "synthesized", target=targets)
        pairs = list(zip(SIGMAS, made, strict=True))
        synthesized = {sigma: (self.loss_of(model, one.out), float(one.residual or 0)) for sigma, one in pairs}
        return Found(live, points, synthesized, self._merge(model))

    def _merge(self, model: GPT) -> dict[str, dict[int, float]]:
        files = sorted((self._out / "live").iterdir())
        merged: dict[str, dict[int, float]] = {scheme: {} for scheme in MERGES}
        for scheme in MERGES:
            for count in (count for count in COUNTS if count <= len(files)):
                out = self._out / "merged" / f"{scheme.replace(':', '-')}-{count}"
                merge(files[-count:], out, scheme=scheme)
                merged[scheme][count] = self.loss_of(model, out)
        return merged


def write(found: Found, out: Path, every: int) -> None:
    """``sweep.json`` and ``sweep.png``."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    said = {
        "live": found.live,
        "online": found.online,
        "synthesized": {
            str(sigma): {"loss": loss, "residual": off} for sigma, (loss, off) in found.synthesized.items()
        },
        "merged": {
            scheme: {str(count): loss for count, loss in losses.items()} for scheme, losses in found.merged.items()
        },
    }
    (out / "sweep.json").write_text(json.dumps(said, indent=1))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    left.plot(list(found.synthesized), [loss for loss, _ in found.synthesized.values()], "o-", label="made afterwards")
    kept = [found.online["sigma_rel .05"], found.online["sigma_rel .10"]]
    left.plot([0.05, 0.10], kept, "s", color="black", label="kept while training")
    left.set_xlabel("width of the average, sigma_rel")
    left.set_ylabel("validation loss, nats per byte")
    left.set_xscale("log")
    for scheme, losses in found.merged.items():
        right.plot([count * every for count in losses], list(losses.values()), "o-", label=scheme)
    right.set_xlabel("steps that are merged (newest weights)")
    for axis in (left, right):
        axis.axhline(found.live, color="gray", linestyle=":", label="live weights")
        axis.legend(frameon=False)
    figure.savefig(out / "sweep.png", dpi=110)
    plt.close(figure)


def table(found: Found) -> Sequence[str]:
    """Lines to be read by people."""
    best = min(found.synthesized, key=lambda sigma: found.synthesized[sigma][0])
    lines = [f"live weights                      {found.live:.4f}"]
    lines += [f"kept while training, {label:<14} {loss:.4f}" for label, loss in found.online.items()]
    lines += [
        f"made afterwards, sigma_rel {sigma:<7} {loss:.4f}   fit off by {off:.1%}"
        for sigma, (loss, off) in found.synthesized.items()
    ]
    lines += [
        f"merged, {scheme:<11} of {count:<3}        {loss:.4f}"
        for scheme, losses in found.merged.items()
        for count, loss in losses.items()
    ]
    return [*lines, f"the best width: sigma_rel {best}, {found.synthesized[best][0]:.4f}"]
