"""Finds every damage of a checkpoint, in one process and bounded memory; and reads single tensors with verification."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_ema.checkpoints.file_values import Advance, no_advance
from dist_ema.checkpoints.parts import IO_CHUNK
from dist_ema.checkpoints.reader import RunReader, damaged_error
from dist_ema.checkpoints.versions import reread
from dist_ema.errors import CheckpointCorruptError
from dist_ema.formats.dtypes import WIDEST
from dist_ema.formats.manifest import NAME, Key, Manifest
from dist_ema.formats.stored import StoredTensor
from dist_ema.formats.tensors import ReadableTensor
from dist_ema.geometry.runs import Runs, chunks, count, whole
from dist_ema.kernels.fingerprint import partial_digest
from dist_ema.runtime.threads import work_through
from dist_ema.storage.paths import StrPath

#: The problem of a tensor that can be read and is damaged.
WRONG = "its fingerprint does not match"
#: Elements that one thread takes at a time, chunk by chunk.
_STRIPE = 32 * IO_CHUNK
#: Elements that :meth:`VerifiedTensor.chunks` gives at a time: few, since callers make several float64 copies of them.
PIECE = IO_CHUNK // 2


@dataclass(frozen=True)
class Finding:
    """Describes one damage.

    Attributes:
        file: path in the data folder, or the manifest.
        tensor: name of the damaged tensor; None if the file itself is damaged.
        problem: what is wrong.
    """

    file: str
    tensor: str | None
    problem: str


def audit(
    path: StrPath, *, threads: int = 4, begin: Callable[[Manifest], Advance] | None = None
) -> tuple[Manifest | None, list[Finding]]:
    """Reads a whole checkpoint and lists every damage; :func:`verify_checkpoint` raises instead. One process.

    Files are read one after the other, and the chunks of a file by all threads, so that all threads are busy with a
    single large tensor, too. Memory: 8 MiB per thread and some scratch, whatever the size of the checkpoint.

    Args:
        path: the checkpoint, a directory or a URL.
        threads: number of threads that read and digest.
        begin: called with the manifest before anything is read; returns the function that is called with the progress.

    Returns:
        The manifest, None if it is damaged itself; and the list of damages.

    Raises:
        CheckpointError: there is no checkpoint, or it has another format version.
    """

    def check(manifest: Manifest) -> Manifest:
        if findings := _audit(path, manifest, threads, begin):
            raise _DamagedError(manifest, findings)
        return manifest

    try:
        return reread(path, check), []
    except _DamagedError as error:
        return error.manifest, error.findings
    except CheckpointCorruptError as error:
        return None, [Finding(NAME, None, str(error))]


class _DamagedError(CheckpointCorruptError):
    """Carries all damages of a checkpoint through :func:`reread`, which reads again if a save has replaced the
    checkpoint.
    """

    def __init__(self, manifest: Manifest, findings: list[Finding]) -> None:
        super().__init__(findings[0].problem)
        self.manifest = manifest
        self.findings = findings


def _audit(
    path: StrPath, manifest: Manifest, threads: int, begin: Callable[[Manifest], Advance] | None
) -> list[Finding]:
    advance = begin(manifest) if begin is not None else no_advance
    by_file: dict[str, dict[Key, StoredTensor]] = defaultdict(dict)
    for key, tensor in manifest.tensors().items():
        by_file[tensor.file][key] = tensor
    findings: list[Finding] = []
    for name, file in manifest.files.items():
        try:
            with RunReader(path, manifest.data, {name: file}, by_file[name]) as reader:
                findings += _audit_file(reader, by_file[name], threads, advance)
        except CheckpointCorruptError as error:  # a file cannot be opened: go on with the others
            findings.append(Finding(name, None, str(error)))
            advance(sum(tensor.nbytes for tensor in by_file[name].values()))
    return findings


def verify_checkpoint(path: StrPath, *, threads: int = 4) -> Manifest:
    """Reads a whole checkpoint and checks every byte of it. One process; some MiB of memory per thread.

    Args:
        path: the checkpoint, a directory or a URL.
        threads: number of threads that read and digest.

    Returns:
        The manifest, which lists what the checkpoint consists of: ``schedules`` by average, ``seen.updates`` (the
            number
        of updates), ``clock`` and ``start`` (of the training, in batches, samples, tokens and epochs), ``skipped`` (NaN
            and
        Inf elements), ``averages`` and ``live`` (each tensor's file, shape, dtype and digest) and ``files``; see
        :class:`dist_ema.formats.manifest.Manifest`.

    Raises:
        CheckpointError: there is none, or it has another format version.
        CheckpointCorruptError: lists every file and tensor that is damaged, missing, or not the one that was written.

    >>> import tempfile
    >>> from dist_ema import ShardedEMA
    >>> ema = ShardedEMA(torch.nn.Linear(3, 2), decay=0.9)
    >>> ema.update()
    True
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ema.save(f"{folder}/ema")
    ...     manifest = verify_checkpoint(f"{folder}/ema")
    >>> manifest.seen.updates, manifest.averages["ema"]["weight"].shape
    (1, (2, 3))
    """
    manifest, findings = audit(path, threads=threads)
    if manifest is None or findings:
        found = [
            finding.problem if finding.tensor is None else f"{finding.file}: {finding.tensor!r}" for finding in findings
        ]
        raise damaged_error(path, found)
    return manifest


def _audit_file(reader: RunReader, tensors: dict[Key, StoredTensor], threads: int, advance: Advance) -> list[Finding]:
    scratch = threading.local()
    sums = dict.fromkeys(tensors, 0)
    problems = dict[Key, str]()
    lock = threading.Lock()

    def digest(stripe: tuple[Key, Runs]) -> None:
        key, runs = stripe
        dtype = reader.dtype(key)
        if not hasattr(scratch, "bytes"):  # one buffer a thread
            scratch.bytes = torch.empty(IO_CHUNK * WIDEST, dtype=torch.uint8)
        for part in chunks(runs, IO_CHUNK):
            values = scratch.bytes[: count(part) * dtype.itemsize].view(dtype)
            try:
                reader.read(key, part, values)
            except (OSError, CheckpointCorruptError) as error:  # a bad block; a file cut off just now
                with lock:
                    problems.setdefault(key, f"cannot be read: {error}")
                return
            found = partial_digest(values, part)
            with lock:
                sums[key] += found
            advance(values.nbytes)

    # Stripes, not tensors, so that one large tensor keeps all threads busy. Their sums add up to the fingerprint.
    stripes = ((key, stripe) for key, tensor in tensors.items() for stripe in chunks(whole(_numel(tensor)), _STRIPE))
    work_through(stripes, digest, threads, "dist_ema verify")
    findings = []
    for key, tensor in tensors.items():
        if key in problems or sums[key] % (1 << 64) != tensor.digest:
            findings.append(Finding(tensor.file, key[1], problems.get(key, WRONG)))
    return findings


class VerifiedTensor:
    """Reads a tensor from its first element to its last, and verifies it with the last.

    Implements :class:`~dist_ema.checkpoints.file_values.Source`.

    Args:
        tensor: a tensor of an opened file. One without a fingerprint is only read.
        damage: the error to raise if the elements do not have the fingerprint.
    """

    def __init__(self, tensor: ReadableTensor, damage: CheckpointCorruptError) -> None:
        self.dtype = tensor.dtype
        self._tensor = tensor
        self._damage = damage
        self._total = 0

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copies the next elements, ``[start, stop)``, into ``out``, a 1D CPU tensor, converted to its dtype.

        Raises CheckpointCorruptError with the last elements if the tensor does not have its fingerprint.
        """
        # Digested as it lies in the file, before it is converted.
        values = out if out.dtype == self.dtype else torch.empty(stop - start, dtype=self.dtype)
        self._tensor.read(start, stop, values)
        self._total += partial_digest(values, ((start, stop - start),))
        if values is not out:
            out.copy_(values)
        if stop == self._tensor.numel and self._tensor.digest not in (None, self._total % (1 << 64)):
            raise self._damage

    def chunks(self) -> Iterator[Tensor]:
        """Yields the elements in order, :data:`PIECE` at a time; each is overwritten by the next."""
        numel = self._tensor.numel
        scratch = torch.empty(min(PIECE, numel), dtype=self.dtype)
        for start in range(0, numel, PIECE):
            stop = min(start + PIECE, numel)
            values = scratch[: stop - start]
            self.read(start, stop, values)
            yield values


def verified(reader: RunReader, key: Key, tensor: StoredTensor) -> VerifiedTensor:
    """Returns a tensor of a checkpoint that raises an error with file and tensor if it is damaged."""
    damage = CheckpointCorruptError(f"{tensor.file}: {key[1]!r}: {WRONG}")
    return VerifiedTensor(reader.tensor(key), damage)


def _numel(tensor: StoredTensor) -> int:
    return torch.Size(tensor.shape).numel()
