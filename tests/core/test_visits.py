"""Who enters which flight, whose the call is, what is due meanwhile, and how they part."""

from __future__ import annotations

import asyncio
import threading

import pytest

from prefetch_embeddings import Hedge, PrefetchStats
from prefetch_embeddings._flights.flight import End, Flight, Met, Run, State, Visit
from prefetch_embeddings._flights.patience import MOST_CALLS, UNMEASURED_LIMIT
from prefetch_embeddings._flights.steps import ReenteredError
from tests.core.parts import CONTEXT, NOTHING, Core, Someone, elsewhere, flight_of, run_of


@pytest.fixture
def core() -> Core:
    return Core()


# --- The hot path --------------------------------------------------------------------------------


def test_a_ready_flight_serves_at_once(core: Core) -> None:
    assert core.visits.ready("q", "q") is None
    run = core.running()
    core.time.advance(2.0)
    assert core.visits.ready("q", "q") is None
    core.landing.complete(run, "value")
    for _ in range(2):
        assert core.visits.ready("q", "q") is run.flight
    assert core.visits.ready("q", "q?") is run.flight
    assert run.flight.served is True
    assert core.stats == PrefetchStats(
        prefetch_started=1,
        prefetch_succeeded=1,
        prefetch_used=1,
        query_ready=3,
        query_matched=1,
        hidden_seconds=2.0,
    )
    core.visits.ready("q", "q?")
    assert core.stats.query_matched == 2
    core.time.advance(10.0)
    assert core.visits.ready("q", "q") is None


def test_who_has_served_leaves_first_the_least_recently_used_before_others() -> None:
    core = Core(max_entries=3)
    for key in "abc":
        core.done(key)
    for key in "bcb":
        core.visits.ready(key, key)
    for gone, new in (("c", "d"), ("b", "e"), ("a", "f")):
        core.done(new)
        assert core.map.get(gone) is None
    assert [flight.key for flight in core.books.shelf.ready()] == ["d", "e", "f"]


# --- Entering ------------------------------------------------------------------------------------


