"""The front door of the core: values by text, loaded ahead or when asked for.

From here a query's text goes down to `query` (which flight), `joins` (how long to wait), then
`in_threads` or `on_loops` (the call), and the loader. Nothing above knows anything below.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from prefetch_embeddings._background import forks
from prefetch_embeddings._background.pool import JobPool
from prefetch_embeddings._flights.asking import Asking
from prefetch_embeddings._flights.books import Books
from prefetch_embeddings._flights.drivers import Drivers
from prefetch_embeddings._flights.in_threads import InThreads
from prefetch_embeddings._flights.joins import LoopVisit, ThreadVisit
from prefetch_embeddings._flights.landing import Landing
from prefetch_embeddings._flights.map import FlightMap
from prefetch_embeddings._flights.on_loops import OnLoops
from prefetch_embeddings._flights.overdue import Lookout
from prefetch_embeddings._flights.query import Queries
from prefetch_embeddings._flights.steps import ReenteredError, Steps, put_off
from prefetch_embeddings._flights.visits import Visits

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from prefetch_embeddings._background import Background
    from prefetch_embeddings._flights.ledger import Unused
    from prefetch_embeddings._flights.loader import Key, Loader
    from prefetch_embeddings._flights.patience import Hedge
    from prefetch_embeddings._flights.query import Answer
    from prefetch_embeddings.events import PrefetchEvent
    from prefetch_embeddings.reporting import Reporter
    from prefetch_embeddings.stats import PrefetchStats

V = TypeVar("V")


class Prefetcher(Asking[V]):
    """Values by text, through flights.

    Every method may be called at any moment, from any thread, also by a finaliser or a signal
    handler that interrupts a call of the same object. What cannot be done then is done as soon as
    that call is out of its step; a prefetch is dropped, and a query asks the model by itself.

    Args:
        loader: Loads the values.
        key: Returns what texts must share to be the same; raises for what is not a text.
        ttl: Seconds that a value is kept, from its arrival.
        max_entries: Values kept.
        max_workers: Threads that prefetch.
        max_pending: Prefetches that may wait for a thread; and those under way on loops.
        attempts: Tries of a prefetch that nobody waits for.
        hedge: When a flight that is waited for gets a second call early; None for never.
        background: Threads and time.
        reporter: Is told what happens.
        sound: Whether a value may be kept. All may, by default.
        on_missed: Is called with this object, and the key and text of a query that found nothing.
    """

    def __init__(
        self,
        loader: Loader[V],
        *,
        key: Key,
        ttl: float,
        max_entries: int,
        max_workers: int,
        max_pending: int,
        attempts: int,
        hedge: Hedge | None,
        background: Background,
        reporter: Reporter,
        sound: Callable[[V], bool] | None = None,
        on_missed: Callable[[Prefetcher[V], Hashable, str], None] | None = None,
    ) -> None:
        steps = Steps()
        books = Books(
            ttl=ttl,
            max_entries=max_entries,
            max_workers=max_workers,
            max_pending=max_pending,
            attempts=attempts,
            hedge=hedge,
            clock=background.clock,
            call_for_look=lambda: steps.put_off.append(lookout.plan),
        )
        flights: FlightMap[V] = FlightMap(books, steps)
        visits: Visits[V] = Visits(books, steps)
        landing: Landing[V] = Landing(
            books, steps, reporter=reporter, try_again=self.try_again, sound=sound
        )
        aside = JobPool(None)
        in_threads: InThreads[V] = InThreads(flights, landing, loader, aside=aside)
        on_loops: OnLoops[V] = OnLoops(flights, landing, loader)
        executor = flights.executor = background.executor(in_threads, max_workers)

        def mend(thrown_out: int) -> None:
            landing.mend(thrown_out)
            steps.put_off.append(executor.wake)  # it may have been to be woken

        steps.mend = mend
        lookout = Lookout(
            visits,
            landing,
            in_threads,
            on_loops,
            scheduler=background.scheduler,
            reporter=reporter,
        )
        self._queries: Final[Queries[V]] = Queries(
            visits,
            landing,
            clock=background.clock,
            reporter=reporter,
            on_missed=None if on_missed is None else partial(on_missed, self),
        )
        self._drivers: Final = Drivers(in_threads, on_loops, hedges=hedge is not None)
        super().__init__(
            flights,
            landing,
            on_loops,
            loader,
            wake=executor.wake,
            key=key,
            scheduler=background.scheduler,
            reporter=reporter,
        )
        self.clock: Final = background.clock
        self._books: Final = books
        self._visits: Final = visits
        self._executor: Final = executor
        self._aside: Final = aside
        forks.register(self)

    def reset_after_fork(self) -> None:
        """Start anew in a forked child, with an empty map."""
        self.steps.start_anew()
        self._books.start_anew()

    # --- Queries -------------------------------------------------------------------------------

    def get(self, text: str, options: Any = None, variant: Hashable = None) -> V:
        """Return the value of `text`; the calling thread waits.

        Args:
            text: The text.
            options: What the loader gets with it if this query makes the call.
            variant: What parts texts that are the same otherwise.

        Raises:
            Exception: What the model raised in a call made for a query.
            RuntimeError: If the model, while it loads a text, asks for that text.
        """
        key = self.key(text, variant)
        self._queried_in_threads = True
        try:
            flight = self._visits.ready(key, text)
            if flight is None:
                visit = ThreadVisit(key, text, options, for_query=True)
                return cast("V", _value(self._drivers.drive(self._queries.way(visit), visit)))
        except ReenteredError:
            return self._loader.load(text, options)
        if self._reporter.listening:
            self._reporter.served(text, flight.number, "ready", 0.0)
        return flight.value

    async def aget(self, text: str, options: Any = None, variant: Hashable = None) -> V:
        """Return the value of `text`; the calling coroutine waits. Raises what `get` raises.

        Cancelling the caller cancels its wait, and the work only if nobody else wants it.
        """
        key = self.key(text, variant)
        self._queried_in_threads = False
        try:
            flight = self._visits.ready(key, text)
            if flight is None:
                visit = LoopVisit(key, text, options, for_query=True)
                visit.loop = asyncio.get_running_loop()
                way = self._queries.way(visit)
                return cast("V", _value(await self._drivers.adrive(way, visit)))
        except ReenteredError:
            return await self._loader.aload(text, options)
        if self._reporter.listening:
            self._reporter.served(text, flight.number, "ready", 0.0)
        return flight.value

    # --- Explicit waits and looks --------------------------------------------------------------

    def wait(self, text: str, timeout: float | None, variant: Hashable = None) -> bool:
        """Wait for the flight of `text`, if it has one; True if its value is there.

        Without a timeout a flight that is still queued is run at once, in a thread of its own:
        the model may hang, and closing must let this thread go.

        Raises:
            RuntimeError: If the model waits, while it loads a text, for that text.
        """
        key = self.key(text, variant)
        visit = ThreadVisit(key, text, None, for_query=False)
        try:
            way = self._queries.wait(visit, timeout, claim=timeout is None)
            return bool(self._drivers.drive(way, visit))
        except ReenteredError:
            return False  # it can come to nothing while this thread is within a step

    async def await_(self, text: str, timeout: float | None, variant: Hashable = None) -> bool:
        """Do what `wait` does without blocking the loop."""
        key = self.key(text, variant)
        visit = LoopVisit(key, text, None, for_query=False)
        visit.loop = asyncio.get_running_loop()
        # Without an async client of its own a model needs a thread of the loop's executor: it
        # would go on there after the timeout, and hold up the end of the loop.
        claim = timeout is None or self._loader.native_async
        try:
            way = self._queries.wait(visit, timeout, claim=claim)
            return bool(await self._drivers.adrive(way, visit))
        except ReenteredError:
            return False

    def is_ready(self, text: str, variant: Hashable = None) -> bool:
        """Tell whether a query for `text` would be answered at once. Changes nothing."""
        return self._flights.is_ready(self.key(text, variant))

    def holds(self, text: str, variant: Hashable = None) -> bool:
        """Tell whether the value of `text` is there, or on its way. Changes nothing."""
        key = self.key(text, variant)
        flight = self._flights.get(key)
        return flight is not None and (not flight.ended or self._flights.is_ready(key))

    def expected_wait(self, text: str, variant: Hashable = None) -> float:
        """Estimate, in seconds, what a query for `text` would wait now. Changes nothing."""
        return self._flights.expected_wait(self.key(text, variant))

    def unused(self, key: Hashable) -> list[Unused] | None:
        """Return the most recent prefetches that no query uses; those in the map come last.

        None if `key` has a prefetch that a query for it can use, or has used.
        """
        self._expire()
        return self._flights.unused(key)

    def stats(self) -> PrefetchStats:
        """Return one consistent snapshot of the counters."""
        self._expire()
        return self._flights.stats()

    @put_off(None)
    def _expire(self) -> None:
        self._flights.expire()

    # --- For what stands beside: speech, instrumentation, tests ----------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._books.closed

    @property
    def paused(self) -> bool:
        """Whether prefetching pauses, because calls keep failing."""
        return self._books.admission.paused

    def add_listener(self, listener: Callable[[PrefetchEvent], None]) -> None:
        """Have one more listener told of events from now on."""
        self._reporter.add_listener(listener)

    def call_later(self, seconds: float, call: Callable[[], None]) -> bool:
        """Call `call()` in `seconds` seconds, from the one thread that all delays share.

        Returns:
            False if it never will.
        """
        return self._scheduler.call_later(seconds, call)

    def waiters(self, text: str, variant: Hashable = None) -> int:
        """Return how many queries and explicit waits wait for the flight of `text`."""
        flight = self._flights.get(self.key(text, variant))
        return 0 if flight is None else len(flight.waiters)

    def leaks(self) -> list[str]:
        """Say what is under way, or does not add up. Nothing is, when all calls have returned."""
        return self._flights.leaks()

    def join(self, timeout: float) -> bool:
        """Wait, `timeout` seconds at the most, until no worker thread is left; True if so."""
        return self._executor.join(timeout) and self._aside.join(timeout)

    # --- Removal -------------------------------------------------------------------------------

    def forget(self, text: str, variant: Hashable = None) -> bool:
        """Take `text` out of the map; True if it was there."""
        return self._forget(self.key(text, variant))

    @put_off(answer=True)
    def _forget(self, key: Hashable) -> bool:
        flight, ended = self._flights.forget(key)
        if flight is not None and ended:
            self._landing.drop((flight,))
        return flight is not None

    @put_off(None)
    def clear(self) -> None:
        """Take everything out of the map."""
        self._landing.drop(self._flights.clear())

    @put_off(None)
    def close(self) -> None:
        """End what is under way in the background; begin nothing more."""
        for flight, runs, attempt in self._flights.close():
            self._landing.drop((flight,))
            self._landing.let_down(flight, runs, attempt)
        self._executor.close()
        self._aside.close()


def _value(answer: Answer) -> Any:
    """Return a query's value, or raise its error, of which nothing here then holds a part."""
    error = answer.error
    if error is None:
        return answer.flight.value
    try:
        raise error
    finally:
        del answer, error
