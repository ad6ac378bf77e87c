"""Counters of what prefetching did, and the snapshots that users read."""

from __future__ import annotations

import bisect
import dataclasses
from collections import deque
from typing import Final, Self

DURATIONS_KEPT: Final = 1024
"""How many recent durations an estimate rests on."""

UNKNOWN_DURATION: Final = 0.7
"""Seconds assumed before anything was measured: the middle of 0.39-1.16 s, what bots' logs show."""


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """Counts as they stood at one moment."""

    def __sub__(self, earlier: Self) -> Self:
        """Return what happened between `earlier` and this snapshot."""
        if type(earlier) is not type(self):
            return NotImplemented
        return type(self)(
            *(
                getattr(self, field.name) - getattr(earlier, field.name)
                for field in dataclasses.fields(self)
            )
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchStats(Snapshot):
    """What prefetching did so far; one consistent snapshot.

    Two snapshots subtract, which gives what happened between them. At any moment:

    * `prefetch_started` = succeeded + failed + withdrawn + those still under way;
    * `prefetch_succeeded` = used + wasted + those ready and not used yet;
    * the number of queries = `query_ready + query_joined + query_claimed + query_missed`.

    Attributes:
        prefetch_started: Flights that a prefetch started.
        prefetch_deduplicated: Prefetches that found their text ready or under way.
        prefetch_dropped: Prefetches refused: queue full, wrapper closed, blank text.
        prefetch_succeeded: Flights started by a prefetch that brought a vector.
        prefetch_failed: Flights started by a prefetch that ended without one.
        prefetch_withdrawn: Flights taken back before they ran: forgotten, cleared or closed.
        prefetch_retried: Second and later attempts in the background.
        prefetch_used: Flights started by a prefetch that served a query.
        prefetch_wasted: Flights that brought a vector and left the map without serving a query.
        query_ready: Queries answered at once from a finished flight.
        query_joined: Queries that waited for a flight already running.
        query_claimed: Queries that found their flight queued and ran it themselves.
        query_missed: Queries that found nothing and called the model.
        query_recovered: Queries (counted above, too) that were answered by a call of their own
            after the flight they had joined failed.
        query_failed: Queries (counted above, too) that ended in an error of the model.
        query_matched: Queries (counted above, too) that were served by a flight of another text,
            which `match` says is the same. The vector they got is that text's.
        hedge_started: Second calls made beside one that took too long. Of the two results one is
            ignored.
        hedge_won: Second calls that brought the vector.
        hedge_denied: Second calls that were due, and beyond the budget.
        hidden_seconds: Embedding time that no query waited for, over flights that a prefetch
            started, at the first query served.
        exposed_seconds: What queries waited, joining a flight or running it themselves.
    """

    prefetch_started: int = 0
    prefetch_deduplicated: int = 0
    prefetch_dropped: int = 0
    prefetch_succeeded: int = 0
    prefetch_failed: int = 0
    prefetch_withdrawn: int = 0
    prefetch_retried: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    query_ready: int = 0
    query_joined: int = 0
    query_claimed: int = 0
    query_missed: int = 0
    query_recovered: int = 0
    query_failed: int = 0
    query_matched: int = 0
    hedge_started: int = 0
    hedge_won: int = 0
    hedge_denied: int = 0
    hidden_seconds: float = 0.0
    exposed_seconds: float = 0.0


class Counters:
    """The running counts behind `PrefetchStats`; whoever owns them holds the lock."""

    __slots__ = tuple(field.name for field in dataclasses.fields(PrefetchStats))

    prefetch_started: int
    prefetch_deduplicated: int
    prefetch_dropped: int
    prefetch_succeeded: int
    prefetch_failed: int
    prefetch_withdrawn: int
    prefetch_retried: int
    prefetch_used: int
    prefetch_wasted: int
    query_ready: int
    query_joined: int
    query_claimed: int
    query_missed: int
    query_recovered: int
    query_failed: int
    query_matched: int
    hedge_started: int
    hedge_won: int
    hedge_denied: int
    hidden_seconds: float
    exposed_seconds: float

    def __init__(self) -> None:
        for field in dataclasses.fields(PrefetchStats):
            setattr(self, field.name, field.default)

    def snapshot(self) -> PrefetchStats:
        """Return the counts as they stand."""
        return PrefetchStats(*(getattr(self, name) for name in self.__slots__))


class RecentDurations:
    """The last durations of successful calls, in seconds; whoever owns them holds the lock."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=DURATIONS_KEPT)
        self._ordered: list[float] = []
        self._added = 0  # since they were put in order

    def add(self, seconds: float) -> None:
        """Remember one more duration."""
        self._seconds.append(seconds)
        self._added += 1

    def __len__(self) -> int:
        """Return how many are remembered."""
        return len(self._seconds)

    def quantile(self, q: float) -> float:
        """Return the `q`-quantile in seconds; there must be durations."""
        ordered = self._in_order()
        return ordered[min(len(ordered) - 1, int(len(ordered) * q))]

    def remaining(self, elapsed: float) -> float:
        """Return the median time left, in seconds, of a call that has run for `elapsed` seconds.

        Only calls that lasted longer than `elapsed` tell something about it. Where none did, it is
        a straggler, and the best guess is that it lasts as long again.
        """
        ordered = self._in_order()
        if not ordered:
            return max(0.0, UNKNOWN_DURATION - elapsed)
        first_longer = bisect.bisect_right(ordered, elapsed)
        if first_longer == len(ordered):
            return elapsed
        return ordered[(first_longer + len(ordered)) // 2] - elapsed

    def _in_order(self) -> list[float]:
        """Return them sorted, but for the last few of many: sorting is not for every query."""
        if self._added * 32 > len(self._ordered):
            self._ordered = sorted(self._seconds)
            self._added = 0
        return self._ordered
