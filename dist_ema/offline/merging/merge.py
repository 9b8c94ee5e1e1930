"""Implements ``dist_ema.merge``: a weighted sum of checkpoints."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from dist_ema import __version__
from dist_ema.checkpoints.configuration import CONFIG_SUFFIXES
from dist_ema.checkpoints.file_values import Advance, no_advance
from dist_ema.checkpoints.model_card import PROVENANCE
from dist_ema.checkpoints.reader import damaged_error
from dist_ema.checkpoints.versions import read_anew_if_replaced, read_manifest_bytes
from dist_ema.comm.agreement import agreed
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.collectives import gather_objects, rank_in, size_of
from dist_ema.errors import CheckpointCorruptError, CheckpointError, EMAConfigError, EMAError, EMAStateError
from dist_ema.formats.manifest import checksum
from dist_ema.offline.merging.alike import check_alike, under_common_names, with_ties
from dist_ema.offline.merging.combine import Combination, digests_of
from dist_ema.offline.merging.meaning import check_integers, check_scales, pattern_of
from dist_ema.offline.merging.order import check_order_matters, in_order_of_training
from dist_ema.offline.merging.outputs import CheckpointOutput, Output, PretrainedOutput, check_output
from dist_ema.offline.merging.schemes import check_weights, scheme_weights
from dist_ema.offline.merging.sources import Selection, Source, open_sources
from dist_ema.options import check_cast
from dist_ema.schedules import ConstantDecay, Schedule
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.state import EMAState
from dist_ema.storage.paths import StrPath, local_path
from dist_ema.storage.staging import Staging

logger = logging.getLogger(__name__)
#: Files of a Hugging Face folder that look like configurations and belong to the source alone.
_NO_CONFIG = {PROVENANCE, "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}
Begin = Callable[[int], Advance]


@dataclass(frozen=True)
class Merged:
    """Describes what a merge has written.

    Attributes:
        out: the output.
        weights: the weight of each source, in their order.
        sources: path, kind, average, progress and fingerprint of each source, as ``merge.json`` has them.
        residual: after a synthesis, the distance of the result's profile from the target's, over the target's norm;
            else None.
        notes: one sentence each on choices that the merge has made, on values that are not finite, and on a synthesis
            whose snapshots hardly serve the target.
    """

    out: str
    weights: tuple[float, ...]
    sources: tuple[Mapping[str, Any], ...]
    residual: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """Describes one output to write.

    Attributes:
        out: its path.
        weights: the weight of each source.
        scheme: the scheme of these weights, in words.
        residual, notes: as in :class:`Merged`.
        average: name and schedule of the average in a checkpoint; None means those of the newest source that is one.
    """

    out: StrPath
    weights: Sequence[float]
    scheme: str
    residual: float | None = None
    notes: tuple[str, ...] = ()
    average: tuple[str, Schedule] | None = None


@dataclass(frozen=True)
class OutputOptions:
    """Holds the options for outputs that :func:`merge` and :func:`synthesize` have in common."""

    dtype: torch.dtype | None = None
    max_shard_size: int | str = "5GB"
    config_from: object = None
    checkpoint: bool = False
    verify: bool = True
    force: bool = False
    newest: str | None = None


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
    key: str | None = None,
    prefix: str | None = None,
    normalize: bool = False,
    force: bool = False,
    newest: str | None = None,
    verify: bool = True,
    begin: Begin | None = None,
) -> Merged:
    """Writes a weighted sum of checkpoints. One process, or collective if torch.distributed is initialised.

    If it is initialised, every rank must call it, because rank 0 alone would wait for the others. To merge in one
    process, run ``dist-ema merge``, or call it before ``init_process_group()`` or after ``destroy_process_group()``.
    Every rank does its share of the bytes, and all of them must see the output's disk. The bits are those of one
    process. Sums are in float64 (:mod:`dist_ema.offline.merging.combine`).

    Args:
        sources: paths of several kinds: directories and URLs of :meth:`ShardedEMA.save`, Hugging Face folders of
            safetensors files, directories of ``torch.distributed.checkpoint``, files of ``torch.save`` or safetensors.
            Only tensors and plain values are unpickled. Sources are put in the order of training, which their clocks,
            ``trainer_state.json`` or the numbers at the end of their names state. A single source is copied.
        out: the directory to make.
        weights: the weight of each source, in the order of ``sources``. Negative weights are allowed.
        scheme: the name of a scheme, in place of ``weights``: see
            :func:`~dist_ema.offline.merging.schemes.scheme_weights`. Without both it is ``"uniform"``. A scheme that
            counts from the oldest source needs sources that state their order.
        name: which average of sources that have several; None means the only one.
        dtype: dtype of floating-point tensors; None means that of the newest source.
        max_shard_size: maximum bytes of one file.
        config_from: configuration files to copy, as for :meth:`ShardedEMA.export`; None means those of the newest
            source that is a Hugging Face folder.
        checkpoint: make a checkpoint that :meth:`ShardedEMA.load` reads, instead of a Hugging Face directory. Clock,
            schedule and name are those of the newest source that is one.
        any_sum: allow weights that do not sum to 1.
        key: which of several dicts of tensors in a file, such as ``"ema"`` or ``"callbacks.EMA.ema_state_dict"``; which
            file of a folder; in a ``torch.distributed.checkpoint``, the prefix of the names. None means the average, if
            there is exactly one, or the only model.
        prefix: take only tensors whose names begin with this, such as ``"model"``. None means the prefix that makes the
            names of a source exactly those of the others, if it needs one.
        normalize: divide the weights by their sum.
        force: replace a model or checkpoint at ``out``, in one step when the new one is complete.
        newest: a regular expression on names. Tensors that it matches are taken from the newest source, and not summed.
        verify: compare what is read with the fingerprints of sources that have them.
        begin: called with the number of bytes to read; returns the function that is called with the progress, from any
            thread.

    Returns:
        What was made. ``merge.json`` in the output has the same facts.

    Raises:
        EMAConfigError: an option has a value that is not allowed.
        CheckpointMismatchError: the sources are not of one model (lists all differences), or their sum means nothing,
            as for packed integers or float8 values with scales.
        CheckpointError: a source cannot be read or has several models, the output exists, or cannot be written.
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
    form = OutputOptions(dtype, max_shard_size, config_from, checkpoint, verify, force, newest)
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    operation = f"merge into {os.fspath(out)}"

    def read(_: Versions) -> Merged:
        with ExitStack() as stack:
            with agreed(group, operation):
                if weights is not None and scheme is not None:
                    raise EMAConfigError(f"weights={weights!r} and scheme={scheme!r}: give one of them")
                found = stack.enter_context(open_sources(sources, Selection(name, key, prefix)))
                if weights is None:
                    given = scheme_weights(scheme or "uniform", len(found))
                else:
                    given = check_weights(weights, len(found), any_sum, normalize)
                found, given = _in_order(found, given, scheme)
                found = with_ties(under_common_names(found))
            why = scheme or ("uniform" if weights is None else "weights")
            target = Target(out, given, why, notes=tuple(dict.fromkeys(note for one in found for note in one.notes)))
            (merged,) = combine(found, [target], form, group, begin, operation)
        return merged

    paths = [] if isinstance(sources, (str, os.PathLike)) else list(sources)
    return read_anew_if_replaced(lambda: Versions(paths, group), read)


