"""An average out of a checkpoint as a Hugging Face directory: one process, no accelerator, no model, a few MiB."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_ema.checkpoints.export import export
from dist_ema.checkpoints.layout import DTYPES
from dist_ema.checkpoints.load import Key, choose_average, stored_tensors
from dist_ema.checkpoints.manifest import LIVE, Manifest, StoredTensor
from dist_ema.checkpoints.reader import RunReader, reread
from dist_ema.checkpoints.storage.paths import StrPath
from dist_ema.errors import EMAConfigError
from dist_ema.offline.verify import Advance, VerifiedTensor, no_advance
from dist_ema.sharding.gather import LocalValues
from dist_ema.sharding.runs import whole
from dist_ema.sharding.shares import Mode, Share
from dist_ema.sharding.spec import TensorSpec
from dist_ema.sharding.writers import FullTensor


def export_checkpoint(
    path: StrPath,
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    config_from: object = None,
    layout: str | None = None,
    begin: Callable[[Manifest, int], Advance] | None = None,
) -> Manifest:
    """Writes an average of a checkpoint as :meth:`ShardedEMA.export` would have. One process.

    What is read is checked against its fingerprint while it is written, and only the files that are needed are opened:
    damage to another average does not matter. Memory: some chunks of half a million elements, whatever the size.

    Args:
        path: of the checkpoint.
        out: the directory to make, which must not exist; missing parents are made.
        name: which average; None means the only one.
        dtype: of floating-point tensors; None means that of the file, which is the shadow's (a checkpoint does not say
            what the live weights were).
        max_shard_size: bytes of one file at most, such as ``"5GB"`` or an int; a larger tensor has its own file.
        config_from: a file or directory whose configuration files are copied, an object with ``save_pretrained``, or a
            list of such.
        layout: ``"diffusers"`` names the files as diffusers does, None and ``"transformers"`` as transformers does. The
            names of the tensors are the module's own, as a checkpoint does not know the model's class.
        begin: called with the manifest and the bytes to read; returns what is told of the progress.

    Returns:
        What the checkpoint consists of.

    Raises:
        CheckpointError: there is no checkpoint, ``out`` exists, or it cannot be written; nothing is left behind.
        CheckpointCorruptError: what was to be exported is damaged; names the first damaged file and tensor.
        EMAConfigError: no such average, or an option has a value that is not allowed.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise EMAConfigError(f"dtype={dtype!r}: allowed is a floating-point torch.dtype, or None")

    def export_it(manifest: Manifest) -> Manifest:
        _export(path, manifest, out, name, dtype, max_shard_size, config_from, layout, begin)
        return manifest

    return reread(path, export_it)


def _export(
    path: StrPath,
    manifest: Manifest,
    out: str | os.PathLike[str],
    name: str | None,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    config_from: object,
    layout: str | None,
    begin: Callable[[Manifest, int], Advance] | None,
) -> None:
    wanted = {f"averages/{choose_average(manifest, name)}", LIVE}
    tensors = {key: tensor for key, tensor in stored_tensors(manifest).items() if key[0] in wanted}
    files = {tensor.file: manifest.files[tensor.file] for tensor in tensors.values()}
    with RunReader(path, manifest.data, files, tensors) as reader:
        advance = begin(manifest, sum(tensor.nbytes for tensor in tensors.values())) if begin else no_advance
        held = {key[1]: _hold(reader, key, tensor, advance) for key, tensor in tensors.items()}
        export(
            out,
            [_entry(one.share) for one in held.values()],
            held.get,
            None,
            dtype=dtype,
            max_shard_size=max_shard_size,
            config_from=config_from,
            gather=False,
            layout=layout,
        )


@dataclass(frozen=True)
class _Stored(LocalValues):
    """A tensor in a file; ``values`` is empty.

    Attributes:
        source: where its elements come from.
        advance: told of the bytes read.
    """

    source: VerifiedTensor
    advance: Advance

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Puts elements ``[start, stop)`` into ``out``, converted; the last call checks what all have read."""
        values = out if out.dtype == self.source.dtype else torch.empty(stop - start, dtype=self.source.dtype)
        self.source.read(start, values)
        if values is not out:
            out.copy_(values)
        self.advance(values.nbytes)


def _hold(reader: RunReader, key: Key, tensor: StoredTensor, advance: Advance) -> _Stored:
    source = VerifiedTensor(reader, key, tensor)
    shape, dtype = torch.Size(tensor.shape), DTYPES[tensor.dtype]
    spec = TensorSpec(key[1], shape, dtype, whole(source.numel), partitioned=False, aliases=tensor.aliases)
    mode: Mode = "live" if key[0] == LIVE else "average"
    share = Share(spec, mode, 0, source.numel, dtype, split=False, first_replica=True)
    return _Stored(share, torch.empty(0, dtype=dtype), 0, source, advance)


def _entry(share: Share) -> FullTensor:
    spec = share.spec
    return FullTensor(spec.name, spec.aliases, tuple(spec.shape), spec.dtype, spec.dtype, share.mode, partitioned=False)
