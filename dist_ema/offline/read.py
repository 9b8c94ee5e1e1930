"""Reads an average of a checkpoint into memory, as full tensors, in one process."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_ema.checkpoints.reader import RunReader, damaged_error
from dist_ema.checkpoints.versions import reread
from dist_ema.formats.manifest import Manifest
from dist_ema.geometry.runs import whole
from dist_ema.kernels.fingerprint import partial_digest
from dist_ema.storage.paths import StrPath


def read_checkpoint(path: StrPath, name: str | None = None) -> dict[str, Tensor]:
    """Returns full tensors of one average, and of everything that is not averaged, by canonical name. One process.

    A tied tensor is under each of its names. A checkpoint that was saved with ``include_untracked=False`` has only the
    average and its buffers.

    Args:
        path: the checkpoint, a directory or a URL.
        name: which average; None means the only one.

    Raises:
        EMAConfigError: there is no such average, or there are several and none was named.
        CheckpointError, CheckpointCorruptError: there is no checkpoint, or it is damaged. What is returned has been
            verified.

    >>> import tempfile
    >>> from dist_ema import ShardedEMA
    >>> model = torch.nn.Linear(3, 2)
    >>> ema = ShardedEMA(model, decay=0.9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ema.save(f"{folder}/ema")
    ...     state = read_checkpoint(f"{folder}/ema")
    >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    return reread(path, lambda manifest: _read(path, manifest, name))


def _read(path: StrPath, manifest: Manifest, name: str | None) -> dict[str, Tensor]:
    wanted = manifest.tensors(manifest.choose(name))
    state: dict[str, Tensor] = {}
    damaged = []
    with RunReader.of(path, manifest) as reader:
        for key, tensor in wanted.items():
            full = torch.empty(tensor.shape, dtype=reader.dtype(key))
            runs = whole(full.numel())
            reader.read(key, runs, full.view(-1))
            if partial_digest(full, runs) != tensor.digest:
                damaged.append(f"{tensor.file}: {key[1]!r}")
            state |= dict.fromkeys((key[1], *tensor.aliases), full)
    if damaged:
        raise damaged_error(path, damaged)
    return state
