"""Pairs of steps in every order: what claims, joins and removals do to each other.

Each pair is explored with one preemption, at every bytecode; and, with `SCHEDULES_DEEP=1`, with two
at every line. Each has a wrong variant, a small and likely mistake, which the exploration must
catch. `pytest -s` shows how many schedules that were; `make schedules` goes deep, and shows it too.
From Python 3.12 on it is lines only, since a thread is no longer told of each of its bytecodes.

What this cannot see:

* More preemptions than that, and more threads than a scenario has.
* Switches inside what is written in C, or in untraced modules (`cachetools`, `Future`): these run
  as one step.
* Event loops. Coroutines switch where they await; tests of their own hold them there by gates.
* Memory that is weaker than the interpreter's lock makes it: free-threaded builds.
* The real `threading.Lock`, `SimpleQueue`, waits on a `Future` and starts of threads: stand-ins
  that let the explorer switch take their place, so it takes on trust that the real ones do what
  they say. A pool here has one thread at a time, and none that cannot be started.
"""

from __future__ import annotations

import contextvars
import os
import queue
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import pytest
from prefetch_embeddings._flights.runner import FlightRunner

from prefetch_embeddings import Hedge, PrefetchOutcome
from prefetch_embeddings._background import pool as workers
from prefetch_embeddings._background.pool import WorkerPool
from prefetch_embeddings._flights import map as flights
from prefetch_embeddings._flights import runner
from prefetch_embeddings._flights.map import AbandonedError, Flight, FlightMap, State
from prefetch_embeddings.events import logger
from prefetch_embeddings.testing import (
    ManualExecutor,
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.tools.schedules import Found, Schedule, StuckError, WaitedFuture, explore

STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome

FILES = [str(module.__file__) for module in (flights, runner, workers)]

BYTECODES: dict[str, Any] = {"preemptions": 1, "opcodes": True}
LINES: dict[str, Any] = {"preemptions": 2}
DEEP = bool(os.environ.get("SCHEDULES_DEEP"))
BYTECODES_SEEN = sys.version_info < (3, 12)
depths = pytest.mark.parametrize(
    "depth",
    [
        pytest.param(
            BYTECODES,
            id="bytecodes",
            marks=pytest.mark.skipif(not BYTECODES_SEEN, reason="not all of them are traced"),
        ),
        pytest.param(
            LINES,
            id="lines",
            marks=pytest.mark.skipif(BYTECODES_SEEN and not DEEP, reason="for a long run"),
        ),
    ],
)


@pytest.fixture(scope="module", autouse=True)
def total() -> Iterator[None]:
    """Says at the end how many schedules were explored in all."""
    explorations.clear()
    yield
    print(f"\n{sum(explorations):,} schedules in {len(explorations)} explorations")


explorations: list[int] = []


class PrefetchError(Exception):
    pass


class Pair:
    """A wrapper whose locks and waits the explorer knows, and its text "q"."""

    wrong: type[FlightMap[list[float]]] | None = None
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, schedule: Schedule) -> None:
        self.model = ScriptedEmbeddings()
        self.embeddings = ManualPrefetchingEmbeddings(self.model, **self.options)
        self.executor = self.embeddings.executor
        self.map = self.embeddings._flights
        if self.wrong is not None:
            self.map.__class__ = self.wrong
        self.map._lock = schedule.lock()  # type: ignore[assignment]
        self.seen: list[Any] = []
        self.set_up()

    @property
    def workers(self) -> list[Callable[[], Any]]:
        return [self.one, self.other]

    def set_up(self) -> None:
        self.embeddings.prefetch("q")

    def one(self) -> Any:
        return self.executor.run_next()

    def other(self) -> Any:
        raise NotImplementedError

    def check(self) -> None:
        assert_no_leaks(self.embeddings)

    def query(self) -> None:
        assert self.embeddings.embed_query("q") == self.model.vector("q")


@contextmanager
def quiet() -> Iterator[None]:
    logger.disabled = True  # thousands of warnings say nothing
    try:
        yield
    finally:
        logger.disabled = False


