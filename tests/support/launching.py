"""What the tests of the launch scripts share: tiny runs, and what one plain model makes of them."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from support import ROOT

import torch

from demo import loop
from demo.options import Options
from demo.text import Text
from demo.wrap import adamw, plain

ENGINES = ("ddp", "fsdp1", "fsdp2", "hsdp", "tp", "zero1", "zero2", "zero3")
SIZES = {"layers": 1, "width": 16, "heads": 2, "context": 16, "batch": 4, "eval_windows": 5}
RUN = SIZES | {
    "steps": 6,
    "eval_every": 3,
    "half_life": "3ba",
    "lr": 1e-3,
    "ema_start": "0ba",
    "data": argparse.__file__,
}


def arguments(engine: str | None, **options: object) -> list[str]:
    """A command line: the engine's YAML, then a tiny run, then ``options``."""
    config = [] if engine is None else ["--config", str(ROOT / "configs" / f"{engine}.yaml")]
    return config + [f"--{name}={value}" for name, value in (RUN | options).items()]


def reference(options: Options) -> tuple[float, float]:
    """Validation loss, live and averaged, of one plain model that sees the batches of all ranks."""
    text = Text.read(options.data, options.context)
    windows = text.windows(options.eval_windows, options.context)
    model, average = plain(options, torch.device("cpu")), plain(options, torch.device("cpu"))
    optimizer = adamw(model, options)
    for step in range(1, options.steps + 1):
        batch = text.batch(step, options.batch, options.context, options.seed)
        loop.token_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, live in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(live, 1 - 0.5 ** (1 / 3) if step > 1 else 1.0)
    with torch.no_grad():
        live, averaged = (loop.token_losses(module, windows).mean().item() for module in (model, average))
    return live, averaged


def environment(**variables: object) -> dict[str, str]:
    """This process's environment with ``variables``, and with the running Python's scripts found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return inherited | {"PATH": path, "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in variables.items()}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
