"""All that the one lock guards, and the moves that steps are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._flights.admission import Admission
from prefetch_embeddings._flights.flight import Flight, Run, State
from prefetch_embeddings._flights.ledger import Ledger
from prefetch_embeddings._flights.patience import Patience
from prefetch_embeddings._flights.shelf import Shelf

if TYPE_CHECKING:
    import asyncio
    import contextvars
    from collections.abc import Callable, Hashable, Iterator

    from prefetch_embeddings._flights.flight import Waiter
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
    ) -> None:
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
        self.patience = Patience(self._hedge, self.ledger.durations)
        self.detached: set[Flight[Any]] = set()  # unfinished, and no longer in the map

    # --- Moves ---------------------------------------------------------------------------------

    def look_up(self, key: Hashable) -> Flight[Any] | None:
        """Return the flight in the map, unless its time is up."""
        flight = self.shelf.get(key)
        if flight is not None and flight.state is State.DONE:
            now = self.clock()
            if flight.expires_at <= now:
                self.left(self.shelf.expire(now))
                return None
        return flight

    def add(
        self,
        key: Hashable,
        text: str,
        options: Any,
        *,
        by_prefetch: bool,
        context: contextvars.Context | None = None,
        home: asyncio.AbstractEventLoop | None = None,
    ) -> Flight[Any]:
        """Put a new flight into the map, queued. Its key must have none."""
        flight: Flight[Any] = Flight(
            key,
            text,
            options,
            self.clock(),
            self.era,
            by_prefetch=by_prefetch,
            context=context,
            home=home,
        )
        if by_prefetch:
            self.ledger.counts.prefetch_started += 1
            flight.asks = 1
            self.admission.take_place(flight)
        self.shelf.add(flight)
        return flight

    def claim(
        self,
        flight: Flight[Any],
        loop: asyncio.AbstractEventLoop | None,
        *,
        for_query: bool,
        pays: bool = True,
    ) -> Run:
        """Take a flight from queued to running. Whoever gets the run is to carry it out."""
        now = self.clock()
        flight.started_at = now
        flight.attempt += 1
        flight.state = State.RUNNING
        if for_query or flight.home is None:
            self.admission.give_back(flight)
        run = self.begin_run(flight, loop, for_query=for_query)
        if pays:
            self.patience.pay_in()
        if flight.waiters:
            self.patience.watch(flight)
        return run

    def begin_run(
        self,
        flight: Flight[Any],
        loop: asyncio.AbstractEventLoop | None,
        *,
        for_query: bool,
        beside: bool = False,
    ) -> Run:
        """Give a running flight a run."""
        now = self.clock()
        run = Run(flight, now, loop, for_query=for_query, beside=beside)
        flight.runs = (*flight.runs, run)
        flight.called_at = now
        flight.for_query = flight.for_query or for_query
        self.admission.note_call(now)
        return run

    def attend(self, flight: Flight[Any], waiter: Waiter, run: Run | None) -> None:
        """Note one more who waits for a flight, and whether the call for it is its own."""
        waiter.makes_call = run is not None
        flight.waiters[waiter] = None
        if flight.state is State.RUNNING and (run is None or self.patience.hedges):
            self.patience.watch(flight)

    def end(self, flight: Flight[Any], state: State) -> None:
        """Take an unfinished flight to its end. Whoever called the step tells those who wait."""
        now = self.clock()
        self.admission.give_back(flight)
        self.detached.discard(flight)
        flight.state = state
        flight.finished_at = now
        flight.context = None  # what is kept holds no request alive
        flight.options = None
        flight.runs = ()
        if state is State.DONE or not flight.waiters:
            flight.failure = None
        if flight.era is not self.era:
            flight.held = False
            return
        ledger = self.ledger
        ledger.ended(flight)
        if state is State.FAILED and flight.held:
            ledger.remember_if_unused(flight)
        if state is not State.DONE or self.closed or not flight.held:
            self.shelf.remove(flight)
        else:
            self.left(self.shelf.keep(flight, now))
        ledger.count_if_wasted(flight)

    def let_go(self, flight: Flight[Any]) -> bool:
        """Take a flight out of the map before its time; True if that ended it."""
        self.shelf.remove(flight)
        if flight.state is State.QUEUED and not flight.waiters:
            self.end(flight, State.FAILED)
            return True
        if flight.state is State.DONE:
            self.ledger.count_if_wasted(flight)
        else:
            self.detached.add(flight)
        return False

    def left(self, flights: list[Flight[Any]]) -> None:
        """Note that ready flights have left for age or for size."""
        for flight in flights:
            self.ledger.remember_if_unused(flight)
            self.ledger.count_if_wasted(flight)

    def expire(self) -> None:
        """Let go of what has outlived its time."""
        self.left(self.shelf.expire(self.clock()))

    def unfinished(self) -> list[Flight[Any]]:
        """Return every flight that has not ended."""
        held = [flight for flight in self.shelf.flights() if not flight.ended]
        return [*held, *self.detached]

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
