"""The map's steps one by one: what each returns, counts and leaves behind."""

from __future__ import annotations

import asyncio

import pytest

from prefetch_embeddings import Hedge, PrefetchStats
from prefetch_embeddings._flights.admission import FAILURES
from prefetch_embeddings._flights.flight import End, Flight, Met, Run, State, Ticket
from prefetch_embeddings._flights.map import DROPPED as NOT_BEGUN
from tests.core.parts import (
    CONTEXT,
    DROPPED,
    IN_FLIGHT,
    NOTHING,
    READY,
    STARTED,
    Core,
    flight_of,
)


@pytest.fixture
def core() -> Core:
    return Core()


def pause(core: Core) -> None:
    """Have so many calls fail that prefetching pauses."""
    for _ in range(FAILURES):
        core.books.admission.note_failure()
    core.books.admission.called_at = core.time()


# --- A prefetch ----------------------------------------------------------------------------------


def test_a_prefetch_queues_a_flight(core: Core) -> None:
    outcome, flight, run = core.map.begin("k", "text", "options", CONTEXT)
    assert flight is not None
    assert (outcome, run) == (STARTED, None)
    assert (flight.key, flight.text, flight.options) == ("k", "text", "options")
    assert (flight.context, flight.home) == (CONTEXT, None)
    assert (flight.by_prefetch, flight.asks, flight.state) == (True, 1, State.QUEUED)
    assert len(core.map) == 1
    assert core.map.get("k") is flight
    assert core.map.get("text") is None
    assert core.stats == PrefetchStats(prefetch_started=1)


def test_a_second_prefetch_finds_the_first(core: Core) -> None:
    flight = core.queued()
    core.time.advance(2.0)
    for asks in (2, 3):
        assert core.map.begin("q", "q", None, CONTEXT) == (IN_FLIGHT, flight, None)
        assert flight.asks == asks
    assert flight.asked_at == core.time()
    assert core.stats == PrefetchStats(prefetch_started=1, prefetch_deduplicated=2)


def test_a_prefetch_finds_what_is_ready(core: Core) -> None:
    flight = core.done()
    assert core.map.begin("q", "q", None, CONTEXT) == (READY, flight, None)
    assert flight.asks == 1, "nothing is under way that could be taken back"
    assert core.stats.prefetch_deduplicated == 1
    core.time.advance(10.0)
    assert core.queued() is not flight


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_a_blank_text_is_dropped(core: Core, loop: asyncio.AbstractEventLoop, text: str) -> None:
    assert core.map.begin("q", text, None, CONTEXT) == NOT_BEGUN
    assert core.map.begin_batch([("q", text)], CONTEXT) == [NOT_BEGUN]
    assert core.map.begin_on_loop("q", text, None, CONTEXT, loop) == NOT_BEGUN
    assert core.stats == PrefetchStats(prefetch_dropped=3)


def test_a_prefetch_is_dropped_where_there_is_no_place() -> None:
    core = Core(max_workers=1, max_pending=1)
    core.queued("a")
    core.queued("b")
    for _ in range(2):
        assert core.map.begin("c", "c", None, CONTEXT) == NOT_BEGUN
    assert core.map.begin("a", "a", None, CONTEXT)[0] is IN_FLIGHT
    assert core.stats == PrefetchStats(
        prefetch_started=2, prefetch_dropped=2, prefetch_deduplicated=1
    )
    assert core.map.get("c") is None


def test_a_prefetch_is_dropped_where_nobody_would_run_it(core: Core) -> None:
    core.executor.accepts = False
    assert core.map.begin("q", "q", None, CONTEXT) == NOT_BEGUN
    assert core.map.get("q") is None
    assert core.stats == PrefetchStats(prefetch_dropped=1)
    assert core.books.admission.places_taken == 0


