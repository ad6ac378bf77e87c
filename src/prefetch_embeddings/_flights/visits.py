"""Who waits for which flight, and the calls that are begun on their behalf.

A query, or an explicit wait, visits a flight: it enters, perhaps with the duty to make the call,
waits, and leaves. Every method is one step, under the lock of the map.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from prefetch_embeddings._flights import reentry
from prefetch_embeddings._flights.flight import End, Flight, Met, Run, State, Visit
from prefetch_embeddings._flights.patience import MOST_CALLS
from prefetch_embeddings._flights.steps import ReenteredError, Steps, step

if TYPE_CHECKING:
    import contextvars
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

    def ready(self, key: Hashable, text: str) -> Flight[V] | None:
        """Serve a query from a ready flight, or return None. The hot path: a step by hand."""
        steps, books = self.steps, self._books
        flight = books.shelf.by_key.get(key)
        if flight is None or flight.state is not State.DONE:
            return None  # seen without the lock: a query that is late by a moment enters
        with steps.lock:
            if steps.within or steps.torn_by is not None:
                return None
            steps.within = True
            try:
                if not flight.held or flight.expires_at <= books.clock():
                    return None
                counts, ledger = books.ledger.counts, books.ledger
                if not flight.served:
                    ledger.served_at_once(flight, ledger.hidden(flight))
                books.shelf.use(flight)
                counts.query_matched += flight.text != text
                counts.query_ready += 1
            except BaseException:
                steps.torn_by = threading.get_ident()
                raise
            finally:
                steps.within = False
        if steps.put_off:
            steps.catch_up()
        return flight

    @step
    def enter(self, visit: Visit[V]) -> None:
        """Take a query in: to the flight of its key, to a new one if there is none.

        If the visit has a run then, the call is the visitor's to make. In every case it waits for
        the flight from now on, and must `leave` it.

        Those who recover from one flight do so by one other, its successor. Their call is never
        left to a prefetch, which could fail them again: beside a running one they begin their own.
        """
        books, after = self._books, visit.after
        now = books.clock()  # before a claim: all of its run is this query's wait
        run = None
        flight = books.to_join(visit.key) if after is None else self._heir(after, visit.key)
        if flight is None:
            met = Met.MISSED
            key, era = visit.key, books.era
            flight = Flight(key, visit.text, visit.options, now, era, False)  # noqa: FBT003
            books.shelf.by_key[key] = flight
            run = books.claim(flight, now, visit.loop, for_query=True)
        elif flight.state is State.DONE:
            met = Met.READY
            if flight.held:  # an heir may have left the map
                books.shelf.use(flight)
        elif flight.state is State.QUEUED:
            met = Met.CLAIMED
            flight.text, flight.options = visit.text, visit.options
            run = books.claim(flight, now, visit.loop, for_query=True)
        else:
            met = Met.JOINED
            _refuse_to_wait_for_oneself(flight)
            if after is not None and not flight.for_query and len(flight.runs) < MOST_CALLS:
                run = books.begin_run(flight, now, visit.loop, for_query=True)
        if after is not None:
            self._move_on(visit, after, flight)
        books.attend(flight, visit, run)
        if flight.first_query_at is None and not flight.ended:
            flight.first_query_at = now
        if after is None:
            visit.met = met
            counts = books.ledger.counts
            if met is Met.MISSED:
                counts.query_missed += 1
            elif met is Met.JOINED:
                counts.query_joined += 1
            elif met is Met.CLAIMED:
                counts.query_claimed += 1
            else:
                counts.query_ready += 1

    def _heir(self, after: Flight[V], key: Hashable) -> Flight[V] | None:
        """Return the flight by which those recover whom `after` has failed; None for a new one."""
        heir = after.successor
        if heir is not None and (heir.state is not State.FAILED or _fails_all(heir)):
            return heir
        return self._books.to_join(key)

    @staticmethod
    def _move_on(visit: Visit[V], failed: Flight[V], heir: Flight[V]) -> None:
        """Take a query from the flight that failed it to the one by which it recovers.

        Whoever comes first decides for all. The heir keeps its own failure for the last of them.
        """
        failed.waiters.pop(visit, None)
        if failed.successor is heir:
            heir.to_come -= 1
        else:
            failed.successor = heir
            heir.to_come += len([other for other in failed.waiters if other.for_query])

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
        if flight.state is State.RUNNING:
            _refuse_to_wait_for_oneself(flight)
        if claim and flight.state is State.QUEUED:
            run = books.claim(flight, books.clock(), visit.loop, for_query=False)
        books.attend(flight, visit, run)

    @step
    def join_in(self, visit: Visit[V]) -> None:
        """Give a visitor a call of its own beside those that cannot go on while it waits."""
        flight = visit.flight
        if flight is not None and flight.state is State.RUNNING:
            books = self._books
            visit.run = books.begin_run(flight, books.clock(), visit.loop, for_query=True)

    @step
    def leave(self, visit: Visit[V], waited: float, end: End) -> tuple[Run, ...]:
        """Part a visitor from its flight after `waited` seconds.

        Returns:
            The calls that nobody wants now, and that are to be cancelled: those for a flight that
            only queries asked for, once the last of them has left. It has ended then. A call in
            a thread cannot be cancelled, and a flight that has one goes on, for whoever comes.
        """
        flight, books = visit.flight, self._books
        if flight is None:
            return ()
        if visit in flight.waiters:
            if flight.era is books.era:
                hidden = 0.0 if flight.served else books.ledger.hidden(flight)
                books.ledger.parted(flight, visit, waited, end, hidden)
            else:
                del flight.waiters[visit]
            if flight.successor is not None and visit.for_query:
                flight.successor.to_come -= 1  # thrown out before it came there
                _let_go_of_failure(flight.successor)
        if flight.era is books.era:
            if flight.served and flight.held and flight.ended:
                books.shelf.use(flight)
            if not flight.waiters and not flight.ended:
                flight.first_query_at = None  # the queries that came have gone, unserved
        _let_go_of_failure(flight)
        if flight.waiters:
            return ()
        runs = flight.runs
        if flight.by_prefetch or flight.asks or not runs or None in {run.loop for run in runs}:
            return ()
        books.end(flight, State.FAILED)
        return runs

    @step
    def begin_due_calls(
        self,
    ) -> tuple[list[tuple[Run, contextvars.Context]], list[Flight[V]], float | None]:
        """Begin the calls that flights are due now, one for all who wait for a flight.

        Returns:
            The calls, each with the context of the one on whose behalf it is made; flights that
            have ended and still are waited for, whose waiters are to be told once more; and the
            seconds after which to look again, None for when there is somebody who waits.
        """
        books = self._books
        patience, now = books.patience, books.clock()
        calls: list[tuple[Run, contextvars.Context]] = []
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

    def _call_if_due(self, flight: Flight[V], now: float) -> tuple[Run, contextvars.Context] | None:
        books = self._books
        patience, counts = books.patience, books.ledger.counts
        hedge = now < patience.overdue_at(flight)
        # Who makes the call itself has nothing to gain from another, unless hedges are wanted.
        waiters = [waiter for waiter in flight.waiters if hedge or waiter.run is None]
        if not waiters:
            return None  # the next one to wait has it watched again
        if now < patience.due_at(flight):
            patience.watch(flight)
            return None
        if books.is_given_up(flight):
            books.let_go(flight)  # the next query begins anew; these go on waiting
            return None
        if hedge and not patience.take_hedge():
            counts.hedge_denied += 1
            flight.hedge_denied = True
            patience.watch(flight)
            return None
        counts.hedge_started += hedge
        counts.overdue_calls += not hedge
        waiter = waiters[-1]
        run = books.begin_run(flight, now, waiter.loop, for_query=waiter.for_query, beside=hedge)
        patience.watch(flight)
        return run, waiter.context.copy()

    @step
    def plan_look(self) -> float | None:
        """Return in how many seconds to call `begin_due_calls`; None if nothing is watched."""
        at = self._books.patience.plan_look()
        return None if at is None else max(0.0, at - self._books.clock())

    @step
    def cancel_look(self) -> None:
        """Note that nobody will call `begin_due_calls` when that was planned."""
        self._books.patience.cancel_look()


def _refuse_to_wait_for_oneself(flight: Flight[Any]) -> None:
    """Refuse what a finaliser or a signal handler asks of a thread that has the flight to run.

    A model that calls back is another case: `reentry` tells it so.
    """
    if flight.is_carried_by(threading.get_ident()) and reentry.running.get() is None:
        raise ReenteredError


def _fails_all(flight: Flight[V]) -> bool:
    """Tell whether a call for a query has failed, and with it all who wait for the flight."""
    return flight.failure is not None and isinstance(flight.failure.error, Exception)


def _let_go_of_failure(flight: Flight[V]) -> None:
    """Have a flight that nobody waits for any more, or will, keep no frames alive."""
    if not flight.waiters and not flight.to_come:
        flight.failure = None