def explored(pair: Callable[..., Any], depth: dict[str, Any], *, wrong: bool = True) -> Found:
    schedule: Schedule
    files = getattr(pair, "files", FILES)
    if getattr(pair, "three", False) and not DEEP:  # the map alone, or there are too many
        files = [str(flights.__file__)]

    def make(new: Schedule) -> Any:
        nonlocal schedule
        schedule = new
        return pair(schedule)

    def future() -> WaitedFuture:
        return WaitedFuture(schedule)

    with mock.patch.object(flights, "Future", future), quiet():
        found = explore(make, [*files, __file__] if wrong else files, **depth)
    explorations.append(found.schedules)
    kind = "wrong" if wrong else "right"
    print(f"{kind} {pair.__name__}, {depth}: {found.schedules} schedules")
    return found


def check(pair: type[Pair], depth: dict[str, Any]) -> None:
    found = explored(pair, depth, wrong=False)
    if found.failure is not None:
        raise found.failure
    assert found.schedules > 20


def catch(pair: type[Pair], wrong: type[FlightMap[Any]], depth: dict[str, Any]) -> None:
    found = explored(type(pair.__name__, (pair,), {"wrong": wrong}), depth)
    assert found.failure is not None, f"{found.schedules} schedules, and nothing found"


# --- claim / claim -----------------------------------------------------------------------------


class ClaimAndClaim(Pair):
    """A worker and a query find the same flight queued."""

    def other(self) -> Any:
        self.query()

    def check(self) -> None:
        super().check()
        assert self.model.calls_for("q") == 1
        assert len(self.executor) == 0
        stats = self.embeddings.stats()
        met = stats.query_ready + stats.query_joined + stats.query_claimed
        assert (met, stats.query_missed, stats.prefetch_used) == (1, 0, 1)


class TwoQueriesAndAWorker(ClaimAndClaim):
    three = True

    @property
    def workers(self) -> list[Callable[[], Any]]:
        return [self.one, self.query, self.query]

    def check(self) -> None:
        assert self.model.calls_for("q") == 1
        assert_no_leaks(self.embeddings)


class LooksBeforeItLocks(FlightMap[list[float]]):
    def claim(self, flights: Iterable[Flight[Any]]) -> list[Flight[Any]]:
        claimed = [flight for flight in flights if flight.state is State.QUEUED]
        with self._lock:
            for flight in claimed:
                self._start(flight, for_query=False, loop=None)
            self._busy += bool(claimed)
        return claimed


@depths
def test_claim_and_claim(depth: dict[str, Any]) -> None:
    check(ClaimAndClaim, depth)


def test_three_claims() -> None:
    check(TwoQueriesAndAWorker, {"preemptions": 1})


@depths
def test_claim_and_claim_wrong(depth: dict[str, Any]) -> None:
    catch(ClaimAndClaim, LooksBeforeItLocks, depth)


# --- complete / clear, complete / forget ---------------------------------------------------------


class CompleteAndClear(Pair):
    """A flight ends while the map is cleared and the text prefetched again."""

    def other(self) -> Any:
        self.embeddings.clear()
        self.seen.append(self.embeddings.prefetch("q"))

    def check(self) -> None:
        assert self.seen == [STARTED], "the cleared flight is back"
        newer = self.map._by_key["q"]
        self.executor.run_all()
        assert self.map._by_key["q"] is newer, "the cleared flight took the newer one's place"
        super().check()


class StoresByKey(FlightMap[list[float]]):
    def _end(
        self, flight: Flight[list[float]], state: State, error: BaseException | None = None
    ) -> None:
        super()._end(flight, state, error)
        if state is State.DONE:
            self._by_key[flight.key] = self._ready[flight.key] = flight


@depths
def test_complete_and_clear(depth: dict[str, Any]) -> None:
    check(CompleteAndClear, depth)


@depths
def test_complete_and_clear_wrong(depth: dict[str, Any]) -> None:
    catch(CompleteAndClear, StoresByKey, depth)


class CompleteAndForget(Pair):
    """A flight ends while its text is forgotten."""

    def other(self) -> Any:
        assert self.embeddings.forget("q")

    def check(self) -> None:
        assert not self.embeddings.is_ready("q"), "what was forgotten is back"
        super().check()
        stats = self.embeddings.stats()
        assert stats.prefetch_wasted + stats.prefetch_withdrawn == 1


