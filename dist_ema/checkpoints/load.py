"""A checkpoint into memory: whole tensors in one process, or each rank's elements at any world size."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoints.dtypes import DTYPES
from dist_ema.checkpoints.manifest import Manifest, StoredTensor, checksum
from dist_ema.checkpoints.reader import RunReader, read_manifest_bytes, reread
from dist_ema.checkpoints.storage.paths import StrPath
from dist_ema.collectives import (
    WINDOW_BYTES,
    agreed,
    answered,
    broadcast_object,
    device_for,
    gather_objects,
    rank_in,
    sum_integers,
)
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, EMAConfigError, EMAError
from dist_ema.kernels.fingerprint import partial_digest
from dist_ema.kernels.streams import Handover
from dist_ema.schedules import Schedule
from dist_ema.shadow.device import Shadow
from dist_ema.sharding.runs import Runs, chunks, count, overlap, whole
from dist_ema.sharding.shares import Share
from dist_ema.sharding.writers import FullTensor, is_writer

logger = logging.getLogger(__name__)
#: Elements that are read, digested and converted at a time.
IO_CHUNK = 1 << 19
Key = tuple[str, str]


def stored_tensors(manifest: Manifest) -> dict[Key, StoredTensor]:
    """Every tensor of a checkpoint by folder and name."""
    return {
        (folder, name): tensor for folder, tensors in manifest.folders().items() for name, tensor in tensors.items()
    }


def open_reader(path: StrPath, manifest: Manifest) -> RunReader:
    """Opens and checks every file of a checkpoint; see :class:`RunReader`. Local."""
    return RunReader(path, manifest.data, manifest.files, stored_tensors(manifest))


# In one process.


def read_checkpoint(path: StrPath, name: str | None = None) -> dict[str, Tensor]:
    """Full tensors of one average, with what is not averaged, by canonical name, tied ones under each. One process.

    A checkpoint that was saved with ``include_untracked=False`` has no more than the average and its buffers.

    Args:
        path: of the checkpoint, a directory or a URL.
        name: which average; None means the only one.

    Raises:
        EMAConfigError: there is no such average, or there are several and none was named.
        CheckpointError, CheckpointCorruptError: there is none, or it is damaged; what is returned has been verified.
    """
    return reread(path, lambda manifest: _read_all(path, manifest, name))


def _read_all(path: StrPath, manifest: Manifest, name: str | None) -> dict[str, Tensor]:
    chosen = choose_average(manifest, name)
    state: dict[str, Tensor] = {}
    damaged = []
    with open_reader(path, manifest) as reader:
        for key, tensor in stored_tensors(manifest).items():
            if key[0].startswith("averages/") and key[0] != f"averages/{chosen}":
                continue
            full = torch.empty(tensor.shape, dtype=reader.dtype(key))
            runs = whole(full.numel())
            reader.read(key, runs, full.view(-1))
            if partial_digest(full, runs) != tensor.digest:
                damaged.append(f"{tensor.file}: {key[1]!r}")
            state |= dict.fromkeys((key[1], *tensor.aliases), full)
    if damaged:
        raise damaged_error(path, damaged)
    return state


def choose_average(manifest: Manifest, name: str | None) -> str:
    """The average that is meant. Raises EMAConfigError if that is not clear."""
    names = tuple(manifest.averages)
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        raise EMAConfigError(f"name={name!r}: the checkpoint has {', '.join(map(repr, names))}")
    return name


def damaged_error(path: StrPath, found: Sequence[str]) -> CheckpointCorruptError:
    """The error for data that are not what was written."""
    return CheckpointCorruptError(f"{path} is damaged; its data are not what was written: {'; '.join(found)}")


# On every rank.


def report_schedules(saved: Mapping[str, Schedule], schedules: Mapping[str, Schedule]) -> None:
    """Logs where the saved schedules are not these. Local."""
    for name, schedule in schedules.items():
        before = saved.get(name)
        if before is not None and before != schedule:
            logger.warning("Average %r was saved with %s and goes on with %s.", name, before, schedule)


@dataclass(frozen=True)
class Want:
    """What this rank wants of one stored tensor: the elements of a share, into a flat shadow."""

    key: Key
    entry: FullTensor
    share: Share | None
    out: Tensor | None


class Load:
    """One load: ``match()``, then ``read()``. Collective.

    Args:
        path: of the checkpoint.
        entries: every full tensor of the model.
        names: of the averages to load.
        group: the ranks.
    """

    def __init__(
        self, path: StrPath, entries: Sequence[FullTensor], names: Sequence[str], group: dist.ProcessGroup | None
    ) -> None:
        self._path = path
        self._group = group
        self._first = rank_in(group) == 0
        self._operation = f"load from {path}"
        self._text = b""
        with agreed(group, self._operation) as round_:
            try:
                self._text = read_manifest_bytes(self._path)
            except EMAError:  # others may not see the disk, or lack what reads URLs
                if self._first:
                    raise
            round_.send(checksum(self._text))
        self._shared = len(set(round_.received)) == 1
        if not self._shared:
            self._text = broadcast_object(self._text, group)
        self.manifest = Manifest.from_bytes(self._text)
        self._entries = [entry for entry in entries if entry.mode != "live"]
        self._names = names

    def _sees_it(self) -> bool:
        """Whether this process sees the checkpoint that rank 0 saw."""
        try:
            return read_manifest_bytes(self._path) == self._text
        except EMAError:  # what reads URLs may be missing on this rank alone
            return False

    def was_replaced(self) -> bool:
        """Whether a save has put another checkpoint there since, which then has to be read. Collective."""
        return broadcast_object(self._first and not self._sees_it(), self._group)

    def match(self, strict: bool) -> dict[str, dict[str, Key]]:
        """Where each tensor of each average is stored, by average and canonical name. The same on every rank.

        Raises CheckpointMismatchError, on every rank, listing all that is missing, unexpected or misshapen; with
        ``strict=False`` it logs that, and leaves those out.
        """
        found: dict[str, dict[str, Key]] = {}
        problems: list[str] = []
        for name in self._names:
            stored = self.manifest.averages.get(name)
            if stored is None:
                problems.append(f"missing average {name!r} (there are {', '.join(map(repr, self.manifest.averages))})")
                continue
            found[name] = {}
            by_name = {known: key for key, tensor in stored.items() for known in (key, *tensor.aliases)}
            used = set()
            for entry in self._entries:
                key = next((by_name[known] for known in entry.names if known in by_name), None)
                if key is None:
                    problems.append(f"missing {entry.name!r}")
                    continue
                used.add(key)
                shape, dtype = stored[key].shape, DTYPES[stored[key].dtype]
                if shape != entry.shape or dtype.is_floating_point != entry.dtype.is_floating_point:
                    problems.append(f"misshapen {entry.name!r}: {shape} {dtype} instead of {entry.shape} {entry.dtype}")
                else:
                    found[name][entry.name] = (f"averages/{name}", key)
            problems += [f"unexpected {key!r}" for key in stored if key not in used]
        if self.manifest.averages.keys() - set(self._names):
            problems += [f"unexpected average {name!r}" for name in self.manifest.averages if name not in self._names]
        if problems and strict:
            raise CheckpointMismatchError(f"{self._operation}: it does not fit this model: {'; '.join(problems)}")
        if problems:
            logger.warning("%s: left out, as it does not fit: %s", self._operation, "; ".join(problems))
        return found

    def wants(self, found: Mapping[str, Mapping[str, Key]], shares: Mapping[str, Share], shadow: Shadow) -> list[Want]:
        """What to read into ``shadow``, in an order that all ranks share. Buffers are those of the first average."""
        wants = []
        for average, keys in found.items():
            outs = dict(zip(shares, shadow.tensors(average), strict=True))
            for entry in self._entries:
                if entry.name in keys:
                    out = outs.get(entry.name) if entry.mode == "average" or average == self._names[0] else None
                    wants.append(Want(keys[entry.name], entry, shares.get(entry.name), out))
        return wants

    def read(self, wants: Sequence[Want], verify: bool) -> None:
        """Fills what is wanted, the same tensors in the same order on every rank. Collective.

        Raises CheckpointCorruptError on every rank; what was filled is then not to be used.
        """
        if self._shared:
            with agreed(self._group, self._operation):
                sums = self._read_own(wants, verify)
        else:
            sums = self._read_sent(wants, verify)
        if verify:
            self._compare(wants, sums)

    def _compare(self, wants: Sequence[Want], sums: Sequence[int]) -> None:
        """Raises CheckpointCorruptError, on every rank, if what was read is not what was written. Collective.

        Args:
            wants: what was read.
            sums: of what this rank has read of each, for the digest.
        """
        damaged = []
        spoken = []
        for want, own in zip(wants, sums, strict=True):
            heard = want.share is not None and is_writer(want.entry, want.share, self._group)
            spoken.append(own if heard else 0)
            # Another rank's sum is counted; one that holds everything can check for itself.
            whole_tensor = want.share is not None and want.share.numel == want.entry.numel
            if not heard and whole_tensor and own % (1 << 64) != self._stored(want).digest:
                damaged.append(self._name(want))
        count_damaged, *totals = sum_integers([len(damaged), *spoken], self._group)
        read = zip(wants, totals, strict=True)
        found = {self._name(want) for want, total in read if total != self._stored(want).digest}
        if count_damaged:
            found.update(*gather_objects(damaged, self._group))
        if found:
            raise damaged_error(self._path, sorted(found))

    def _name(self, want: Want) -> str:
        return f"{self._stored(want).file}: {want.key[1]!r}"

    def _stored(self, want: Want) -> StoredTensor:
        return self.manifest.folders()[want.key[0]][want.key[1]]

    def _read_own(self, wants: Sequence[Want], verify: bool) -> list[int]:
        """Reads this rank's elements, with as many threads as torch has. Local."""
        scratch = threading.local()

        def take(want: Want, runs: Runs, low: int) -> int:
            out = want.out[low : low + count(runs)] if want.out is not None else None
            dtype = reader.dtype(want.key)
            if out is not None and out.is_cpu and out.dtype == dtype:  # straight into its place
                reader.read(want.key, runs, out)
                return partial_digest(out, runs) if verify else 0
            if not hasattr(scratch, "bytes"):
                scratch.bytes = torch.empty(IO_CHUNK * 16, dtype=torch.uint8)
            values = scratch.bytes[: count(runs) * dtype.itemsize].view(dtype)
            reader.read(want.key, runs, values)
            if out is not None:
                with handover.taken():
                    out.copy_(values)
            return partial_digest(values, runs) if verify else 0

        handover = Handover(want.out for want in wants if want.out is not None)
        with open_reader(self._path, self.manifest) as reader:
            pool = ThreadPoolExecutor(torch.get_num_threads())
            try:
                jobs = []
                for want in wants:
                    parts = list(chunks(want.share.runs if want.share is not None else (), IO_CHUNK))
                    lows = accumulate(map(count, parts), initial=0)
                    jobs.append([pool.submit(take, want, part, low) for part, low in zip(parts, lows, strict=False)])
                return [sum(job.result() for job in parts) for parts in jobs]
            finally:  # before the files are closed
                pool.shutdown(cancel_futures=True)

    def _read_sent(self, wants: Sequence[Want], verify: bool) -> list[int]:
        """Rank 0 reads and sends, window by window, where others do not see its disk. Collective."""
        with agreed(self._group, self._operation):
            buffer = torch.empty(WINDOW_BYTES, dtype=torch.uint8)
            reader = open_reader(self._path, self.manifest) if self._first else None
        failures: list[Exception] = []  # a rank that fails goes on sending and receiving, so that no other waits
        sums = []
        try:
            for want in wants:
                low, total = 0, 0
                for runs, values in self._windows(reader, want, buffer, failures):
                    try:
                        total += partial_digest(values, runs) if verify else 0
                        if want.out is not None:
                            want.out[low : low + values.numel()].copy_(values)
                    except Exception as error:
                        failures.append(error)
                    low += values.numel()
                sums.append(total)
        finally:
            if reader is not None:
                reader.close()
        with agreed(self._group, self._operation):
            if failures:
                raise failures[0]
        return sums

    def _windows(
        self, reader: RunReader | None, want: Want, buffer: Tensor, failures: list[Exception]
    ) -> Iterator[tuple[Runs, Tensor]]:
        dtype = DTYPES[self._stored(want).dtype]
        size = WINDOW_BYTES // dtype.itemsize
        for start in range(0, want.entry.numel, size):
            stop = min(start + size, want.entry.numel)
            values = buffer[: (stop - start) * dtype.itemsize].view(dtype)
            if reader is not None and not failures:
                try:
                    reader.read(want.key, ((start, stop - start),), values)
                except Exception as error:
                    failures.append(error)
            _broadcast_bytes(values, self._group)
            runs = want.share.runs if want.share is not None else ()
            for _, inside, length in overlap(runs, start, stop):
                yield ((start + inside, length),), values[inside : inside + length]


def _broadcast_bytes(values: Tensor, group: dist.ProcessGroup | None) -> None:
    sent = values.view(torch.uint8).to(device_for(group))
    with answered():
        dist.broadcast(sent, group=group, group_src=0)
    values.view(torch.uint8).copy_(sent)
