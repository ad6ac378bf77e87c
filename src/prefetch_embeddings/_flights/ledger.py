"""The ledger: counts, recent durations, and the prefetches that no query used."""

from __future__ import annotations

import bisect
import dataclasses
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from prefetch_embeddings._flights.flight import End, State
from prefetch_embeddings.stats import PrefetchStats

if TYPE_CHECKING:
    from collections.abc import Hashable

    from prefetch_embeddings._flights.flight import Flight, Visit

UNUSED_KEPT: Final = 256
"""How many prefetched texts that no query used are remembered, to tell why queries missed."""

DURATIONS_KEPT: Final = 1024
"""How many recent durations an estimate rests on."""

UNKNOWN_DURATION: Final = 0.7
"""Seconds assumed before anything was measured: the middle of 0.39-1.16 s, what bots' logs show."""


class Unused(NamedTuple):
    """A prefetched text that no query has used."""

    key: Hashable
    text: str
    asked_at: float


class Counters:
    """The running counts behind `PrefetchStats`."""

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
    overdue_calls: int

    def __init__(self) -> None:
        for field in dataclasses.fields(PrefetchStats):
            setattr(self, field.name, field.default)

    def snapshot(self) -> PrefetchStats:
        """Return the counts as they stand."""
        return PrefetchStats(*(getattr(self, name) for name in self.__slots__))


class Durations:
    """The last durations of successful calls, in seconds."""

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


class Ledger:
    """Keeps the counts in step with what becomes of flights. Guarded by the map's lock."""

    def __init__(self) -> None:
        self.counts: Final = Counters()
        self.durations: Final = Durations()
        self._unused: deque[Unused] = deque(maxlen=UNUSED_KEPT)  # those that have left the map

    # An exception out of a signal handler may come at any call, and so not within methods that call
    # nothing. Each of these changes a flight and its counts together.

    def parted(
        self, flight: Flight[Any], visit: Visit[Any], waited: float, end: End, hidden: float
    ) -> None:
        """Part a visitor from a flight after `waited` seconds, and count how. Calls nothing."""
        counts = self.counts
        del flight.waiters[visit]
        counts.exposed_seconds += waited
        if end is End.SERVED or end is End.RECOVERED:
            counts.query_recovered += end is End.RECOVERED
            counts.query_matched += flight.text != visit.text
            if not flight.served:
                flight.served = True
                if flight.by_prefetch:
                    counts.prefetch_used += 1
                    counts.hidden_seconds += hidden
        elif end is End.FAILED:
            counts.query_failed += 1
        if flight.by_prefetch and not (flight.held or flight.served or flight.waiters):
            counts.prefetch_wasted += flight.state is State.DONE

    def hidden(self, flight: Flight[Any]) -> float:
        """Return what part of a flight's duration no query has waited for, in seconds."""
        came = flight.first_query_at
        exposed = 0.0 if came is None else max(0.0, flight.finished_at - came)
        return max(0.0, flight.finished_at - flight.started_at - exposed)

    def served_at_once(self, flight: Flight[Any], hidden: float) -> None:
        """Count the first query that finds a flight ready. Calls nothing."""
        flight.served = True
        if flight.by_prefetch:
            self.counts.prefetch_used += 1
            self.counts.hidden_seconds += hidden

    def ended(self, flight: Flight[Any], state: State, now: float) -> None:
        """Take a flight to its end, and count it. Calls nothing."""
        counts = self.counts
        flight.state = state
        flight.ended = True
        flight.finished_at = now
        flight.context = None  # what is kept holds no request alive
        flight.options = None
        flight.runs = ()
        if not flight.by_prefetch:
            return
        if state is State.DONE:
            counts.prefetch_succeeded += 1
            if not (flight.held or flight.served or flight.waiters):
                counts.prefetch_wasted += 1
        elif flight.attempt:
            counts.prefetch_failed += 1
        else:
            counts.prefetch_withdrawn += 1

    def left_map(self, flight: Flight[Any]) -> None:
        """Note that a flight is no longer in the map, once. Calls nothing."""
        if flight.held:
            flight.held = False
            if flight.by_prefetch and not (flight.served or flight.waiters):
                self.counts.prefetch_wasted += flight.state is State.DONE

    def remember_if_unused(self, flight: Flight[Any]) -> None:
        """Remember the text of a prefetch that leaves the map, or fails in it, unused."""
        if self._is_unused(flight) and not flight.for_query:
            self._unused.append(Unused(flight.key, flight.text, flight.asked_at))

    def forget(self, key: Hashable) -> None:
        """Remember nothing of `key`."""
        kept = [unused for unused in self._unused if unused.key != key]
        self._unused = deque(kept, maxlen=UNUSED_KEPT)

    def forget_all(self) -> None:
        """Remember no text."""
        self._unused.clear()

    def unused(self, held: list[Flight[Any]]) -> list[Unused]:
        """Return the most recent prefetches that no query uses; those still `held` come last."""
        still_held = [Unused(f.key, f.text, f.asked_at) for f in held if self._is_unused(f)]
        return [*self._unused, *still_held][-UNUSED_KEPT:]

    @staticmethod
    def _is_unused(flight: Flight[Any]) -> bool:
        return flight.by_prefetch and not flight.served and not flight.waiters