@depths
def test_complete_and_forget(depth: dict[str, Any]) -> None:
    check(CompleteAndForget, depth)


@depths
def test_complete_and_forget_wrong(depth: dict[str, Any]) -> None:
    catch(CompleteAndForget, StoresByKey, depth)


# --- fail / join -------------------------------------------------------------------------------


class FailAndJoin(Pair):
    """A prefetch fails for good while a query finds it."""

    options: ClassVar[dict[str, Any]] = {"attempts": 1}

    def set_up(self) -> None:
        super().set_up()
        self.model.fail("q", PrefetchError())

    def other(self) -> Any:
        try:
            self.query()
        except PrefetchError:
            self.seen.append("failed")

    def check(self) -> None:
        super().check()
        stats = self.embeddings.stats()
        # Only a query that ran the flight itself may see its error.
        assert self.seen == ["failed"] * stats.query_claimed
        assert self.model.calls_for("q") == 2 - stats.query_claimed
        assert stats.query_recovered == stats.query_joined


class RetryAndJoin(FailAndJoin):
    """A prefetch fails, and would pause before it tries again, while a query finds it."""

    options: ClassVar[dict[str, Any]] = {"attempts": 2}

    def check(self) -> None:
        assert self.embeddings.stats().prefetch_retried == 0
        if self.map._by_key.get("q") is not None:
            self.embeddings.time.advance(60.0)
            self.executor.run_all()
        assert_no_leaks(self.embeddings)
        stats = self.embeddings.stats()
        assert stats.query_recovered == stats.query_joined


class PublishesFirst(FlightMap[list[float]]):
    def fail(self, flight: Flight[list[float]], error: BaseException) -> State | None:
        flight.error = error
        flight.state = State.FAILED
        flights._publish(flight)
        with self._lock:
            flight.future = None
            self._end(flight, State.FAILED, error)
        return State.FAILED


class RetriesDespiteWaiters(FlightMap[list[float]]):
    def fail(self, flight: Flight[list[float]], error: BaseException) -> State | None:
        if flight.waiters or flight.for_query or not flight.held:
            return super().fail(flight, error)
        with self._lock:
            flight.runners = 0
            flight.state = State.QUEUED
            self._queued.add(flight)
        return State.QUEUED


@depths
def test_fail_and_join(depth: dict[str, Any]) -> None:
    check(FailAndJoin, depth)


@depths
def test_fail_and_join_wrong(depth: dict[str, Any]) -> None:
    catch(FailAndJoin, PublishesFirst, depth)


@depths
def test_retry_and_join(depth: dict[str, Any]) -> None:
    check(RetryAndJoin, depth)


@depths
def test_retry_and_join_wrong(depth: dict[str, Any]) -> None:
    found = explored(type("Wrong", (RetryAndJoin,), {"wrong": RetriesDespiteWaiters}), depth)
    assert isinstance(found.failure, StuckError), "no query was left waiting for a pause"


# --- expire / prefetch ---------------------------------------------------------------------------


class ExpireAndPrefetch(Pair):
    """A vector's time ends while two threads prefetch its text."""

    options: ClassVar[dict[str, Any]] = {"ttl": 10.0}

    def set_up(self) -> None:
        self.query()

    def one(self) -> Any:
        self.embeddings.time.advance(10.0)
        self.seen.append(self.embeddings.prefetch("q"))

    def other(self) -> Any:
        self.seen.append(self.embeddings.prefetch("q"))

    def check(self) -> None:
        assert sorted(self.seen) in ([IN_FLIGHT, STARTED], [READY, STARTED])
        self.executor.run_all()
        assert self.embeddings.is_ready("q")
        assert self.model.calls_for("q") == 2
        super().check()


class LooksThenAdds(FlightMap[list[float]]):
    def begin(
        self, key: Hashable, text: str, context: contextvars.Context
    ) -> tuple[PrefetchOutcome, Flight[list[float]] | None]:
        with self._lock:
            outcome, flight = self._find(key, text)
        if outcome is not None:
            return outcome, flight
        with self._lock:
            return self._enqueue(key, text, context)


