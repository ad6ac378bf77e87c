"""Who waits for which flight, and the calls that are begun on their behalf.

A query, or an explicit wait, visits a flight: it enters, perhaps with the duty to make the call,
waits, and leaves. Every method is one step, under the lock of the map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, TypeVar

from prefetch_embeddings._flights.flight import End, Flight, Met, Run, State, Visit, Waiter
from prefetch_embeddings._flights.patience import MOST_CALLS
from prefetch_embeddings._flights.steps import Steps, step

if TYPE_CHECKING:
    from collections.abc import Hashable

    from prefetch_embeddings._flights.books import Books

V = TypeVar("V")


class Visits(Generic[V]):
    """Takes waiters in, and parts them from their flights.

    Args:
        books: What the steps read and write.
        steps: The lock that makes them steps.
    """

    def __init__(self, books: Books, steps: Steps) -> None:
        self._books: Final = books
        self.steps: Final = steps

    @step
    def ready(self, key: Hashable, text: str) -> Flight[V] | None:
        """Serve a query from a ready flight, or return None. The hot path."""
        books = self._books
        flight = books.look_up(key)
        if flight is None or flight.state is not State.DONE:
            return None
        ledger = books.ledger
        ledger.counts.query_ready += 1
        if flight.text != text:
            ledger.counts.query_matched += 1
        if not flight.served:
            ledger.served(flight)
        books.shelf.use(flight)
        return flight

    @step
    def enter(self, visit: Visit[V]) -> None:
        """Take a query in: to the flight of its key, to a new one if there is none.

        If the visit has a run then, the call is the visitor's to make. In every case it waits for
        the flight from now on, and must `leave` it.
        """
        books = self._books
        now = books.clock()  # before a claim: all of its run is this query's wait
        flight, met, run = self._find(visit)
        books.attend(flight, visit.waiter, run)
        if flight.first_query_at is None and not flight.ended:
            flight.first_query_at = now
        if visit.after is None:
            books.ledger.met(met)
        else:
            visit.after.successor = flight
        visit.met = met
        visit.run = run
        visit.flight = flight

    def _find(self, visit: Visit[V]) -> tuple[Flight[V], Met, Run | None]:
        """Find the flight that a query is to wait for, and the call it is to make for it.

        Those who recover from one flight do so by one other, its successor. Their call is never
        left to a prefetch, which could fail them again: beside a running one they begin their own.
        """
        books, loop, after = self._books, visit.waiter.loop, visit.after
        heir = None if after is None else after.successor
        if heir is not None and heir.state is not State.FAILED:
            return heir, Met.READY if heir.state is State.DONE else Met.JOINED, None
        flight = books.look_up(visit.key)
        if flight is None:
            flight = books.add(visit.key, visit.text, visit.options, by_prefetch=False)
            return flight, Met.MISSED, books.claim(flight, loop, for_query=True)
        if flight.state is State.DONE:
            books.shelf.use(flight)
            return flight, Met.READY, None
        if flight.state is State.QUEUED:
            flight.text, flight.options = visit.text, visit.options
            return flight, Met.CLAIMED, books.claim(flight, loop, for_query=True)
        run = None
        if after is not None and not flight.for_query and len(flight.runs) < MOST_CALLS:
            run = books.begin_run(flight, loop, for_query=True)
        return flight, Met.JOINED, run

    @step
    def attend(self, visit: Visit[V], *, claim: bool) -> None:
        """Take an explicit wait in, if its key has a flight; it must `leave` it, as GONE.

        Args:
            visit: The wait. It has no flight afterwards if there is none.
            claim: Whether to claim the flight if it is queued.
        """
        books = self._books
        flight = books.look_up(visit.key)
        if flight is None:
            return
        run = None
        if claim and flight.state is State.QUEUED:
            run = books.claim(flight, visit.waiter.loop, for_query=False)
        books.attend(flight, visit.waiter, run)
        visit.run = run
        visit.flight = flight

    @step
    def join_in(self, visit: Visit[V]) -> None:
        """Give a visitor a call of its own beside those that cannot go on while it waits."""
        flight = visit.flight
        if flight is not None and flight.state is State.RUNNING:
            visit.run = self._books.begin_run(flight, visit.waiter.loop, for_query=True)

    @step
    def leave(self, visit: Visit[V], waited: float, end: End) -> tuple[Run, ...]:
        """Part a visitor from its flight after `waited` seconds.

        Returns:
            The calls that nobody wants now, and that are to be cancelled: those for a flight that
            only queries asked for, once the last of them has left. It has ended then. A call in
            a thread cannot be cancelled, and a flight that has one goes on, for whoever comes.
        """
        flight, books = visit.flight, self._books
        if flight is None or visit.waiter not in flight.waiters:
            return ()
        del flight.waiters[visit.waiter]
        if flight.era is books.era:
            books.ledger.parted(flight, visit.text, waited, end)
            if flight.held and flight.served and flight.state is State.DONE:
                books.shelf.use(flight)
            if not flight.waiters and not flight.ended:
                flight.first_query_at = None  # the queries that came have gone, unserved
            books.ledger.count_if_wasted(flight)
        if flight.waiters:
            return ()
        flight.failure = None  # it keeps no frames alive
        runs = flight.runs
        if flight.by_prefetch or flight.asks or not runs or any(run.loop is None for run in runs):
            return ()
        books.end(flight, State.FAILED)
        return runs

    @step
    def begin_due_calls(self) -> tuple[list[tuple[Run, Waiter]], list[Flight[V]], float | None]:
        """Begin the calls that flights are due now, one for all who wait for a flight.

        Returns:
            The calls, each with the one on whose behalf it is made; flights that have ended and
            still are waited for, whose waiters are to be told once more; and the seconds after
            which to look again, None for when there is somebody who waits.
        """
        books = self._books
        patience, now = books.patience, books.clock()
        calls: list[tuple[Run, Waiter]] = []
        ended: list[Flight[V]] = []
        while (flight := patience.next_due(now)) is not None:
            if flight.ended:
                ended.append(flight)
            elif flight.state is State.RUNNING:
                call = self._call_if_due(flight, now)
                if call is not None:
                    calls.append(call)
        at = patience.plan_look()
        return calls, ended, None if at is None else max(0.0, at - now)

    def _call_if_due(self, flight: Flight[V], now: float) -> tuple[Run, Waiter] | None:
        books = self._books
        patience, counts = books.patience, books.ledger.counts
        hedge = now < patience.overdue_at(flight)
        # Who makes the call itself has nothing to gain from another, unless hedges are wanted.
        waiters = [waiter for waiter in flight.waiters if hedge or not waiter.makes_call]
        if not waiters:
            return None  # the next one to wait has it watched again
        if now < patience.due_at(flight):
            patience.watch(flight)
            return None
        if len(flight.runs) >= MOST_CALLS:
            books.shelf.remove(flight)  # the next query begins anew; these go on waiting
            books.detached.add(flight)
            return None
        if hedge and not patience.take_hedge():
            counts.hedge_denied += 1
            flight.hedge_denied = True
            patience.watch(flight)
            return None
        counts.hedge_started += hedge
        counts.overdue_calls += not hedge
        waiter = waiters[-1]
        run = books.begin_run(flight, waiter.loop, for_query=waiter.for_query, beside=hedge)
        patience.watch(flight)
        return run, waiter

    @property
    def look_is_missing(self) -> bool:
        """Whether a flight is due another call before anybody will look for it."""
        return self._books.patience.look_is_missing

    @step
    def plan_look(self) -> float | None:
        """Return in how many seconds to call `begin_due_calls`; None if nothing is watched."""
        at = self._books.patience.plan_look()
        return None if at is None else max(0.0, at - self._books.clock())

    @step
    def cancel_look(self) -> None:
        """Note that nobody will call `begin_due_calls` when that was planned."""
        self._books.patience.cancel_look()