def test_a_prefetch_is_dropped_in_a_pause_but_for_a_probe(core: Core) -> None:
    ready, under_way = core.done("ready"), core.queued("under way")
    pause(core)
    assert core.map.begin("q", "q", None, CONTEXT) == NOT_BEGUN
    assert core.map.begin("ready", "ready", None, CONTEXT)[1] is ready
    assert core.map.begin("under way", "", None, CONTEXT)[0] is DROPPED
    assert core.map.begin("under way", "?", None, CONTEXT)[1] is under_way
    core.time.advance(1.0)
    core.queued("probe")
    assert core.map.begin("q", "q", None, CONTEXT) == NOT_BEGUN


def test_a_prefetch_that_came_while_no_step_could_be_made_is_counted(core: Core) -> None:
    core.map.count_dropped()
    core.map.count_dropped()
    assert core.stats == PrefetchStats(prefetch_dropped=2)


# --- Several at once -----------------------------------------------------------------------------


def test_a_batch_is_one_job(core: Core) -> None:
    ready, queued = core.done("ready"), core.queued("queued")
    items = [(key, f"text {key}") for key in ("a", "ready", "b", "a", "queued", "c")]
    all_begun = core.map.begin_batch(items, CONTEXT)
    assert [outcome for outcome, _, _ in all_begun] == [
        *(STARTED, READY, STARTED, IN_FLIGHT, IN_FLIGHT, STARTED)
    ]
    flights = [flight for _, flight, _ in all_begun]
    assert (flights[1], flights[3], flights[4]) == (ready, flights[0], queued)
    a, b, c = flights[0], flights[2], flights[5]
    assert a is not None
    assert (a.key, a.text, a.options, a.context) == ("a", "text a", None, CONTEXT)
    assert len(core.map) == 2
    core.work()
    runs, _ = core.work()
    assert [run.flight for run in runs] == [a, b, c]
    assert all(run.for_query is False for run in runs)


def test_of_a_batch_those_are_dropped_for_whom_there_is_no_place() -> None:
    core = Core(max_workers=1, max_pending=1)
    all_begun = core.map.begin_batch([(key, key) for key in "abc"], CONTEXT)
    assert [outcome for outcome, _, _ in all_begun] == [STARTED, STARTED, DROPPED]
    assert core.stats == PrefetchStats(prefetch_started=2, prefetch_dropped=1)


def test_a_batch_is_dropped_where_nobody_would_run_it(core: Core) -> None:
    core.executor.accepts = False
    all_begun = core.map.begin_batch([(key, key) for key in "ab"], CONTEXT)
    assert all_begun == [NOT_BEGUN] * 2
    assert len(core.map) == 0
    assert core.stats == PrefetchStats(prefetch_dropped=2)


# --- On a loop -----------------------------------------------------------------------------------


def test_a_prefetch_on_a_loop_runs_at_once(core: Core, loop: asyncio.AbstractEventLoop) -> None:
    outcome, flight, run = core.map.begin_on_loop("k", "text", "options", CONTEXT, loop)
    assert outcome is STARTED
    assert flight is not None
    assert run is not None
    assert (flight.key, flight.text, flight.options) == ("k", "text", "options")
    assert (flight.context, flight.home, flight.runs) == (CONTEXT, loop, (run,))
    assert (run.loop, run.for_query, flight.state) == (loop, False, State.RUNNING)
    assert len(core.map) == 0
    assert core.map.on_loops() == [flight]
    assert core.map.begin_on_loop("k", "text", None, CONTEXT, loop) == (IN_FLIGHT, flight, None)


def test_loops_have_so_many_places(loop: asyncio.AbstractEventLoop) -> None:
    core = Core(max_pending=2)
    a, b = (core.on_loop(loop, key) for key in "ab")
    assert core.map.begin_on_loop("c", "c", None, CONTEXT, loop) == NOT_BEGUN
    core.landing.complete(a, "value")
    core.on_loop(loop, "c")
    core.landing.abandon(b.flight)
    core.on_loop(loop, "d")
    assert core.stats.prefetch_dropped == 1


def test_a_loop_begins_nothing_in_a_pause(core: Core, loop: asyncio.AbstractEventLoop) -> None:
    pause(core)
    assert core.map.begin_on_loop("q", "q", None, CONTEXT, loop) == NOT_BEGUN


