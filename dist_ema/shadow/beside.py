"""Runs updates on a GPU beside the next forward pass: ``attach(optimizer, overlap=True)``.

::

    caller's stream    step 1 | copies of buffers | forward, backward ........ | wait | step 2
    second stream             | wait | update ................................^

Weights must not change until the update has read them. The next optimizer step waits for that on the device, by the
hook of :mod:`dist_ema.shadow.reading`, and so does every other call of the library. A forward pass may write buffers,
so buffers are copied first. If anything else writes weights in the meantime, torch's count of writes shows it. The
average may then have elements from before and from after the write, so it cannot be used any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from dist_ema.engines.base import write_count
from dist_ema.errors import EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.runtime.streams import OwnStream
from dist_ema.shadow.reading import announce

logger = logging.getLogger(__name__)


class Beside:
    """Runs the updates of one average on streams of its own. Local; nothing here waits on the host.

    Attributes:
        failure: the error that every call raises from now on; None if there is none.
    """

    def __init__(self) -> None:
        self.failure: EMAStateError | None = None
        self._streams: dict[torch.device, OwnStream] = {}
        self._running: list[OwnStream] = []  # streams whose work the caller's stream has not waited for
        self._read: list[tuple[str, Tensor, int]] = []  # name, tensor and write count of what is being read
        self._taken: list[Tensor] = []  # keeps what is being read alive until the work is done
        self._has_warned = False

    def run(self, shares: Sequence[Share], sources: Sequence[Tensor], work: Callable[[Sequence[Tensor]], None]) -> None:
        """Runs ``work`` on the sources as they are now, on second streams; on the current ones if that is impossible.

        Args:
            shares: what is averaged of each source.
            sources: the live tensors.
            work: launches an update from the given tensors on the current streams.
        """
        self.join()  # one update at a time
        kept = [index for index, share in enumerate(shares) if share.mode != "live"]
        devices = {sources[index].device for index in kept if sources[index].is_cuda}
        if not devices:
            self._warn_once(sources[kept[0]].device)
        # A CUDA graph must contain the end of all work whose beginning it contains.
        if not devices or torch.cuda.is_current_stream_capturing():
            work(sources)
            return
        # 1. A forward pass may write buffers, so copies of them are averaged. Parameters are read in place: count
        #    their writes, to notice one during the update.
        taken = list(sources)
        for index in kept:
            if shares[index].spec.kind == "buffer":
                taken[index] = sources[index].clone()
            else:
                self._read.append((shares[index].spec.name, sources[index], write_count(sources[index])))
        self._taken = taken
        announce(self)  # from here on optimizers wait for this update
        # 2. Let each second stream wait for the caller's stream, and launch the update there.
        with ExitStack() as stack:
            for device in devices:
                stream = self._streams.setdefault(device, OwnStream(device))
                stream.follow()
                self._running.append(stream)
                stack.enter_context(stream.inside())
            try:
                work(taken)
            finally:
                # 3. Mark the end of the work, for join(). After an error as well: a part of it may have been launched.
                for stream in self._running:
                    stream.record()

    def join(self) -> None:
        """Makes later work of the caller's stream wait for the update. Raises nothing."""
        if not self._running:
            return
        # Compared before anything is forgotten. A write after this call waits for the update, so it does no harm.
        written = [name for name, tensor, count in self._read if write_count(tensor) != count]
        for stream in self._running:
            stream.hold_back()
        self._running = []
        self._read = []
        self._taken = []
        if written:
            self.failure = EMAStateError(
                f"{written[0]!r} and {len(written) - 1} more parameters were written by something else than the step() "
                "of a torch optimizer, while an update beside training (attach(overlap=True)) was still reading them, "
                "so the average cannot be used. Call wait() before you write weights, or attach without overlap. To go "
                "on now, call reset() to start again from the live weights, or load() a checkpoint"
            )

    #: Implements :class:`~dist_ema.shadow.reading.Reader`.
    wait_for_reads = join

    def _warn_once(self, device: torch.device) -> None:
        """Logs at the first call that ``overlap=True`` has no effect on this device."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "attach(overlap=True) changes nothing: the weights are on %s, and only updates on a CUDA device can "
                "run beside training.",
                device,
            )
