"""The moves that steps are made of: each leaves places, counts and the map in agreement."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import threading

import pytest

from prefetch_embeddings import Hedge, PrefetchStats
from prefetch_embeddings._flights.books import Books
from prefetch_embeddings._flights.flight import Failure, Flight, Run, State
from tests.core.parts import NOTHING, Core, Someone


@pytest.fixture
def books() -> Books:
    return Core().books


def added(books: Books, key: str = "q", *, by_prefetch: bool = True) -> Flight[str]:
    """Put a new flight into the map, in no queue."""
    now = books.clock()
    flight: Flight[str] = Flight(key, key, None, now, books.era, by_prefetch)
    if by_prefetch:
        books.add_prefetched(flight, now)
        books.admission.take_place(flight)
    else:
        books.shelf.by_key[key] = flight
    return flight


def ready(books: Books, key: str = "q", *, by_prefetch: bool = True) -> Flight[str]:
    flight = added(books, key, by_prefetch=by_prefetch)
    books.claim(flight, books.clock(), None, for_query=False)
    flight.value = "value"
    books.end(flight, State.DONE)
    return flight


# --- A new flight --------------------------------------------------------------------------------


def test_a_new_flight(books: Books, loop: asyncio.AbstractEventLoop) -> None:
    context = contextvars.Context()
    flight: Flight[str] = Flight("k", "t", "o", books.clock(), books.era, True, context, loop)
    books.add_prefetched(flight, books.clock())
    assert (flight.key, flight.text, flight.options) == ("k", "t", "o")
    assert (flight.context, flight.home, flight.era) == (context, loop, books.era)
    assert flight.asked_at == books.clock()
    assert (flight.asks, flight.by_prefetch, flight.for_query) == (1, True, False)
    assert (flight.state, flight.attempt, flight.runs) == (State.QUEUED, 0, ())
    assert (flight.started_at, flight.called_at, flight.finished_at, flight.expires_at) == (
        (0.0,) * 4
    )
    assert (flight.hedge_denied, flight.watched, flight.served, flight.held) == (
        *(False, False, False),
        True,
    )
    assert (flight.waiters, flight.first_query_at) == ({}, None)
    assert (flight.successor, flight.failure) == (None, None)
    assert (flight.ended, flight.wanted) == (False, True)
    assert books.shelf.by_key.get("k") is flight
    assert books.admission.on_loops() == [], "its place is the caller's to give"
    assert flight.to_come == 0


def test_prefetches_are_counted_and_take_places_queries_do_not(books: Books) -> None:
    for key in "ab":
        assert added(books, key).asks == 1
    asked = added(books, "c", by_prefetch=False)
    assert (asked.by_prefetch, asked.asks, asked.context, asked.home) == (False, 0, None, None)
    assert asked.wanted is False
    assert books.admission.places_taken == 2
    assert books.ledger.counts.snapshot() == PrefetchStats(prefetch_started=2)


def test_no_two_flights_have_one_number(books: Books) -> None:
    assert added(books, "a").number < added(books, "b").number


# --- Claims and calls ----------------------------------------------------------------------------


def test_the_claim(loop: asyncio.AbstractEventLoop) -> None:
    core = Core()
    books = core.books
    flight = added(books)
    core.time.advance(5.0)
    run = books.claim(flight, books.clock(), loop, for_query=True)
    now = core.time()
    assert (flight.state, flight.attempt, flight.started_at) == (State.RUNNING, 1, now)
    assert (flight.called_at, flight.runs, flight.for_query) == (now, (run,), True)
    assert (run.flight, run.started_at, run.loop) == (flight, now, loop)
    assert (run.for_query, run.beside, run.began, run.task) == (True, False, False, None)
    assert run.thread == threading.get_ident()
    assert books.admission.places_taken == 0
    assert flight.watched is False, "nobody waits for it"


def test_the_claim_of_what_somebody_waits_for_has_it_watched(books: Books) -> None:
    flight = added(books)
    books.attend(flight, Someone(), None)
    assert flight.watched is False, "it does not run yet"
    books.claim(flight, books.clock(), None, for_query=False)
    assert flight.watched is True


def test_a_flight_keeps_its_place_on_its_loop_until_a_query_claims_it(
    books: Books, loop: asyncio.AbstractEventLoop
) -> None:
    flights: list[Flight[str]] = [
        Flight(key, key, None, 0.0, books.era, True, None, loop) for key in "ab"
    ]
    for flight in flights:
        books.add_prefetched(flight, 0.0)
        books.admission.take_place(flight)
    books.claim(flights[0], books.clock(), loop, for_query=False)
    assert set(books.admission.on_loops()) == set(flights)
    books.claim(flights[1], books.clock(), None, for_query=True)
    assert books.admission.on_loops() == [flights[0]]
    assert flights[0].for_query is False


def test_each_attempt_is_counted(books: Books) -> None:
    flight = added(books)
    for attempt in (1, 2, 3):
        flight.runs = ()
        books.claim(flight, books.clock(), None, for_query=False)
        assert flight.attempt == attempt


def test_a_claim_pays_for_hedges_unless_it_is_a_part_of_a_call() -> None:
    books = Core(hedge=Hedge(after=1.0, budget=1.0)).books
    assert books.patience.take_hedge() is True
    books.claim(added(books, "a"), books.clock(), None, for_query=False)  # pays back the loan
    books.claim(added(books, "b"), books.clock(), None, for_query=False, pays=False)
    assert books.patience.take_hedge() is False
    books.claim(added(books, "c"), books.clock(), None, for_query=True)
    assert books.patience.take_hedge() is True


def test_a_call_beside_others(loop: asyncio.AbstractEventLoop) -> None:
    core = Core()
    books = core.books
    flight = added(books)
    first = books.claim(flight, books.clock(), None, for_query=False)
    core.time.advance(5.0)
    second = books.begin_run(flight, books.clock(), loop, for_query=True, beside=True)
    assert flight.runs == (first, second)
    assert (flight.called_at, flight.started_at) == (core.time(), core.time() - 5.0)
    assert (second.flight, second.loop, second.started_at) == (flight, loop, core.time())
    assert (second.beside, second.for_query, flight.for_query) == (True, True, True)
    third = books.begin_run(flight, books.clock(), None, for_query=False)
    assert (third.beside, third.for_query, flight.for_query) == (False, False, True)


def test_a_call_puts_off_the_next_probe(books: Books) -> None:
    for _ in range(3):
        books.admission.note_failure()
    books.claim(added(books), books.clock(), None, for_query=False)
    assert books.admission.may_speculate(books.clock()) is False


# --- Waiters -------------------------------------------------------------------------------------


def test_who_attends_a_flight(books: Books) -> None:
    flight = added(books)
    run = books.claim(flight, books.clock(), None, for_query=True)
    mine, other = Someone(), Someone()
    books.attend(flight, mine, run)
    assert mine.run is run
    assert flight.watched is False, "the caller has nothing to gain from another call"
    books.attend(flight, other, None)
    assert other.run is None
    assert (mine.flight, other.flight) == (flight, flight)
    assert flight.watched is True
    assert list(flight.waiters) == [mine, other]
    assert flight.wanted is True


def test_with_hedges_the_call_of_a_waiter_is_watched_as_well() -> None:
    books = Core(hedge=Hedge(after=1.0)).books
    flight = added(books)
    books.attend(flight, Someone(), books.claim(flight, books.clock(), None, for_query=True))
    assert flight.watched is True


# --- Ends ----------------------------------------------------------------------------------------


def test_the_end_of_a_flight_that_is_done() -> None:
    core = Core(ttl=7.0)
    books = core.books
    flight: Flight[str] = Flight(
        "q", "q", "options", books.clock(), books.era, True, contextvars.Context()
    )
    books.add_prefetched(flight, books.clock())
    run = books.claim(flight, books.clock(), None, for_query=False)
    waiter = Someone()
    books.attend(flight, waiter, None)
    flight.failure = Failure(run, ValueError(), None)
    core.time.advance(2.0)
    books.end(flight, State.DONE)
    now = core.time()
    assert (flight.state, flight.ended, flight.finished_at) == (State.DONE, True, now)
    assert flight.expires_at == now + 7.0
    assert [flight.context, flight.options, flight.failure, *flight.runs] == [None, None, None]
    assert flight.held is True
    assert list(flight.waiters) == [waiter], "each leaves by itself"
    assert books.shelf.ready() == [flight]
    assert books.ledger.counts.snapshot() == PrefetchStats(prefetch_started=1, prefetch_succeeded=1)


def test_the_end_of_a_flight_that_has_failed(books: Books) -> None:
    flight = added(books)
    run = books.claim(flight, books.clock(), None, for_query=True)
    failure = flight.failure = Failure(run, ValueError(), None)
    books.attend(flight, Someone(), run)
    books.end(flight, State.FAILED)
    assert (flight.state, flight.ended, flight.held) == (State.FAILED, True, False)
    assert flight.failure is failure, "a waiter is to see it"
    assert books.shelf.flights() == []
    other = added(books, "other")
    other.failure = failure
    books.end(other, State.FAILED)
    assert other.failure is None, "nobody is to see it"


def test_a_queued_flight_that_ends_gives_back_its_place(books: Books) -> None:
    flight = added(books)
    books.admission.enqueue(flight)
    books.end(flight, State.FAILED)
    assert books.admission.places_taken == 0
    assert books.admission.next_job() == ()
    assert books.ledger.unused([]) == [("q", "q", books.clock())]


def test_what_fails_outside_of_the_map_is_not_remembered(books: Books) -> None:
    flight = added(books)
    books.claim(flight, books.clock(), None, for_query=False)
    books.let_go(flight)
    books.end(flight, State.FAILED)
    assert books.ledger.unused([]) == []
    assert not books.detached


@pytest.mark.parametrize("closed", [True, False])
def test_what_is_done_is_kept_if_it_is_in_the_map_that_is_not_closed(
    books: Books, closed: bool
) -> None:
    flight = added(books)
    if closed:
        books.closed = True
    else:
        books.claim(flight, books.clock(), None, for_query=False)
        books.let_go(flight)
    books.end(flight, State.DONE)
    assert flight.held is False
    assert books.shelf.flights() == books.shelf.ready() == []
    assert books.ledger.counts.prefetch_wasted == 1


def test_who_has_to_leave_for_another_counts_as_wasted() -> None:
    books = Core(max_entries=1).books
    first, second = ready(books, "first"), ready(books, "second")
    assert (first.held, second.held) == (False, True)
    assert books.ledger.counts.prefetch_wasted == 1
    assert books.ledger.unused([]) == [("first", "first", books.clock())]


def test_a_flight_from_before_a_fork_is_not_counted(books: Books) -> None:
    kept, failed = added(books, "a"), added(books, "b")
    era = books.era
    books.start_anew()
    assert books.era is not era
    assert books.shelf.flights() == []
    assert books.unfinished() == []
    assert books.admission.places_taken == 0
    books.end(kept, State.DONE)
    books.end(failed, State.FAILED)
    assert (kept.held, failed.held) == (False, False)
    assert (kept.state, failed.state) == (State.DONE, State.FAILED)
    assert books.ledger.counts.snapshot() == NOTHING
    assert books.ledger.unused([]) == []


def test_a_child_has_the_same_bounds() -> None:
    books = Core(ttl=3.0, max_entries=1, max_workers=1, max_pending=2, hedge=Hedge(after=0.5)).books
    books.start_anew()
    assert ready(books, "a").expires_at == books.clock() + 3.0
    ready(books, "b")
    assert len(books.shelf.ready()) == 1
    assert books.patience.hedges is True
    admission = books.admission
    for key in "cd":
        added(books, key)
        assert admission.lets_in(0.0) is True
    added(books, "e")
    assert admission.lets_in(0.0) is False


def test_workers_and_waiting_flights_are_bounded_by_themselves(
    loop: asyncio.AbstractEventLoop,
) -> None:
    admission = Core(max_workers=1, max_pending=2).books.admission
    assert (admission._max_in_threads, admission._max_on_loops) == (3, 2)


# --- Letting go ----------------------------------------------------------------------------------


def test_what_is_queued_ends_when_it_is_let_go(books: Books) -> None:
    flight = added(books)
    assert books.let_go(flight) is True
    assert (flight.state, flight.held) == (State.FAILED, False)
    assert books.shelf.flights() == books.unfinished() == []


@pytest.mark.parametrize("waited_for", [True, False])
def test_what_is_under_way_goes_on_outside_of_the_map(books: Books, waited_for: bool) -> None:
    flight = added(books)
    if waited_for:
        books.attend(flight, Someone(), None)
    else:
        books.claim(flight, books.clock(), None, for_query=False)
    state = flight.state
    assert books.let_go(flight) is False
    assert (flight.state, flight.held) == (state, False)
    assert books.shelf.flights() == []
    assert books.unfinished() == [flight]
    assert books.detached == {flight}


def test_what_is_ready_and_let_go_is_wasted(books: Books) -> None:
    flight = ready(books)
    assert books.let_go(flight) is False
    assert books.ledger.counts.prefetch_wasted == 1
    assert not books.detached


# --- Time ----------------------------------------------------------------------------------------


def test_what_has_outlived_its_time_is_not_found() -> None:
    core = Core(ttl=10.0)
    books = core.books
    flight, under_way = ready(books, "ready"), added(books, "under way")
    core.time.advance(9.9)
    assert books.look_up("ready") is flight
    core.time.advance(0.1)
    assert books.look_up("under way") is under_way
    assert books.shelf.ready() == [flight]
    assert books.look_up("ready") is None
    assert books.shelf.flights() == [under_way]
    assert books.ledger.counts.prefetch_wasted == 1
    assert books.ledger.unused([]) == [("ready", "ready", 1000.0)]
    assert books.look_up("nothing") is None


def test_expiring() -> None:
    core = Core(ttl=10.0)
    books = core.books
    ready(books, "old")
    core.time.advance(5.0)
    young = ready(books, "young")
    core.time.advance(5.0)
    books.expire()
    assert books.shelf.flights() == [young]
    assert books.ledger.counts.prefetch_wasted == 1


def test_the_unfinished_are_in_the_map_and_outside_of_it(books: Books) -> None:
    ready(books, "ready")
    queued, running = added(books, "queued"), added(books, "running")
    books.claim(running, books.clock(), None, for_query=False)
    outside = added(books, "outside")
    books.claim(outside, books.clock(), None, for_query=False)
    books.let_go(outside)
    assert set(books.unfinished()) == {queued, running, outside}


# --- Leaks ---------------------------------------------------------------------------------------


def test_nothing_leaks(books: Books) -> None:
    ready(books, "a")
    books.ledger.served_at_once(ready(books, "b"), 0.0)
    books.let_go(ready(books, "c"))
    added(books, "d")
    books.let_go(books.shelf.flights()[-1])
    books.end(added(books, "e"), State.FAILED)
    assert list(books.leaks()) == []


def test_flights_that_are_under_way_leak(books: Books) -> None:
    flights = [added(books, key) for key in "ab"]
    books.claim(flights[1], books.clock(), None, for_query=False)
    books.let_go(flights[1])
    assert list(books.leaks()) == [
        "2 flights are still under way",
        "1 places in the queue are taken by nobody",
        "the map and the ready flights differ",
        f"prefetches do not add up: {PrefetchStats(prefetch_started=2)}",
    ]


def test_waits_leak(books: Books) -> None:
    for key in "ab":
        flight = ready(books, key)
        flight.waiters.update(dict.fromkeys((Someone(), Someone())))
    assert list(books.leaks()) == ["4 waits never ended"]


def test_a_map_that_differs_from_what_is_ready(books: Books) -> None:
    ready(books).held = False
    assert list(books.leaks()) == ["the map and the ready flights differ"]


@pytest.mark.parametrize("field", ["failure", "runs", "context"])
def test_a_flight_that_holds_too_much(books: Books, field: str) -> None:
    flight = ready(books)
    run = Run(flight, 0.0, None, for_query=True)
    context = contextvars.Context()
    context.run(contextvars.ContextVar[int]("of a request").set, 1)
    held = {"failure": Failure(run, ValueError(), None), "runs": (run,), "context": context}
    setattr(flight, field, held[field])
    assert list(books.leaks()) == ["a kept flight holds more than its value"]


@pytest.mark.parametrize("name", ["prefetch_succeeded", "prefetch_failed", "prefetch_withdrawn"])
def test_counts_that_do_not_add_up(books: Books, name: str) -> None:
    ready(books)
    books.end(added(books, "b"), State.FAILED)
    setattr(books.ledger.counts, name, getattr(books.ledger.counts, name) + 1)
    leaks = list(books.leaks())
    stats = books.ledger.counts.snapshot()
    assert leaks[0] == f"prefetches do not add up: {stats}"
    assert leaks[1:] == (
        [f"uses do not add up: {stats} with 1 unused"] if name == "prefetch_succeeded" else []
    )


@pytest.mark.parametrize("name", ["prefetch_used", "prefetch_wasted"])
def test_uses_that_do_not_add_up(books: Books, name: str) -> None:
    ready(books)
    setattr(books.ledger.counts, name, 1)
    stats = dataclasses.replace(books.ledger.counts.snapshot())
    assert list(books.leaks()) == [f"uses do not add up: {stats} with 1 unused"]


def test_only_prefetches_count_as_unused(books: Books) -> None:
    ready(books, by_prefetch=False)
    used = ready(books, "used")
    books.ledger.served_at_once(used, 0.0)
    assert list(books.leaks()) == []