# --- Workers -------------------------------------------------------------------------------------


def test_there_is_nothing_to_claim(core: Core) -> None:
    assert core.map.claim_job() == (None, [])
    assert core.books.admission.lets_in(core.time()) is True


def test_a_worker_claims_a_job_and_takes_a_place() -> None:
    core = Core(max_workers=1, max_pending=1)
    flight = core.queued()
    [run], token = core.work()
    assert (run.flight, run.loop, run.for_query) == (flight, None, False)
    assert flight.runs == (run,)
    assert core.map.claim_job() == (None, [])
    core.queued("b")
    assert core.map.begin("c", "c", None, CONTEXT) == NOT_BEGUN
    core.landing.complete(run, "value")
    assert core.map.begin("c", "c", None, CONTEXT) == NOT_BEGUN, "the worker still works"
    core.map.worker_done(token)
    core.map.worker_done(token)  # of a worker from before a fork
    core.queued("c")
    assert core.map.begin("d", "d", None, CONTEXT) == NOT_BEGUN


def test_a_worker_finds_nothing_of_a_job_that_queries_have_claimed(core: Core) -> None:
    core.map.begin_batch([("a", "a"), ("b", "b")], CONTEXT)
    core.query("a", Met.CLAIMED)
    [run], _ = core.work()
    assert run.flight.key == "b"
    core.map.begin_batch([("c", "c")], CONTEXT)
    core.query("c", Met.CLAIMED)
    assert core.map.claim_job() == (None, [])


def test_what_has_waited_too_long_is_not_run(core: Core) -> None:
    _, (_, again, _) = core.map.begin_batch([("old", "old"), ("again", "again")], CONTEXT)
    core.time.advance(6.0)
    core.map.begin("again", "again", None, CONTEXT)
    limit = core.queued("at its limit")
    young = core.queued("young")
    young.asked_at += 0.1
    core.time.advance(10.0)
    claimed, expired = core.map.claim_job()
    assert claimed is not None
    assert [run.flight for run in claimed.runs] == [again]
    assert [each.key for each in expired] == ["old"]
    assert expired[0].state is State.FAILED
    limit.asked_at -= 0.1
    claimed, expired = core.map.claim_job()
    assert claimed is not None
    assert [run.flight for run in claimed.runs] == [young]
    assert expired == [limit], "a job in which all is too old keeps nobody from the next"
    assert core.stats == PrefetchStats(
        prefetch_started=4, prefetch_deduplicated=1, prefetch_withdrawn=2
    )


def test_in_a_pause_workers_run_the_probe_and_end_the_rest(core: Core) -> None:
    flights = [core.queued(key) for key in "ab"]
    pause(core)
    core.time.advance(1.0)
    probe = core.queued("probe")
    claimed, expired = core.map.claim_job()
    assert expired == flights
    assert claimed is not None
    assert [run.flight for run in claimed.runs] == [probe]
    assert core.stats.prefetch_withdrawn == 2


def test_a_batch_pays_for_hedges_as_the_one_call_it_is() -> None:

    core = Core(hedge=Hedge(after=1.0, budget=0.25))
    patience = core.books.patience
    assert patience.take_hedge() is True
    for _ in range(7):  # four of them pay back the loan
        core.map.begin_batch([(object(), text) for text in "abcd"], CONTEXT)
        core.work()
    assert patience.take_hedge() is False
    core.map.begin_batch([(object(), "a")], CONTEXT)
    core.work()
    assert patience.take_hedge() is True


# --- Between attempts ----------------------------------------------------------------------------


def failed_once(core: Core, key: str = "q") -> Flight[str]:
    run = core.running(key)
    core.landing.fail(run, OSError())
    assert run.flight.state is State.QUEUED
    return run.flight


