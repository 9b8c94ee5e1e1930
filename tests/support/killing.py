"""Trainers that are killed or stopped, and whether they left a whole checkpoint."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.formats.manifest import Manifest

#: Operations that change what is on disk; before any other a kill leaves what it leaves before the next of these.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.fsync"}


def make_trainer(shard: bool = False) -> tuple[nn.Module, ShardedEMA]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 63))
    model[2].bias.requires_grad_(False)
    if shard:
        fully_shard(model)
    return model, ShardedEMA(model, averages={"fast": 0.5, "slow": 0.9})


@torch.no_grad()
def train_once(model: nn.Module, ema: ShardedEMA) -> None:
    """The same bits on any shard, whatever was before: what an average holds follows from the number of updates."""
    for index, parameter in enumerate(model.parameters()):
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.fill_(1.0 / (ema.num_updates + index + 3))
    ema.update()


def digests(manifest: Manifest) -> dict[str, dict[str, int]]:
    return {name: {key: held.digest for key, held in tensors.items()} for name, tensors in manifest.averages.items()}


@functools.cache
def expected_digests(updates: int) -> dict[str, dict[str, int]]:
    """Digests of the trained tensors after so many updates."""
    model, ema = make_trainer()
    for _ in range(updates):
        train_once(model, ema)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: ema.fingerprint(name) for name in ema.names}
    return {name: {key: value for key, value in each.items() if key in trained} for name, each in found.items()}


def whole(path: Path) -> int:
    """Checks every byte, and that all of them are of one moment; gives the number of updates then."""
    manifest = verify_checkpoint(path)
    updates = manifest.seen.updates
    found = digests(manifest)
    expected = expected_digests(updates)
    assert {name: {key: found[name][key] for key in keys} for name, keys in expected.items()} == expected
    return updates


@contextlib.contextmanager
def forked(
    server: multiprocessing.context.BaseContext, target: Callable[..., None], *arguments: object
) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that runs ``target`` with a pipe as its last argument, killed at the end, and the other end."""
    ours, theirs = server.Pipe()
    process = server.Process(target=target, args=(*arguments, theirs), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()
