"""Counts that users read: snapshots, two of which subtract."""

from __future__ import annotations

import dataclasses
from typing import Self


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
        prefetch_dropped: Prefetches refused: queue full, calls failing, wrapper closed, blank text.
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
        overdue_calls: Second and third calls made beside one that was overdue.
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
    overdue_calls: int = 0

    def __str__(self) -> str:
        """Return what a person wants to know; `repr` has all fields."""
        queries = self.query_ready + self.query_joined + self.query_claimed + self.query_missed
        return (
            f"{queries} queries: {self.query_ready} ready, {self.query_joined} joined, "
            f"{self.query_claimed} claimed, {self.query_missed} missed; "
            f"{self.query_failed} failed\n"
            f"{self.exposed_seconds:.2f} s waited for, {self.hidden_seconds:.2f} s hidden\n"
            f"{self.prefetch_started} prefetches: {self.prefetch_used} used, "
            f"{self.prefetch_wasted} in vain, {self.prefetch_failed} failed; "
            f"{self.prefetch_dropped} more dropped"
        )