def test_a_flight_between_attempts_is_queued_again() -> None:
    core = Core(attempts=3)
    flight = failed_once(core)
    for attempt in (2, 3):
        assert core.map.claim_job() == (None, []), "it pauses"
        assert core.map.requeue([flight]) is True
        [run], token = core.work()
        assert (run.flight, flight.attempt) == (flight, attempt)
        assert core.stats.prefetch_retried == attempt - 1
        core.map.worker_done(token)
        core.landing.fail(run, OSError())
    assert flight.state is State.FAILED


def test_what_a_query_has_claimed_meanwhile_is_not_queued_again(core: Core) -> None:
    first, second = failed_once(core, "a"), failed_once(core, "b")
    core.books.admission.note_success()
    core.query("a", Met.CLAIMED)
    assert core.map.requeue([first, second]) is True
    assert len(core.map) == 1
    [run], _ = core.work()
    assert run.flight is second
    assert core.map.requeue([first]) is True
    assert core.map.requeue([]) is True
    assert len(core.map) == 0


def test_in_a_pause_nothing_is_queued_again_but_a_probe(core: Core) -> None:
    flight = failed_once(core)
    pause(core)
    assert core.map.requeue([flight]) is False
    core.time.advance(1.0)
    assert core.map.requeue([flight]) is True
    [run], _ = core.work()
    assert run.flight is flight, "it is the probe"


def test_a_paused_flight_of_a_loop_is_claimed_again(loop: asyncio.AbstractEventLoop) -> None:
    core = Core(attempts=3)
    run = core.on_loop(loop)
    flight = run.flight
    assert core.map.reclaim(flight, loop) is None, "it runs already"
    for attempt in (2, 3):
        core.landing.fail(run, OSError())
        assert flight.state is State.QUEUED
        assert core.map.claim_job() == (None, []), "no worker is to run it"
        again = core.map.reclaim(flight, loop)
        assert again is not None
        run = again
        assert (run.flight, run.loop, run.for_query) == (flight, loop, False)
        assert (flight.state, flight.for_query) == (State.RUNNING, False)
        assert core.map.on_loops() == [flight]
        assert core.stats.prefetch_retried == attempt - 1


