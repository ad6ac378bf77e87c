"""Prefetches: begins them, takes them back, and has them tried again."""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from prefetch_embeddings._flights.flight import PrefetchOutcome, Ticket
from prefetch_embeddings._flights.map import DROPPED
from prefetch_embeddings._flights.steps import ReenteredError, put_off

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from prefetch_embeddings._background.timer import Scheduler
    from prefetch_embeddings._flights.flight import Flight
    from prefetch_embeddings._flights.landing import Landing
    from prefetch_embeddings._flights.loader import Key, Loader
    from prefetch_embeddings._flights.map import Begun, FlightMap
    from prefetch_embeddings._flights.on_loops import OnLoops
    from prefetch_embeddings.reporting import Reporter

V = TypeVar("V")


class Asking(Generic[V]):
    """The half of a `Prefetcher` that begins flights in the background.

    Args:
        flights: The map.
        landing: Where runs end.
        on_loops: Carries out runs as tasks.
        loader: Loads the values.
        wake: Has the executor look at the queue; False if nothing ever will.
        key: Returns what texts must share to be the same.
        scheduler: Wakes flights that pause between attempts.
        reporter: Is told what happens.
    """

    def __init__(
        self,
        flights: FlightMap[V],
        landing: Landing[V],
        on_loops: OnLoops[V],
        loader: Loader[V],
        *,
        wake: Callable[[], bool],
        key: Key,
        scheduler: Scheduler,
        reporter: Reporter,
    ) -> None:
        self._flights: Final = flights
        self._landing: Final = landing
        self._on_loops: Final = on_loops
        self._loader: Final = loader
        self.key: Final = key
        self.steps: Final = flights.steps
        self._wake: Final = wake
        self._scheduler: Final = scheduler
        self._reporter: Final = reporter
        self._queried_in_threads = False  # whether the last query came in one

    def prefetch(self, text: str, options: Any = None, variant: Hashable = None) -> PrefetchOutcome:
        """Have `text` loaded in the background. Arguments as for `get`."""
        return self._begin(text, options, variant)[0]

    def ask(
        self, text: str, options: Any = None, variant: Hashable = None
    ) -> tuple[PrefetchOutcome, Ticket[V] | None]:
        """Do what `prefetch` does, so that it can be taken back.

        Returns:
            The outcome, and the ticket that stands for this ask; None where there is nothing
            to take back: the value is there, or the prefetch was dropped.
        """
        outcome, flight, _ = self._begin(text, options, variant)
        if flight is None or outcome is PrefetchOutcome.READY:
            return outcome, None
        return outcome, Ticket(flight)

    @put_off(answer=False)
    def take_back(self, ticket: Ticket[V]) -> bool:
        """Take back the ask that a ticket stands for; a second time does nothing.

        Returns:
            Whether this withdrew the flight: it was still queued, nobody waits for it, and nobody
            else asked for it. One that runs goes on, and is not retried if nobody wants it.
        """
        flight = self._flights.take_back(ticket)
        if flight is not None:
            self._landing.drop((flight,))
        return flight is not None

    def _begin(self, text: str, options: Any, variant: Hashable) -> Begun:
        key = self.key(text, variant)
        context = contextvars.copy_context()
        try:
            begun = self._flights.begin(key, text, options, context)
            outcome, flight, _ = begun
            if outcome is PrefetchOutcome.IN_FLIGHT and self._abandon_if_dead(flight):
                begun = self._flights.begin(key, text, options, context)
        except ReenteredError:
            return self._refuse(text)
        return self._have_run(text, begun)

    def _have_run(self, text: str, begun: Begun, *, woken: bool = False) -> Begun:
        """Have a new flight run by the executor, and tell what became of the prefetch.

        Args:
            text: The text.
            begun: What the map did.
            woken: Whether the executor has been told of the job already.
        """
        outcome, flight, run = begun
        if outcome is PrefetchOutcome.STARTED and flight is not None:
            if self._reporter.listening:
                self._reporter.started(text, flight.number)
            if run is None and not woken and not self._wake():
                self._landing.abandon(flight, only_queued=True)
                if flight.ended:
                    return self._refuse(text)
        elif outcome is PrefetchOutcome.DROPPED:
            self._reporter.dropped(text)
        return begun

    def prefetch_many(self, texts: Iterable[str]) -> list[PrefetchOutcome]:
        """Have several texts loaded in the background, in one call where the model allows it."""
        items = [(self.key(text), text) for text in texts]
        if not self._loader.loads_many:
            return [self.prefetch(text) for _, text in items]
        try:
            for key, _ in items:
                self._abandon_if_dead(self._flights.get(key))
            all_begun = self._flights.begin_batch(items, contextvars.copy_context())
        except ReenteredError:
            return [self._refuse(text)[0] for _, text in items]
        outcomes: list[PrefetchOutcome] = []
        for (_, text), begun in zip(items, all_begun, strict=True):
            woken = PrefetchOutcome.STARTED in outcomes  # all that it started are one job
            outcomes.append(self._have_run(text, begun, woken=woken)[0])
        return outcomes

    async def aprefetch(
        self, text: str, options: Any = None, variant: Hashable = None
    ) -> PrefetchOutcome:
        """Have `text` loaded on the running loop; returns once the first step is done.

        Where the last query came in a thread, threads load it, as with `prefetch`: then no query
        waits in a thread of an executor for a task that needs a thread of the same executor.
        """
        if not self._loader.native_async or self._queried_in_threads:
            return self.prefetch(text, options, variant)
        key = self.key(text, variant)
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        try:
            begun = self._flights.begin_on_loop(key, text, options, context, loop)
            outcome, flight, _ = begun
            if outcome is not PrefetchOutcome.STARTED and self._abandon_dead(flight):
                begun = self._flights.begin_on_loop(key, text, options, context, loop)
        except ReenteredError:
            return self._refuse(text)[0]
        outcome, _, run = self._have_run(text, begun)
        if run is not None:
            self._on_loops.launch(run, context.copy())
            await asyncio.sleep(0)
        return outcome

    def _refuse(self, text: str) -> Begun:
        """Drop a prefetch that nothing will run."""
        try:
            self._flights.count_dropped()
        except ReenteredError:  # it came while this thread was within a step
            self.steps.put_off.append(self._flights.count_dropped)
        self._reporter.dropped(text)
        return DROPPED

    def _abandon_dead(self, flight: Flight[V] | None) -> bool:
        """Abandon flights whose loops have closed, and which take the places of others."""
        if flight is not None:
            return self._abandon_if_dead(flight)
        abandoned = [self._abandon_if_dead(each) for each in self._flights.on_loops()]
        return any(abandoned)

    def _abandon_if_dead(self, flight: Flight[V] | None) -> bool:
        """Abandon a flight that only closed loops run; True if it was so."""
        if flight is None or flight.ended or not flight.is_left_alone():
            return False
        self._landing.abandon(flight)
        return True

    def try_again(self, flights: Sequence[Flight[V]], seconds: float) -> None:
        """Have flights that a run in the background has failed run again, after a pause."""
        if not self._scheduler.call_later(seconds, lambda: self._again(flights)):
            for flight in flights:
                self._landing.abandon(flight, only_queued=True)

    def _again(self, flights: Sequence[Flight[V]]) -> None:
        for flight in flights:
            if flight.home is not None:
                self._on_loops.relaunch(flight, flight.home)
        in_threads = [flight for flight in flights if flight.home is None]
        if not (self._flights.requeue(in_threads) and self._wake()):
            for flight in in_threads:
                self._landing.abandon(flight, only_queued=True)