def _in_order(
    sources: Sequence[Source], weights: Sequence[float], scheme: str | None
) -> tuple[list[Source], list[float]]:
    """Returns the sources in the order of training, if their order is known, and their weights."""
    order = in_order_of_training(sources)
    if order is None:
        if scheme is not None:
            check_order_matters(sources, weights, scheme)
        return list(sources), list(weights)
    ordered = [sources[number] for number in order]
    if order != list(range(len(sources))):
        logger.warning("The sources were put in the order of training: %s.", ", ".join(map(str, ordered)))
    # A scheme's weights count from the oldest source; a user's belong to the sources that they were given for.
    return ordered, list(weights) if scheme is not None else [weights[number] for number in order]


class Versions:
    """Remembers which checkpoints of this library are at some paths. Collective, except for the constructor.

    Args:
        paths: the paths of sources of any kind.
        group: the ranks that read them.
    """

    def __init__(self, paths: Sequence[StrPath], group: dist.ProcessGroup | None) -> None:
        self._paths = paths
        self._group = group
        self._before = [_manifest_at(path) for path in paths]

    def was_replaced(self) -> bool:
        """Returns whether a save has replaced one of them. Collective."""
        changed = any(
            before is not None and _manifest_at(path) != before
            for path, before in zip(self._paths, self._before, strict=True)
        )
        return any(gather_objects(changed, self._group))


def _manifest_at(path: StrPath) -> str | None:
    """Returns what identifies the checkpoint at a path; None if there is none."""
    try:
        return checksum(read_manifest_bytes(path))
    except (EMAError, OSError, TypeError, ValueError):  # it is of another kind, or opening it says what is wrong
        return None