def test_a_flight_of_a_loop_is_not_claimed_again_in_a_pause(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    run = core.on_loop(loop)
    core.landing.fail(run, OSError())
    pause(core)
    assert core.map.reclaim(run.flight, loop) is None
    assert core.stats.prefetch_retried == 0
    core.time.advance(1.0)
    assert core.map.reclaim(run.flight, loop) is not None
    assert core.map.begin("q2", "q2", None, CONTEXT) == NOT_BEGUN, "a second probe"


def test_a_paused_flight_that_a_query_claimed_is_not_claimed_again(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    run = core.on_loop(loop)
    core.landing.fail(run, OSError())
    assert flight_of(core.query("q", Met.CLAIMED)) is run.flight
    assert core.map.reclaim(run.flight, loop) is None
    assert run.flight.for_query is True
    assert core.stats.prefetch_retried == 0


# --- Looks ---------------------------------------------------------------------------------------


def test_what_is_ready(core: Core) -> None:
    assert core.map.is_ready("q") is False
    run = core.running()
    assert core.map.is_ready("q") is False
    core.landing.complete(run, "value")
    assert core.map.is_ready("q") is True
    core.time.advance(9.9)
    assert core.map.is_ready("q") is True
    core.time.advance(0.1)
    assert core.map.is_ready("q") is False
    assert core.map.get("q") is run.flight, "a look has changed something"


def test_the_wait_to_expect(core: Core) -> None:
    for seconds in (1.0, 2.0, 3.0):
        core.books.ledger.durations.add(seconds)
    assert core.map.expected_wait("q") == 2.0
    core.queued()
    core.time.advance(1.5)
    assert core.map.expected_wait("q") == 2.0, "it does not run yet"
    [run], _ = core.work()
    core.time.advance(1.5)
    assert core.map.expected_wait("q") == 1.5
    core.landing.complete(run, "value")
    assert core.map.expected_wait("q") == 0.0
    core.time.advance(10.0)
    assert core.map.expected_wait("q") == 2.0
    assert core.map.get("q") is run.flight


def test_unused_prefetches_in_the_map_come_last() -> None:
    core = Core(attempts=1)
    core.landing.fail(core.running("lost"), OSError())
    core.done("ready")
    core.queued("queued")
    core.done("used")
    core.visits.ready("used", "used")
    core.queued("waited for")
    core.attend("waited for")
    core.query("asked")
    assert core.map.unused("asked") == [
        (each, each, core.time()) for each in ("lost", "ready", "queued")
    ]
    for prefetched in ("ready", "queued", "used", "waited for"):
        assert core.map.unused(prefetched) is None, "a query finds it"
    core.time.advance(10.0)
    core.map.expire()
    assert ("ready", "ready", 1000.0) in (core.map.unused("ready") or [])


def test_what_has_outlived_its_time_counts_as_gone(core: Core) -> None:
    core.done()
    core.time.advance(10.0)
    assert core.stats.prefetch_wasted == 1
    assert core.map.get("q") is None


def test_what_leaks(core: Core) -> None:
    flight = core.done()
    assert core.map.leaks() == []
    flight.runs = (Run(flight, 0.0, None, for_query=False),)
    assert core.map.leaks() == ["a kept flight holds more than its value"]
    core.time.advance(10.0)
    core.map.expire()
    assert core.map.leaks() == [], "what has outlived its time is kept"


# --- Removal -------------------------------------------------------------------------------------


def test_forgetting(core: Core) -> None:
    assert core.map.forget("q") == (None, False)
    queued = core.queued()
    assert core.map.forget("q") == (queued, True)
    assert queued.state is State.FAILED
    running = core.running().flight
    assert core.map.forget("q") == (running, False)
    assert running.state is State.RUNNING
    done = core.done()
    assert core.map.forget("q") == (done, False)
    assert core.map.forget("q") == (None, False)
    core.done()
    core.time.advance(10.0)
    assert core.map.forget("q") == (None, False), "its time was up"


def test_what_is_forgotten_is_not_remembered_as_unused() -> None:
    core = Core(attempts=1)
    for key in "ab":
        core.landing.fail(core.running(key), OSError())
    core.map.forget("a")
    assert [each.key for each in core.map.unused("q") or []] == ["b"]


@pytest.mark.parametrize("state", ["queued", "done", "too old"])
def test_nothing_is_remembered_of_what_forgetting_has_taken_out(core: Core, state: str) -> None:
    if state == "queued":
        core.queued()
    else:
        core.done()
    if state == "too old":
        core.time.advance(10.0)
    core.map.forget("q")
    assert core.map.unused("other") == []


def test_clearing() -> None:
    core = Core(attempts=1)
    core.landing.fail(core.running("lost"), OSError())
    core.done("old")
    core.time.advance(10.0)
    core.done("ready")
    running = core.running("running").flight
    waited_for = core.queued("waited for")
    core.attend("waited for")
    queued = [core.queued(key) for key in "ab"]
    assert core.map.clear() == queued
    assert core.map.clear() == []
    assert (running.state, waited_for.state) == (State.RUNNING, State.QUEUED)
    for key in ("ready", "running", "waited for", "a", "b"):
        assert core.map.get(key) is None
    assert core.map.unused("q") == []
    stats = core.stats
    assert (stats.prefetch_wasted, stats.prefetch_withdrawn) == (2, 2)
    [run], _ = core.work()
    assert run.flight is waited_for, "somebody waits for it"


def test_closing(loop: asyncio.AbstractEventLoop) -> None:
    core = Core(attempts=1)
    core.landing.fail(core.running("lost"), OSError())
    core.done("old")
    core.time.advance(10.0)
    done = core.done("done")
    queued = core.queued("queued")
    on_loop = core.on_loop(loop, "on loop")
    outside = core.query("outside")
    asked_outside = flight_of(outside)
    core.map.forget("outside")
    gone = core.running("gone")
    core.map.forget("gone")
    asked = core.query("asked")
    joined = core.query("queued", Met.CLAIMED)
    retried = core.running("retried")
    retried.flight.attempt = 3
    waiting = core.queued("waiting")
    core.attend("waiting")
    assert core.map.close() == [
        (on_loop.flight, (on_loop,), 1),
        (retried.flight, (retried,), 3),
        (waiting, (), 0),
        (gone.flight, (gone,), 1),
    ]
    assert core.books.closed is True
    for flight in (on_loop.flight, retried.flight, waiting, gone.flight):
        assert (flight.state, flight.held, flight.runs) == (State.FAILED, False, ())
    assert (flight_of(asked).state, queued.state) == (State.RUNNING, State.RUNNING)
    assert asked_outside.state is State.RUNNING
    assert flight_of(joined) is queued
    assert done.held is False
    assert core.map.unused("q") == []
    assert core.map.close() == []
    assert core.map.begin("new", "new", None, CONTEXT) == NOT_BEGUN
    stats = core.stats
    assert (stats.prefetch_wasted, stats.prefetch_failed, stats.prefetch_withdrawn) == (2, 4, 1)


def test_a_closed_map_keeps_nothing(core: Core) -> None:
    query = core.query()
    core.map.close()
    assert query.run is not None
    core.landing.complete(query.run, "value")
    assert flight_of(query).state is State.DONE
    assert core.map.get("q") is None


# --- Taking back ---------------------------------------------------------------------------------


def test_who_asked_alone_takes_back_the_flight(core: Core) -> None:
    flight = core.queued()
    ticket = Ticket(flight)
    assert core.map.take_back(ticket) is flight
    assert (flight.state, flight.asks, ticket.flight) == (State.FAILED, 0, None)
    assert core.map.get("q") is None
    assert core.map.take_back(ticket) is None
    assert flight.asks == 0
    assert core.stats == PrefetchStats(prefetch_started=1, prefetch_withdrawn=1)
    assert core.books.admission.places_taken == 0


def test_the_last_of_those_who_asked_takes_back_the_flight(core: Core) -> None:
    flight = core.queued()
    core.map.begin("q", "q", None, CONTEXT)
    first, second = Ticket(flight), Ticket(flight)
    assert core.map.take_back(first) is None
    assert core.map.take_back(first) is None, "one ask taken back twice"
    assert (flight.state, flight.asks) == (State.QUEUED, 1)
    assert core.map.take_back(second) is flight


@pytest.mark.parametrize("why", ["it is waited for", "it runs", "is done"])
def test_a_flight_does_not_end_with_its_last_ask_if(core: Core, why: str) -> None:
    flight = core.queued()
    if why == "it is waited for":
        core.attend()
    else:
        [run], _ = core.work()
        if why == "is done":
            core.landing.complete(run, "value")
    state = flight.state
    assert core.map.take_back(Ticket(flight)) is None
    assert (flight.state, flight.held) == (state, True)
    assert flight.asks == (1 if why == "is done" else 0)


def test_what_runs_and_was_taken_back_is_not_tried_again(core: Core) -> None:
    run = core.running()
    core.map.take_back(Ticket(run.flight))
    core.landing.fail(run, OSError())
    assert run.flight.state is State.FAILED


# --- After a fork --------------------------------------------------------------------------------


def test_flights_from_before_a_fork_are_not_counted() -> None:
    core = Core()
    done, failed, left = (core.running(key) for key in "abc")
    visit = core.query("c", Met.JOINED)
    core.steps.start_anew()
    core.books.start_anew()
    core.landing.complete(done, "value")
    core.landing.fail(failed, OSError())
    assert failed.flight.state is State.FAILED, "tried again in the child"
    core.landing.complete(left, "value")
    core.leave(visit, 1.0, End.SERVED)
    assert core.stats == NOTHING
    for run in (done, failed, left):
        assert not run.flight.held
    assert core.map.unused("q") == []
    assert core.map.expected_wait("a") == Core().map.expected_wait("a")
    assert core.books.admission.note_failure() is False
    assert core.books.admission.note_failure() is False, "the failure before it counted"
