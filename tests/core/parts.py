"""The core without threads and without a model: its steps, made one by one."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from prefetch_embeddings import PrefetchEvent, PrefetchOutcome, PrefetchStats
from prefetch_embeddings._flights.books import Books
from prefetch_embeddings._flights.flight import End, Flight, Met, Run, State, Visit
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
    return Flight(key, str(key), None, 0.0, None, by_prefetch, **facts)


class Someone(Visit[str]):
    """Somebody who waits, and counts how often it was woken."""

    def __init__(
        self,
        key: Hashable = "q",
        text: str = "",
        options: Any = None,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        for_query: bool = True,
        after: Flight[str] | None = None,
    ) -> None:
        super().__init__(key, text, options, for_query=for_query)
        self.loop = loop
        self.after = after
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1


class Executor:
    """Runs nothing; tells whether it would."""

    def __init__(self) -> None:
        self.accepts = True

    def wake(self) -> bool:
        return self.accepts

    def close(self) -> None:
        self.accepts = False

    def join(self, timeout: float) -> bool:
        return True

    def reset_after_fork(self) -> None:
        pass


def elsewhere(run: Run) -> Run:
    """Have a run carried out by another thread than the test's, which may then wait for it."""
    run.aside = True
    return run


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
        self.looks_called_for = 0
        self.books = Books(
            **{**defaults, **options}, clock=self.time, call_for_look=self._call_for_look
        )
        self.steps = Steps()
        self.executor = Executor()
        self.map: FlightMap[str] = FlightMap(self.books, self.steps)
        self.map.executor = self.executor
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

    def _call_for_look(self) -> None:
        self.looks_called_for += 1

    def _try_again(self, flights: Sequence[Flight[str]], seconds: float) -> None:
        self.again.append((list(flights), seconds))

    @property
    def stats(self) -> PrefetchStats:
        self.map.expire()
        return self.map.stats()

    # --- The background ------------------------------------------------------------------------

    def queued(self, key: str = "q") -> Flight[str]:
        outcome, flight, run = self.map.begin(key, key, None, CONTEXT)
        assert outcome is STARTED
        assert run is None
        assert flight is not None
        return flight

    def work(self) -> tuple[list[Run], object]:
        """Claim the next job, as a worker does."""
        claimed, expired = self.map.claim_job()
        assert claimed is not None
        assert not expired
        return [elsewhere(run) for run in claimed.runs], claimed.token

    def running(self, key: str = "q") -> Run:
        """Have a flight of the background run, whatever is queued before it."""
        return elsewhere(self.books.claim(self.queued(key), self.time(), None, for_query=False))

    def on_loop(self, loop: asyncio.AbstractEventLoop, key: str = "q") -> Run:
        outcome, flight, run = self.map.begin_on_loop(key, key, None, CONTEXT, loop)
        assert outcome is STARTED
        assert run is not None
        assert run.flight is flight
        return run

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
    ) -> Someone:
        visit = Someone(key, text or key, loop=loop, after=after)
        self.visits.enter(visit)
        if visit.run is not None:
            elsewhere(visit.run)
        assert visit.met is (met if after is None else None)
        assert visit.flight is not None
        return visit

    def attend(
        self,
        key: str = "q",
        *,
        claim: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Someone:
        visit = Someone(key, loop=loop, for_query=False)
        self.visits.attend(visit, claim=claim)
        if visit.run is not None:
            elsewhere(visit.run)
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
    assert isinstance(visit, Someone)
    return visit.woken
