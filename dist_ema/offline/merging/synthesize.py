"""Implements ``dist_ema.synthesize``: an average that was never kept, from averages that were."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist

from dist_ema.checkpoints.versions import read_anew_if_replaced
from dist_ema.comm.agreement import agreed
from dist_ema.errors import EMAConfigError
from dist_ema.offline.merging.merge import Begin, Merged, OutputOptions, Target, Versions, combine
from dist_ema.offline.merging.snapshots import Wanted, open_snapshots, paths_of, profiles, wanted_profile
from dist_ema.offline.synthesis import fit
from dist_ema.schedules import ConstantDecay
from dist_ema.storage.paths import StrPath

#: A residual from which on the result is another average than the wanted one: EDM2's own reach some thousandths.
_FAR = 0.05
#: A sum of absolute weights from which on rounding errors of 16-bit snapshots show.
_LARGE = 30.0


def synthesize(
    snapshots: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    target: Wanted | Mapping[str, Wanted] | Sequence[Wanted],
    at: str | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    config_from: object = None,
    checkpoint: bool = False,
    force: bool = False,
    verify: bool = True,
    begin: Begin | None = None,
) -> list[Merged]:
    """Writes the weighted sum of saved averages that is closest to a wanted one. One process, or collective.

    The schedule of a saved average says how much each past step weighs in it: its profile. The sum is the one whose
    profile comes closest to the wanted profile (:mod:`dist_ema.offline.synthesis`). For power functions this is EDM2's
    post-hoc EMA (arXiv:2312.02696); here it works for any schedule. All targets are made in one pass.

    Args:
        snapshots: directories or URLs of :meth:`ShardedEMA.save`, or a folder of such directories. All averages in them
            are used.
        out: the directory to make. Each of several targets gets a directory inside it.
        target: a schedule; its words: ``"sigma_rel=.05"``, ``"gamma=6.94"``, ``"half_life=1000ba"``, ``"decay=.999"``,
            ``"window=5000ba"`` (the plain mean of the last 5,000 batches), ``"wsm:sqrt@20000ba"`` (as if the learning
            rate had fallen in this shape from batch 20,000 on); or a function from an array of steps, counted from the
            first copy, to their weights. For several targets a list, or a mapping from the names of their directories.
        at: the moment of the training clock that the average is for; None means that of the newest snapshot.
        name: use only the averages of this name.
        dtype, max_shard_size, config_from, checkpoint, force, verify, begin: as for :func:`merge`.

    Returns:
        What was made, with weights and residual, for each target. A large residual is logged: the snapshots are too
        sparse for the target, or it is sharper or older than what they cover.

    Raises:
        EMAConfigError: an option has a value that is not allowed, or the snapshots are not of one run and unit.
        CheckpointError, CheckpointMismatchError, CheckpointCorruptError: as :func:`merge`. Several targets are put in
            their places one after the other when all are complete. If that fails for one, earlier ones stay.
    """
    form = OutputOptions(dtype, max_shard_size, config_from, checkpoint, verify, force)
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    operation = f"synthesize into {os.fspath(out)}"
    given = [snapshots] if isinstance(snapshots, (str, os.PathLike)) else list(snapshots)

    def read(_: Versions) -> list[Merged]:
        with ExitStack() as stack:
            with agreed(group, operation):
                opened = stack.enter_context(open_snapshots(given, name))
                saved, every = profiles(opened)
                targets = []
                for place, wanted in _places(out, target).items():
                    profile, schedule = wanted_profile(wanted, opened[-1], at, every)
                    found = fit(saved, profile)
                    said = wanted if isinstance(wanted, str) else repr(wanted)
                    notes = _notes(said, found.residual, found.gain)
                    average = (name or "ema", schedule or ConstantDecay(0.0))
                    targets.append(Target(place, found.weights, f"synthesize {said}", found.residual, notes, average))
            return combine([one.source for one in opened], targets, form, group, begin, operation)

    return read_anew_if_replaced(lambda: Versions(paths_of(given), group), read)


def _places(out: StrPath, target: Wanted | Mapping[str, Wanted] | Sequence[Wanted]) -> dict[str, Wanted]:
    """Returns the path of each target."""
    if isinstance(target, Mapping):
        named = dict(target)
    elif isinstance(target, (list, tuple)):
        named = {re.sub(r"[^A-Za-z0-9_.=-]", "_", str(one)): one for one in target}
        if len(named) < len(target):
            raise EMAConfigError(f"target={target!r}: two have one name; give a mapping from names")
    else:
        return {os.fspath(out): target}  # type: ignore[dict-item]
    # Of dots alone a name would be a directory that is there: "." or "..".
    if not named or not all(
        isinstance(key, str) and re.fullmatch(r"\.?[A-Za-z0-9_=-][A-Za-z0-9_.=-]*", key) for key in named
    ):
        raise EMAConfigError(f"target={target!r}: allowed are names of A-Z a-z 0-9 _ . = -, and not of dots alone")
    return {os.path.join(os.fspath(out), key): one for key, one in named.items()}  # noqa: PTH118 - keeps its type


def _notes(target: str, residual: float, gain: float) -> tuple[str, ...]:
    notes = []
    if residual > _FAR:
        notes.append(
            f"{target}: the closest sum of these snapshots is off by {residual:.0%} of the wanted profile: they are "
            "too sparse for it, or it is sharper or older than what they span. More snapshots, or shorter averages "
            "among them, come closer"
        )
    if gain > _LARGE:
        notes.append(
            f"{target}: weights of {gain:.0f} in absolute terms, which multiply the rounding errors of the snapshots; "
            "averages that were saved in 16 bits show that"
        )
    return tuple(notes)
