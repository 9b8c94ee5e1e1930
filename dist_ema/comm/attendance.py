"""Records which ranks have arrived at a round that others wait in, to name the missing ones in logs and errors.

A rank that waits writes its place into the store of the job. A rank that has not arrived has written nothing, or an
older place. A round that ends within half a second writes nothing, so a normal call costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, repeat
from time import monotonic, sleep

import torch.distributed as dist

logger = logging.getLogger(__name__)
#: Seconds after which a waiting rank records its place.
ARRIVAL = 0.5
#: Seconds after which the missing ranks are logged, and the factor by which this grows each time.
_REPORT = 10.0
_GROWTH = 6
#: With more ranks than this, only the first waiting rank logs.
_EACH_TELLS = 64
#: Seconds of one wait, so that signals are handled in between.
_SLICE = 1.0
#: A place: how often the group was made, and the number of the round in it.
Place = tuple[int, int]


class Attendance:
    """Finds out which ranks are missing in a round. Local; talks to the store only.

    Args:
        store: the store of the job, with a prefix that no other group of ranks uses.
        ranks: the global ranks of the group, for messages.
        rank: the place of this rank among them.
    """

    def __init__(self, store: dist.Store, ranks: Sequence[int], rank: int) -> None:
        self._store = store
        self._ranks = ranks
        self._rank = rank

    def waits(self, call: str, place: Place, timeout: float) -> Iterator[float]:
        """Yields the seconds of the next wait, again and again, until ``timeout`` seconds have passed.

        Between two waits it records that this rank is here, and logs which ranks are missing.
        """
        begin = monotonic()
        arrived = False
        report = _REPORT
        # A rank that arrives within the first _REPORT seconds has recorded it ARRIVAL seconds later.
        for length in chain([ARRIVAL], repeat(_SLICE)):
            left = begin + timeout - monotonic()
            if left <= 0:
                return
            yield min(length, left)
            waited = monotonic() - begin
            if not arrived:
                self.arrive(place)
                arrived = True
            if waited >= report + ARRIVAL:
                self._log(call, place, report)
                report *= _GROWTH

    def leave(self) -> None:
        """Records that this rank no longer waits."""
        self.arrive((0, 0))

    def missing(self, place: Place) -> list[int]:
        """Returns the global ranks that have not arrived; an empty list if the store does not answer."""
        found = []
        try:
            for rank, number in enumerate(self._ranks):
                if rank != self._rank and self._place(rank) < place:
                    found.append(number)
        except RuntimeError:  # the process of the store is gone
            return []
        return found

    def missed(self, call: str, place: Place, seconds: float) -> str:
        """Returns the error text for a call that is given up after ``seconds``. It names the missing ranks."""
        if len(self._ranks) > 2:
            sleep(ARRIVAL)  # other waiting ranks may have arrived just now
        return self._sentence(call, self.missing(place), seconds)

    def arrive(self, place: Place) -> None:
        """Records that this rank has arrived."""
        with suppress(RuntimeError):  # the process of the store is gone
            self._store.set(str(self._rank), " ".join(map(str, place)))

    def _place(self, rank: int) -> Place:
        if not self._store.check([str(rank)]):
            return 0, 0
        generation, round_ = self._store.get(str(rank)).decode().split()
        return int(generation), int(round_)

    def _log(self, call: str, place: Place, seconds: float) -> None:
        # With thousands of ranks it would take too long if each looked at all others, so the first waiting rank logs.
        lower = range(self._rank) if len(self._ranks) > _EACH_TELLS else ()
        if not any(self._is_there(rank, place) for rank in lower):
            logger.warning("%s", self._sentence(call, self.missing(place), seconds))

    def _is_there(self, rank: int, place: Place) -> bool:
        try:
            return self._place(rank) >= place
        except RuntimeError:
            return False

    def _sentence(self, call: str, missing: Sequence[int], seconds: float) -> str:
        names = ", ".join(map(str, missing[:16])) + (f" and {len(missing) - 16} more" if len(missing) > 16 else "")
        who = f"rank{'s' * (len(missing) > 1)} {names}" if missing else "another rank"
        return (
            f"{call} has waited {seconds:g} s for {who} of {len(self._ranks)} ranks. Every rank must make this call, "
            "also where rank 0 alone writes or uses the result: do not put it inside `if rank == 0:`. A rank that is "
            "missing may be in another collective call, such as one of the training step, or may have ended"
        )
