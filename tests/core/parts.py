"""The core without threads and without a model: its steps, made one by one."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from prefetch_embeddings import PrefetchEvent, PrefetchOutcome, PrefetchStats
from prefetch_embeddings._flights.books import Books
from prefetch_embeddings._flights.flight import End, Flight, Met, Run, State, Visit, Waiter
from prefetch_embeddings._flights.landing import Landing
from prefetch_embeddings._flights.map import FlightMap
from prefetch_embeddings._flights.steps import Steps
from prefetch_embeddings._flights.visits import Visits
from prefetch_embeddings.reporting import Reporter
from prefetch_embeddings.testing import ManualTime

STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome

CONTEXT = contextvars.Context()

NOTHING = PrefetchStats()


def a_flight(key: Hashable = "q", *, by_prefetch: bool = True, **facts: Any) -> Flight[str]:
    """Make a flight that no map knows."""
    return Flight(key, str(key), None, 0.0, None, by_prefetch=by_prefetch, **facts)


class Someone(Waiter):
    """Somebody who waits, and counts how often it was woken."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop | None = None, *, for_query: bool = True
    ) -> None:
        self.loop = loop
        self.context = contextvars.Context()
        self.for_query = for_query
        self.makes_call = False
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1


class Core:
    """Map, visits and landing over the same books, with the clock in hand."""

    def __init__(self, *, sound: Callable[[str], bool] | None = None, **options: Any) -> None:
        self.time = ManualTime()
        defaults: dict[str, Any] = {
            "ttl": 10.0,
            "max_entries": 8,
            "max_workers": 200,
            "max_pending": 200,
            "attempts": 2,
            "hedge": None,
        }
        self.books = Books(**{**defaults, **options}, clock=self.time)
        self.steps = Steps()
        self.awake = True
        self.wakes = 0
        self.map: FlightMap[str] = FlightMap(self.books, self.steps, self._wake)
        self.visits: Visits[str] = Visits(self.books, self.steps)
        self.events: list[PrefetchEvent] = []
        self.again: list[tuple[list[Flight[str]], float]] = []
        self.landing: Landing[str] = Landing(
            self.books,
            self.steps,
            reporter=Reporter(self.events.append),
            try_again=self._try_again,
            sound=sound,
        )
        self.steps.mend = self.landing.mend

    def _wake(self) -> bool:
        self.wakes += 1
        return self.awake

    def _try_again(self, flights: Sequence[Flight[str]], seconds: float) -> None:
        self.again.append((list(flights), seconds))

    @property
    def stats(self) -> PrefetchStats:
        return self.map.stats()

    # --- The background ------------------------------------------------------------------------

    def queued(self, key: str = "q") -> Flight[str]:
        begun = self.map.begin(key, key, None, CONTEXT)
        assert begun.outcome is STARTED
        assert begun.run is None
        assert begun.flight is not None
        return begun.flight

    def work(self) -> tuple[list[Run], object]:
        """Claim the next job, as a worker does."""
        claimed, expired = self.map.claim_job()
        assert claimed is not None
        assert not expired
        return claimed.runs, claimed.token

    def running(self, key: str = "q") -> Run:
        """Have a flight of the background run, whatever is queued before it."""
        return self.books.claim(self.queued(key), None, for_query=False)

    def on_loop(self, loop: asyncio.AbstractEventLoop, key: str = "q") -> Run:
        begun = self.map.begin_on_loop(key, key, None, CONTEXT, loop)
        assert begun.outcome is STARTED
        assert begun.run is not None
        assert begun.flight is begun.run.flight
        return begun.run

    def done(self, key: str = "q", value: str = "value") -> Flight[str]:
        run = self.running(key)
        self.landing.complete(run, value)
        assert run.flight.state is State.DONE
        return run.flight

    # --- Those who wait ------------------------------------------------------------------------

    def query(
        self,
        key: str = "q",
        met: Met = Met.MISSED,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        after: Flight[str] | None = None,
        text: str | None = None,
    ) -> Visit[str]:
        visit: Visit[str] = Visit(key, text or key, None, Someone(loop), after)
        self.visits.enter(visit)
        assert visit.met is met
        assert visit.flight is not None
        return visit

    def attend(
        self,
        key: str = "q",
        *,
        claim: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Visit[str]:
        visit: Visit[str] = Visit(key, "", None, Someone(loop, for_query=False))
        self.visits.attend(visit, claim=claim)
        return visit

    def leave(self, visit: Visit[str], waited: float = 0.0, end: End = End.GONE) -> tuple[Run, ...]:
        return self.visits.leave(visit, waited, end)


def flight_of(visit: Visit[str]) -> Flight[str]:
    assert visit.flight is not None
    return visit.flight


def run_of(visit: Visit[str]) -> Run:
    assert visit.run is not None
    return visit.run


def woken(visit: Visit[str]) -> int:
    assert isinstance(visit.waiter, Someone)
    return visit.waiter.woken