@depths
def test_expire_and_prefetch(depth: dict[str, Any]) -> None:
    check(ExpireAndPrefetch, depth)


@depths
def test_expire_and_prefetch_wrong(depth: dict[str, Any]) -> None:
    catch(ExpireAndPrefetch, LooksThenAdds, depth)


# --- close / submit ------------------------------------------------------------------------------


class CloseAndSubmit(Pair):
    """The wrapper is closed while a prefetch begins."""

    def set_up(self) -> None:
        pass

    def one(self) -> Any:
        self.seen.append(self.embeddings.prefetch("q"))

    def other(self) -> Any:
        self.embeddings.close()

    def check(self) -> None:
        super().check()
        stats = self.embeddings.stats()
        assert len(self.executor) == 0
        assert (stats.prefetch_withdrawn, stats.prefetch_dropped) == (
            (1, 0) if self.seen == [STARTED] else (0, 1)
        )


class ClosesLast(FlightMap[list[float]]):
    def close(self) -> list[Flight[list[float]]]:
        with self._lock:
            ended = list(self._by_key.values())
            for flight in ended:
                self._end(flight, State.FAILED, AbandonedError())
        self._closed = True
        return ended


@depths
def test_close_and_submit(depth: dict[str, Any]) -> None:
    check(CloseAndSubmit, depth)


@depths
def test_close_and_submit_wrong(depth: dict[str, Any]) -> None:
    catch(CloseAndSubmit, ClosesLast, depth)


# --- submit / claim ------------------------------------------------------------------------------


class SubmitAndClaim(Pair):
    """A query claims a flight that is not yet in the executor's queue."""

    def set_up(self) -> None:
        pass

    def one(self) -> Any:
        self.seen.append(self.embeddings.prefetch("q"))

    def other(self) -> Any:
        self.query()

    def check(self) -> None:
        assert len(self.executor) == 0, "a flight that nobody need run stays in the queue"
        assert self.model.calls_for("q") == 1
        super().check()


class SubmitsAndForgets(FlightRunner[list[float]]):
    def _submit(self, flight: Flight[list[float]]) -> PrefetchOutcome:
        self._executor.submit(flight, self._fly)
        return STARTED


class WrongSubmitAndClaim(SubmitAndClaim):
    def set_up(self) -> None:
        self.embeddings._runner.__class__ = SubmitsAndForgets


@depths
def test_submit_and_claim(depth: dict[str, Any]) -> None:
    check(SubmitAndClaim, depth)


@depths
def test_submit_and_claim_wrong(depth: dict[str, Any]) -> None:
    assert explored(WrongSubmitAndClaim, depth).failure is not None


# --- hedge / complete ----------------------------------------------------------------------------


class HedgeAndComplete(Pair):
    """A flight's first call returns while the second is being made."""

    three = True
    options: ClassVar[dict[str, Any]] = {"hedge": Hedge(after=1.0, budget=1.0)}

    def set_up(self) -> None:
        super().set_up()
        self.aside = ManualExecutor()
        self.embeddings._runner._aside = self.aside  # type: ignore[misc]

    @property
    def workers(self) -> list[Callable[[], Any]]:
        return [self.ask, self.one, self.other]

    def ask(self) -> None:
        self.query()
        self.seen.append("answered")

    def one(self) -> Any:
        self.schedule.wait_until(lambda: len(self.aside) > 0)
        return self.aside.run_next()

    def other(self) -> Any:
        self.schedule.wait_until(lambda: self.embeddings.time.calls_to_come > 0 or bool(self.seen))
        self.embeddings.time.advance(1.0)
        return self.aside.run_next()

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        super().__init__(schedule)

    def check(self) -> None:
        super().check()
        stats = self.embeddings.stats()
        assert 1 <= self.model.calls_for("q") == 1 + stats.hedge_started
        assert stats.hedge_won <= stats.hedge_started
        assert (stats.query_claimed, stats.prefetch_succeeded) == (1, 1)


