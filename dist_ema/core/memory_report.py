"""Describes an average and its memory on this rank in words, for ``memory_report()`` and ``repr()``."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dist_ema.core.track import Track
from dist_ema.geometry.shares import Share
from dist_ema.shadow.device import Shadow


def memory_report(shares: Sequence[Share], names: Collection[str], shadow: Shadow) -> str:
    """Returns one line for what is averaged, and one for each device and for the scratch memory. Local."""
    averaged = [share for share in shares if share.mode == "average"]
    local = sum(share.numel for share in averaged)
    full = sum(share.spec.numel for share in averaged)
    # Each average has a shadow of its own. Copied buffers exist once, whatever the number of averages.
    kept = sum(share.numel * share.dtype.itemsize for share in averaged) * len(names)
    copied = sum(share.numel * share.dtype.itemsize for share in shares if share.mode == "copy")
    plural = "" if len(names) == 1 else "s"
    lines = [
        f"{len(names)} average{plural} ({', '.join(names)}) of {len(averaged)} tensors: this rank keeps {local:,} of "
        f"{full:,} elements of each, {_mebibytes(kept)}, and {_mebibytes(copied)} of buffers"
    ]
    if not shadow.started:
        lines.append("nothing is allocated before the first update")
    lines += [f"{device}: {_mebibytes(size)} in use" for device, size in shadow.nbytes().items()]
    lines += shadow.notes()
    lines += [f"scratch: {_mebibytes(shadow.scratch.nbytes())}"]
    return "\n".join(lines)


def summary(kind: str, engine: str, shares: Sequence[Share], track: Track, skipped: int) -> str:
    """Returns the line of ``repr()``. Local.

    It names the engine, the averages with their schedules, the numbers of tensors, elements and updates, the progress,
    and the NaN and Inf elements that this rank has left out.
    """
    averaged = [share.spec for share in shares if share.mode == "average"]
    averages = ", ".join(f"{name!r}: {schedule!r}" for name, schedule in track.schedules.items())
    elements = sum(spec.numel for spec in averaged)
    updates = track.averaged.updates
    left_out = f", {_counted(skipped, 'NaN or Inf element')} left out on this rank" if skipped else ""
    return (
        f"<{kind} on {engine}: {{{averages}}} of {_counted(len(averaged), 'tensor')}, {elements:,} elements; "
        f"{_counted(updates, 'update')}, progress {track.progress}{left_out}>"
    )


def _counted(number: int, noun: str) -> str:
    """Returns, for example, ``"1 tensor"`` or ``"2,000 tensors"``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
