"""All that the one lock guards, and the moves that steps are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._flights.admission import Admission
from prefetch_embeddings._flights.flight import Flight, Run, State
from prefetch_embeddings._flights.ledger import Ledger
from prefetch_embeddings._flights.patience import MOST_CALLS, Patience
from prefetch_embeddings._flights.shelf import Shelf

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable, Iterator

    from prefetch_embeddings._flights.flight import Visit
    from prefetch_embeddings._flights.patience import Hedge


class Books:
    """Flights by key, places, counts and patience.

    Every method is called within a step, and leaves the collaborators in agreement.

    Args:
        ttl: Seconds that a ready flight is kept, from its completion, and a queued one waits.
        max_entries: Ready flights kept.
        max_workers: Jobs that workers run at a time.
        max_pending: Flights that may wait for a worker; and those under way on loops.
        attempts: Tries of a background flight that nobody waits for.
        hedge: When a flight that is waited for gets a second call early; None for never.
        clock: A monotonic clock, in seconds.
        call_for_look: Is called within a step that makes a flight due another call before anybody
            will look for it.
    """

    def __init__(
        self,
        *,
        ttl: float,
        max_entries: int,
        max_workers: int,
        max_pending: int,
        attempts: int,
        hedge: Hedge | None,
        clock: Callable[[], float],
        call_for_look: Callable[[], object],
    ) -> None:
        self._call_for_look: Final = call_for_look
        self._max_entries: Final = max_entries
        self._max_workers: Final = max_workers
        self._max_pending: Final = max_pending
        self._hedge: Final = hedge
        self.ttl: Final = ttl
        self.attempts: Final = attempts
        self.clock: Final = clock
        self.closed = False
        self.start_anew()

    def start_anew(self) -> None:
        """Start empty; once more in a forked child: what is under way is so in the parent."""
        self.era = object()
        self.shelf = Shelf(self.ttl, self._max_entries)
        self.admission = Admission(self._max_pending, self._max_workers, self._max_pending)
        self.ledger = Ledger()
        self.patience = Patience(self._hedge, self.ledger.durations, self._call_for_look)
        self.detached: set[Flight[Any]] = set()  # unfinished, and no longer in the map

    # --- Moves ---------------------------------------------------------------------------------

    def look_up(self, key: Hashable) -> Flight[Any] | None:
        """Return the flight in the map, unless its time is up."""
        flight = self.shelf.by_key.get(key)
        if flight is not None and flight.state is State.DONE:
            now = self.clock()
            if flight.expires_at <= now:
                self.take_out(self.shelf.expired(now))
                return None
        return flight

    def to_join(self, key: Hashable) -> Flight[Any] | None:
        """Return the flight in the map, unless its time is up, or all its calls are overdue.

        Nobody looks after a flight that nobody waits for: who comes next finds out.
        """
        flight = self.look_up(key)
        if flight is not None and self.is_given_up(flight):
            self.let_go(flight)
            return None
        return flight

    def is_given_up(self, flight: Flight[Any]) -> bool:
        """Tell whether a flight has had all its calls, and the last one is overdue, too."""
        return len(flight.runs) >= MOST_CALLS and self.patience.overdue_at(flight) <= self.clock()

    def add_prefetched(self, flight: Flight[Any], now: float) -> None:
        """Put a new flight of a prefetch into the map, queued. Its key must have none."""
        counts, by_key, key = self.ledger.counts, self.shelf.by_key, flight.key
        flight.asks = 1
        by_key[key] = flight  # and from here to the next call nothing can come in between
        counts.prefetch_started += 1
        if self.admission.paused:
            self.admission.note_probe(flight, now)

    def claim(
        self,
        flight: Flight[Any],
        now: float,
        loop: asyncio.AbstractEventLoop | None,
        *,
        for_query: bool,
        pays: bool = True,
    ) -> Run:
        """Take a flight from queued to running. Whoever gets the run is to carry it out."""
        flight.started_at = now
        flight.attempt += 1
        flight.state = State.RUNNING
        if flight.by_prefetch and (for_query or flight.home is None):
            self.admission.give_back(flight)
        run = self.begin_run(flight, now, loop, for_query=for_query)
        if pays and self.patience.hedges:
            self.patience.pay_in()
        if flight.waiters:
            self.patience.watch(flight)
        return run

    def begin_run(
        self,
        flight: Flight[Any],
        now: float,
        loop: asyncio.AbstractEventLoop | None,
        *,
        for_query: bool,
        beside: bool = False,
    ) -> Run:
        """Give a running flight a run."""
        run = Run(flight, now, loop, for_query=for_query)
        if for_query:
            flight.for_query = True
        if beside:
            run.beside = True
        flight.called_at = now
        flight.runs = (*flight.runs, run)
        self.admission.called_at = now
        return run

    def attend(self, flight: Flight[Any], visit: Visit[Any], run: Run | None) -> None:
        """Note one more who waits for a flight, and the call for it that it is to make."""
        flight.waiters[visit] = None
        visit.run = run
        visit.flight = flight
        if (run is None or self.patience.hedges) and flight.state is State.RUNNING:
            self.patience.watch(flight)

    def end(self, flight: Flight[Any], state: State) -> None:
        """Take an unfinished flight to its end. Whoever called the step tells those who wait."""
        now = self.clock()
        if state is State.DONE or not (flight.waiters or flight.to_come):
            flight.failure = None
        if flight.era is not self.era:
            flight.held = flight.by_prefetch = False  # it is counted in the parent
            self.ledger.ended(flight, state, now)
            return
        if state is State.FAILED and flight.held:
            self.ledger.remember_if_unused(flight)
        self.ledger.ended(flight, state, now)
        if flight.by_prefetch:
            self.admission.give_back(flight)
        if self.detached:
            self.detached.discard(flight)
        if not flight.held:
            return
        if state is not State.DONE or self.closed:
            self.ledger.left_map(flight)
            self.shelf.remove(flight)
        elif leaving := self.shelf.keep(flight, now):
            self.take_out(leaving)

    def let_go(self, flight: Flight[Any]) -> bool:
        """Take a flight out of the map before its time; True if that ended it."""
        if not flight.ended:
            self.detached.add(flight)
        self.ledger.left_map(flight)
        self.shelf.remove(flight)
        if flight.state is State.QUEUED and not flight.waiters:
            self.end(flight, State.FAILED)
            return True
        return False

    def take_out(self, flights: list[Flight[Any]]) -> None:
        """Take ready flights out of the map, for age or for size."""
        for flight in flights:
            self.ledger.remember_if_unused(flight)
            self.ledger.left_map(flight)
            self.shelf.remove(flight)

    def expire(self) -> None:
        """Let go of what has outlived its time."""
        self.take_out(self.shelf.expired(self.clock()))

    def mend(self, thrown_out: int) -> list[Flight[Any]]:
        """Put in order what a torn step may have left; return the flights that this has ended.

        Args:
            thrown_out: The thread whose step it was. Calls that it was to make, and has not begun,
                nobody will make.
        """
        self.shelf.mend()
        self.detached = {flight for flight in self.detached if not flight.ended}
        ended = []
        for flight in self.unfinished():
            flight.runs = tuple(r for r in flight.runs if r.began or r.thread != thrown_out)
            if flight.state is State.RUNNING and not flight.runs:
                if flight.by_prefetch and not flight.for_query and not flight.waiters:
                    flight.state = State.QUEUED
                else:
                    self.end(flight, State.FAILED)
                    ended.append(flight)
        self.admission.mend(self.unfinished())
        return ended

    def unfinished(self) -> list[Flight[Any]]:
        """Return every flight that has not ended."""
        held = {flight for flight in self.shelf.flights() if not flight.ended}
        return [*(held | self.detached)]

    def leaks(self) -> Iterator[str]:
        """Say what is under way, or does not add up. Nothing is, when all calls have returned."""
        held, ready, stats = self.shelf.flights(), self.shelf.ready(), self.ledger.counts.snapshot()
        if unfinished := self.unfinished():
            yield f"{len(unfinished)} flights are still under way"
        if places := self.admission.places_taken:
            yield f"{places} places in the queue are taken by nobody"
        if self.closed and (busy := self.admission.workers_busy):
            yield f"{busy} jobs were never given back"
        if waits := sum(len(flight.waiters) for flight in held):
            yield f"{waits} waits never ended"
        if set(held) != set(ready) or not all(flight.held for flight in held):
            yield "the map and the ready flights differ"
        if any(flight.failure or flight.runs or flight.context for flight in held):
            yield "a kept flight holds more than its value"
        ended = stats.prefetch_succeeded + stats.prefetch_failed + stats.prefetch_withdrawn
        if stats.prefetch_started != ended:
            yield f"prefetches do not add up: {stats}"
        unused = sum(flight.by_prefetch and not flight.served for flight in ready)
        if stats.prefetch_succeeded != stats.prefetch_used + stats.prefetch_wasted + unused:
            yield f"uses do not add up: {stats} with {unused} unused"
