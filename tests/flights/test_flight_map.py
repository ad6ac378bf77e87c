"""The map's steps one by one: what each returns, counts and leaves behind."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from typing import Any

import pytest

from prefetch_embeddings import Hedge, PrefetchOutcome
from prefetch_embeddings._flights.map import (
    UNUSED_KEPT,
    AbandonedError,
    End,
    Flight,
    FlightMap,
    Met,
    State,
)
from prefetch_embeddings._flights.patience import LEAST_DURATIONS
from prefetch_embeddings.testing import ManualTime

STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome

CONTEXT = contextvars.Context()


class Map(FlightMap[str]):
    """A map with its clock in hand."""

    def __init__(self, **options: Any) -> None:
        self.time = ManualTime()
        defaults: dict[str, Any] = {
            "ttl": 10.0,
            "max_entries": 8,
            "capacity": 400,
            "max_on_loops": 2,
            "attempts": 2,
            "hedge": None,
        }
        super().__init__(**{**defaults, **options}, clock=self.time)

    def queued(self, key: str = "q") -> Flight[str]:
        outcome, flight = self.begin(key, key, CONTEXT)
        assert outcome is STARTED
        assert flight is not None
        return flight

    def running(self, key: str = "q") -> Flight[str]:
        flight = self.queued(key)
        assert self.claim((flight,)) == [flight]
        return flight

    def asked(self, key: str = "q") -> Flight[str]:
        flight, met = self.enter(key, key)
        assert met is Met.MISSED
        return flight


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def assert_abandoned(flight: Flight[str]) -> None:
    assert flight.state is State.FAILED
    assert isinstance(flight.error, AbandonedError)
    assert not flight.held


# --- undo ----------------------------------------------------------------------------------------


def test_what_is_undone_was_never_started() -> None:
    flights = Map()
    flight = flights.queued()
    attended, mine = flights.attend("q", claim=False)
    assert attended is flight
    assert mine is False
    future = flight.future
    assert future is not None
    assert flights.undo(flight) is True
    assert_abandoned(flight)
    assert isinstance(future.exception(0), AbandonedError), "its waiters were not told"
    stats = flights.stats()
    assert (stats.prefetch_started, stats.prefetch_withdrawn, stats.prefetch_dropped) == (0, 0, 1)
    assert flights.forget("q") is None
    flights.leave(flight, "", 0.0, End.GONE)


def test_a_claimed_flight_is_not_undone() -> None:
    flights = Map()
    flight = flights.running()
    assert flights.undo(flight) is False
    assert flight.state is State.RUNNING
    assert flights.stats().prefetch_started == 1


# --- reclaim -------------------------------------------------------------------------------------


def test_a_paused_flight_of_a_loop_is_claimed_again(loop: asyncio.AbstractEventLoop) -> None:
    flights = Map()
    _, flight = flights.begin_on_loop("q", "q", loop)
    assert flight is not None
    assert flights.reclaim(flight, loop) is False, "it runs already"
    assert flights.fail(flight, OSError()) is State.QUEUED
    assert not flights._queued, "no worker is to run it"
    assert flights.reclaim(flight, loop) is True
    assert (flight.state, flight.for_query, flight.loop) == (State.RUNNING, False, loop)
    assert flights._on_loops == {flight}
    assert flights.stats().prefetch_retried == 1


def test_every_attempt_after_the_first_is_counted(loop: asyncio.AbstractEventLoop) -> None:
    flights = Map(attempts=3)
    _, flight = flights.begin_on_loop("q", "q", loop)
    assert flight is not None
    for _ in range(2):
        assert flights.fail(flight, OSError()) is State.QUEUED
        assert flights.reclaim(flight, loop) is True
    assert flights.fail(flight, OSError()) is State.FAILED
    assert flights.stats().prefetch_retried == 2


def test_a_paused_flight_that_a_query_claimed_is_not_claimed_again(
    loop: asyncio.AbstractEventLoop,
) -> None:
    flights = Map()
    _, flight = flights.begin_on_loop("q", "q", loop)
    assert flight is not None
    flights.fail(flight, OSError())
    assert flights.enter("q", "q") == (flight, Met.CLAIMED)
    assert flights.reclaim(flight, loop) is False
    assert flight.for_query is True
    assert flights.stats().prefetch_retried == 0


# --- abandon -------------------------------------------------------------------------------------


@pytest.mark.parametrize("only_queued", [True, False])
def test_abandoning_a_queued_flight(only_queued: bool) -> None:
    flights = Map()
    flight = flights.queued()
    flights.attend("q", claim=False)
    future = flight.future
    assert future is not None
    assert flights.abandon(flight, only_queued=only_queued) is True
    assert_abandoned(flight)
    assert isinstance(future.exception(0), AbandonedError)
    assert flights.abandon(flight) is False, "it has ended"
    assert flights.stats().prefetch_withdrawn == 1


def test_abandoning_a_running_flight() -> None:
    flights = Map()
    flight = flights.running()
    assert flights.abandon(flight, only_queued=True) is False
    assert flight.state is State.RUNNING
    assert flights.abandon(flight) is True
    assert_abandoned(flight)
    assert flights.stats().prefetch_failed == 1
    assert flights.complete(flight, "late") is False


def test_abandoning_what_a_loop_runs(loop: asyncio.AbstractEventLoop) -> None:
    flights = Map()
    _, flight = flights.begin_on_loop("q", "q", loop)
    assert flight is not None
    another = asyncio.new_event_loop()
    another.close()
    assert flights.abandon(flight, only_on=another) is False
    assert flight.state is State.RUNNING
    assert flights.abandon(flight, only_on=loop) is True
    assert_abandoned(flight)
    assert flights.abandon(flights.running("other"), only_on=loop) is False, "a worker runs it"


def test_a_flight_that_is_done_is_not_abandoned() -> None:
    flights = Map()
    flight = flights.running()
    flights.complete(flight, "value")
    for only_queued in (True, False):
        assert flights.abandon(flight, only_queued=only_queued) is False
    assert flight.state is State.DONE
    assert flights.is_ready("q")


# --- withdraw ------------------------------------------------------------------------------------


def test_a_queued_flight_that_nobody_waits_for_is_withdrawn() -> None:
    flights = Map()
    assert flights.withdraw("q", 1, 1) is None
    flight = flights.queued()
    assert flights.withdraw("q", flight.number, 1) is flight
    assert_abandoned(flight)
    assert flights.withdraw("q", flight.number, 1) is None
    assert flights.stats().prefetch_withdrawn == 1


@pytest.mark.parametrize(
    "why",
    ["it is waited for", "others prefetched it", "it is another", "it runs", "is done"],
)
def test_a_flight_is_not_withdrawn_if(why: str) -> None:
    flights = Map()
    flight = flights.queued()
    number = flight.number
    match why:
        case "it is waited for":
            flights.attend("q", claim=False)
        case "others prefetched it":
            assert flights.begin("q", "q", CONTEXT) == (IN_FLIGHT, flight)
        case "it is another":
            assert flights.forget("q") is flight
            flight = flights.queued()
        case _:
            flights.claim((flight,))
    if why == "is done":
        flights.complete(flight, "value")
    state = flight.state
    assert flights.withdraw("q", number, 1) is None
    assert flight.state is state
    assert flight.held


def test_all_who_prefetched_a_flight_may_take_it_back_together() -> None:
    flights = Map()
    flight = flights.queued()
    flights.begin("q", "q", CONTEXT)
    assert flights.get("q") is flight
    assert flights.withdraw("q", flight.number, 2) is flight
    assert flights.get("q") is None


# --- Hedges --------------------------------------------------------------------------------------


def test_nothing_is_due_without_hedging() -> None:
    flights = Map()
    flight = flights.asked()
    assert flights.hedge_due_in(flight) is None
    assert flights.add_hedge(flight) is False


def test_a_hedge_is_due_some_time_after_the_claim() -> None:
    flights = Map(hedge=Hedge(after=3.0, budget=1.0))
    queued = flights.queued()
    assert flights.hedge_due_in(queued) is None, "due before it runs"
    flights.time.advance(5.0)
    flights.claim((queued,))
    flights.time.advance(1.0)
    assert flights.hedge_due_in(queued) == 2.0
    flights.complete(queued, "value")
    assert flights.hedge_due_in(queued) is None, "due after its end"


def test_a_quantile_needs_so_many_durations() -> None:
    flights = Map(hedge=Hedge(quantile=0.5, budget=1.0))
    flight = flights.asked()
    for _ in range(LEAST_DURATIONS - 1):
        flights._durations.add(4.0)
    assert flights.hedge_due_in(flight) is None
    flights._durations.add(4.0)
    flights.time.advance(1.0)
    assert flights.hedge_due_in(flight) == 3.0


def test_a_second_runner_is_admitted_once_and_for_waiters_only() -> None:
    flights = Map(hedge=Hedge(after=1.0, budget=1.0))
    background = flights.running("background")
    assert flights.add_hedge(background) is False, "nobody waits for it"
    flight = flights.asked()
    assert flights.add_hedge(flight) is True
    assert flight.runners == 2
    assert flights.add_hedge(flight) is False, "a third runner"
    flights.complete(flight, "value", hedge=True)
    assert flights.add_hedge(flight) is False, "it has ended"
    stats = flights.stats()
    assert (stats.hedge_started, stats.hedge_won, stats.hedge_denied) == (1, 1, 0)


def test_a_denied_second_runner_is_counted_once_for_a_flight() -> None:
    flights = Map(hedge=Hedge(after=1.0, budget=0.01))
    assert flights.add_hedge(flights.asked("first")) is True
    second, third = flights.asked("second"), flights.asked("third")
    for flight in (second, second, third, third):
        assert flights.add_hedge(flight) is False
        assert flight.runners == 1
    stats = flights.stats()
    assert (stats.hedge_started, stats.hedge_denied) == (1, 2)


def test_a_second_runner_that_could_not_be_had_is_taken_back() -> None:
    flights = Map(hedge=Hedge(after=1.0, budget=1.0))
    flight = flights.asked()
    flights.add_hedge(flight)
    flights.remove_hedge(flight)
    assert (flight.state, flight.runners) == (State.RUNNING, 1)
    assert flights.stats().hedge_started == 0
    for key in "ab":
        flights.asked(key)
    flights.add_hedge(flight)
    assert flights.fail(flight, OSError()) is None, "its second runner goes on"
    flights.remove_hedge(flight)
    assert_abandoned(flight)
    assert flights.stats().hedge_started == 0


def test_a_batch_pays_into_the_budget_as_the_one_call_it_is() -> None:
    flights = Map(hedge=Hedge(after=1.0, budget=0.5))
    _, batch = flights.begin_batch([(key, key) for key in "abcd"], CONTEXT)
    assert len(flights.claim(batch.flights)) == 4
    assert flights._budget is not None
    assert flights._budget._owed == 0.5


# --- Tasks ---------------------------------------------------------------------------------------


def test_a_flight_holds_its_tasks_until_it_ends() -> None:
    flights = Map()
    flight = flights.asked()
    first: Any = object()
    second: Any = object()
    assert flights.hold_task(flight, first) is True
    assert flights.hold_task(flight, second) is True
    assert flight.tasks == (first, second)
    flights.complete(flight, "value")
    assert flights.hold_task(flight, first) is False
    assert flight.tasks == (first, second)


# --- Loops ---------------------------------------------------------------------------------------


def test_a_loop_that_stopped_gives_its_places_back(loop: asyncio.AbstractEventLoop) -> None:
    flights = Map()

    async def fill() -> list[Flight[str] | None]:
        both = [flights.begin_on_loop(key, key, loop)[1] for key in "ab"]
        assert flights.begin_on_loop("c", "c", loop) == (DROPPED, None)
        return both

    filled = loop.run_until_complete(fill())
    attended, _ = flights.attend("a", claim=False)
    assert attended is not None
    future = attended.future
    assert future is not None
    outcome, flight = flights.begin_on_loop("c", "c", loop)
    assert outcome is STARTED
    assert flight is not None
    for each in filled:
        assert each is not None
        assert_abandoned(each)
    assert isinstance(future.exception(0), AbandonedError)
    assert flights._on_loops == {flight}
    assert flights.stats().prefetch_dropped == 1


# --- Explicit waits ------------------------------------------------------------------------------


def test_there_is_nothing_to_attend() -> None:
    assert Map().attend("q", claim=True) == (None, False)


def test_attending_may_claim_and_names_the_loop(loop: asyncio.AbstractEventLoop) -> None:
    flights = Map()
    flight = flights.queued()
    assert flights.attend("q", claim=True, loop=loop) == (flight, True)
    assert (flight.state, flight.for_query, flight.loop) == (State.RUNNING, False, loop)
    assert flights.attend("q", claim=True) == (flight, False), "claimed twice"
    assert flight.waiters == 2


# --- What was prefetched and not used ------------------------------------------------------------


def test_time_is_hidden_from_the_query_served_not_from_one_that_went_away() -> None:
    flights = Map()
    flight = flights.running()
    flights.enter("q", "q")
    flights.attend("q", claim=False)
    flights.leave(flight, "q", 0.0, End.GONE)
    flights.leave(flight, "q", 0.0, End.GONE)  # the explicit wait goes last
    flights.time.advance(3.0)
    flights.enter("q", "q")
    flights.time.advance(1.0)
    flights.complete(flight, "v")
    flights.leave(flight, "q", 1.0, End.SERVED)
    assert flights.stats().hidden_seconds == pytest.approx(3.0)


def test_unused_prefetches_are_remembered_up_to_a_number() -> None:
    flights = Map(attempts=1, max_entries=1000)
    for number in range(UNUSED_KEPT + 10):
        flight = flights.running(f"lost {number}")
        flights.fail(flight, OSError())
        flights.worker_done()
    assert flights.forget("lost 50") is None
    for number in range(UNUSED_KEPT, UNUSED_KEPT + 20):
        flight = flights.running(f"more {number}")
        flights.fail(flight, OSError())
        flights.worker_done()
    unused = [each.key for each in flights.unused("q") or []]
    assert len(unused) == len(set(unused)) == UNUSED_KEPT
    assert "lost 50" not in unused
    assert "lost 51" in unused
    assert len(flights._lost) == UNUSED_KEPT, "what was lost is kept without bound"


def test_unused_prefetches_in_the_map_come_last() -> None:
    flights = Map(attempts=1)
    flights.fail(flights.running("lost"), OSError())
    ready = flights.running("ready")
    flights.complete(ready, "value")
    flights.queued("queued")
    used = flights.running("used")
    flights.complete(used, "value")
    flights.ready("used", "used")
    flights.queued("waited for")
    flights.attend("waited for", claim=False)
    flights.asked("asked")
    assert flights.unused("asked") == [
        (each, each, flights.time()) for each in ("lost", "ready", "queued")
    ]
    for prefetched in ("ready", "queued", "used", "waited for"):
        assert flights.unused(prefetched) is None, "a query finds it"
    flights.time.advance(10.0)
    assert ("ready", "ready", 1000.0) in (flights.unused("ready") or [])


# --- Estimates -----------------------------------------------------------------------------------


def test_the_wait_to_expect() -> None:
    flights = Map()
    for seconds in (1.0, 2.0, 3.0):
        flights._durations.add(seconds)
    assert flights.expected_wait("q") == 2.0
    flight = flights.queued()
    flights.time.advance(1.5)
    assert flights.expected_wait("q") == 2.0, "it does not run yet"
    flights.claim((flight,))
    flights.time.advance(1.5)
    assert flights.expected_wait("q") == 1.5
    flights.complete(flight, "value")
    assert flights.expected_wait("q") == 0.0


# --- Counting ------------------------------------------------------------------------------------


def test_a_worker_gives_back_its_place_and_no_more() -> None:
    flights = Map(capacity=1)
    flight = flights.running()
    assert flights.begin("other", "other", CONTEXT) == (DROPPED, None)
    flights.complete(flight, "value")
    flights.worker_done()
    flights.worker_done()  # of a worker from before a fork
    assert flights._busy == 0
    flights.queued("other")
    assert flights.begin("third", "third", CONTEXT) == (DROPPED, None)


def test_each_worker_has_a_place_of_its_own() -> None:
    flights = Map(capacity=2)
    for key in "ab":
        flights.complete(flights.running(key), "value")
    flights.worker_done()
    flights.queued("c")
    assert flights.begin("d", "d", CONTEXT) == (DROPPED, None)


def test_a_worker_that_claimed_nothing_takes_no_place() -> None:
    flights = Map()
    flight = flights.running()
    assert flight.for_query is False
    assert flights.claim((flight,)) == []
    assert flights._busy == 1


def test_flights_from_before_a_fork_are_not_counted() -> None:
    flights = Map(hedge=Hedge(after=1.0, budget=1.0))
    done, failed, hedged, left = (flights.running(key) for key in "abcd")
    waited, _ = flights.enter("d", "d")
    assert waited is left
    flights.reset_after_fork()
    empty = flights.stats()
    flights.complete(done, "value")
    assert flights.fail(failed, OSError()) is State.FAILED, "tried again in the child"
    flights.complete(hedged, "value", hedge=True)
    flights.complete(left, "value")
    flights.leave(left, "d", 1.0, End.SERVED)
    assert flights.stats() == empty
    for flight in (done, failed, hedged, left):
        assert not flight.held
    assert flights.unused("q") == []
    assert flights.expected_wait("a") == Map().expected_wait("a")
