"""Records which ranks have come to a round that others wait in.

A rank that waits writes into the store of the job where it is, and a rank that is not there has written nothing or an
older place. Nothing is written by a round that ends within half a second, so that a normal call costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, repeat
from time import monotonic, sleep

import torch.distributed as dist

logger = logging.getLogger(__name__)
#: Seconds after which a rank that waits says where it is.
ARRIVAL = 0.5
#: Seconds after which it is logged who is missing, and by what this grows for each further time.
_REPORT = 10.0
_GROWTH = 6
#: Up to so many ranks, each that waits logs it.
_EACH_TELLS = 64
#: Seconds of one wait, so that signals are handled in between.
_SLICE = 1.0
#: A place: how often the group was made anew, and the number of the round in it.
Place = tuple[int, int]


class Attendance:
    """Says which ranks are missing. Local; talks to the store only.

    Args:
        store: of the job, with a prefix that no other group of ranks uses.
        ranks: their global numbers, for the messages.
        rank: this one's place among them.
    """

    def __init__(self, store: dist.Store, ranks: Sequence[int], rank: int) -> None:
        self._store = store
        self._ranks = ranks
        self._rank = rank

    def waits(self, call: str, place: Place, timeout: float) -> Iterator[float]:
        """Gives the seconds to wait next, over and over, until ``timeout`` seconds are over.

        Says in between where this rank is, and logs who is missing.
        """
        begin = monotonic()
        arrived = False
        report = _REPORT
        # A rank that comes within the first _REPORT seconds has said so ARRIVAL seconds later.
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
        """Says that this rank waits no more."""
        self.arrive((0, 0))

    def missing(self, place: Place) -> list[int]:
        """Global numbers of the ranks that have not come; empty where the store does not say."""
        found = []
        try:
            for rank, number in enumerate(self._ranks):
                if rank != self._rank and self._place(rank) < place:
                    found.append(number)
        except RuntimeError:  # the store's process is gone
            return []
        return found

    def missed(self, call: str, place: Place, seconds: float) -> str:
        """Returns the error text that names the missing ranks of a call that is given up after ``seconds``."""
        if len(self._ranks) > 2:
            sleep(ARRIVAL)  # others that wait, too, may have come just now
        return self._sentence(call, self.missing(place), seconds)

    def arrive(self, place: Place) -> None:
        """Says where this rank is."""
        with suppress(RuntimeError):  # the store's process is gone
            self._store.set(str(self._rank), " ".join(map(str, place)))

    def _place(self, rank: int) -> Place:
        if not self._store.check([str(rank)]):
            return 0, 0
        generation, round_ = self._store.get(str(rank)).decode().split()
        return int(generation), int(round_)

    def _log(self, call: str, place: Place, seconds: float) -> None:
        # Of thousands of ranks each would look at all others: then the first of those that wait tells for all.
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
