"""Exports an average of a checkpoint as a Hugging Face directory: one process, no accelerator, no model, a few MiB of
memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from dist_ema.checkpoints.configuration import is_transformers_config
from dist_ema.checkpoints.export import export
from dist_ema.checkpoints.file_values import Advance, FileValues, no_advance
from dist_ema.checkpoints.model_card import ModelCard
from dist_ema.checkpoints.reader import RunReader
from dist_ema.checkpoints.versions import reread
from dist_ema.comm.catalogue import FullTensor
from dist_ema.formats.dtypes import DTYPES
from dist_ema.formats.manifest import LIVE, Key, Manifest
from dist_ema.formats.stored import StoredTensor
from dist_ema.geometry.shares import Mode
from dist_ema.offline.verify import verified
from dist_ema.options import check_cast
from dist_ema.storage.paths import StrPath


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

    Each tensor is checked against its fingerprint while it is written. Only the files of this average are opened, so
    damage to another average does not matter. Memory: some chunks of half a million elements, whatever the size.

    Args:
        path: the checkpoint, a directory or a URL.
        out: the directory to make, which must not exist. Missing parents are created.
        name: which average; None means the only one.
        dtype: dtype of floating-point tensors; None means that of the checkpoint, which is the shadow's. (A checkpoint
            does not have the dtype of the live weights.)
        max_shard_size: maximum bytes of one file, as an int or as ``"5GB"``. A larger tensor gets a file of its own.
        config_from: a file or directory whose configuration files are copied, an object with ``save_pretrained``, or a
            list of these.
        layout: ``"diffusers"`` names the files as diffusers does; None and ``"transformers"`` as transformers does.
            Tensors have the names of the module, because a checkpoint does not have the model's class. A tied tensor is
            written once with ``"transformers"``, and if ``config_from`` is the configuration of a transformers model;
            otherwise under all of its names, so that ``load_state_dict`` takes it.
        begin: called with the manifest and the number of bytes to read; returns the function that is called with the
            progress.

    Returns:
        The manifest of the checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, ``out`` exists, or it cannot be written; nothing is left behind.
        CheckpointCorruptError: what should be exported is damaged. Names the first damaged file and tensor.
        EMAConfigError: there is no such average, or an option has a value that is not allowed.
    """
    check_cast(dtype)

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
    chosen = manifest.choose(name)
    tensors = manifest.tensors(chosen)
    card = ModelCard(chosen, manifest.schedules[chosen], manifest.state, os.fspath(path))
    with RunReader.of(path, manifest, tensors) as reader:
        advance = begin(manifest, sum(tensor.nbytes for tensor in tensors.values())) if begin else no_advance
        once = layout == "transformers" or (layout is None and is_transformers_config(config_from))
        entries = [_entry(key, tensor, once) for key, tensor in tensors.items()]
        sources = [verified(reader, key, tensor) for key, tensor in tensors.items()]
        held = {
            entry.name: FileValues.of(entry, source, advance) for entry, source in zip(entries, sources, strict=True)
        }
        export(
            out,
            entries,
            held.get,
            None,
            dtype=dtype,
            max_shard_size=max_shard_size,
            config_from=config_from,
            gather=False,
            layout=layout,
            card=card,
        )


def _entry(key: Key, tensor: StoredTensor, once: bool) -> FullTensor:
    """Describes a stored tensor for writing. ``live_dtype`` is that of the file, because the model's is not known."""
    aliases = () if once else tensor.aliases
    folder, name = key
    dtype = DTYPES[tensor.dtype]
    mode: Mode = "live" if folder == LIVE else "average"
    return FullTensor(name, aliases, tensor.shape, dtype, dtype, mode, partitioned=False)
