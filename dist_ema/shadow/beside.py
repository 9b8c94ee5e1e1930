"""Updates on a GPU that run beside the next forward pass: ``attach(optimizer, overlap=True)``.

::

    the caller's stream   step 1 | copies of buffers | forward, backward ........ | wait | step 2
    a stream of our own          | wait | update ................................^

The weights have to stay as they are until the update has read them. The next optimizer step waits for that, on the
device, by the hook of :mod:`dist_ema.shadow.reading`; every other call of the library waits as well. A forward pass may
write buffers, so these are copied before. Weights that anything else has written meanwhile are noticed by torch's count
of writes: the average may then have some of their elements from before and some from after, and cannot be used.
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
    """The streams on which one average is updated. Local; nothing here waits on the host.

    Attributes:
        failure: what every call raises from now on; None if nothing is wrong.
    """

    def __init__(self) -> None:
        self.failure: EMAStateError | None = None
        self._streams: dict[torch.device, OwnStream] = {}
        self._running: list[OwnStream] = []  # with work that the caller's stream has not waited for
        self._read: list[tuple[str, Tensor, int]] = []  # name, tensor, and how often it had been written
        self._taken: list[Tensor] = []  # stay alive until the work is done
        self._told = False

    def run(self, shares: Sequence[Share], sources: Sequence[Tensor], work: Callable[[Sequence[Tensor]], None]) -> None:
        """Has ``work`` done with the sources as they are now. It is done at once where no stream of ours can do it.

        Args:
            shares: what is kept of each source.
            sources: the live tensors.
            work: asks the current streams for an update from these tensors.
        """
        self.join()
        kept = [index for index, share in enumerate(shares) if share.mode != "live"]
        devices = {sources[index].device for index in kept if sources[index].is_cuda}
        if not devices:
            self._tell_once(sources[kept[0]].device)
        if not devices or torch.cuda.is_current_stream_capturing():  # a graph has to end with all that began in it
            work(sources)
            return
        taken = list(sources)
        for index in kept:
            if shares[index].spec.kind == "buffer":
                taken[index] = sources[index].clone()
            else:
                self._read.append((shares[index].spec.name, sources[index], write_count(sources[index])))
        self._taken = taken
        announce(self)
        with ExitStack() as stack:
            for device in devices:
                stream = self._streams.setdefault(device, OwnStream(device))
                stream.follow()
                self._running.append(stream)
                stack.enter_context(stream.inside())
            try:
                work(taken)
            finally:
                for stream in self._running:
                    stream.record()

    def join(self) -> None:
        """Makes later work of the caller's stream wait for the update. Raises nothing."""
        if not self._running:
            return
        written = [name for name, tensor, count in self._read if write_count(tensor) != count]
        for stream in self._running:
            stream.hold_back()
        self._running, self._read, self._taken = [], [], []
        if written:
            self.failure = EMAStateError(
                f"{written[0]!r} and {len(written) - 1} more parameters were written, and not by a torch optimizer's "
                "step(), while an update beside training (attach(overlap=True)) was still reading them, so the average "
                "cannot be used. Call wait() before you write weights, or attach without overlap. To go on now, call "
                "reset() to start anew from the live weights, or load() a checkpoint"
            )

    #: As :class:`~dist_ema.shadow.reading.Reader`.
    wait_for_reads = join

    def _tell_once(self, device: torch.device) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "attach(overlap=True) changes nothing: the weights are on %s, and only updates on a CUDA device can "
                "run beside training.",
                device,
            )
