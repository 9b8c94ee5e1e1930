"""Computes the folders, files and manifest of a checkpoint. The result is the same on every rank.

Shapes and dtypes of all full tensors are known, so the place of every byte is known before anything is written. Each
rank writes the elements that it is the writer of (:mod:`dist_ema.comm.catalogue`), in place, into the same files::

    averages/ema/model.safetensors     | header: rank 0 | w: ranks 0 to 3, each its runs | b: rank 0 | ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from dist_ema.checkpoints.folder import Folder
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.gather import LocalValues
from dist_ema.formats.dtypes import DTYPE_NAMES
from dist_ema.formats.layout import FilePlan
from dist_ema.formats.manifest import LIVE, NAME, Manifest, checksum
from dist_ema.formats.stored import StoredFile, StoredTensor
from dist_ema.schedules import Schedule
from dist_ema.schedules.state import EMAState

#: Maximum bytes of one file.
FILE_LIMIT = 5 * 10**9
#: Placeholders for the name of a data folder and for a fingerprint, with as many characters as the real ones have.
_SOME_DATA = "data-" + "0" * 32
_SOME_DIGEST = 0


class Contents:
    """Describes the folders of a checkpoint: one for each average, and one for the tensors that are not averaged.

    Args:
        state: the clocks, and how many NaN and Inf elements this rank has left out.
        schedules: the schedule of each average.
        entries: every full tensor of the model.
        views: for each average, what this rank holds of a tensor, by its name.
        include_untracked: write the tensors that are not averaged; if False, the manifest only lists their names.
        dtype: dtype of floating-point averages in the files; None means that of the shadow.
    """

    def __init__(
        self,
        state: EMAState,
        schedules: Mapping[str, Schedule],
        entries: Sequence[FullTensor],
        views: Mapping[str, Callable[[str], LocalValues | None]],
        include_untracked: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.state = state
        self._schedules = schedules
        tracked = [entry for entry in entries if entry.mode != "live"]
        live = [entry for entry in entries if entry.mode == "live"]
        self._lacking = () if include_untracked else tuple(entry.name for entry in live)
        self._frozen = tuple(entry.name for entry in live if entry.frozen) if include_untracked else ()
        self.folders = {f"averages/{name}": _folder(tracked, held, dtype) for name, held in views.items()}
        if live and include_untracked:  # tensors that are not averaged are the same in every view
            self.folders[LIVE] = _folder(live, next(iter(views.values())))

    @cached_property
    def plans(self) -> dict[str, list[FilePlan]]:
        """Returns the files of each folder. Raises CheckpointError for what safetensors cannot store."""
        return {name: folder.plans for name, folder in self.folders.items()}

    def manifest(
        self, data: str = _SOME_DATA, skipped: int = 0, digests: Mapping[tuple[str, str], int] | None = None
    ) -> Manifest:
        """Returns the manifest; without arguments a manifest of the same size.

        Args:
            data: name of the data folder.
            skipped: number of NaN and Inf elements that all ranks have left out.
            digests: fingerprints of the full tensors, by folder and name.
        """
        # The plans of the files give everything but the fingerprints, so the size is known before anything is read.
        files: dict[str, StoredFile] = {}
        tensors: dict[str, dict[str, StoredTensor]] = {name: {} for name in self.folders}
        for folder, plans in self.plans.items():
            aliases = {entry.name: entry.aliases for entry in self.folders[folder].entries}
            for plan in plans:
                file = f"{folder}/{plan.name}"
                files[file] = StoredFile(plan.size, checksum(plan.header))
                for name, dtype, shape in plan.tensors:
                    digest = _SOME_DIGEST if digests is None else digests[folder, name]
                    tensors[folder][name] = StoredTensor(file, DTYPE_NAMES[dtype], shape, digest, aliases[name])
        return Manifest(
            data=data,
            state=replace(self.state, skipped=skipped),
            schedules=self._schedules,
            averages={name: tensors[f"averages/{name}"] for name in self._schedules},
            live=tensors.get(LIVE, {}),
            files=files,
            lacking=self._lacking,
            frozen=self._frozen,
        )

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of every file of the checkpoint, by its path in it, including the manifest."""
        manifest = self.manifest()
        files = {f"{manifest.data}/{name}": file.size for name, file in manifest.files.items()}
        return files | {NAME: len(manifest.to_bytes())}


def _folder(
    entries: Sequence[FullTensor], held: Callable[[str], LocalValues | None], dtype: torch.dtype | None = None
) -> Folder:
    dtypes = {entry.name: entry.cast(dtype) for entry in entries}  # without a fingerprint the tensor is not verified
    return Folder(entries, held, dtypes, FILE_LIMIT, tied=False, with_digests=True)
