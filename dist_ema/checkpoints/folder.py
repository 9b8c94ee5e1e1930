"""Full tensors from all ranks into the files of one folder: in place by everyone, or through rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoints.arrangement import Arrangement
from dist_ema.checkpoints.layout import FilePlan, TensorPlan, plan_files
from dist_ema.checkpoints.storage.base import TensorWriter
from dist_ema.collectives import agreed, rank_in
from dist_ema.kernels.fingerprint import partial_digest
from dist_ema.sharding.gather import LocalValues, gather_each
from dist_ema.sharding.runs import Runs, chunks, count
from dist_ema.sharding.writers import FullTensor, is_writer

#: Elements that are converted, digested and written at a time.
IO_CHUNK = 1 << 19


@dataclass
class Folder:
    """Full tensors that go into one folder, and what this rank holds of them.

    Attributes:
        entries: the tensors, the same on every rank.
        held: what this rank has of one, by its name.
        dtypes: what each is written as.
        limit: bytes of one file at most.
        tied: write a tied tensor under all of its names.
        stem: of the files' names.
        arrangement: what is written in place of the tensors, made of their elements; None means the tensors.
        digests: of what this rank wrote, by name; empty unless they were asked for.
    """

    entries: Sequence[FullTensor]
    held: Callable[[str], LocalValues | None]
    dtypes: dict[str, torch.dtype]
    limit: int
    tied: bool
    stem: str = "model"
    arrangement: Arrangement | None = None
    digests: dict[str, int] = field(default_factory=dict)

    def lay_out_files(self) -> list[FilePlan]:
        """The files. Pure: every rank computes the same."""
        if self.arrangement is not None:
            return plan_files(self.arrangement.targets, self.limit, self.stem)
        tensors = [
            TensorPlan(name, self.dtypes[entry.name], entry.shape)
            for entry in self.entries
            for name in self.names(entry)
        ]
        return plan_files(tensors, self.limit, self.stem)

    @property
    def written(self) -> list[FullTensor]:
        """The tensors that have an element in the files."""
        known = None if self.arrangement is None else self.arrangement.sources
        return [entry for entry in self.entries if known is None or entry.name in known]

    def names(self, entry: FullTensor) -> tuple[str, ...]:
        """The names under which a tensor is written."""
        return entry.names if self.tied else (entry.name,)

    def write(
        self,
        writer: TensorWriter,
        plans: Sequence[FilePlan],
        group: dist.ProcessGroup | None,
        shared: bool,
        digest: bool,
        operation: str,
    ) -> None:
        """Fills the files; what was written has to be synced yet. Collective unless ``shared``.

        An error of one rank is raised on all; where they share the files, on that rank alone, since no other waits for
        it yet.

        Args:
            writer: of the files.
            plans: what ``lay_out_files()`` gave.
            group: the ranks.
            shared: every rank sees the files and writes its own elements; else rank 0 writes all of them, tensor by
                tensor in the order of the files where no tensor is tied.
            digest: take the fingerprint of what is written.
            operation: for the error.
        """
        if shared:
            self._each_chunk(group, digest, writer)
        else:
            self._write_gathered(writer, plans, group, digest, operation)

    def _write_gathered(
        self,
        writer: TensorWriter,
        plans: Sequence[FilePlan],
        group: dist.ProcessGroup | None,
        digest: bool,
        operation: str,
    ) -> None:
        def take(entry: FullTensor, start: int, values: Tensor) -> None:
            self._write(writer, entry, ((start, values.numel()),), values.cpu())

        if digest:
            with agreed(group, operation):
                self._each_chunk(group, digest, None)
        ordered = self.written
        if self.arrangement is None:
            tensors = (tensor for plan in plans for tensor in plan.tensors)
            places = {tensor.name: place for place, tensor in enumerate(tensors)}
            ordered.sort(key=lambda entry: places[entry.name])
        gather_each(ordered, self.held, self.dtypes, group, take, operation)

    def _each_chunk(self, group: dist.ProcessGroup | None, digest: bool, writer: TensorWriter | None) -> None:
        rank = rank_in(group)
        for entry in self.written:
            mine = self.held(entry.name)
            if mine is None or not is_writer(entry, mine.share, rank):
                continue
            scratch = torch.empty(min(IO_CHUNK, mine.share.numel), dtype=self.dtypes[entry.name])
            low, total = 0, 0
            for runs in chunks(mine.runs, IO_CHUNK):
                values = mine.chunk(low, low + count(runs), scratch)
                low += values.numel()
                total += partial_digest(values, runs) if digest else 0
                if writer is not None:
                    self._write(writer, entry, runs, values)
            self.digests[entry.name] = total

    def _write(self, writer: TensorWriter, entry: FullTensor, runs: Runs, values: Tensor) -> None:
        if self.arrangement is None:
            for name in self.names(entry):
                writer.write(name, runs, values)
            return
        low = 0
        for part in chunks(runs, IO_CHUNK):  # what is gathered comes in more, and has an index for each element
            high = low + count(part)
            for name, places, moved in self.arrangement.place(entry.name, part, values[low:high]):
                writer.write(name, places, moved)
            low = high
