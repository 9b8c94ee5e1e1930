"""Writes the output of a merge, a Hugging Face directory or a checkpoint, which appears when it is complete or not at
all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dist_ema.checkpoints.configuration import Configuration
from dist_ema.checkpoints.contents import Contents
from dist_ema.checkpoints.model_card import NAME as README
from dist_ema.checkpoints.model_card import PROVENANCE, merged_card
from dist_ema.comm.catalogue import FullTensor
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.formats.layout import TensorPlan, index_json, parse_size, plan_files
from dist_ema.formats.manifest import DATA, NAME
from dist_ema.schedules import Schedule
from dist_ema.schedules.state import EMAState
from dist_ema.storage.base import TensorWriter
from dist_ema.storage.local import write_text
from dist_ema.storage.local_commit import LocalWriter
from dist_ema.storage.paths import StrPath, check_path, is_remote, local_path
from dist_ema.storage.staging import LOCK, Staging

#: Names of weight files, and of the index of several, as save_pretrained, export and merge write them.
_WEIGHTS = re.compile(r"(adapter_|diffusion_pytorch_)?model(-\d{5}-of-\d{5})?[.]safetensors([.]index[.]json)?")
#: Code of a model, as save_pretrained copies it.
_CODE = re.compile(r"(configuration|modeling|tokenization|processing|image_processing|feature_extraction)_\w+[.]py")
#: Other files that save_pretrained and the Hub put beside weights.
_BESIDE_WEIGHTS = {
    *("config.json", "generation_config.json", "adapter_config.json", "model_index.json", "scheduler_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.json", "chat_template.jinja", README, "LICENSE", "LICENSE.txt", "NOTICE", ".gitattributes"),
}


class Output(Protocol):
    """Defines one output. The methods are called in this order; after a failure ``abandon()`` replaces the remaining
    calls.

    Attributes:
        path: the path as the user gave it.
        dtypes: the dtype of each tensor in it, by name.
    """

    path: str
    dtypes: dict[str, torch.dtype]

    def create(self) -> None:
        """Makes the files. Rank 0. Raises CheckpointError if ``path`` exists, EMAConfigError, OSError."""

    def is_visible(self) -> bool:
        """Returns whether this process can write into the files that rank 0 made."""

    def writers(self) -> Mapping[str, tuple[TensorWriter, tuple[str, ...]]]:
        """Returns, for one thread, the writer of each tensor and its names in the output, by the tensor's own name."""

    def commit(self, digests: Mapping[str, int], provenance: Mapping[str, Any]) -> None:
        """Puts the output in its place. Rank 0."""

    def abandon(self) -> None:
        """Removes everything that was made. Rank 0."""