def test_a_query_that_finds_nothing_makes_the_call(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    visit = Someone("k", "text", "options", loop=loop)
    core.visits.enter(visit)
    flight, run = flight_of(visit), run_of(visit)
    assert visit.met is Met.MISSED
    assert core.map.get("k") is flight
    assert (flight.key, flight.text, flight.options) == ("k", "text", "options")
    assert (flight.by_prefetch, flight.asks, flight.for_query) == (False, 0, True)
    assert (flight.runs, run.loop, run.for_query) == ((run,), loop, True)
    assert list(flight.waiters) == [visit]
    assert visit.run is not None
    assert flight.first_query_at == core.time()
    assert core.stats == PrefetchStats(query_missed=1)
    assert core.books.admission.places_taken == 0


def test_a_query_that_finds_its_flight_queued_runs_it_with_its_own_text(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    flight = core.queued()
    core.time.advance(1.0)
    visit = Someone("q", "q?", "options", loop=loop)
    core.visits.enter(visit)
    run = run_of(visit)
    assert (visit.flight, visit.met) == (flight, Met.CLAIMED)
    assert (run.loop, run.for_query, flight.runs) == (loop, True, (run,))
    assert (flight.text, flight.options, flight.for_query) == ("q?", "options", True)
    assert flight.first_query_at == core.time()
    assert core.map.claim_job() == (None, [])
    assert core.stats == PrefetchStats(prefetch_started=1, query_claimed=1)


def test_a_query_joins_what_runs(core: Core) -> None:
    run = core.running()
    flight = run.flight
    came = core.time()
    visits = []
    for _ in range(2):
        visits.append(core.query("q", Met.JOINED, text="q?"))
        core.time.advance(1.0)
    assert flight.runs == (run,)
    for visit in visits:
        assert (visit.flight, visit.run) == (flight, None)
        assert visit.run is None
    assert flight.first_query_at == came
    assert (flight.text, flight.watched) == ("q", True)
    assert core.stats == PrefetchStats(prefetch_started=1, query_joined=2)


def test_a_query_that_comes_just_too_late_for_the_hot_path(core: Core) -> None:
    core.done("other")
    flight = core.done()
    visit = core.query("q", Met.READY)
    assert (visit.flight, visit.run, flight.first_query_at) == (flight, None, None)
    assert core.leave(visit, 0.0, End.SERVED) == ()
    assert (flight.served, flight.waiters, flight.held) == (True, {}, True)
    assert core.stats.query_ready == 1
    assert list(core.books.shelf._served) == [flight]


# --- Recovering ----------------------------------------------------------------------------------


def failed_under(core: Core, *visits: Visit[str]) -> None:
    """Let the flight that these have joined fail for them."""
    [run] = flight_of(visits[0]).runs
    core.landing.fail(run, OSError())
    for visit in visits:
        assert flight_of(visit).state is State.FAILED


def test_those_who_recover_do_so_by_one_flight(core: Core) -> None:
    core.running()
    first, second, third = (core.query("q", Met.JOINED) for _ in range(3))
    failed = flight_of(first)
    failed_under(core, first, second, third)
    stats = core.stats
    mine = core.query("q", Met.MISSED, after=failed)
    assert mine.run is not None
    assert failed.successor is mine.flight
    core.map.forget("q")
    core.queued()  # it is nothing to them
    other = core.query("q", Met.JOINED, after=failed)
    assert (other.flight, other.run) == (mine.flight, None)
    core.landing.complete(run_of(mine), "value")
    late = core.query("q", Met.READY, after=failed)
    assert (late.flight, late.run) == (mine.flight, None)
    after = core.stats
    assert after - stats == PrefetchStats(prefetch_started=1), "they were counted before"


def test_who_recovers_is_led_on_where_its_successor_has_failed(core: Core) -> None:
    core.running()
    first = core.query("q", Met.JOINED)
    failed = flight_of(first)
    failed_under(core, first)
    mine = core.query("q", Met.MISSED, after=failed)
    core.landing.lose(run_of(mine))
    again = core.query("q", Met.MISSED, after=failed)
    assert again.flight is not mine.flight
    assert failed.successor is again.flight


def test_an_error_of_the_successors_call_is_that_of_all_who_recover_by_it(core: Core) -> None:
    core.running()
    first, second = core.query("q", Met.JOINED), core.query("q", Met.JOINED)
    failed = flight_of(first)
    failed_under(core, first, second)
    mine = core.query("q", Met.MISSED, after=failed)
    error = OSError()
    core.landing.fail(run_of(mine), error)
    core.leave(mine, 0.0, End.FAILED)
    late = core.query("q", Met.JOINED, after=failed)
    assert (late.flight, late.run) == (mine.flight, None)
    failure = flight_of(late).failure
    assert failure is not None
    assert failure.error is error


def test_who_is_thrown_out_before_it_recovers_is_taken_off_once(core: Core) -> None:
    core.running()
    first, second = core.query("q", Met.JOINED), core.query("q", Met.JOINED)
    first.after = failed = flight_of(first)
    failed_under(core, first, second)
    core.visits.enter(first)
    heir = flight_of(first)
    assert heir.to_come == 1
    core.leave(second)
    core.leave(second)  # once more, as where the first time was interrupted
    assert heir.to_come == 0
    assert not failed.waiters


def test_who_recovers_never_leaves_its_call_to_a_prefetch(core: Core) -> None:
    core.running()
    first = core.query("q", Met.JOINED)
    failed = flight_of(first)
    failed_under(core, first)
    newer = core.running()
    mine = core.query("q", Met.JOINED, after=failed)
    assert mine.flight is newer.flight
    run = run_of(mine)
    assert newer.flight.runs == (newer, run)
    assert (run.for_query, run.beside, run.loop) == (True, False, None)
    assert mine.run is not None
    other = core.query("q", Met.JOINED, after=failed)
    assert other.run is None, "it waits for the call of the first"


def test_who_recovers_begins_no_call_beside_that_of_a_query(core: Core) -> None:
    core.running()
    first = core.query("q", Met.JOINED)
    failed = flight_of(first)
    failed_under(core, first)
    asked = core.query("q", Met.MISSED)
    mine = core.query("q", Met.JOINED, after=failed)
    assert (mine.flight, mine.run) == (asked.flight, None)


def test_there_are_so_many_calls_for_a_flight(core: Core) -> None:
    core.running()
    first = core.query("q", Met.JOINED)
    failed = flight_of(first)
    failed_under(core, first)
    newer = core.running().flight
    while len(newer.runs) < MOST_CALLS - 1:
        elsewhere(core.books.begin_run(newer, core.time(), None, for_query=False))
    assert core.query("q", Met.JOINED, after=failed).run is not None
    failed.successor = None
    newer.for_query = False
    assert len(newer.runs) == MOST_CALLS
    assert core.query("q", Met.JOINED, after=failed).run is None


# --- Explicit waits ------------------------------------------------------------------------------


def test_there_is_nothing_to_attend(core: Core) -> None:
    visit = core.attend(claim=True)
    assert (visit.flight, visit.run, visit.met) == (None, None, None)
    assert core.leave(visit) == ()
    assert core.stats == NOTHING


def test_attending_may_claim_and_names_the_loop(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    flight = core.queued()
    first = core.attend(claim=False, loop=loop)
    assert (first.flight, first.run, flight.state) == (flight, None, State.QUEUED)
    second = core.attend(claim=True, loop=loop)
    run = run_of(second)
    assert second.flight is flight
    assert (run.loop, run.for_query, flight.for_query) == (loop, False, False)
    assert flight.state is State.RUNNING
    third = core.attend(claim=True)
    assert (third.flight, third.run) == (flight, None), "claimed twice"
    assert list(flight.waiters) == [first, second, third]
    assert flight.first_query_at is None
    assert core.stats == PrefetchStats(prefetch_started=1)


def test_a_loop_that_cannot_turn_is_helped(core: Core, loop: asyncio.AbstractEventLoop) -> None:
    on_loop = core.on_loop(loop)
    visit = core.query("q", Met.JOINED)
    core.visits.join_in(visit)
    run = run_of(visit)
    assert on_loop.flight.runs == (on_loop, run)
    assert (run.for_query, run.loop, run.beside) == (True, None, False)


def test_nobody_joins_in_once_a_flight_has_ended(core: Core) -> None:
    run = core.running()
    visit = core.query("q", Met.JOINED)
    core.landing.complete(run, "value")
    core.visits.join_in(visit)
    assert visit.run is None
    core.visits.join_in(core.attend("nothing"))


# --- Leaving -------------------------------------------------------------------------------------


def test_a_visitor_leaves_once(core: Core) -> None:
    run = core.running()
    visit, other = core.query("q", Met.JOINED), core.query("q", Met.JOINED)
    core.time.advance(2.0)
    core.landing.complete(run, "value")
    assert core.leave(visit, 2.0, End.SERVED) == ()
    assert list(run.flight.waiters) == [other]
    assert core.leave(visit, 2.0, End.SERVED) == ()
    assert core.stats == PrefetchStats(
        prefetch_started=1,
        prefetch_succeeded=1,
        prefetch_used=1,
        query_joined=2,
        exposed_seconds=2.0,
    )


def test_a_matched_visitor_is_counted_when_it_leaves(core: Core) -> None:
    run = core.running()
    visit = core.query("q", Met.JOINED, text="q?")
    core.landing.complete(run, "value")
    core.leave(visit, 0.0, End.SERVED)
    assert core.stats.query_matched == 1


def test_time_is_hidden_from_the_query_served_not_from_one_that_went_away(core: Core) -> None:
    run = core.running()
    query, wait = core.query("q", Met.JOINED), core.attend()
    core.leave(query)
    assert run.flight.first_query_at is not None
    core.leave(wait)  # the explicit wait goes last
    assert run.flight.first_query_at is None
    core.time.advance(3.0)
    query = core.query("q", Met.JOINED)
    core.time.advance(1.0)
    core.landing.complete(run, "v")
    core.leave(query, 1.0, End.SERVED)
    assert core.stats.hidden_seconds == pytest.approx(3.0)
    assert run.flight.first_query_at is not None, "it was served"


def test_what_nobody_waits_for_any_more_was_wasted(core: Core) -> None:
    run = core.running()
    first, second = core.query("q", Met.JOINED), core.query("q", Met.JOINED)
    core.map.forget("q")
    core.landing.complete(run, "value")
    core.leave(first)
    assert core.stats.prefetch_wasted == 0
    core.leave(second)
    assert core.stats.prefetch_wasted == 1


def test_a_failure_is_held_as_long_as_somebody_waits(core: Core) -> None:
    visit = core.query()
    other = core.query("q", Met.JOINED)
    flight = flight_of(visit)
    core.landing.fail(run_of(visit), OSError())
    core.leave(visit, 0.0, End.FAILED)
    assert flight.failure is not None
    core.leave(other, 0.0, End.FAILED)
    assert flight.failure is None
    assert core.stats.query_failed == 2


def test_on_a_loop_what_only_queries_wanted_ends_with_the_last_of_them(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    first = core.query(loop=loop)
    second = core.query("q", Met.JOINED, loop=loop)
    flight, run = flight_of(first), run_of(first)
    assert core.leave(first) == ()
    assert flight.state is State.RUNNING
    assert core.leave(second) == (run,)
    assert (flight.state, flight.held, flight.runs) == (State.FAILED, False, ())
    assert core.map.get("q") is None


@pytest.mark.parametrize("why", ["prefetched", "asked for", "in a thread", "partly", "taken back"])
def test_what_else_is_under_way_goes_on(
    core: Core, loop: asyncio.AbstractEventLoop, why: str
) -> None:
    if why in ("prefetched", "taken back"):
        core.on_loop(loop)
        visit = core.query("q", Met.JOINED, loop=loop)
    else:
        visit = core.query(loop=None if why == "in a thread" else loop)
    flight = flight_of(visit)
    if why == "asked for":
        core.map.begin("q", "q", None, CONTEXT)
    if why == "partly":
        core.books.begin_run(flight, core.time(), None, for_query=False)
    if why == "taken back":
        flight.asks = 0
    runs = flight.runs
    assert core.leave(visit) == ()
    assert (flight.state, flight.runs, flight.held) == (State.RUNNING, runs, True)


def test_a_flight_from_before_a_fork_is_left_uncounted(core: Core) -> None:
    visit = core.query("q")
    core.books.start_anew()
    assert core.leave(visit, 2.0, End.FAILED) == ()
    assert flight_of(visit).waiters == {}
    assert core.stats == NOTHING
    assert flight_of(visit).first_query_at is not None


# --- Calls that are due --------------------------------------------------------------------------


def due(core: Core) -> list[Run]:
    """Begin the calls that are due, of flights that all go on."""
    calls, ended, _ = core.visits.begin_due_calls()
    assert not ended
    return [elsewhere(run) for run, _ in calls]


def test_an_overdue_flight_gets_another_call_for_its_last_waiter(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    first = core.running()
    flight = first.flight
    core.query("q", Met.JOINED)
    core.query("q", Met.JOINED, loop=loop)
    assert core.visits.plan_look() == UNMEASURED_LIMIT
    core.time.advance(UNMEASURED_LIMIT - 1.0)
    assert core.visits.begin_due_calls() == ([], [], 1.0)
    core.time.advance(1.0)
    [run] = due(core)
    assert flight.runs == (first, run)
    assert (run.loop, run.for_query, run.beside) == (loop, True, False)
    assert flight.called_at == core.time()
    assert core.stats.overdue_calls == 1
    assert due(core) == []
    assert core.visits.begin_due_calls() == ([], [], UNMEASURED_LIMIT)
    core.time.advance(UNMEASURED_LIMIT)
    assert len(due(core)) == 1
    assert core.stats.overdue_calls == 2
    assert core.stats.hedge_started == 0


def test_a_call_for_an_explicit_wait_is_none_for_a_query(core: Core) -> None:
    core.running()
    core.attend()
    core.time.advance(UNMEASURED_LIMIT)
    [run] = due(core)
    assert run.for_query is False


def test_a_flight_with_too_many_overdue_calls_leaves_the_map(core: Core) -> None:
    core.running()
    visit = core.query("q", Met.JOINED)
    flight = flight_of(visit)
    for calls in range(2, MOST_CALLS + 1):
        core.time.advance(UNMEASURED_LIMIT)
        assert len(due(core)) == 1
        assert len(flight.runs) == calls
    core.time.advance(UNMEASURED_LIMIT)
    assert core.visits.begin_due_calls() == ([], [], None)
    assert (flight.held, flight.state) == (False, State.RUNNING)
    assert core.map.get("q") is None
    assert core.books.unfinished() == [flight]
    core.query("q", Met.MISSED)
    core.landing.complete(flight.runs[1], "value")
    assert core.leave(visit, 0.0, End.SERVED) == ()
    assert core.books.unfinished() == [core.map.get("q")]


def test_who_makes_the_call_itself_gets_none_beside_it(core: Core) -> None:
    visit = core.query()
    flight = flight_of(visit)
    core.books.patience.watch(flight)
    core.time.advance(UNMEASURED_LIMIT)
    assert core.visits.begin_due_calls() == ([], [], None)
    assert flight.runs == (visit.run,)
    assert flight.watched is False
    other = core.query("q", Met.JOINED)
    assert flight.watched is True
    [run] = due(core)
    assert run.flight is flight_of(other)


def test_of_those_who_wait_one_gets_the_call_who_makes_none(core: Core) -> None:
    first = core.running()
    other = core.query("q", Met.JOINED)
    makes_one = core.query("q", Met.JOINED)
    makes_one.run = first
    core.time.advance(UNMEASURED_LIMIT)
    [run] = due(core)
    assert run.flight is flight_of(other)


def test_nobody_calls_for_whom_nobody_waits(core: Core) -> None:
    core.running()
    visit = core.query("q", Met.JOINED)
    core.leave(visit)
    core.time.advance(UNMEASURED_LIMIT)
    assert core.visits.begin_due_calls() == ([], [], None)
    assert core.stats.overdue_calls == 0


def test_a_call_that_began_meanwhile_is_given_its_own_time(core: Core) -> None:
    core.running()
    visit = core.query("q", Met.JOINED)
    core.time.advance(2.0)
    core.books.begin_run(flight_of(visit), core.time(), None, for_query=False)
    core.time.advance(UNMEASURED_LIMIT - 2.0)
    assert core.visits.begin_due_calls() == ([], [], 2.0)
    core.time.advance(2.0)
    assert len(due(core)) == 1


def test_waiters_of_what_has_ended_are_told_once_more(core: Core) -> None:
    runs = [core.running(key) for key in "ab"]
    visits = [core.query(key, Met.JOINED) for key in "ab"]
    core.query("c")
    core.queued("queued")
    queued = core.map.get("queued")
    assert queued is not None
    core.books.patience.watch(queued)
    for run in runs:
        core.landing.complete(run, "value")
    core.time.advance(9.0)
    calls, ended, seconds = core.visits.begin_due_calls()
    assert ended == [flight_of(visit) for visit in visits]
    assert (calls, seconds) == ([], None)


def test_all_flights_that_are_due_get_their_calls(core: Core) -> None:
    for key in "ab":
        core.running(key)
        core.query(key, Met.JOINED)
    core.time.advance(UNMEASURED_LIMIT + 1.0)
    assert [run.flight.key for run in due(core)] == ["a", "b"]


# --- Hedges --------------------------------------------------------------------------------------


def test_a_hedge_is_due_some_time_after_the_claim() -> None:
    core = Core(hedge=Hedge(after=2.0, budget=1.0))
    first = core.running()
    visit = core.query("q", Met.JOINED)
    assert core.visits.plan_look() == 2.0
    core.time.advance(2.0)
    [run] = due(core)
    assert run.flight is flight_of(visit)
    assert (run.beside, run.for_query) == (True, True)
    assert first.flight.runs == (first, run)
    stats = core.stats
    assert (stats.hedge_started, stats.overdue_calls, stats.hedge_denied) == (1, 0, 0)
    core.time.advance(2.0)
    assert core.visits.begin_due_calls() == ([], [], UNMEASURED_LIMIT - 2.0), "a second hedge"
    core.time.advance(UNMEASURED_LIMIT - 2.0)
    [overdue] = due(core)
    assert overdue.beside is False
    core.landing.complete(run, "value")
    stats = core.stats
    assert (stats.hedge_started, stats.hedge_won, stats.overdue_calls) == (1, 1, 1)


def test_who_makes_the_call_itself_is_hedged_but_gets_no_overdue_call() -> None:
    core = Core(hedge=Hedge(after=2.0, budget=1.0))
    visit = core.query()
    core.time.advance(2.0)
    [run] = due(core)
    assert run.flight is flight_of(visit)
    core.time.advance(UNMEASURED_LIMIT)
    assert core.visits.begin_due_calls() == ([], [], None)


def test_a_denied_hedge_is_counted_once_for_a_flight() -> None:
    core = Core(hedge=Hedge(after=2.0, budget=0.01))
    for key in "abc":
        core.running(key)
        core.query(key, Met.JOINED)
    core.time.advance(2.0)
    calls, ended, seconds = core.visits.begin_due_calls()
    assert ([run.flight.key for run, _ in calls], ended) == (["a"], [])
    assert seconds == 1.0
    stats = core.stats
    assert (stats.hedge_started, stats.hedge_denied) == (1, 2)
    flight = core.map.get("b")
    assert flight is not None
    assert flight.hedge_denied is True
    core.time.advance(1.0)
    assert [run.flight.key for run in due(core)] == ["b", "c"]
    stats = core.stats
    assert (stats.hedge_started, stats.hedge_denied, stats.overdue_calls) == (1, 2, 2)


# --- Looks ---------------------------------------------------------------------------------------


def test_looks_are_planned_for_the_first_that_may_be_due(core: Core) -> None:
    assert core.visits.plan_look() is None
    core.running()
    core.query("q", Met.JOINED)
    assert core.looks_called_for == 1
    core.time.advance(1.0)
    assert core.visits.plan_look() == UNMEASURED_LIMIT - 1.0
    core.running("other")
    core.query("other", Met.JOINED)
    assert core.looks_called_for == 1, "the one that is planned comes before"
    core.visits.cancel_look()
    core.running("third")
    core.query("third", Met.JOINED)
    assert core.looks_called_for == 2
    core.time.advance(9.0)
    assert core.visits.plan_look() == 0.0, "not in the past"


# --- Counts and moments, more than once ----------------------------------------------------------


def test_each_query_counts_once_more_by_what_it_met(core: Core) -> None:
    for number in range(2):
        core.query(f"missed {number}", Met.MISSED)
        core.queued(f"queued {number}")
        core.query(f"queued {number}", Met.CLAIMED)
        core.done(f"ready {number}")
        core.query(f"ready {number}", Met.READY)
    stats = core.stats
    assert (stats.query_missed, stats.query_claimed, stats.query_ready) == (2, 2, 2)


def test_the_call_of_a_miss_begins_when_the_query_comes(core: Core) -> None:
    core.time.advance(3.0)
    visit = core.query("q", Met.MISSED)
    assert flight_of(visit).asked_at == core.time()
    assert run_of(visit).started_at == core.time()
    assert flight_of(visit).started_at == core.time()


def test_a_call_beside_one_that_cannot_turn_begins_now(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    core.on_loop(loop)
    visit = core.query("q", Met.JOINED)
    core.time.advance(3.0)
    core.visits.join_in(visit)
    assert run_of(visit).started_at == flight_of(visit).called_at == core.time()


def test_who_recovers_on_a_loop_calls_there(core: Core, loop: asyncio.AbstractEventLoop) -> None:
    core.running()
    first = core.query("q", Met.JOINED, loop=loop)
    failed = flight_of(first)
    failed_under(core, first)
    core.running()
    again = core.query("q", Met.JOINED, loop=loop, after=failed)
    assert run_of(again).loop is loop


def test_an_heir_knows_how_many_are_to_come(core: Core) -> None:
    core.running()
    visits = [core.query("q", Met.JOINED) for _ in range(4)]
    failed = flight_of(visits[0])
    failed_under(core, *visits)
    to_come = []
    for visit in visits:
        visit.after = failed
        core.visits.enter(visit)
        if visit.run is not None:
            elsewhere(visit.run)
        to_come.append(flight_of(visit).to_come)
    assert to_come == [3, 2, 1, 0]


def test_the_hot_path_is_a_step(core: Core) -> None:
    """What calls in while it is under way is refused, and it is refused within a step."""
    core.done()
    within: list[bool] = []
    use = core.books.shelf.use

    def called_in(flight: Flight[str]) -> None:
        within.append(core.steps.within)
        assert core.visits.ready("q", "q") is None
        with pytest.raises(ReenteredError):
            core.map.forget("q")
        use(flight)

    core.books.shelf.use = called_in  # type: ignore[method-assign]
    assert core.visits.ready("q", "q") is not None
    assert within == [True]
    assert core.steps.within is False


def test_a_hot_path_that_was_torn_is_mended(core: Core) -> None:
    core.done()
    mended: list[int] = []
    core.steps.mend = mended.append

    def interrupted(flight: Flight[str]) -> None:
        raise KeyboardInterrupt

    core.books.shelf.use = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        core.visits.ready("q", "q")
    assert core.visits.ready("q", "q") is None, "what was torn is mended first, by another step"
    core.map.expire()
    assert mended == [threading.get_ident()]


def test_who_carries_a_flight_cannot_wait_for_it(core: Core) -> None:
    """As a finaliser would that interrupts the thread which makes the call."""
    core.queued()
    claimed, _ = core.map.claim_job()
    assert claimed is not None
    with pytest.raises(ReenteredError):
        core.visits.enter(Someone())
    with pytest.raises(ReenteredError):
        core.visits.attend(Someone(for_query=False), claim=False)
    assert not claimed.runs[0].flight.waiters
