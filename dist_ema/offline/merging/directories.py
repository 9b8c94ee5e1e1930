"""The model's tensors in a directory of torch.distributed.checkpoint, or in a file of torch.save."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dist_ema.errors import CheckpointError
from dist_ema.importers import dcp
from dist_ema.importers.files import open_model
from dist_ema.importers.foreign import LazyTensor

#: Entries beside the model's: those of torch's recipes, of torchtitan and of Lightning.
_OTHERS = re.compile(r"(optim|optimizers?|lr_schedulers?|dataloader|train_state|ema)(\.|$)")
#: What wrappers put into names; see :mod:`dist_ema.engines.names`.
_TOKENS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def open_dcp(path: Path, prefix: str | None) -> dict[str, LazyTensor]:
    """Of a directory: FSDP1's and FSDP2's ``{"model": ..., "optimizer": ...}`` with ``prefix="model."``, torchtitan's,
    which has the model's names as they are, without one. Runs no code that a file names.

    Raises CheckpointError where there are none.
    """
    return _model(dcp.open_directory(path).tensors, prefix, path)


def open_pickle(path: Path, prefix: str | None) -> dict[str, LazyTensor]:
    """Of a file, or of the state dict in it that trainers call ``state_dict`` or ``model``; runs no code of the file.

    Raises as :func:`open_dcp`.
    """
    return _model(open_model(path, None).tensors, prefix, path)


def _model(tensors: Mapping[str, LazyTensor], prefix: str | None, path: Path) -> dict[str, LazyTensor]:
    if prefix is None:
        names = {name: name for name in tensors if not _OTHERS.match(name)}
    else:
        names = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    found = {_TOKENS.sub("", plain): tensors[name] for name, plain in names.items()}
    if not found:
        some = ", ".join(map(repr, list(tensors)[:4])) or "none"
        raise CheckpointError(f"{path} has no tensors of a model for prefix={prefix!r}; it has {some}")
    if len(found) < len(names):
        raise CheckpointError(f"{path}: two names are one without the parts that wrappers have added")
    return found
