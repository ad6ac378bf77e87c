"""The front door of the core: values by text, loaded ahead or when asked for.

From here a query's text goes down to `query` (which flight), `joins` (how long to wait), then
`in_threads` or `on_loops` (the call), and the loader. Nothing above knows anything below.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from prefetch_embeddings._background import forks
from prefetch_embeddings._background.pool import JobPool
from prefetch_embeddings._flights.asking import Asking
from prefetch_embeddings._flights.books import Books
from prefetch_embeddings._flights.drivers import Drivers
from prefetch_embeddings._flights.flight import full_key
from prefetch_embeddings._flights.in_threads import InThreads
from prefetch_embeddings._flights.joins import LoopWaiter, ThreadWaiter
from prefetch_embeddings._flights.landing import Landing
from prefetch_embeddings._flights.map import FlightMap
from prefetch_embeddings._flights.on_loops import OnLoops
from prefetch_embeddings._flights.overdue import Lookout
from prefetch_embeddings._flights.query import Queries
from prefetch_embeddings._flights.steps import ReenteredError, Steps, put_off
from prefetch_embeddings._flights.visits import Visits

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from prefetch_embeddings._background import Background
    from prefetch_embeddings._flights.flight import Flight, PrefetchOutcome, Ticket
    from prefetch_embeddings._flights.ledger import Unused
    from prefetch_embeddings._flights.loader import Loader
    from prefetch_embeddings._flights.patience import Hedge
    from prefetch_embeddings._flights.query import Answer
    from prefetch_embeddings.events import PrefetchEvent
    from prefetch_embeddings.reporting import Reporter
    from prefetch_embeddings.stats import PrefetchStats

V = TypeVar("V")


class Prefetcher(Generic[V]):
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
        on_missed: Is called with the key and text of a query that found nothing.
    """

    def __init__(
        self,
        loader: Loader[V],
        *,
        key: Callable[[str], Hashable],
        ttl: float,
        max_entries: int,
        max_workers: int,
        max_pending: int,
        attempts: int,
        hedge: Hedge | None,
        background: Background,
        reporter: Reporter,
        sound: Callable[[V], bool] | None = None,
        on_missed: Callable[[Hashable, str], None] | None = None,
    ) -> None:
        self.key: Final = key
        self.clock: Final = background.clock
        self._loader: Final = loader
        self._reporter: Final = reporter
        self._scheduler: Final = background.scheduler
        books = self._books = Books(
            ttl=ttl,
            max_entries=max_entries,
            max_workers=max_workers,
            max_pending=max_pending,
            attempts=attempts,
            hedge=hedge,
            clock=background.clock,
        )
        self.steps: Final = Steps()
        self.steps.mend = self._mend
        self._flights: Final[FlightMap[V]] = FlightMap(books, self.steps, self._wake)
        visits: Visits[V] = Visits(books, self.steps)
        self._visits: Final = visits
        self._landing: Final[Landing[V]] = Landing(
            books, self.steps, reporter=reporter, try_again=self._try_again, sound=sound
        )
        self._aside: Final = JobPool(None)
        in_threads: InThreads[V] = InThreads(
            self._flights, self._landing, loader, aside=self._aside
        )
        on_loops: OnLoops[V] = OnLoops(self._flights, self._landing, loader)
        self._executor: Final = background.executor(in_threads, max_workers)
        lookout = Lookout(
            visits,
            self._landing,
            in_threads,
            on_loops,
            scheduler=background.scheduler,
            reporter=reporter,
        )
        self._queries: Final[Queries[V]] = Queries(
            visits, self._landing, lookout, reporter=reporter, on_missed=on_missed
        )
        self._drivers: Final = Drivers(in_threads, on_loops, hedges=hedge is not None)
        self._asking: Final[Asking[V]] = Asking(
            self._flights,
            self._landing,
            on_loops,
            loader,
            key=key,
            scheduler=background.scheduler,
            reporter=reporter,
        )
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
        key = full_key(self.key, text, variant)
        self._asking.queried_in_threads = True
        try:
            flight = self._visits.ready(key, text)
            if flight is None:
                waiter = ThreadWaiter(contextvars.copy_context(), for_query=True)
                way = self._queries.way(key, text, options, waiter, self.clock)
                answer: Answer = self._drivers.drive(way, waiter)
                return cast("V", _value(answer))
        except ReenteredError:
            return self._loader.load(text, options)
        if self._reporter.listening:
            self._reporter.served(text, flight.number, "ready", 0.0)
        return flight.value

    async def aget(self, text: str, options: Any = None, variant: Hashable = None) -> V:
        """Return the value of `text`; the calling coroutine waits. Raises what `get` raises.

        Cancelling the caller cancels its wait, and the work only if nobody else wants it.
        """
        key = full_key(self.key, text, variant)
        self._asking.queried_in_threads = False
        try:
            flight = self._visits.ready(key, text)
            if flight is None:
                loop = asyncio.get_running_loop()
                waiter = LoopWaiter(loop, contextvars.copy_context(), for_query=True)
                way = self._queries.way(key, text, options, waiter, self.clock)
                answer: Answer = await self._drivers.adrive(way, waiter)
                return cast("V", _value(answer))
        except ReenteredError:
            return await self._loader.aload(text, options)
        if self._reporter.listening:
            self._reporter.served(text, flight.number, "ready", 0.0)
        return flight.value

    # --- Prefetches ----------------------------------------------------------------------------

    def prefetch(self, text: str, options: Any = None, variant: Hashable = None) -> PrefetchOutcome:
        """Have `text` loaded in the background. Arguments as for `get`."""
        return self._asking.prefetch(text, options, variant)

    def ask(
        self, text: str, options: Any = None, variant: Hashable = None
    ) -> tuple[PrefetchOutcome, Ticket[V] | None]:
        """Do what `prefetch` does, so that it can be taken back.

        Returns:
            The outcome, and the ticket that stands for this ask; None where there is nothing
            to take back: the value is there, or the prefetch was dropped.
        """
        return self._asking.ask(text, options, variant)

    def take_back(self, ticket: Ticket[V]) -> bool:
        """Take back the ask that a ticket stands for, and nobody else's.

        Returns:
            Whether this withdrew the flight before it ran: nobody else asked or waits for it.
        """
        return self._asking.take_back(ticket)

    def prefetch_many(self, texts: Iterable[str]) -> list[PrefetchOutcome]:
        """Have several texts loaded in the background, in one call where the model allows it."""
        return self._asking.prefetch_many(texts)

    async def aprefetch(
        self, text: str, options: Any = None, variant: Hashable = None
    ) -> PrefetchOutcome:
        """Have `text` loaded on the running loop; returns once the first step is done."""
        return await self._asking.aprefetch(text, options, variant)

    # --- Explicit waits and looks --------------------------------------------------------------

    def wait(self, text: str, timeout: float | None, variant: Hashable = None) -> bool:
        """Wait for the flight of `text`, if it has one; True if its value is there.

        Without a timeout a flight that is still queued is run at once, in a thread of its own:
        the model may hang, and closing must let this thread go.

        Raises:
            RuntimeError: If the model waits, while it loads a text, for that text.
        """
        key = full_key(self.key, text, variant)
        waiter = ThreadWaiter(contextvars.copy_context(), for_query=False)
        try:
            way = self._queries.wait(key, waiter, timeout, claim=timeout is None)
            return bool(self._drivers.drive(way, waiter))
        except ReenteredError:
            return False  # it can come to nothing while this thread is within a step

    async def await_(self, text: str, timeout: float | None, variant: Hashable = None) -> bool:
        """Do what `wait` does without blocking the loop."""
        key = full_key(self.key, text, variant)
        waiter = LoopWaiter(asyncio.get_running_loop(), contextvars.copy_context(), for_query=False)
        # Without an async client of its own a model needs a thread of the loop's executor: it
        # would go on there after the timeout, and hold up the end of the loop.
        claim = timeout is None or self._loader.native_async
        try:
            way = self._queries.wait(key, waiter, timeout, claim=claim)
            return bool(await self._drivers.adrive(way, waiter))
        except ReenteredError:
            return False

    def is_ready(self, text: str, variant: Hashable = None) -> bool:
        """Tell whether a query for `text` would be answered at once. Changes nothing."""
        return self._flights.is_ready(full_key(self.key, text, variant))

    def holds(self, text: str, variant: Hashable = None) -> bool:
        """Tell whether the value of `text` is there, or on its way. Changes nothing."""
        key = full_key(self.key, text, variant)
        flight = self._flights.get(key)
        return flight is not None and (not flight.ended or self._flights.is_ready(key))

    def expected_wait(self, text: str, variant: Hashable = None) -> float:
        """Estimate, in seconds, what a query for `text` would wait now. Changes nothing."""
        return self._flights.expected_wait(full_key(self.key, text, variant))

    def unused(self, key: Hashable) -> list[Unused] | None:
        """Return the most recent prefetches that no query uses; those in the map come last.

        None if `key` has a prefetch that a query for it can use, or has used.
        """
        return self._flights.unused(key)

    def stats(self) -> PrefetchStats:
        """Return one consistent snapshot of the counters."""
        return self._flights.stats()

    # --- For what stands beside: speech, instrumentation, tests ----------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._books.closed

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
        flight = self._flights.get(full_key(self.key, text, variant))
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
        return self._forget(full_key(self.key, text, variant))

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

    # --- Behind the curtain --------------------------------------------------------------------

    def _wake(self) -> bool:
        return self._executor.wake()

    def _try_again(self, flights: Sequence[Flight[V]], seconds: float) -> None:
        self._asking.try_again(flights, seconds)

    def _mend(self) -> None:
        self._landing.mend()
        self.steps.put_off.append(self._wake)


def _value(answer: Answer) -> Any:
    """Return a query's value, or raise its error, of which nothing here then holds a part."""
    error = answer.error
    if error is None:
        return answer.flight.value
    try:
        raise error
    finally:
        del answer, error