class CompletesUnchecked(FlightMap[list[float]]):
    def complete(
        self, flight: Flight[list[float]], value: list[float], *, hedge: bool = False
    ) -> bool:
        if flight.state is not State.RUNNING:
            return False
        with self._lock:
            flight.value = value
            self._end(flight, State.DONE)
        flights._publish(flight)
        return True


def test_hedge_and_complete() -> None:
    check(HedgeAndComplete, {"preemptions": 1})


def test_hedge_and_complete_wrong() -> None:
    catch(HedgeAndComplete, CompletesUnchecked, {"preemptions": 1})


# --- submit / park -------------------------------------------------------------------------------


class Wakeups:
    """Stands in for the pool's queue of wake-ups."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.tokens = 0
        self.time_is_up = False

    def put(self, token: None) -> None:
        self.tokens += 1
        self._schedule.switch()

    def get(self, timeout: float | None = None) -> None:
        ends = timeout is not None
        self._schedule.wait_until(lambda: self.tokens > 0 or (ends and self.time_is_up))
        if not self.tokens:
            raise queue.Empty
        self.tokens -= 1


class SubmitAndPark:
    """A pool's thread finds nothing to do while a job comes, and then the pool is closed."""

    kind = WorkerPool

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.pool = self.kind(1)
        self.pool._lock = schedule.lock()  # type: ignore[assignment]
        self.pool._wakeups = Wakeups(schedule)  # type: ignore[assignment]
        self.pool._threads.add(mock.sentinel.thread)
        self.ran: list[Hashable] = []
        self.workers = [self.work, self.submit]

    def work(self) -> None:
        with mock.patch("threading.current_thread", return_value=mock.sentinel.thread):
            self.pool._work()

    def submit(self) -> None:
        assert self.pool.submit("job", self.ran.append)
        self.schedule.wait_until(lambda: self.ran == ["job"])
        self.pool.close()

    def check(self) -> None:
        assert not self.pool._threads
        assert not self.pool.submit("too late", self.ran.append)


class ParksUncounted(WorkerPool):
    """Counts a thread as idle only after it has given up the lock."""

    def _work(self) -> None:
        while True:
            job: Hashable = None
            with self._lock:
                if self._jobs:
                    job, run = self._jobs.popitem(last=False)
                elif self._closed:
                    self._threads.clear()
                    return
            if job is not None:
                run(job)
                continue
            with self._lock:
                self._idle += 1
            self._park()


@depths
def test_submit_and_park(depth: dict[str, Any]) -> None:
    found = explored(SubmitAndPark, depth, wrong=False)
    if found.failure is not None:
        raise found.failure
    assert found.schedules > 20


@depths
def test_submit_and_park_wrong(depth: dict[str, Any]) -> None:
    found = explored(type("Wrong", (SubmitAndPark,), {"kind": ParksUncounted}), depth)
    assert isinstance(found.failure, StuckError)


# --- close / submit, in the pool -----------------------------------------------------------------


class ClosePoolAndSubmit:
    """A pool is closed while a job comes that its first thread is to be started for."""

    files = (str(workers.__file__),)
    kind = WorkerPool

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.pool = self.kind(1)
        self.pool._lock = schedule.lock()  # type: ignore[assignment]
        self.wakeups = self.pool._wakeups = Wakeups(schedule)  # type: ignore[assignment]
        self.started: list[threading.Thread] = []
        self.returned: list[str] = []
        self.accepted: list[str] = []
        self.ran: list[Hashable] = []
        self.workers = [self.be_a_thread, self.submit, self.close]

    def be_a_thread(self) -> None:
        """Run the threads that the pool has started, in their order, until no more can come."""
        while True:
            self.schedule.wait_until(lambda: bool(self.started) or len(self.returned) == 2)
            if not self.started:
                return
            thread = self.started.pop(0)
            with mock.patch("threading.current_thread", return_value=thread):
                thread.run()

    def submit(self) -> None:
        with mock.patch.object(workers, "start", self.started.append):
            if self.pool.submit("job", self.ran.append):
                self.accepted.append("job")
        self.returned.append("submit")

    def close(self) -> None:
        self.pool.close()
        self.returned.append("close")

    def check(self) -> None:
        assert self.ran == self.accepted, "a job was accepted and not run, or run and not accepted"
        assert not self.pool._threads
        assert not self.pool._jobs
        assert self.pool._idle == self.wakeups.tokens == 0, "a token too few, or too many"
        assert not self.pool.submit("too late", self.ran.append)