def combine(
    sources: Sequence[Source],
    targets: Sequence[Target],
    form: OutputOptions,
    group: dist.ProcessGroup | None,
    begin: Begin | None,
    operation: str,
) -> list[Merged]:
    """Writes all targets of these sources in one pass. Collective; raises as :func:`merge` does, on every rank."""
    first = rank_in(group) == 0
    # 1. Check everything that can be checked without reading a tensor, and that all ranks ask for the same.
    with agreed(group, operation) as round_:
        check_cast(form.dtype)
        check_alike(sources)
        pattern = pattern_of(form.newest)
        for target in targets:
            check_output(target.out, form.force, [source.path for source in sources])
        entries = _entries(sources[-1], form.dtype, pattern)
        wanted = [(os.fspath(one.out), list(one.weights)) for one in targets]
        # config_from is not compared, because only rank 0's is used.
        options = form.dtype, form.max_shard_size, form.checkpoint, form.verify, form.force, form.newest
        asked = repr(([str(source) for source in sources], wanted, options))
        versions = [source.manifest and source.manifest.data for source in sources]
        round_.send((hashlib.sha256(asked.encode()).hexdigest(), versions, [Staging.new_token() for _ in targets]))
    digests, opened, tokens = zip(*round_.received, strict=True)
    if len(set(digests)) > 1:
        raise EMAStateError(f"{operation}: ranks ask for different things: give all of them the same arguments")
    if any(versions != opened[0] for versions in opened):
        raise CheckpointCorruptError(f"{operation}: ranks have opened different checkpoints: a source was replaced")
    outputs: list[Output] = []
    try:
        # 2. Make the files of all outputs, under hidden names that have rank 0's tokens in them.
        with agreed(group, operation):
            outputs = [
                _output(target, token, entries, sources, form) for target, token in zip(targets, tokens[0], strict=True)
            ]
            if first:
                for output in outputs:
                    output.create()
        # 3. Every rank has to see these files, since each writes its share of them.
        with agreed(group, operation):
            hidden = [output.path for output in outputs if not output.is_visible()]
            if hidden:
                raise CheckpointError(f"{hidden[0]} of rank 0 is not on this rank's disk: merge in one process")
            combination = Combination(entries, sources, [target.weights for target in targets], outputs, pattern)
            _check_meaning(entries, sources, targets, combination, pattern, group)
            advance = begin(combination.nbytes) if begin is not None and first else no_advance
        # 4. Read, sum and write. Fingerprints of all ranks are added up afterwards.
        with agreed(group, operation):
            combination.run(group, advance, torch.get_num_threads())
        combination.sums.total(group)
        # 5. Only now is it known whether the sources were intact. If so, the outputs get their names.
        with agreed(group, operation):
            if form.verify:
                _verify(sources, combination)
            merged = [_merged(number, target, sources, combination) for number, target in enumerate(targets)]
            if first:
                for number, (output, one, target) in enumerate(zip(outputs, merged, targets, strict=True)):
                    output.commit(digests_of(combination.sums.outputs, number), _provenance(one, target))
    except BaseException:
        if first:
            for output in outputs:
                output.abandon()
        raise
    if first:
        for note in dict.fromkeys(note for one in merged for note in one.notes):
            logger.warning("%s", note)
    return merged


