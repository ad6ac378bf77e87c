"""How runs end, and flights with them: completed, failed, tried again, abandoned."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from prefetch_embeddings import PrefetchFailed, PrefetchStats, PrefetchSucceeded
from prefetch_embeddings._flights.admission import FAILURES, PROBE_SECONDS
from prefetch_embeddings._flights.flight import AbandonedError, End, Flight, Met, Run, State
from prefetch_embeddings._flights.landing import RETRY_PAUSE
from prefetch_embeddings._flights.steps import ReenteredError, step
from prefetch_embeddings.reporting import digest
from tests.core.parts import CONTEXT, NOTHING, Core, Someone, elsewhere, flight_of, run_of, woken


@pytest.fixture
def core() -> Core:
    return Core()


class StatusError(Exception):
    status_code = 401


def failed(flight: Flight[str], error: str, attempt: int, *, will_retry: bool) -> PrefetchFailed:
    text = flight.text
    return PrefetchFailed(digest(text), len(text), flight.number, error, attempt, will_retry)


# --- Completed -----------------------------------------------------------------------------------


def test_a_run_brings_a_value(core: Core) -> None:
    run = core.running()
    flight = run.flight
    visits = [core.query("q", Met.JOINED) for _ in range(2)]
    core.time.advance(2.0)
    core.landing.complete(run, "value")
    assert (flight.value, flight.state, flight.runs) == ("value", State.DONE, ())
    assert [woken(visit) for visit in visits] == [1, 1]
    assert core.map.is_ready("q")
    assert core.events == [PrefetchSucceeded(digest("q"), 1, flight.number, 2.0, 1)]
    assert core.map.expected_wait("other") == 2.0, "its duration is not known"
    assert core.stats.prefetch_succeeded == 1


def test_a_prefetch_takes_its_time_from_when_it_was_asked_for_last(core: Core) -> None:
    core.queued()
    core.time.advance(5.0)
    core.map.begin("q", "q", None, CONTEXT)
    core.time.advance(2.0)
    [run], _ = core.work()
    core.time.advance(1.0)
    core.landing.complete(run, "value")
    [event] = core.events
    assert isinstance(event, PrefetchSucceeded)
    assert event.seconds == 3.0


def test_only_the_first_value_counts(core: Core) -> None:
    run = core.running()
    visit = core.query("q", Met.JOINED)
    other = core.books.begin_run(run.flight, core.time(), None, for_query=True, beside=True)
    core.landing.complete(other, "first")
    core.landing.complete(run, "second")
    core.landing.complete(other, "third")
    assert run.flight.value == "first"
    assert core.stats.hedge_won == 1
    assert len(core.events) == 1
    assert woken(visit) == 3, "twice is no harm"
    assert len(core.books.ledger.durations) == 1


def test_a_duration_is_that_of_the_call(core: Core) -> None:
    run = core.running()
    core.time.advance(3.0)
    other = core.books.begin_run(run.flight, core.time(), None, for_query=True)
    core.time.advance(1.0)
    core.landing.complete(other, "value")
    assert core.map.expected_wait("other") == 1.0
    assert core.stats.hedge_won == 0


def test_the_flight_of_a_query_is_no_news(core: Core) -> None:
    visit = core.query()
    core.landing.complete(run_of(visit), "value")
    assert core.events == []
    assert core.stats == PrefetchStats(query_missed=1)
    assert len(core.books.ledger.durations) == 1


def test_a_value_that_is_not_sound_is_served_and_not_kept() -> None:
    core = Core(sound=lambda value: value == "sound")
    run = core.running()
    visit = core.query("q", Met.JOINED)
    core.landing.complete(run, "bad")
    assert (run.flight.value, run.flight.state, run.flight.held) == ("bad", State.DONE, False)
    assert core.map.get("q") is None
    core.leave(visit, 0.0, End.SERVED)
    assert core.done(value="sound").held is True
    assert core.stats.prefetch_used == 1


def test_a_success_ends_the_pause(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "prefetch_embeddings")
    runs = [core.running(key) for key in "abcde"]
    for run in runs[:FAILURES]:
        core.landing.fail(run, StatusError())
        paused = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(paused) == (run is runs[FAILURES - 1])
    assert core.books.admission.paused is True
    core.landing.complete(runs[3], "value")
    core.landing.complete(runs[4], "value")
    assert core.books.admission.paused is False
    assert [r.getMessage() for r in caplog.records if "goes on" in r.getMessage()] == [
        "prefetching goes on: a call succeeded"
    ]


# --- Failed --------------------------------------------------------------------------------------


def test_a_flight_of_the_background_is_tried_again(core: Core) -> None:
    run = core.running()
    flight = run.flight
    core.landing.fail(run, OSError())
    assert (flight.state, flight.runs, flight.held) == (State.QUEUED, (), True)
    [(again, seconds)] = core.again
    assert again == [flight]
    assert RETRY_PAUSE * 0.75 <= seconds <= RETRY_PAUSE * 1.25
    assert core.events == [failed(flight, "OSError", 1, will_retry=True)]
    assert core.books.admission.places_taken == 1
    assert core.map.requeue(again) is True
    [run], _ = core.work()
    core.landing.fail(run, ValueError())
    assert (flight.state, flight.held) == (State.FAILED, False)
    assert len(core.again) == 1
    assert core.events[1:] == [failed(flight, "ValueError", 2, will_retry=False)]
    assert core.stats == PrefetchStats(prefetch_started=1, prefetch_retried=1, prefetch_failed=1)


def test_pauses_double_and_are_spread(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    spread: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        spread.append((low, high))
        return 1.0

    monkeypatch.setattr("random.uniform", uniform)
    core = Core(attempts=9)
    run = core.running()
    for attempt in range(1, 6):
        core.landing.fail(run, OSError())
        again, seconds = core.again[-1]
        pause = RETRY_PAUSE * 2 ** (attempt - 1)
        assert seconds == (pause if attempt < FAILURES else max(PROBE_SECONDS, pause))
        core.time.advance(2.0)
        assert core.map.requeue(again)
        [run], _ = core.work()
    assert spread == [(0.75, 1.25)] * 5


def test_a_flight_of_a_loop_keeps_its_place_for_the_next_attempt(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    run = core.on_loop(loop)
    core.landing.fail(run, OSError())
    assert core.map.on_loops() == [run.flight]
    assert core.map.claim_job() == (None, [])


@pytest.mark.parametrize(
    "why",
    [
        "by a query",
        "for a query",
        "waited for",
        "forgotten",
        "taken back",
        "closed",
        "not to be mended",
        "interrupted",
        "the last attempt",
    ],
)
def test_a_flight_is_not_tried_again_if(core: Core, why: str) -> None:
    error: BaseException = OSError()
    if why == "by a query":
        run = run_of(core.query())
    elif why == "the last attempt":
        core = Core(attempts=1)
        run = core.running()
    else:
        run = core.running()
    flight = run.flight
    match why:
        case "for a query":
            flight.for_query = True
        case "waited for":
            core.attend()
        case "forgotten":
            core.map.forget("q")
        case "taken back":
            flight.asks = 0
        case "closed":
            core.books.closed = True
        case "not to be mended":
            error = StatusError()
        case "interrupted":
            error = AbandonedError()
    core.landing.fail(run, error)
    assert (flight.state, flight.held, flight.runs) == (State.FAILED, False, ())
    assert not core.again
    told = why not in ("by a query", "for a query")
    name = type(error).__name__
    assert core.events == ([failed(flight, name, 1, will_retry=False)] if told else [])


def test_the_last_of_several_runs_decides(core: Core) -> None:
    run = core.running()
    flight = run.flight
    other = elsewhere(core.books.begin_run(flight, core.time(), None, for_query=False, beside=True))
    visit = core.query("q", Met.JOINED)
    core.landing.fail(run, OSError())
    assert (flight.state, flight.runs) == (State.RUNNING, (other,))
    assert woken(visit) == 0
    assert core.events == []
    core.leave(visit)
    core.landing.fail(other, OSError())
    assert flight.state is State.QUEUED, "a call beside others is a reason to try again, too"
    assert core.again[0][0] == [flight]
    core.landing.fail(other, OSError())
    core.landing.fail(run, OSError())
    assert flight.state is State.QUEUED
    assert len(core.events) == len(core.again) == 1
    assert core.books.admission.paused is False, "a run failed twice"


def test_those_who_wait_are_told_when_a_flight_has_failed(core: Core) -> None:
    run = core.running()
    visits = [core.query("q", Met.JOINED), core.attend()]
    core.landing.fail(run, OSError())
    assert [woken(visit) for visit in visits] == [1, 1]
    assert run.flight.failure is None, "no call for a query has failed"
    assert len(core.events) == 1


def test_the_error_of_a_call_for_a_query_is_kept_for_those_who_wait(core: Core) -> None:
    visit = core.query()
    core.query("q", Met.JOINED)
    run, flight = run_of(visit), flight_of(visit)
    with pytest.raises(OSError, match=r"^$") as raised:
        raise OSError
    core.landing.fail(run, raised.value)
    assert flight.failure == (run, raised.value, raised.tb)
    assert raised.tb is not None


def test_what_interrupted_a_call_is_nobodys_error(core: Core) -> None:
    visit = core.query()
    core.query("q", Met.JOINED)
    for _ in range(FAILURES):
        core.landing.lose(run_of(visit))
    assert flight_of(visit).state is State.FAILED
    assert flight_of(visit).failure is None
    assert core.books.admission.paused is False


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failures_in_a_row_pause_prefetching(core: Core, error: type[BaseException]) -> None:
    for key in "abc"[:FAILURES]:
        core.landing.fail(core.running(key), error())
    assert core.books.admission.paused is (error is OSError)


def test_a_lost_run_ends_its_flight_unless_another_goes_on(core: Core) -> None:
    run = core.running()
    other = core.books.begin_run(run.flight, core.time(), None, for_query=True)
    core.landing.lose(other)
    assert run.flight.runs == (run,)
    core.landing.lose(run)
    assert run.flight.state is State.FAILED
    assert core.stats.prefetch_failed == 1


def test_runs_of_one_call_fail_together_and_are_tried_again_together(core: Core) -> None:
    core.map.begin_batch([(key, key) for key in "abc"], CONTEXT)
    runs, _ = core.work()
    core.attend("b")
    core.landing.fail_all(runs, OSError())
    states = [run.flight.state for run in runs]
    assert states == [State.QUEUED, State.FAILED, State.QUEUED]
    assert [flights for flights, _ in core.again] == [[runs[0].flight, runs[2].flight]]
    assert core.events == [
        failed(run.flight, "OSError", 1, will_retry=run is not runs[1]) for run in runs
    ]


# --- Abandoned -----------------------------------------------------------------------------------


@pytest.mark.parametrize("only_queued", [True, False])
def test_abandoning_a_queued_flight(core: Core, only_queued: bool) -> None:
    flight = core.queued()
    visit = core.attend()
    core.landing.abandon(flight, only_queued=only_queued)
    assert (flight.state, flight.held) == (State.FAILED, False)
    assert woken(visit) == 1
    core.landing.abandon(flight)
    assert core.stats.prefetch_withdrawn == 1
    assert core.events == [failed(flight, "AbandonedError", 0, will_retry=False)]


def test_abandoning_a_running_flight(core: Core) -> None:
    run = core.running()
    flight = run.flight
    core.landing.abandon(flight, only_queued=True)
    assert flight.state is State.RUNNING
    assert core.events == []
    core.landing.abandon(flight)
    assert (flight.state, flight.runs) == (State.FAILED, ())
    assert core.stats.prefetch_failed == 1
    core.landing.complete(run, "late")
    assert core.map.is_ready("q") is False
    assert core.events == [failed(flight, "AbandonedError", 1, will_retry=False)]


def test_a_flight_that_is_done_is_not_abandoned(core: Core) -> None:
    flight = core.done()
    core.events.clear()
    for only_queued in (True, False):
        core.landing.abandon(flight, only_queued=only_queued)
    assert flight.state is State.DONE
    assert core.map.is_ready("q")
    assert core.events == []


@pytest.mark.parametrize("by_prefetch", [True, False])
def test_that_a_query_was_let_down_is_no_news_of_a_prefetch(core: Core, by_prefetch: bool) -> None:
    if by_prefetch:
        core.queued()
        visit = core.query("q", Met.CLAIMED)
    else:
        visit = core.query()
    core.landing.abandon(flight_of(visit))
    assert core.events == []


def test_waiters_of_what_a_step_of_the_map_has_ended_are_told(core: Core) -> None:
    flights = [core.queued(key) for key in "ab"]
    visits = [core.attend(key) for key in "ab"]
    core.landing.drop(flights)
    assert [woken(visit) for visit in visits] == [0, 0], "they have not ended"
    core.map.close()
    core.landing.drop(flights)
    assert [woken(visit) for visit in visits] == [1, 1]


# --- Cancelling ----------------------------------------------------------------------------------


async def hang() -> None:
    await asyncio.get_running_loop().create_future()


async def test_the_losers_of_a_flight_are_cancelled_and_not_the_winner(core: Core) -> None:
    loop = asyncio.get_running_loop()
    run = core.on_loop(loop)
    others = [core.books.begin_run(run.flight, core.time(), loop, for_query=True) for _ in range(2)]
    in_a_thread = core.books.begin_run(run.flight, core.time(), None, for_query=True)
    for each in (run, *others):
        each.task = asyncio.create_task(hang())
    core.landing.complete(run, "value")
    tasks = [each.task for each in (*others, run)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [task is not None and task.cancelled() for task in tasks] == [True, True, False]
    assert in_a_thread.task is None
    assert run.task is not None
    run.task.cancel()


async def test_a_task_does_not_cancel_itself(core: Core) -> None:
    loop = asyncio.get_running_loop()
    run = core.on_loop(loop)
    run.task = asyncio.current_task()
    core.landing.abandon(run.flight)
    await asyncio.sleep(0)
    assert run.flight.state is State.FAILED


async def test_a_task_of_another_loop_is_cancelled_there(core: Core) -> None:
    run = core.on_loop(asyncio.get_running_loop())
    task = run.task = asyncio.create_task(hang())
    thread = threading.Thread(target=core.landing.abandon, args=(run.flight,))
    thread.start()
    thread.join()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_task_of_a_loop_that_has_closed_is_left_alone(
    core: Core, loop: asyncio.AbstractEventLoop
) -> None:
    class Task:
        def cancel(self) -> None:
            raise AssertionError("it is cancelled here")

    run = core.on_loop(loop)
    run.task = Task()  # type: ignore[assignment]
    loop.close()
    core.landing.abandon(run.flight)
    assert run.flight.state is State.FAILED


async def test_tasks_after_one_without_a_task_are_cancelled_too(core: Core) -> None:
    loop = asyncio.get_running_loop()
    run = core.on_loop(loop)
    second = core.books.begin_run(run.flight, core.time(), loop, for_query=True)
    second.task = asyncio.create_task(hang())
    core.landing.abandon(run.flight)
    with pytest.raises(asyncio.CancelledError):
        await second.task


# --- In the midst of a step ----------------------------------------------------------------------


class InAStep:
    """Does something as a finaliser would that comes in the midst of a step."""

    def __init__(self, core: Core) -> None:
        self.steps = core.steps

    @step
    def do(self, act: Any, *args: Any, **options: Any) -> Any:
        return act(*args, **options)


def test_losing_and_abandoning_are_put_off_in_the_midst_of_a_step(core: Core) -> None:
    run, other = core.running("a"), core.running("b")
    midst = InAStep(core)
    assert midst.do(core.landing.lose, run) is None
    assert run.flight.state is State.FAILED
    midst.do(core.landing.abandon, other.flight)
    assert other.flight.state is State.FAILED
    with pytest.raises(ReenteredError):
        midst.do(core.landing.complete, core.running("c"), "value")


# --- Told at all events --------------------------------------------------------------------------


class Unwilling(Someone):
    """One whose waking a signal handler interrupts, the first time."""

    def wake(self) -> None:
        super().wake()
        if self.woken == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["complete", "fail", "abandon", "drop"])
def test_all_are_told_though_a_signal_handler_throws_an_exception(core: Core, how: str) -> None:
    run = core.running()
    flight = run.flight
    core.visits.attend(Unwilling(for_query=False), claim=False)
    last = core.attend()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - one of them is called
        match how:
            case "complete":
                core.landing.complete(run, "value")
            case "fail":
                core.landing.fail(run, OSError())
            case "abandon":
                core.landing.abandon(flight)
            case _:
                core.books.end(flight, State.FAILED)
                core.landing.drop([flight])
    assert woken(last) == 1


@pytest.mark.parametrize("how", ["complete", "fail", "abandon"])
def test_all_are_told_though_the_step_is_torn_after_its_work(
    core: Core, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = core.running()
    visit = core.query("q", Met.JOINED)
    end = core.books.end

    def torn(flight: Flight[str], state: State) -> None:
        end(flight, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(core.books, "end", torn)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - one of them is called
        match how:
            case "complete":
                core.landing.complete(run, "value")
            case "fail":
                core.landing.fail(run, OSError())
            case _:
                core.landing.abandon(run.flight)
    assert woken(visit) == 1


# --- Mended --------------------------------------------------------------------------------------


def tear(core: Core) -> None:
    """Throw this thread out of a step."""

    def throw() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InAStep(core).do(throw)


def test_a_call_that_the_thread_was_to_make_is_made_by_nobody_and_so_queued(core: Core) -> None:
    run = core.running()
    begun = core.running("begun")
    begun.began = True
    tear(core)
    core.map.expire()
    assert (run.flight.state, run.flight.runs) == (State.QUEUED, ())
    assert (begun.flight.state, begun.flight.runs) == (State.RUNNING, (begun,))
    [again], _ = core.work()
    assert again.flight is run.flight
    admission = core.books.admission
    assert (admission.places_taken, admission.workers_busy) == (0, 1)


def test_a_call_of_another_thread_is_left_to_it(core: Core) -> None:
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(core.running()))
    thread.start()
    thread.join()
    tear(core)
    core.map.expire()
    [run] = runs
    assert run.flight.runs == (run,)


@pytest.mark.parametrize("why", ["by a query", "for a query", "waited for"])
def test_a_torn_flight_that_somebody_waits_for_ends_and_they_are_told(core: Core, why: str) -> None:
    if why == "by a query":
        visit = core.query()
    elif why == "for a query":
        core.queued()
        visit = core.query("q", Met.CLAIMED)
    else:
        core.running()
        visit = core.attend()
    tear(core)
    assert core.stats.prefetch_failed == (why != "by a query")
    assert flight_of(visit).state is State.FAILED
    assert woken(visit) == 1
    assert not core.steps.put_off


def test_what_is_queued_stays_so_after_a_torn_step(core: Core) -> None:
    flight = core.queued()
    visit = core.attend()
    tear(core)
    core.map.expire()
    assert core.map.get("q") is flight
    assert flight.state is State.QUEUED
    assert woken(visit) == 0
    core.books.shelf.by_key.clear()
    tear(core)
    assert core.map.claim_job() == (None, []), "it is not in the map any more"


def test_the_shelf_is_mended_as_well(core: Core) -> None:
    flight = core.done()
    core.books.shelf._arrived.clear()
    tear(core)
    assert core.stats != NOTHING
    assert core.books.shelf.ready() == [flight]
