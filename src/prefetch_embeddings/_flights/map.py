"""The map from key to flight: what is begun ahead, what is kept, and what is let go.

It decides; it runs nothing, waits for nothing and calls nobody. Every method is one step, so the
states of a flight and of the map are those between two steps, and no others:

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

from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from prefetch_embeddings._flights.flight import (
    Flight,
    PrefetchOutcome,
    Run,
    State,
    Ticket,
)
from prefetch_embeddings._flights.steps import Steps, hot_step, look, step

if TYPE_CHECKING:
    import asyncio
    import contextvars
    from collections.abc import Hashable, Iterable

    from prefetch_embeddings._background.pool import Executor
    from prefetch_embeddings._flights.books import Books
    from prefetch_embeddings._flights.ledger import Unused
    from prefetch_embeddings.stats import PrefetchStats

V = TypeVar("V")


Begun: TypeAlias = tuple[PrefetchOutcome, Flight[Any] | None, Run | None]
"""What became of a prefetch: its flight, None if it was dropped; what the caller is to carry out on
its loop. A plain tuple, since prefetching is to take microseconds."""


class Claimed(NamedTuple):
    """What a worker is to run, in one call."""

    runs: list[Run]
    token: object
    """To be given back with `worker_done`."""


DROPPED: Final[Begun] = (PrefetchOutcome.DROPPED, None, None)


class FlightMap(Generic[V]):
    """Flights by key: prefetches, looks, and removal before their time.

    Args:
        books: What the steps read and write.
        steps: The lock that makes them steps.
    """

    executor: Executor
    """Runs what is queued. It is only asked whether it accepts jobs at all."""

    def __init__(self, books: Books, steps: Steps) -> None:
        self._books: Final = books
        self.steps: Final = steps

    # --- Prefetches ----------------------------------------------------------------------------

    @hot_step
    def begin(self, key: Hashable, text: str, options: Any, context: contextvars.Context) -> Begun:
        """Queue a flight for a worker, unless the key has one."""
        books = self._books
        now = books.clock()
        if key in books.shelf.by_key or books.closed or not text or text.isspace():
            settled = self._settled(key, text, now)
            if settled is not None:
                return settled
        if not (books.admission.lets_in(now) and self.executor.accepts):
            return self._dropped()
        flight: Flight[V] = Flight(key, text, options, now, books.era, True, context)  # noqa: FBT003
        books.add_prefetched(flight, now)
        books.admission.enqueue(flight)
        return PrefetchOutcome.STARTED, flight, None

    @step
    def begin_batch(
        self, items: Iterable[tuple[Hashable, str]], context: contextvars.Context
    ) -> list[Begun]:
        """Queue one job with a flight for each key that has none."""
        books = self._books
        now = books.clock()
        all_begun: list[Begun] = []
        started: list[Flight[V]] = []
        for key, text in items:
            begun = self._settled(key, text, now)
            if begun is None and not (books.admission.lets_in(now) and self.executor.accepts):
                begun = self._dropped()
            if begun is None:
                flight: Flight[V] = Flight(key, text, None, now, books.era, True, context)  # noqa: FBT003
                books.add_prefetched(flight, now)
                books.admission.take_place(flight)
                started.append(flight)
                begun = (PrefetchOutcome.STARTED, flight, None)
            all_begun.append(begun)
        books.admission.enqueue(*started)
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
        books = self._books
        now = books.clock()
        settled = self._settled(key, text, now)
        if settled is not None:
            return settled
        if not books.admission.lets_onto_loop(now):
            return self._dropped()
        flight: Flight[V] = Flight(
            key,
            text,
            options,
            now,
            books.era,
            True,  # noqa: FBT003
            context,
            loop,
        )
        books.add_prefetched(flight, now)
        books.admission.take_place(flight)
        run = books.claim(flight, now, loop, for_query=False)
        return PrefetchOutcome.STARTED, flight, run

    def _settled(self, key: Hashable, text: str, now: float) -> Begun | None:
        """Return what settles a prefetch at once, and count it; None if nothing does."""
        books = self._books
        if books.closed or not text or text.isspace():
            return self._dropped()
        if key not in books.shelf.by_key:
            return None
        flight = books.to_join(key)
        if flight is None:
            return None
        books.ledger.counts.prefetch_deduplicated += 1
        if flight.state is State.DONE:
            return PrefetchOutcome.READY, flight, None
        flight.asks += 1
        flight.asked_at = now
        return PrefetchOutcome.IN_FLIGHT, flight, None

    def _dropped(self) -> Begun:
        self._books.ledger.counts.prefetch_dropped += 1
        return DROPPED

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
                run = books.claim(flight, books.clock(), None, for_query=False, pays=not runs)
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
        return books.claim(flight, books.clock(), loop, for_query=False)

    @step
    def requeue(self, flights: Iterable[Flight[V]]) -> bool:
        """Put flights that paused between attempts into the queue, as one job.

        Returns:
            False if nothing will run them.
        """
        waiting = [flight for flight in flights if flight.state is State.QUEUED]
        if not waiting:
            return True
        if not self._may_retry(waiting[0]):
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

    @look
    def _jobs_waiting(self) -> int:
        return self._books.admission.jobs_waiting

    # --- Looks ---------------------------------------------------------------------------------

    @step
    def expire(self) -> None:
        """Let go of what has outlived its time, so that it counts as gone."""
        self._books.expire()

    @look
    def is_ready(self, key: Hashable) -> bool:
        """Tell whether a query for `key` would be answered at once. Changes nothing."""
        books = self._books
        flight = books.shelf.by_key.get(key)
        return (
            flight is not None and flight.state is State.DONE and flight.expires_at > books.clock()
        )

    @look
    def expected_wait(self, key: Hashable) -> float:
        """Estimate, in seconds, what a query for `key` would wait now. Changes nothing."""
        books = self._books
        flight, now = books.shelf.by_key.get(key), books.clock()
        if flight is not None and flight.state is State.DONE and flight.expires_at > now:
            return 0.0
        elapsed = 0.0
        if flight is not None and flight.state is State.RUNNING:
            elapsed = now - flight.started_at
        return books.ledger.durations.remaining(elapsed)

    @look
    def unused(self, key: Hashable) -> list[Unused] | None:
        """Return the most recent prefetches that no query uses; those in the map come last.

        None if `key` has a prefetch that a query for it can use, or has used.
        """
        books = self._books
        found = books.shelf.by_key.get(key)
        if found is not None and found.by_prefetch:
            return None
        return books.ledger.unused(books.shelf.flights())

    @look
    def stats(self) -> PrefetchStats:
        """Return the counts."""
        return self._books.ledger.counts.snapshot()

    @look
    def get(self, key: Hashable) -> Flight[V] | None:
        """Return the flight that stands under `key`, if one does. Changes nothing."""
        return self._books.shelf.by_key.get(key)

    # --- Removal -------------------------------------------------------------------------------

    @step
    def forget(self, key: Hashable) -> tuple[Flight[V] | None, bool]:
        """Take the key's flight out of the map; who waits for it still gets its value.

        Returns:
            The flight, and whether this has ended it.
        """
        books = self._books
        flight = books.look_up(key)
        ended = flight is not None and books.let_go(flight)
        books.ledger.forget(key)  # what has just ended, or left for age, as well
        return flight, ended

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