def _check_meaning(
    entries: Sequence[FullTensor],
    sources: Sequence[Source],
    targets: Sequence[Target],
    combination: Combination,
    pattern: re.Pattern[str] | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Raises CheckpointMismatchError for sums that mean nothing; see :mod:`.meaning`. Local."""
    for weights in {tuple(target.weights) for target in targets}:
        used = [source for source, weight in zip(sources, weights, strict=True) if weight]
        if len(used) > 1:
            check_scales(entries, used, combination.is_summed)
            check_integers(entries, used, pattern, rank_in(group), size_of(group))


def _entries(newest: Source, dtype: torch.dtype | None, pattern: re.Pattern[str] | None) -> list[FullTensor]:
    """Returns the tensors of the outputs, under the names of the newest source.

    Tensors that ``pattern`` matches keep their own dtype.
    """
    entries = []
    for name, tensor in newest.tensors.items():
        mode: Any = "live" if tensor.untracked else "average"
        entry = FullTensor(name, tensor.aliases, tensor.shape, tensor.dtype, tensor.dtype, mode, partitioned=False)
        taken = pattern is not None and pattern.search(name) is not None
        entries.append(entry if taken else replace(entry, dtype=entry.cast(dtype)))
    return entries


def _output(
    target: Target, token: str, entries: Sequence[FullTensor], sources: Sequence[Source], form: OutputOptions
) -> Output:
    if not form.checkpoint:
        config = form.config_from if form.config_from is not None else _configuration(sources)
        return PretrainedOutput(target.out, entries, form.max_shard_size, config, token, form.force, form.dtype)
    if form.config_from is not None:
        raise EMAConfigError("config_from: a checkpoint has no configuration files; leave out checkpoint, or export it")
    name, schedule, state = _average(sources)
    if target.average is not None:
        name, schedule = target.average
    return CheckpointOutput(target.out, entries, name, schedule, state, token, form.force)


def _configuration(sources: Sequence[Source]) -> list[str] | None:
    """Returns the configuration files of the newest source that is a Hugging Face folder."""
    folders = (local_path(source.path) for source in reversed(sources) if source.kind == "pretrained")
    folder = next((folder for folder in folders if (folder / "config.json").exists()), None)
    if folder is None:
        return None
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in CONFIG_SUFFIXES]
    return [str(file) for file in files if file.name not in _NO_CONFIG and ".index." not in file.name]


def _average(sources: Sequence[Source]) -> tuple[str, Schedule, EMAState]:
    """Returns name, schedule and clocks of the newest average; if there is none, of an average that begins with the
    merge.
    """
    for source in reversed(sources):
        if source.manifest is not None and source.average is not None:
            state = replace(source.manifest.state, started=True, skipped=0)
            if not state.averaged.updates:
                state = replace(state, averaged=Progress(updates=1), first_copy=state.training)
            return source.average, source.manifest.schedules[source.average], state
    return "ema", ConstantDecay(0.0), EMAState(True, Progress(), Progress(), Progress(updates=1))


def _verify(sources: Sequence[Source], combination: Combination) -> None:
    """Raises CheckpointCorruptError if what was read from a source does not have the source's fingerprints."""
    for number, source in enumerate(sources):
        found = digests_of(combination.sums.sources, number)
        damaged = [
            repr(name)
            for name, digest in found.items()
            if (tensor := source.get(name)) is not None and tensor.digest not in (None, digest)
        ]
        if damaged:
            raise damaged_error(source.path, damaged)


def _merged(number: int, target: Target, sources: Sequence[Source], combination: Combination) -> Merged:
    described = tuple(_described(source, place, combination) for place, source in enumerate(sources))
    notes = (*target.notes, *_counted(number, target, sources, combination))
    return Merged(os.fspath(target.out), tuple(target.weights), described, target.residual, notes)


def _counted(number: int, target: Target, sources: Sequence[Source], combination: Combination) -> Iterator[str]:
    """Returns notes on elements of the sources of one output that are not finite, and on sums that its dtype cannot
    hold.
    """
    for place, source in enumerate(sources):
        counts = combination.sums.nonfinite if target.weights[place] else {}
        if found := {name: count for (owner, name), count in counts.items() if owner == place}:
            yield f"{source} has {sum(found.values())} elements that are NaN or infinite, in {_names(found)}"
    lost = {name: count for (owner, name), count in combination.sums.overflown.items() if owner == number}
    if lost:
        yield (
            f"{sum(lost.values())} elements of {os.fspath(target.out)} are beyond its dtype, so infinite or NaN there, "
            f"in {_names(lost)}: give a wider one (--dtype bf16 or fp32)"
        )


def _names(found: Mapping[str, int]) -> str:
    names = sorted(found)
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more tensors" if len(names) > 4 else "")


def _described(source: Source, number: int, combination: Combination) -> dict[str, Any]:
    """Returns the description of a source for ``merge.json``. Its fingerprint covers names and fingerprints of its
    tensors.
    """
    found = digests_of(combination.sums.sources, number)
    text = "".join(f"{name} {digest:016x}\n" for name, digest in sorted(found.items()))
    described: dict[str, Any] = {"path": source.path, "kind": source.kind}
    if found:
        described["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    if source.manifest is not None:
        described |= {"average": source.average, "progress": asdict(source.manifest.clock)}
    return described


def _provenance(merged: Merged, target: Target) -> dict[str, Any]:
    """Returns the content of ``merge.json``."""
    sources = [
        {**described, "weight": weight} for described, weight in zip(merged.sources, merged.weights, strict=True)
    ]
    said: dict[str, Any] = {"library": f"dist_ema {__version__}", "scheme": target.scheme, "sources": sources}
    said |= {} if merged.residual is None else {"residual": merged.residual}
    return said | ({"notes": list(merged.notes)} if merged.notes or merged.residual is not None else {})
