"""The map from key to flight: what is begun ahead, what is kept, and what is let go.

It decides; it runs nothing, waits for nothing and calls nobody but the executor, to wake it. Every
method is one step, so the states of a flight and of the map are those between two steps, and no
others:

* A flight is queued, then running, then done or failed; a failed attempt in the background may put
  it back from running to queued. Whoever takes it from queued to running (the claim) runs it.
* A key has at most one flight in the map, under way or ready. A flight that has left the map never
  returns, and changes nothing there: each removal checks that the entry is this very flight.
* Each call for a flight is a run of it. Only a run that the flight knows can end it.
* A flight leaves the map, or becomes ready in it, before those who wait for it are told.

The steps of those who wait are in `visits`, how runs end is in `landing`, with the same lock. What
all these steps are made of is in `books`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from prefetch_embeddings._flights.flight import (
    Flight,
    PrefetchOutcome,
    Run,
    State,
    Ticket,
)
from prefetch_embeddings._flights.steps import Steps, step

if TYPE_CHECKING:
    import asyncio
    import contextvars
    from collections.abc import Callable, Hashable, Iterable

    from prefetch_embeddings._flights.books import Books
    from prefetch_embeddings._flights.ledger import Unused
    from prefetch_embeddings.stats import PrefetchStats

V = TypeVar("V")


class Begun(NamedTuple):
    """What became of a prefetch."""

    outcome: PrefetchOutcome
    flight: Flight[Any] | None = None
    """The text's flight; None if it was dropped."""
    run: Run | None = None
    """What the caller is to carry out, on its loop."""


class Claimed(NamedTuple):
    """What a worker is to run, in one call."""

    runs: list[Run]
    token: object
    """To be given back with `worker_done`."""


DROPPED: Final = Begun(PrefetchOutcome.DROPPED)


