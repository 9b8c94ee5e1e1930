"""``dist_ema.merge``: a weighted sum of checkpoints."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from dist_ema import __version__
from dist_ema.checkpoints.file_values import Advance, no_advance
from dist_ema.checkpoints.reader import damaged_error
from dist_ema.checkpoints.storage.paths import StrPath
from dist_ema.checkpoints.storage.staging import Staging
from dist_ema.clock import Progress
from dist_ema.collectives import agreed, rank_in
from dist_ema.errors import CheckpointError, EMAConfigError, EMAStateError
from dist_ema.offline.merging.combine import Combination, digests_of
from dist_ema.offline.merging.outputs import CheckpointOutput, Output, PretrainedOutput, check_output
from dist_ema.offline.merging.schemes import check_weights, scheme_weights
from dist_ema.offline.merging.sources import Source, check_alike, check_order, open_sources
from dist_ema.options import check_cast
from dist_ema.schedules import ConstantDecay, Schedule
from dist_ema.sharding.writers import FullTensor
from dist_ema.state import EMAState

logger = logging.getLogger(__name__)
Begin = Callable[[int], Advance]


@dataclass(frozen=True)
class Merged:
    """What a merge has made.

    Attributes:
        out: the output.
        weights: of each source, in their order.
        sources: what each is: its path, kind, average, progress and fingerprint; as ``merge.json`` has it.
        residual: of a synthesis: distance of the result's profile from the target's, over the target's norm; else None.
        notes: what to know of a synthesis whose snapshots hardly serve.
    """

    out: str
    weights: tuple[float, ...]
    sources: tuple[Mapping[str, Any], ...]
    residual: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One output to be.

    Attributes:
        out: where.
        weights: of each source.
        scheme: why these weights, in words.
        residual, notes: as of :class:`Merged`.
        average: name and schedule of it as a checkpoint; None means those of the newest source that is one.
    """

    out: StrPath
    weights: Sequence[float]
    scheme: str
    residual: float | None = None
    notes: tuple[str, ...] = ()
    average: tuple[str, Schedule] | None = None


@dataclass(frozen=True)
class Form:
    """Of what form outputs are: the options that :func:`merge` and :func:`synthesize` have in common."""

    dtype: torch.dtype | None = None
    max_shard_size: int | str = "5GB"
    config_from: object = None
    checkpoint: bool = False
    verify: bool = True


def merge(
    sources: Sequence[StrPath],
    out: StrPath,
    *,
    weights: Sequence[float] | None = None,
    scheme: str | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    config_from: object = None,
    checkpoint: bool = False,
    any_sum: bool = False,
    prefix: str | None = None,
    verify: bool = True,
    begin: Begin | None = None,
) -> Merged:
    """Writes a weighted sum of checkpoints. One process, or collective where torch.distributed is initialised.

    Every rank does its share of the bytes, and all of them must see the output's disk; the bits are those of one
    process. Sums are in float64 (:mod:`dist_ema.offline.merging.combine`).

    Args:
        sources: paths, the oldest first, of several kinds: directories and URLs of :meth:`ShardedEMA.save`, directories
            of safetensors files, directories of ``torch.distributed.checkpoint``, files of ``torch.save``. Nothing is
            unpickled but tensors and plain values.
        out: the directory to make, which must not exist.
        weights: of each source; negative ones are allowed.
        scheme: in their place, by name: see :func:`~dist_ema.offline.merging.schemes.scheme_weights`. None of both is
            ``"uniform"``.
        name: which average of sources that have several; None means the only one.
        dtype: of floating-point tensors; None means the newest source's own.
        max_shard_size: bytes of one file at most.
        config_from: configuration files to be copied, as of :meth:`ShardedEMA.export`. For a source that is a Hugging
            Face directory give its path.
        checkpoint: make a checkpoint that :meth:`ShardedEMA.load` reads, and not a Hugging Face directory. Clock,
            schedule and name are those of the newest source that is one.
        any_sum: allow weights that do not sum to 1.
        prefix: of the model's names in files of the last two kinds, such as ``"model."``.
        verify: hold what is read against the fingerprints of sources that have them.
        begin: called with the bytes to read; gives the function that is told of those done, from any thread.

    Returns:
        What was made; ``merge.json`` in the output says the same.

    Raises:
        EMAConfigError: an option has a value that is not allowed.
        CheckpointMismatchError: the sources are not of one model; lists all that differs.
        CheckpointError: a source cannot be read, the output exists, or cannot be written.
        CheckpointCorruptError: a source is damaged. In all cases nothing is left behind.
        EMAStateError: ranks give different arguments.

    >>> import tempfile
    >>> from dist_ema import ShardedEMA, read_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for number in (1, 2):
    ...         model = torch.nn.Linear(1, 1, bias=False)
    ...         _ = torch.nn.init.constant_(model.weight, number)
    ...         ShardedEMA(model, decay=0.9).save(f"{folder}/{number}")
    ...     merged = merge([f"{folder}/1", f"{folder}/2"], f"{folder}/both", scheme="wsm:0.25", checkpoint=True)
    ...     read_checkpoint(f"{folder}/both")["weight"].item(), merged.weights
    (1.25, (0.75, 0.25))
    """
    form = Form(dtype, max_shard_size, config_from, checkpoint, verify)
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    operation = f"merge into {os.fspath(out)}"
    with ExitStack() as stack:
        with agreed(group, operation):
            if weights is not None and scheme is not None:
                raise EMAConfigError(f"weights={weights!r} and scheme={scheme!r}: give one of them")
            found = stack.enter_context(open_sources(sources, name, prefix))
            check_order(found)
            if weights is None:
                given = scheme_weights(scheme or "uniform", len(found))
            else:
                given = check_weights(weights, len(found), any_sum)
        target = Target(out, given, scheme or ("uniform" if weights is None else "weights"))
        (merged,) = combine(found, [target], form, group, begin, operation)
    return merged


