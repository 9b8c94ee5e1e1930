"""Loads a checkpoint on all ranks: each rank reads its elements, at any world size and under any engine.

A checkpoint holds full tensors, so nothing is resharded. A rank reads the runs of its own share from the files, no
matter which rank wrote them. A tensor of 12 elements, saved on 3 ranks and loaded on 2::

    saved by       [ 0 0 0 0 1 1 1 1 2 2 2 2 ]       each rank wrote its runs in place
    in the file    [ . . . . . . . . . . . . ]       the full tensor, row-major
    read by        [ 0 0 0 0 0 0 1 1 1 1 1 1 ]       each rank reads its runs

If other ranks do not see rank 0's files, rank 0 reads them and sends windows of 16 MiB.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
import torch.distributed as dist

from dist_ema.checkpoints.parts import Part, read_own, read_sent
from dist_ema.checkpoints.reader import damaged_error
from dist_ema.checkpoints.versions import read_manifest_bytes
from dist_ema.comm.agreement import agreed
from dist_ema.comm.catalogue import FullTensor, is_writer
from dist_ema.comm.collectives import broadcast_object, gather_objects, rank_in, sum_integers
from dist_ema.errors import CheckpointMismatchError, EMAError
from dist_ema.formats.dtypes import DTYPES, is_convertible
from dist_ema.formats.manifest import LIVE, Key, Manifest, checksum
from dist_ema.formats.stored import StoredTensor
from dist_ema.geometry.shares import Share, shadow_dtype
from dist_ema.schedules import Schedule
from dist_ema.shadow.device import Shadow
from dist_ema.storage.paths import StrPath

logger = logging.getLogger(__name__)


def report_schedules(saved: Mapping[str, Schedule], schedules: Mapping[str, Schedule]) -> None:
    """Logs each average whose schedule differs from the saved one. Local."""
    for name, schedule in schedules.items():
        before = saved.get(name)
        # Compared as JSON, in which a tuple of a user's schedule has become a list.
        if before is not None and json.dumps(before.to_dict()) != json.dumps(schedule.to_dict()):
            logger.warning("Average %r was saved with %s and continues with %s.", name, before, schedule)


def _find(tensors: Mapping[str, StoredTensor], entry: FullTensor) -> StoredTensor | None:
    """Returns the stored tensor that has one of the names of an entry; None if there is none."""
    return next((tensors[name] for name in entry.names if name in tensors), None)


class Load:
    """Carries out one load: ``match()``, then ``fill()``. The constructor and ``was_replaced()`` are collective, too.

    All ranks load the checkpoint that rank 0 sees. If every rank sees that manifest, each reads its own elements; else
    rank 0 reads all of them and sends them, window by window.

    Args:
        path: the checkpoint, a directory or a URL.
        entries: every full tensor of the model.
        names: the names of the averages to load.
        group: the ranks.
        selects: returns whether ``include`` and ``exclude`` admit a name to the average.
        dtype: the dtype of averages; None means each tensor's own.
        trained: names of this rank's parameters that are trained now and not averaged yet.

    Attributes:
        manifest: the manifest of the checkpoint.
        joining: names of parameters that join the average with this load. They are frozen in the model and have an
            average in the checkpoint, or they are trained now and were frozen in the checkpoint.
        shapes: shapes of buffers that have another shape in the checkpoint, by name.
    """

    def __init__(
        self,
        path: StrPath,
        entries: Sequence[FullTensor],
        names: Sequence[str],
        group: dist.ProcessGroup | None,
        selects: Callable[[str], bool],
        dtype: torch.dtype | None,
        trained: Collection[str] = (),
    ) -> None:
        self._path = path
        self._group = group
        self._first = rank_in(group) == 0
        self._operation = f"load from {path}"
        self._text = b""
        with agreed(group, self._operation) as round_:
            try:
                self._text = read_manifest_bytes(path)
            except EMAError:  # other ranks may not see the disk, or lack the package that opens such a URL
                if self._first:
                    raise
            round_.send((checksum(self._text), sorted(trained)))
        sums, names_trained = zip(*round_.received, strict=True)
        # Equal checksums mean equal manifests, whose data folder has a name that no other save uses. So if they are
        # equal all ranks see the same files.
        self._shared = len(set(sums)) == 1
        if not self._shared:
            self._text = broadcast_object(self._text, group)
        self.manifest = Manifest.from_bytes(self._text)
        self._names = names
        self._trained = set(chain.from_iterable(names_trained))  # stages of a pipeline have different names
        self.joining: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        fitted = [self._fitted(entry, selects, dtype) for entry in entries]
        self._entries = [entry for entry in fitted if entry.mode != "live"]  # load() writes into no live weights

    def _fitted(self, entry: FullTensor, selects: Callable[[str], bool], dtype: torch.dtype | None) -> FullTensor:
        """Returns the entry of a tensor as the load makes it: averaged although frozen, or resized. Pure."""
        stored = next(
            (tensor for tensors in self.manifest.averages.values() if (tensor := _find(tensors, entry))), None
        )
        constant = any(name in self.manifest.frozen for name in entry.names)
        unfrozen = constant and any(name in self._trained for name in entry.names)
        if (
            unfrozen and stored is None and selects(entry.name)
        ):  # the frozen value is the average of a parameter that never changed
            self.joining.update(entry.names)
            return replace(entry, mode="average", dtype=shadow_dtype(entry.live_dtype, dtype), frozen=False)
        if stored is None:
            return entry
        if entry.frozen and selects(entry.name):
            self.joining.update(entry.names)
            return replace(entry, mode="average", dtype=shadow_dtype(entry.live_dtype, dtype), frozen=False)
        own = entry.buffer and entry.mode != "live" and not entry.partitioned
        alike = is_convertible(DTYPES[stored.dtype], entry.dtype)
        if own and alike and stored.shape != entry.shape:
            self.shapes |= dict.fromkeys(entry.names, stored.shape)
            return replace(entry, shape=stored.shape)
        return entry

    def was_replaced(self) -> bool:
        """Returns whether a save has replaced the checkpoint. Collective: all ranks get the answer of rank 0."""
        replaced = False
        if self._first:
            try:
                replaced = read_manifest_bytes(self._path) != self._text
            except EMAError:  # removed, or not readable any more
                replaced = True
        # Rank 0 decides. Ranks that look at different moments could disagree, and not all would start over.
        return broadcast_object(replaced, self._group)

    def match(self, strict: bool) -> dict[str, dict[str, Key]]:
        """Finds the stored tensor for each tensor of the model, in each average. Pure; the same on every rank.

        Returns:
            The key of the stored tensor, by the name of the average and the canonical name.

        Raises:
            CheckpointMismatchError: lists all missing, unexpected and mismatched tensors. With ``strict=False`` they
                are logged, and left out of the result.
        """
        found: dict[str, dict[str, Key]] = {}
        problems: list[str] = []
        for name in self._names:
            if name in self.manifest.averages:
                found[name] = self._match_average(name, problems)
            else:
                problems.append(f"missing average {name!r} (there are {', '.join(map(repr, self.manifest.averages))})")
        problems += [f"unexpected average {name!r}" for name in self.manifest.averages if name not in self._names]
        if problems and strict:
            raise CheckpointMismatchError(f"{self._operation}: it does not fit this model: {'; '.join(problems)}")
        if problems:
            logger.warning("%s: left out, as it does not fit: %s", self._operation, "; ".join(problems))
        return found

    def _match_average(self, average: str, problems: list[str]) -> dict[str, Key]:
        """Pairs tensors by name, tied ones by any of their names. Adds what does not fit to ``problems``."""
        stored = self.manifest.averages[average]
        by_name = {known: name for name, tensor in stored.items() for known in (name, *tensor.aliases)}
        constant = set(self.manifest.frozen)  # parameters that were frozen are stored beside the averages
        found: dict[str, Key] = {}
        used = set()
        for entry in self._entries:
            # Tied tensors may be stored under another of their names. A parameter without an average may have been
            # frozen when the checkpoint was saved.
            name = next((by_name[known] for known in entry.names if known in by_name), None)
            frozen = None if name is not None else next((known for known in entry.names if known in constant), None)
            if name is None and frozen is None:
                problems.append(f"missing {entry.name!r}")
                continue
            key = (LIVE, frozen) if frozen is not None else (f"averages/{average}", name or "")
            tensor = self.manifest.live[frozen] if frozen is not None else stored[key[1]]
            used.add(name)
            shape = tensor.shape
            dtype = DTYPES[tensor.dtype]
            if shape != entry.shape or not is_convertible(dtype, entry.dtype):
                problems.append(
                    f"shape mismatch for {entry.name!r}: checkpoint {shape} {dtype}, model {entry.shape} {entry.dtype}"
                )
            else:
                found[entry.name] = key
        problems += [f"unexpected {name!r}" for name in stored if name not in used]
        return found

    def fill(
        self, shadow: Shadow, shares: Sequence[Share], found: Mapping[str, Mapping[str, Key]], verify: bool
    ) -> None:
        """Reads this rank's elements into a shadow that has been allocated. Collective.

        Args:
            shadow: the shadow of these shares.
            shares: what this rank averages of each tensor.
            found: the result of ``match()``.
            verify: check the fingerprints of what is read.

        Raises:
            CheckpointCorruptError: on every rank. The shadow must not be used then.
        """
        parts = self._parts(shadow, shares, found)
        if self._shared:
            with agreed(self._group, self._operation):
                sums = read_own(self._path, self.manifest, parts, verify)
        else:
            sums = read_sent(self._path, self.manifest, parts, verify, self._group, self._operation)
        if verify:
            self._compare(parts, sums)

    def _parts(self, shadow: Shadow, shares: Sequence[Share], found: Mapping[str, Mapping[str, Key]]) -> list[Part]:
        """Lists what to read, in the same order on all ranks. Averages share the buffers, which the first average
        reads.
        """
        own = {share.spec.name: share for share in shares}
        stored = self.manifest.tensors()
        parts = []
        for average, keys in found.items():
            outs = dict(zip(own, shadow.tensors(average), strict=True))
            for entry in self._entries:
                if (key := keys.get(entry.name)) is not None:
                    # Buffers are stored with each average and are the same in all of them: the first one is read.
                    out = outs.get(entry.name) if entry.mode == "average" or average == self._names[0] else None
                    parts.append(Part(key, stored[key], entry, own.get(entry.name), out))
        return parts

    def _compare(self, parts: Sequence[Part], sums: Sequence[int]) -> None:
        """Raises CheckpointCorruptError, on every rank, unless all fingerprints match. Collective.

        The sums of the ranks that write a tensor add up to its fingerprint. A rank whose sum is not counted compares by
        itself if it has read the whole tensor. If it has read a part, other ranks have read the same part.

        Args:
            parts: the tensors that were read.
            sums: for each part, the sum over the elements that this rank has read.
        """
        rank = rank_in(self._group)
        counted = []
        damaged = []
        for part, own in zip(parts, sums, strict=True):
            counts = part.share is not None and is_writer(part.entry, part.share, rank)
            counted.append(own if counts else 0)
            is_whole = part.share is not None and part.share.numel == part.entry.numel
            if not counts and is_whole and own % (1 << 64) != part.stored.digest:
                damaged.append(str(part))
        # One more number says whether any tensor is damaged, so names are gathered only then.
        any_damaged, *totals = sum_integers([len(damaged), *counted], self._group)
        found = {str(part) for part, total in zip(parts, totals, strict=True) if total != part.stored.digest}
        if any_damaged:
            found.update(*gather_objects(damaged, self._group))
        if found:
            raise damaged_error(self._path, sorted(found))