class FlightMap(Generic[V]):
    """Flights by key: prefetches, looks, and removal before their time.

    Args:
        books: What the steps read and write.
        steps: The lock that makes them steps.
        wake: Has the executor look at the queue; False if nothing ever will. Blocks nowhere, and
            may therefore be called within a step.
    """

    def __init__(self, books: Books, steps: Steps, wake: Callable[[], bool]) -> None:
        self._books: Final = books
        self.steps: Final = steps
        self._wake: Final = wake

    # --- Prefetches ----------------------------------------------------------------------------

    @step
    def begin(self, key: Hashable, text: str, options: Any, context: contextvars.Context) -> Begun:
        """Queue a flight for a worker, unless the key has one."""
        settled = self._settled(key, text)
        if settled is not None:
            return settled
        if not self._books.admission.has_place() or not self._wake():
            return self._dropped()
        flight = self._add(key, text, options, context=context)
        self._books.admission.enqueue(flight)
        return Begun(PrefetchOutcome.STARTED, flight)

    @step
    def begin_batch(
        self, items: Iterable[tuple[Hashable, str]], context: contextvars.Context
    ) -> list[Begun]:
        """Queue one job with a flight for each key that has none."""
        admission = self._books.admission
        all_begun: list[Begun] = []
        started: list[Flight[V]] = []
        for key, text in items:
            begun = self._settled(key, text)
            if begun is None and (not admission.has_place() or not (started or self._wake())):
                begun = self._dropped()
            if begun is None:
                started.append(self._add(key, text, None, context=context))
                begun = Begun(PrefetchOutcome.STARTED, started[-1])
            all_begun.append(begun)
        admission.enqueue(*started)
        return all_begun

    @step
    def begin_on_loop(
        self,
        key: Hashable,
        text: str,
        options: Any,
        context: contextvars.Context,
        loop: asyncio.AbstractEventLoop,
    ) -> Begun:
        """Start a flight that the caller runs on `loop`, unless the key has one."""
        settled = self._settled(key, text)
        if settled is not None:
            return settled
        if not self._books.admission.has_place_on_loop():
            return self._dropped()
        flight = self._add(key, text, options, context=context, home=loop)
        run = self._books.claim(flight, loop, for_query=False)
        return Begun(PrefetchOutcome.STARTED, flight, run)

    def _settled(self, key: Hashable, text: str) -> Begun | None:
        """Return what settles a prefetch at once, and count it; None if nothing does."""
        books = self._books
        if books.closed or not text or text.isspace():
            return self._dropped()
        flight = books.look_up(key)
        if flight is None:
            return None if books.admission.may_speculate(books.clock()) else self._dropped()
        books.ledger.counts.prefetch_deduplicated += 1
        if flight.state is State.DONE:
            return Begun(PrefetchOutcome.READY, flight)
        flight.asks += 1
        flight.asked_at = books.clock()
        return Begun(PrefetchOutcome.IN_FLIGHT, flight)

    def _dropped(self) -> Begun:
        self._books.ledger.counts.prefetch_dropped += 1
        return DROPPED

    def _add(self, key: Hashable, text: str, options: Any, **facts: Any) -> Flight[V]:
        flight = self._books.add(key, text, options, by_prefetch=True, **facts)
        self._books.admission.note_probe(flight, flight.asked_at)
        return flight

    @step
    def count_dropped(self) -> None:
        """Count a prefetch that came while no step could be made."""
        self._dropped()

    @step
    def claim_job(self) -> tuple[Claimed | None, list[Flight[V]]]:
        """Claim the next job of the queue, for one worker, which must call `worker_done`.

        Returns:
            The job, None if there is none; and the flights that this has ended: those that
            have waited longer than `ttl`, or that have no business in a pause.
        """
        books, admission = self._books, self._books.admission
        expired: list[Flight[V]] = []
        while job := admission.next_job():
            oldest = books.clock() - books.ttl
            runs: list[Run] = []
            for flight in job:
                if flight.asked_at < oldest or not admission.may_run(flight):
                    books.end(flight, State.FAILED)
                    expired.append(flight)
                    continue
                # The budget of hedges grows by calls, of which a job is one.
                run = books.claim(flight, None, for_query=False, pays=not runs)
                books.ledger.counts.prefetch_retried += flight.attempt > 1
                runs.append(run)
            if runs:
                return Claimed(runs, admission.begin()), expired
        return None, expired

    @step
    def worker_done(self, token: object) -> None:
        """Take back the place that `claim_job` gave."""
        self._books.admission.done(token)

    @step
    def reclaim(self, flight: Flight[V], loop: asyncio.AbstractEventLoop) -> Run | None:
        """Claim a flight that paused between attempts on `loop`; None if it is not to be run."""
        books = self._books
        if flight.state is not State.QUEUED or not self._may_retry(flight):
            return None
        books.ledger.counts.prefetch_retried += 1
        return books.claim(flight, loop, for_query=False)

    @step
    def requeue(self, flights: Iterable[Flight[V]]) -> bool:
        """Put flights that paused between attempts into the queue, as one job.

        Returns:
            False if nothing will run them.
        """
        waiting = [flight for flight in flights if flight.state is State.QUEUED]
        if not waiting:
            return True
        if not self._may_retry(waiting[0]) or not self._wake():
            return False
        self._books.admission.enqueue(*waiting)
        return True

    def _may_retry(self, flight: Flight[V]) -> bool:
        now, admission = self._books.clock(), self._books.admission
        if not admission.may_speculate(now):
            return False
        admission.note_probe(flight, now)
        return True

    def __len__(self) -> int:
        """Return how many jobs wait for a worker."""
        return self._jobs_waiting()

    @step
    def _jobs_waiting(self) -> int:
        return self._books.admission.jobs_waiting

    # --- Looks ---------------------------------------------------------------------------------

    @step
    def is_ready(self, key: Hashable) -> bool:
        """Tell whether a query for `key` would be answered at once. Changes nothing."""
        books = self._books
        flight = books.shelf.get(key)
        return (
            flight is not None and flight.state is State.DONE and flight.expires_at > books.clock()
        )

    @step
    def expected_wait(self, key: Hashable) -> float:
        """Estimate, in seconds, what a query for `key` would wait now. Changes nothing."""
        books = self._books
        flight, now = books.shelf.get(key), books.clock()
        if flight is not None and flight.state is State.DONE and flight.expires_at > now:
            return 0.0
        elapsed = 0.0
        if flight is not None and flight.state is State.RUNNING:
            elapsed = now - flight.started_at
        return books.ledger.durations.remaining(elapsed)

    @step
    def unused(self, key: Hashable) -> list[Unused] | None:
        """Return the most recent prefetches that no query uses; those in the map come last.

        None if `key` has a prefetch that a query for it can use, or has used.
        """
        books = self._books
        books.expire()
        found = books.shelf.get(key)
        if found is not None and found.by_prefetch:
            return None
        return books.ledger.unused(books.shelf.flights())

    @step
    def stats(self) -> PrefetchStats:
        """Return the counts; what has outlived its time counts as gone."""
        self._books.expire()
        return self._books.ledger.counts.snapshot()

    @step
    def get(self, key: Hashable) -> Flight[V] | None:
        """Return the flight that stands under `key`, if one does. Changes nothing."""
        return self._books.shelf.get(key)

    # --- Removal -------------------------------------------------------------------------------

    @step
    def forget(self, key: Hashable) -> tuple[Flight[V] | None, bool]:
        """Take the key's flight out of the map; who waits for it still gets its value.

        Returns:
            The flight, and whether this has ended it.
        """
        books = self._books
        books.ledger.forget(key)
        flight = books.look_up(key)
        return flight, flight is not None and books.let_go(flight)

    @step
    def take_back(self, ticket: Ticket[V]) -> Flight[V] | None:
        """Take back one ask. Return the flight if this has ended it: nobody else wanted it."""
        flight, ticket.flight = ticket.flight, None
        if flight is None or flight.ended:
            return None
        flight.asks -= 1
        if flight.state is not State.QUEUED or flight.wanted:
            return None
        self._books.end(flight, State.FAILED)
        return flight

    @step
    def clear(self) -> list[Flight[V]]:
        """Take every flight out of the map, as `forget` does; return those that this has ended."""
        books = self._books
        books.expire()
        ended = [flight for flight in books.shelf.flights() if books.let_go(flight)]
        books.ledger.forget_all()
        return ended

    @step
    def on_loops(self) -> list[Flight[V]]:
        """Return the flights of the background that loops run."""
        return self._books.admission.on_loops()

    @step
    def close(self) -> list[tuple[Flight[V], tuple[Run, ...], int]]:
        """Begin nothing more, keep nothing more, and end every flight that no query runs.

        Returns:
            The flights that this has ended, each with the calls that were under way for it,
            and how many attempts there were.
        """
        books = self._books
        books.closed = True
        books.expire()
        ended = []
        for flight in (*books.shelf.flights(), *books.detached):
            if flight.state is State.DONE:
                books.let_go(flight)
            elif not flight.for_query:
                ended.append((flight, flight.runs, flight.attempt))
                books.end(flight, State.FAILED)
        books.ledger.forget_all()
        return ended

    @step
    def leaks(self) -> list[str]:
        """Say what is under way, or does not add up."""
        books = self._books
        books.expire()
        return [*books.leaks()]