def combine(
    sources: Sequence[Source],
    targets: Sequence[Target],
    form: Form,
    group: dist.ProcessGroup | None,
    begin: Begin | None,
    operation: str,
) -> list[Merged]:
    """All targets of these sources in one pass. Collective; raises as :func:`merge`, on every rank."""
    first = rank_in(group) == 0
    with agreed(group, operation) as round_:
        check_cast(form.dtype)
        check_alike(sources)
        for target in targets:
            check_output(target.out)
        entries = _entries(sources[-1], form.dtype)
        wanted = [(os.fspath(one.out), list(one.weights)) for one in targets]
        options = form.dtype, form.max_shard_size, form.checkpoint, form.verify  # config_from is rank 0's
        asked = repr(([str(source) for source in sources], wanted, options))
        round_.send((hashlib.sha256(asked.encode()).hexdigest(), [Staging.new_token() for _ in targets]))
    digests, tokens = zip(*round_.received, strict=True)
    if len(set(digests)) > 1:
        raise EMAStateError(f"{operation}: ranks ask for different things: give all of them the same arguments")
    outputs: list[Output] = []
    try:
        with agreed(group, operation):
            outputs = [
                _output(target, token, entries, sources, form) for target, token in zip(targets, tokens[0], strict=True)
            ]
            if first:
                for output in outputs:
                    output.create()
        with agreed(group, operation):
            hidden = [output.path for output in outputs if not output.is_visible()]
            if hidden:
                raise CheckpointError(f"{hidden[0]} of rank 0 is not on this rank's disk: merge in one process")
            combination = Combination(entries, sources, [target.weights for target in targets], outputs)
            advance = begin(combination.nbytes) if begin is not None and first else no_advance
        with agreed(group, operation):
            combination.run(group, advance, torch.get_num_threads())
        combination.sums.total(group)
        with agreed(group, operation):
            if form.verify:
                _verify(sources, combination)
            merged = [_merged(target, sources, combination) for target in targets]
            if first:
                for number, (output, one, target) in enumerate(zip(outputs, merged, targets, strict=True)):
                    output.commit(digests_of(combination.sums.outputs, number), _provenance(one, target))
    except BaseException:
        if first:
            for output in outputs:
                output.abandon()
        raise
    return merged


def _entries(newest: Source, dtype: torch.dtype | None) -> list[FullTensor]:
    """The tensors of the outputs, under the names of the newest source."""
    entries = []
    for name, tensor in newest.tensors.items():
        mode: Any = "live" if tensor.untracked else "average"
        entry = FullTensor(name, tensor.aliases, tensor.shape, tensor.dtype, tensor.dtype, mode, partitioned=False)
        entries.append(replace(entry, dtype=entry.cast(dtype)))
    return entries


def _output(target: Target, token: str, entries: Sequence[FullTensor], sources: Sequence[Source], form: Form) -> Output:
    if not form.checkpoint:
        return PretrainedOutput(target.out, entries, form.max_shard_size, form.config_from, token)
    if form.config_from is not None:
        raise EMAConfigError("config_from: a checkpoint has no configuration files; leave out checkpoint, or export it")
    name, schedule, state = _average(sources)
    if target.average is not None:
        name, schedule = target.average
    return CheckpointOutput(target.out, entries, name, schedule, state, token)


def _average(sources: Sequence[Source]) -> tuple[str, Schedule, EMAState]:
    """Name, schedule and clocks of the newest average; where there is none, of one that begins with the merge."""
    for source in reversed(sources):
        if source.manifest is not None and source.average is not None:
            state = replace(source.manifest.state, started=True, skipped=0)
            if not state.averaged.updates:
                state = replace(state, averaged=Progress(updates=1), first_copy=state.training)
            return source.average, source.manifest.schedules[source.average], state
    return "ema", ConstantDecay(0.0), EMAState(True, Progress(), Progress(), Progress(updates=1))


def _verify(sources: Sequence[Source], combination: Combination) -> None:
    """Raises CheckpointCorruptError if a source has other bytes than its fingerprints say."""
    for number, source in enumerate(sources):
        found = digests_of(combination.sums.sources, number)
        damaged = [
            repr(name)
            for name, digest in found.items()
            if (tensor := source.get(name)) is not None and tensor.digest not in (None, digest)
        ]
        if damaged:
            raise damaged_error(source.path, damaged)


def _merged(target: Target, sources: Sequence[Source], combination: Combination) -> Merged:
    described = tuple(_described(source, number, combination) for number, source in enumerate(sources))
    return Merged(os.fspath(target.out), tuple(target.weights), described, target.residual, target.notes)


def _described(source: Source, number: int, combination: Combination) -> dict[str, Any]:
    """A source for ``merge.json``. Its fingerprint is of the names and fingerprints of all of its tensors."""
    found = digests_of(combination.sums.sources, number)
    text = "".join(f"{name} {digest:016x}\n" for name, digest in sorted(found.items()))
    described: dict[str, Any] = {"path": source.path, "kind": source.kind}
    if found:
        described["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    if source.manifest is not None:
        described |= {"average": source.average, "progress": asdict(source.manifest.clock)}
    return described


def _provenance(merged: Merged, target: Target) -> dict[str, Any]:
    """What ``merge.json`` says."""
    sources = [
        {**described, "weight": weight} for described, weight in zip(merged.sources, merged.weights, strict=True)
    ]
    said = {"library": f"dist_ema {__version__}", "scheme": target.scheme, "sources": sources}
    return said if merged.residual is None else said | {"residual": merged.residual, "notes": list(merged.notes)}