class PretrainedOutput:
    """Writes a Hugging Face directory. A tied tensor has all of its names in it."""

    def __init__(
        self,
        path: StrPath,
        entries: Sequence[FullTensor],
        limit: int | str,
        config_from: object,
        token: str,
        force: bool,
        cast: torch.dtype | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._entries = entries
        self._cast = cast
        self.dtypes = {entry.name: entry.dtype for entry in entries}
        plans = [TensorPlan(name, entry.dtype, entry.shape) for entry in entries for name in entry.names]
        self._plans = plan_files(plans, parse_size(limit))
        self._config_from = config_from
        self._force = force
        self._staging = Staging(local_path(path), token)

    def create(self) -> None:
        """Implements :meth:`Output.create`."""
        _refuse_existing(self._staging.target, self._force)
        self._staging.create()
        self._staging.create_files("", self._plans)
        if len(self._plans) > 1:
            write_text(self._staging.content / "model.safetensors.index.json", index_json(self._plans))
        dtype = next((dtype for dtype in self.dtypes.values() if dtype.is_floating_point), None)
        Configuration(None, None, dtype, self._staging.content, self._cast).write(self._config_from)

    def is_visible(self) -> bool:
        """Implements :meth:`Output.is_visible`."""
        return self._staging.is_visible()

    def writers(self) -> Mapping[str, tuple[TensorWriter, tuple[str, ...]]]:
        """Implements :meth:`Output.writers`."""
        writer = self._staging.writer("", self._plans)
        return {entry.name: (writer, entry.names) for entry in self._entries}

    def commit(self, digests: Mapping[str, int], provenance: Mapping[str, Any]) -> None:
        """Implements :meth:`Output.commit`."""
        write_text(self._staging.content / PROVENANCE, json.dumps(provenance, indent=1))
        if not (self._staging.content / README).exists():  # one that config_from named stays
            write_text(self._staging.content / README, merged_card(provenance))
        self._staging.sync()
        _refuse_existing(self._staging.target, self._force)  # again: a rename would replace an empty directory
        if self._force and self._staging.target.exists():
            self._staging.take_place()
        else:
            self._staging.put_in_place()

    def abandon(self) -> None:
        """Implements :meth:`Output.abandon`."""
        self._staging.discard()


class CheckpointOutput:
    """Writes a checkpoint of one average, with :data:`PROVENANCE` beside its manifest."""

    def __init__(
        self,
        path: StrPath,
        entries: Sequence[FullTensor],
        name: str,
        schedule: Schedule,
        state: EMAState,
        token: str,
        force: bool,
    ) -> None:
        self.path = os.fspath(path)
        self.dtypes = {entry.name: entry.dtype for entry in entries}
        self._target = local_path(path)
        self._contents = Contents(state, {name: schedule}, entries, {name: lambda _: None})
        self._force = force
        self._storage = LocalWriter(self._target, token)

    def create(self) -> None:
        """Implements :meth:`Output.create`."""
        if not self._force:
            _refuse_existing(self._target, force=False)
        self._storage.create(self._contents.plans, overwrite=self._force)  # which replaces nothing but a checkpoint

    def is_visible(self) -> bool:
        """Implements :meth:`Output.is_visible`."""
        return self._storage.is_visible()

    def writers(self) -> Mapping[str, tuple[TensorWriter, tuple[str, ...]]]:
        """Implements :meth:`Output.writers`."""
        found: dict[str, tuple[TensorWriter, tuple[str, ...]]] = {}
        for folder, plans in self._contents.plans.items():
            writer = self._storage.writer(folder, plans)
            found |= {tensor.name: (writer, (tensor.name,)) for plan in plans for tensor in plan.tensors}
        return found

    def commit(self, digests: Mapping[str, int], provenance: Mapping[str, Any]) -> None:
        """Implements :meth:`Output.commit`."""
        keys = {(folder, entry.name) for folder, held in self._contents.folders.items() for entry in held.entries}
        sums = {key: digests[key[1]] for key in keys}
        self._storage.write_beside(PROVENANCE, json.dumps(provenance, indent=1))
        self._storage.commit(self._contents.manifest(self._storage.data, 0, sums).to_bytes())

    def abandon(self) -> None:
        """Implements :meth:`Output.abandon`."""
        self._storage.abandon()


def _refuse_existing(target: Path, force: bool) -> None:
    """Raises CheckpointError if ``target`` exists, unless ``force`` is set and it holds a model and nothing else."""
    if not os.path.lexists(target):
        return
    if not force:
        raise CheckpointError(f"{target} exists already: give a path that does not, or force=True, which replaces it")
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target} is not a directory: force=True replaces a model's directory, and nothing else")
    names = sorted(entry.name for entry in target.iterdir())
    # A folder may hold anything, such as the checkpoints of a run whose last model lies beside them.
    folders = [entry.name for entry in target.iterdir() if entry.is_dir() and not DATA.fullmatch(entry.name)]
    foreign = [name for name in names if not DATA.fullmatch(name) and not _may_be_of_model(name)]
    if not any(_is_weights(name) for name in names):
        foreign += names
    unknown = sorted(folders) or foreign
    if unknown:
        raise CheckpointError(
            f"{target} holds {unknown[0]!r}, and force=True replaces a directory that holds a model and nothing else: "
            "give another path, or remove it first"
        )


def _is_weights(name: str) -> bool:
    """Returns whether a file shows that its directory is a model or a checkpoint of this library."""
    # README.md and *.json do not: most folders have one, whatever else they hold. Other names with .safetensors do not
    # either: a folder of adapters or data has many such files, and none of them would be written again.
    return name in (PROVENANCE, NAME) or _WEIGHTS.fullmatch(name) is not None


def _may_be_of_model(name: str) -> bool:
    """Returns whether ``save_pretrained``, ``merge``, ``save`` or the Hub put a file of this name beside weights.

    ``force=True`` must not remove anything else, such as code, notes, results or an optimizer's state of the user.
    """
    return _is_weights(name) or name in (*_BESIDE_WEIGHTS, LOCK) or _CODE.fullmatch(name) is not None


def check_output(path: StrPath, force: bool, sources: Sequence[str]) -> None:
    """Raises EMAConfigError for a URL or an invalid path, CheckpointError if the path exists.

    With ``force`` an existing model or checkpoint is allowed, unless it is one of the sources or contains one.
    """
    check_path(path)
    if is_remote(path):
        raise EMAConfigError(f"out={os.fspath(path)!r}: a merge is a directory of this machine")
    target = local_path(path)
    _refuse_existing(target, force)
    for source in sources if force else ():
        if not is_remote(source) and local_path(source).resolve().is_relative_to(target.resolve()):
            raise CheckpointError(f"{target} is, or holds, the source {source}: give another path")