class ClosePoolAndSubmitToItsThread(ClosePoolAndSubmit):
    """A pool is closed while a job comes, and its one thread waits or is about to."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        thread = threading.Thread(target=self.pool._work)
        self.pool._threads.add(thread)
        self.started.append(thread)


class GiveUpAndSubmit(ClosePoolAndSubmitToItsThread):
    """The one thread has waited too long for a job when one comes, and then the pool is closed."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.workers = [self.be_a_thread, self.submit_and_close, self.let_time_pass]

    def submit_and_close(self) -> None:
        self.submit()
        self.close()

    def let_time_pass(self) -> None:
        self.wakeups.time_is_up = True


class ClosesSilently(WorkerPool):
    """Hands out no tokens."""

    def close(self) -> None:
        with self._lock:
            self._closed = True


class CountsIdleFirst(WorkerPool):
    """Looks who is idle before it has the lock."""

    def close(self) -> None:
        tokens = self._idle
        with self._lock:
            self._closed = True
            self._idle = 0
        for _ in range(tokens):
            self._wakeups.put(None)


class EndsBeforeItsJobs(WorkerPool):
    """Ends a closed pool's thread without a look at what is queued."""

    def _work(self) -> None:
        while True:
            with self._lock:
                job: Hashable = None
                if self._closed:
                    self._threads.clear()
                    return
                if self._jobs:
                    job, run = self._jobs.popitem(last=False)
                else:
                    self._idle += 1
            if job is not None:
                run(job)
            else:
                self._park()


class StartsNoneOnceClosed(WorkerPool):
    """Accepts a job, and then starts no thread for it because the pool is closed."""

    def _start_thread(self, job: Hashable) -> bool:
        return self._closed or super()._start_thread(job)


class RefusesTooLate(WorkerPool):
    """Looks whether it is closed when it has given up the lock, and the job is in the queue.

    (A look before the lock would do no harm: what it lets through still gets its thread.)
    """

    def submit(self, job: Hashable, run: Callable[[Any], None]) -> bool:
        with self._lock:
            self._jobs[job] = run
            wake = self._idle > 0
            if wake:
                self._idle -= 1
        if wake:
            self._wakeups.put(None)
        if self._closed:
            return False
        return wake or self._start_thread(job)


class GivesUpRegardless(WorkerPool):
    """Ends a thread whose time is up, also if a job counts on it."""

    def _park(self) -> bool:
        try:
            self._wakeups.get(timeout=workers.IDLE_SECONDS)
        except queue.Empty:
            with self._lock:
                self._idle = max(0, self._idle - 1)
                self._threads.clear()
            return False
        return True


@depths
@pytest.mark.parametrize(
    "scenario",
    [
        ClosePoolAndSubmit,
        ClosePoolAndSubmitToItsThread,
        GiveUpAndSubmit,
    ],
)
def test_close_pool_and_submit(scenario: type[ClosePoolAndSubmit], depth: dict[str, Any]) -> None:
    found = explored(scenario, depth, wrong=False)
    if found.failure is not None:
        raise found.failure
    assert found.schedules > 20


@depths
@pytest.mark.parametrize(
    ("scenario", "wrong"),
    [
        (ClosePoolAndSubmitToItsThread, ClosesSilently),
        (ClosePoolAndSubmitToItsThread, CountsIdleFirst),
        (ClosePoolAndSubmitToItsThread, EndsBeforeItsJobs),
        (ClosePoolAndSubmitToItsThread, RefusesTooLate),
        (GiveUpAndSubmit, GivesUpRegardless),
        (ClosePoolAndSubmit, StartsNoneOnceClosed),
    ],
)
def test_close_pool_and_submit_wrong(
    scenario: type[ClosePoolAndSubmit], wrong: type[WorkerPool], depth: dict[str, Any]
) -> None:
    found = explored(type(wrong.__name__, (scenario,), {"kind": wrong}), depth)
    assert found.failure is not None, f"{found.schedules} schedules, and nothing found"
