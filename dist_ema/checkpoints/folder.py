"""Writes the full tensors of one folder: in place by all ranks, or gathered to rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoints.arrangement import Arrangement
from dist_ema.comm.agreement import agreed
from dist_ema.comm.catalogue import FullTensor, is_writer
from dist_ema.comm.collectives import rank_in
from dist_ema.comm.gather import LocalValues, gather_each
from dist_ema.formats.layout import FilePlan, TensorPlan, plan_files
from dist_ema.geometry.runs import Runs, chunks, count
from dist_ema.kernels.fingerprint import partial_digest
from dist_ema.storage.base import TensorWriter

#: Number of elements that are converted, digested and written at a time.
IO_CHUNK = 1 << 19


@dataclass
class Folder:
    """Describes full tensors that go into the files of one folder, and what this rank holds of them.

    Attributes:
        entries: the tensors, the same on every rank.
        held: returns what this rank holds of the tensor of a name; None if nothing.
        dtypes: the dtype in the files, by name.
        limit: maximum bytes of one file.
        tied: write a tied tensor under all of its names; if False, under the first one.
        stem: how the names of the files begin.
        metadata: further entries of the files' headers.
        arrangement: the tensors of the files, if they are made of these in another way; None means that they are the
            same.
        with_digests: compute fingerprints.
        digests: sums of the fingerprints of what this rank has written, by name.
    """

    entries: Sequence[FullTensor]
    held: Callable[[str], LocalValues | None]
    dtypes: dict[str, torch.dtype]
    limit: int
    tied: bool
    stem: str = "model"
    metadata: Mapping[str, str] | None = None
    arrangement: Arrangement | None = None
    with_digests: bool = False
    digests: dict[str, int] = field(default_factory=dict)

    @cached_property
    def plans(self) -> list[FilePlan]:
        """Returns the files; every rank computes the same. Raises CheckpointError for what safetensors cannot store."""
        if self.arrangement is not None:
            return plan_files(self.arrangement.targets, self.limit, self.stem, self.metadata)
        tensors = [
            TensorPlan(name, self.dtypes[entry.name], entry.shape)
            for entry in self.entries
            for name in self._names(entry)
        ]
        return plan_files(tensors, self.limit, self.stem, self.metadata)

    @property
    def written(self) -> list[FullTensor]:
        """Returns the tensors that have an element in the files."""
        known = None if self.arrangement is None else self.arrangement.sources
        return [entry for entry in self.entries if known is None or entry.name in known]

    def write_own(self, writer: TensorWriter, group: dist.ProcessGroup | None) -> None:
        """Writes the elements that this rank is the writer of, if every rank sees the files. Local.

        Args:
            writer: writes into the files. The caller syncs it.
            group: the ranks among which each tensor has its writers.
        """
        self._read_own(writer, group)

    def write_gathered(self, writer: TensorWriter, group: dist.ProcessGroup | None, operation: str) -> None:
        """Sends all elements to rank 0, window by window, which alone writes. Collective.

        Tensors come in the order of the files, as an object store needs them, unless a tensor has several names.

        Args:
            writer: writes into the files, on rank 0 only. The caller syncs it.
            group: the ranks.
            operation: names the operation in the error, which is raised on all ranks.
        """

        def take(entry: FullTensor, start: int, values: Tensor) -> None:
            self._put(writer, entry, ((start, values.numel()),), values.cpu())

        if (
            self.with_digests
        ):  # each rank digests its own elements; rank 0 alone would take as much longer as there are ranks
            with agreed(group, operation):
                self._read_own(None, group)
        ordered = self.written
        if self.arrangement is None:
            tensors = (tensor for plan in self.plans for tensor in plan.tensors)
            places = {tensor.name: place for place, tensor in enumerate(tensors)}
            ordered.sort(key=lambda entry: places[entry.name])
        gather_each(ordered, self.held, self.dtypes, group, take, operation)

    def _read_own(self, writer: TensorWriter | None, group: dist.ProcessGroup | None) -> None:
        """Reads this rank's elements in chunks, computes their digests, and writes them if there is a writer. Local."""
        rank = rank_in(group)
        for entry in self.written:
            mine = self.held(entry.name)
            if mine is None or not is_writer(entry, mine.share, rank):
                continue
            total = 0
            for runs, values in mine.chunks(self.dtypes[entry.name], IO_CHUNK):
                total += partial_digest(values, runs) if self.with_digests else 0
                if writer is not None:
                    self._put(writer, entry, runs, values)
            self.digests[entry.name] = total

    def _put(self, writer: TensorWriter, entry: FullTensor, runs: Runs, values: Tensor) -> None:
        """Writes elements of a tensor under the names that they have in the files. Local."""
        if self.arrangement is None:
            for name in self._names(entry):
                writer.write(name, runs, values)
            return
        low = 0
        for part in chunks(
            runs, IO_CHUNK
        ):  # a gathered window is larger, and arranging needs an index for each element
            high = low + count(part)
            for name, places, moved in self.arrangement.place(entry.name, part, values[low:high]):
                writer.write(name, places, moved)
            low = high

    def _names(self, entry: FullTensor) -> tuple[str, ...]:
        return entry.names if self.tied else (entry.name,)
