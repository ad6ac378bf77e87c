"""The flight map against a plain dictionary model: whatever happens, in whatever order.

Hypothesis draws the steps. Calls of the model hang until a step answers them, so that flights
stay under way over any number of steps; threads and coroutines join them and are cancelled. After
each step the map's insides, every counter and every answer must be what the dictionaries say.

The normal run draws the same examples each time. `STATE_MACHINE_EXAMPLES=5000` draws that many, at
random.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchOutcome
from prefetch_embeddings._flights import runner
from prefetch_embeddings.stats import Counters
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.helpers import PATIENCE, Call, until

STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome

TEXTS = ("a", "A", "b", "c", "d")  # "a" and "A" share a key
TTL = 100
MAX_ENTRIES = 2
ATTEMPTS = 2
MAX_PENDING = 2
MAX_WORKERS = 1

vector = ScriptedEmbeddings().vector


class ModelError(Exception):
    pass


class HeldCall:
    """A call of the model that hangs until it is answered."""

    def __init__(self, texts: list[str], *, on_loop: bool = False) -> None:
        self.texts = texts
        self.on_loop = on_loop
        self.answer: Future[None] = Future()

    @property
    def keys(self) -> list[str]:
        return [text.casefold() for text in self.texts]


class Puppet(Embeddings):
    """A model none of whose calls returns by itself."""

    def __init__(self) -> None:
        self.calls: list[HeldCall] = []  # appended to by any thread

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        call = HeldCall(texts)
        self.calls.append(call)
        call.answer.result()
        return [vector(text) for text in texts]

    async def aembed_query(self, text: str) -> list[float]:
        call = HeldCall([text], on_loop=True)
        self.calls.append(call)
        await asyncio.wrap_future(call.answer)
        return vector(text)

    def open(self) -> list[HeldCall]:
        return [call for call in list(self.calls) if not call.answer.done()]


class State(enum.Enum):
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@dataclasses.dataclass(eq=False)
class Waiter:
    """A query, or an explicit wait, that has not returned."""

    text: str
    query: bool
    began: float
    result: Callable[[], Any]  # blocks until there is one
    task: Future[Any] | None = None  # of a coroutine
    recovers: bool = False
    inline: Run | None = None  # the call that its own thread makes


@dataclasses.dataclass(eq=False)
class Flight:
    key: str
    text: str
    by_prefetch: bool
    state: State = State.QUEUED
    for_query: bool = False
    takes_place_on_loop: bool = False
    attempt: int = 0
    waiters: list[Waiter] = dataclasses.field(default_factory=list)
    served: bool = False
    started_at: float = 0.0
    finished_at: float = 0.0
    first_query_at: float | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """What the executor queues, or what pauses before it is queued again."""

    flights: list[Flight]

    @property
    def alive(self) -> bool:
        return any(flight.state is State.QUEUED for flight in self.flights)


@dataclasses.dataclass(eq=False)
class Run:
    """A call of the model that is under way for some flights."""

    flights: list[Flight]
    worker: Call[bool] | None = None
    call: HeldCall | None = None

    @property
    def keys(self) -> list[str]:
        return [flight.key for flight in self.flights]


class FlightMachine(RuleBasedStateMachine):
    """Does each step to the wrapper and to the dictionaries, and compares."""

    def __init__(self) -> None:
        super().__init__()
        # No pause between attempts: a worker's comes with the next advance, a loop's at once.
        self.patch = mock.patch.object(runner, "_pause", return_value=0.0)
        self.patch.start()
        self.model = Puppet()
        self.loop = asyncio.new_event_loop()
        self.loop_thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.loop_thread.start()
        # The dictionary model:
        self.map: dict[str, Flight] = {}  # ready ones in the order of their use
        self.detached: list[Flight] = []
        self.jobs: list[Job] = []
        self.paused: list[Job] = []
        self.runs: list[Run] = []
        self.counts = Counters()
        self.refusing = self.closed = False
        self.queries = 0
        self.late: list[Waiter] = []  # their flight is gone, and their thread still in its call

    @initialize(symmetric=st.booleans())
    def wrap(self, symmetric: bool) -> None:
        self.symmetric = symmetric
        self.embeddings = ManualPrefetchingEmbeddings(
            self.model,
            ttl=TTL,
            max_entries=MAX_ENTRIES,
            max_workers=MAX_WORKERS,
            max_pending=MAX_PENDING,
            attempts=ATTEMPTS,
            match=str.casefold,
            symmetric=symmetric,
        )

    # --- Prefetches ----------------------------------------------------------------------------

    @rule(text=st.sampled_from((*TEXTS, "", " \n")))
    def prefetch(self, text: str) -> None:
        assert self.embeddings.prefetch(text) is self.expect_prefetches([text])[0]
        self.settle()

    @rule(texts=st.lists(st.sampled_from(TEXTS), max_size=4))
    def prefetch_many(self, texts: list[str]) -> None:
        if self.symmetric:
            expected = self.expect_prefetches(texts)
        else:
            expected = [self.expect_prefetches([text])[0] for text in texts]
        assert self.embeddings.prefetch_many(texts) == expected
        self.settle()

    @rule(text=st.sampled_from(TEXTS))
    def aprefetch(self, text: str) -> None:
        outcome = self.known(text)
        if outcome is None and len([f for f in self.all() if f.takes_place_on_loop]) >= MAX_PENDING:
            outcome = DROPPED
            self.counts.prefetch_dropped += 1
        if outcome is None:
            flight = self.add(text)
            self.start([flight], for_query=False)
            flight.takes_place_on_loop = True
            outcome = STARTED
        assert self.on_loop(self.embeddings.aprefetch(text)).result(PATIENCE) is outcome
        self.settle()

    def expect_prefetches(self, texts: list[str]) -> list[PrefetchOutcome]:
        outcomes = []
        job = Job([])
        for text in texts:
            outcome = self.known(text)
            if outcome is None and self.places() >= MAX_PENDING + MAX_WORKERS:
                outcome = DROPPED
                self.counts.prefetch_dropped += 1
            if outcome is None:
                job.flights.append(self.add(text))
                outcome = STARTED
            outcomes.append(outcome)
        if job.flights and self.refusing:
            for flight in job.flights:
                del self.map[flight.key]
                flight.state = State.FAILED
            self.counts.prefetch_started -= len(job.flights)
            self.counts.prefetch_dropped += len(job.flights)
            return [DROPPED if outcome is STARTED else outcome for outcome in outcomes]
        if job.flights:
            self.jobs.append(job)
        return outcomes

    def known(self, text: str) -> PrefetchOutcome | None:
        if self.closed or not text.strip():
            self.counts.prefetch_dropped += 1
            return DROPPED
        flight = self.look_up(text.casefold())
        if flight is None:
            return None
        self.counts.prefetch_deduplicated += 1
        return READY if flight.state is State.DONE else IN_FLIGHT

    def add(self, text: str) -> Flight:
        self.counts.prefetch_started += 1
        flight = self.map[text.casefold()] = Flight(text.casefold(), text, by_prefetch=True)
        return flight

    def places(self) -> int:
        return len([f for f in self.all() if f.state is State.QUEUED]) + self.busy()

    def busy(self) -> int:
        return len([run for run in self.runs if run.worker is not None])

    # --- Queries and waits ---------------------------------------------------------------------

    @rule(text=st.sampled_from(TEXTS))
    def query(self, text: str) -> None:
        call = Call(self.embeddings.embed_query, text)
        self.enter(Waiter(text, True, self.now(), call.result))

    @rule(text=st.sampled_from(TEXTS))
    def aquery(self, text: str) -> None:
        task = self.on_loop(self.embeddings.aembed_query(text))
        self.enter(Waiter(text, True, self.now(), lambda: task.result(PATIENCE), task))

    def enter(self, waiter: Waiter) -> None:
        self.queries += 1
        flight = self.look_up(waiter.text.casefold())
        if flight is None:
            self.counts.query_missed += 1
        elif flight.state is State.QUEUED:
            self.counts.query_claimed += 1
        elif flight.state is State.RUNNING:
            self.counts.query_joined += 1
        else:
            self.counts.query_ready += 1
        self.take_in(flight, waiter)
        self.settle()

    def take_in(self, flight: Flight | None, waiter: Waiter, *, apart: bool = False) -> Flight:
        if flight is not None and flight.state is State.DONE:
            self.serve(flight, waiter)
            return flight
        if flight is None:
            key = waiter.text.casefold()
            flight = Flight(key, waiter.text, by_prefetch=False)
            if apart:
                self.detached.append(flight)
            else:
                self.map[key] = flight
        if flight.state is State.QUEUED:
            flight.text = waiter.text
            self.start([flight], for_query=True)
        flight.waiters.append(waiter)
        if flight.first_query_at is None:
            flight.first_query_at = self.now()
        return flight

    @rule(text=st.sampled_from(TEXTS), how=st.sampled_from(["thread", "with timeout", "task"]))
    def wait(self, text: str, how: str) -> None:
        flight = self.look_up(text.casefold())
        task: Future[Any] | None = None
        if how == "task":
            task = result = self.on_loop(self.embeddings.await_for_prefetch(text))
            waiter = Waiter(text, False, self.now(), lambda: result.result(PATIENCE), task)
        else:
            timeout = 1000.0 if how == "with timeout" else None
            call = Call(self.embeddings.wait_for_prefetch, text, timeout)
            waiter = Waiter(text, False, self.now(), call.result)
        if flight is None or flight.state is State.DONE:
            assert waiter.result() is (flight is not None)
        else:
            if flight.state is State.QUEUED and how != "with timeout":
                run = self.start([flight], for_query=False)
                waiter.inline = run if how == "thread" else None
            flight.waiters.append(waiter)
        self.settle()

    @precondition(lambda self: self.tasks())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        flight, waiter = data.draw(st.sampled_from(self.tasks()), label="waiter")
        assert waiter.task is not None
        waiter.task.cancel()
        flight.waiters.remove(waiter)
        if waiter.query:
            self.counts.exposed_seconds += self.now() - waiter.began
            if not flight.waiters:
                flight.first_query_at = None
        self.settle()

    def tasks(self) -> list[tuple[Flight, Waiter]]:
        return [(f, w) for f in self.all() for w in f.waiters if w.task is not None]

    # --- The background ------------------------------------------------------------------------

    @rule()
    def run_next(self) -> None:
        if not self.jobs:
            assert not self.embeddings.executor.run_next()
            return
        job = self.jobs.pop(0)
        claimed = [flight for flight in job.flights if flight.state is State.QUEUED]
        self.counts.prefetch_retried += sum(flight.attempt > 0 for flight in claimed)
        run = self.start(claimed, for_query=False)
        run.worker = Call(self.embeddings.executor.run_next)
        self.settle()

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        for flight in self.answer(data.draw(st.sampled_from(self.runs)), None):
            self.succeed(flight)
        self.settle()

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.runs))
        again = []
        for flight in self.answer(run, ModelError()):
            if not self.tries_again(flight):
                self.end_in_failure(flight)
            elif run.worker is None:  # the loop's task tries again
                self.counts.prefetch_retried += 1
                self.start([flight], for_query=False)
            else:
                flight.state = State.QUEUED
                again.append(flight)
        if again:
            self.paused.append(Job(again))
        self.settle()

    def answer(self, run: Run, error: Exception | None) -> list[Flight]:
        """Answer a call; return its flights that have not ended."""
        assert run.call is not None
        if error is None:
            run.call.answer.set_result(None)
        else:
            run.call.answer.set_exception(error)
        if run.worker is not None:
            assert run.worker.result()
        self.runs.remove(run)
        for waiter in [waiter for waiter in self.late if waiter.inline is run]:
            assert waiter.result() is False
            self.late.remove(waiter)
        return [flight for flight in run.flights if flight.state is State.RUNNING]

    def tries_again(self, flight: Flight) -> bool:
        return (
            flight.by_prefetch
            and not flight.for_query
            and not flight.waiters
            and self.map.get(flight.key) is flight
            and flight.attempt < ATTEMPTS
        )

    @rule(seconds=st.sampled_from([0, 1, 60, TTL - 1, TTL]))
    def advance(self, seconds: int) -> None:
        self.embeddings.time.advance(seconds)
        paused, self.paused = self.paused, []
        for job in paused:
            if job.alive and not self.refusing:
                self.jobs.append(job)
            elif job.alive:
                for flight in job.flights:
                    if flight.state is State.QUEUED:
                        self.end_in_failure(flight)
        for flight in list(self.map.values()):
            if flight.state is State.DONE and flight.finished_at + TTL <= self.now():
                self.drop_ready(flight)
        self.settle()

    @rule(refusing=st.booleans())
    def refuse(self, refusing: bool) -> None:
        self.refusing = self.embeddings.executor.refusing = refusing or self.closed

    # --- Removal -------------------------------------------------------------------------------

    @rule(text=st.sampled_from(TEXTS))
    def forget(self, text: str) -> None:
        flight = self.look_up(text.casefold())
        if flight is not None:
            self.let_go(flight)
        assert self.embeddings.forget(text) is (flight is not None)
        self.settle()

    @rule()
    def clear(self) -> None:
        for flight in list(self.map.values()):
            self.let_go(flight)
        self.embeddings.clear()
        self.settle()

    @precondition(lambda self: self.queries > 3)
    @rule()
    def close(self) -> None:
        self.closed = self.refusing = True
        self.jobs.clear()
        self.paused.clear()
        self.embeddings.close()
        ended = [f for f in self.all() if f.state is not State.DONE and not f.for_query]
        for flight in list(self.map.values()):
            if flight.state is State.DONE:
                self.drop_ready(flight)
        for flight in ended:
            self.remove(flight)
        for run in list(self.runs):
            if run.call is not None and run.call.on_loop and not run.flights[0].for_query:
                self.runs.remove(run)  # cancelled
        for flight in ended:
            self.end_in_failure(flight)
        self.settle()

    # --- The dictionary model ------------------------------------------------------------------

    def now(self) -> float:
        return self.embeddings.time()

    def all(self) -> list[Flight]:
        return [*self.map.values(), *self.detached]

    def look_up(self, key: str) -> Flight | None:
        flight = self.map.get(key)
        if flight is not None and flight.state is State.DONE:
            self.map[key] = self.map.pop(key)
        return flight

    def start(self, flights: list[Flight], *, for_query: bool) -> Run:
        for flight in flights:
            flight.state = State.RUNNING
            flight.for_query = for_query
            flight.attempt += 1
            flight.started_at = self.now()
        self.jobs = [job for job in self.jobs if job.alive]
        self.runs.append(Run(flights))
        return self.runs[-1]

    def remove(self, flight: Flight) -> None:
        if self.map.get(flight.key) is flight:
            del self.map[flight.key]
        elif flight in self.detached:
            self.detached.remove(flight)

    def let_go(self, flight: Flight) -> None:
        if flight.state is State.DONE:
            self.drop_ready(flight)
            return
        self.remove(flight)
        if flight.state is State.QUEUED and not flight.waiters:
            self.end_in_failure(flight)
            self.jobs = [job for job in self.jobs if job.alive]
        else:
            self.detached.append(flight)

    def drop_ready(self, flight: Flight) -> None:
        del self.map[flight.key]
        self.counts.prefetch_wasted += flight.by_prefetch and not flight.served

    def succeed(self, flight: Flight) -> None:
        flight.state = State.DONE
        flight.takes_place_on_loop = False
        flight.finished_at = self.now()
        self.counts.prefetch_succeeded += flight.by_prefetch
        keeps = self.map.get(flight.key) is flight and not self.closed
        self.remove(flight)
        waiters, flight.waiters = flight.waiters, []
        for waiter in waiters:
            if waiter.query:
                self.serve(flight, waiter)
            else:
                assert waiter.result() is True
        if keeps:
            self.map[flight.key] = flight
            ready = [f for f in self.map.values() if f.state is State.DONE]
            if len(ready) > MAX_ENTRIES:
                self.drop_ready(ready[0])
        elif flight.by_prefetch and not flight.served:
            self.counts.prefetch_wasted += 1

    def serve(self, flight: Flight, waiter: Waiter) -> None:
        counts = self.counts
        counts.exposed_seconds += self.now() - waiter.began
        counts.query_recovered += waiter.recovers
        counts.query_matched += flight.text != waiter.text
        if not flight.served and flight.by_prefetch:
            came = flight.first_query_at
            counts.prefetch_used += 1
            waited = 0.0 if came is None else flight.finished_at - came
            counts.hidden_seconds += max(0.0, flight.finished_at - flight.started_at - waited)
        flight.served = True
        assert waiter.result() == vector(flight.text)

    def end_in_failure(self, flight: Flight) -> None:
        if flight.by_prefetch and flight.attempt:
            self.counts.prefetch_failed += 1
        elif flight.by_prefetch:
            self.counts.prefetch_withdrawn += 1
        flight.state = State.FAILED
        flight.takes_place_on_loop = False
        self.remove(flight)
        waiters, flight.waiters = flight.waiters, []
        heir: Flight | None = None
        for waiter in waiters:
            if not waiter.query:
                if waiter.inline in self.runs:
                    self.late.append(waiter)
                else:
                    assert waiter.result() is False
            elif flight.for_query:
                self.counts.exposed_seconds += self.now() - waiter.began
                self.counts.query_failed += 1
                with pytest.raises(ModelError):
                    waiter.result()
            else:
                waiter.recovers = True
                apart = False
                if heir is None:
                    heir = self.look_up(flight.key)
                    if heir is not None and heir.state is State.RUNNING and not heir.for_query:
                        apart, heir = True, None  # a newer prefetch keeps its place
                heir = self.take_in(heir, waiter, apart=apart)

    def on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    # --- Comparing -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until threads and tasks have done what the step leads to, and no more."""
        with suppress(AssertionError):
            until(lambda: self.observed() == self.expected())
        assert self.observed() == self.expected()
        taken = [run.call for run in self.runs]
        for run in self.runs:
            if run.call is None:
                run.call = next(
                    call
                    for call in self.model.open()
                    if call not in taken and call.keys == run.keys
                )
                for flight, text in zip(run.flights, run.call.texts, strict=True):
                    flight.text = text  # of several who recover, anybody's

    def observed(self) -> dict[str, Any]:
        stats = self.embeddings.stats()
        flights = self.embeddings._flights
        with flights._lock:
            return {
                "stats": stats,
                "map": {
                    key: (flight.state.name, flight.waiters)
                    for key, flight in flights._by_key.items()
                },
                "detached": sorted((f.key, f.state.name, f.waiters) for f in flights._detached),
                "ready": sorted(flights._ready),
                "queued": len(flights._queued),
                "busy": flights._busy,
                "on loops": len(flights._on_loops),
                "jobs": len(self.embeddings.executor),
                "calls": sorted(call.keys for call in self.model.open()),
                "readable": [text for text in TEXTS if text.casefold() in flights._ready],
            }

    def expected(self) -> dict[str, Any]:
        return {
            "stats": self.counts.snapshot(),
            "map": {key: (f.state.name, len(f.waiters)) for key, f in self.map.items()},
            "detached": sorted((f.key, f.state.name, len(f.waiters)) for f in self.detached),
            "ready": sorted(f.key for f in self.map.values() if f.state is State.DONE),
            "queued": len([f for f in self.all() if f.state is State.QUEUED]),
            "busy": self.busy(),
            "on loops": len([f for f in self.all() if f.takes_place_on_loop]),
            "jobs": len(self.jobs),
            "calls": sorted(run.keys for run in self.runs),
            "readable": [
                text
                for text in TEXTS
                if text.casefold() in self.map and self.map[text.casefold()].state is State.DONE
            ],
        }

    @invariant()
    def the_counters_add_up(self) -> None:
        stats = self.embeddings.stats()
        background = [flight for flight in self.all() if flight.by_prefetch]
        under_way = [flight for flight in background if flight.state is not State.DONE]
        unused = [f for f in background if f.state is State.DONE and not f.served]
        assert stats.prefetch_started == len(under_way) + (
            stats.prefetch_succeeded + stats.prefetch_failed + stats.prefetch_withdrawn
        )
        assert stats.prefetch_succeeded == (
            stats.prefetch_used + stats.prefetch_wasted + len(unused)
        )
        assert self.queries == (
            stats.query_ready + stats.query_joined + stats.query_claimed + stats.query_missed
        )
        assert len(unused) <= MAX_ENTRIES
        assert min(dataclasses.astuple(stats)) >= 0

    @invariant()
    def looks_tell_the_truth(self) -> None:
        for text in TEXTS:
            flight = self.map.get(text.casefold())
            ready = flight is not None and flight.state is State.DONE
            assert self.embeddings.is_ready(text) is ready
            assert (self.embeddings.expected_wait(text) == 0.0) or not ready

    def teardown(self) -> None:
        try:
            if not hasattr(self, "embeddings"):
                return
            self.close()
            while self.runs:
                for flight in self.answer(self.runs[0], None):
                    self.succeed(flight)
                self.settle()
            assert not self.late
            assert_no_leaks(self.embeddings)
        finally:
            for call in self.model.open():
                call.answer.set_result(None)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.loop_thread.join(PATIENCE)
            self.loop.close()
            self.patch.stop()


EXAMPLES = os.environ.get("STATE_MACHINE_EXAMPLES")


def test_any_order_of_steps() -> None:
    run_state_machine_as_test(
        FlightMachine,
        settings=settings(
            max_examples=int(EXAMPLES or 60),
            stateful_step_count=50 if EXAMPLES else 30,
            derandomize=EXAMPLES is None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
