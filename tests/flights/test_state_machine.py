"""The flight map against a plain dictionary model: whatever happens, in whatever order.

Hypothesis draws the steps. Calls of the model hang until a step answers them, so that flights
stay under way over any number of steps; threads and coroutines join them and are cancelled, and
time passes until calls are overdue. After each step the map's insides, every counter and every
answer must be what the dictionaries say.

The normal run draws the same examples each time. `STATE_MACHINE_EXAMPLES=5000` draws that many, at
random.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import enum
import itertools
import os
import threading
from collections import deque
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
from prefetch_embeddings._flights import landing, patience
from prefetch_embeddings._flights.admission import FAILURES, PROBE_SECONDS
from prefetch_embeddings._flights.ledger import Counters
from prefetch_embeddings._flights.patience import MOST_CALLS, UNMEASURED_LIMIT
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ManualPrefetchingRetriever,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.helpers import PATIENCE, Call, until
from tests.retriever.facade import RetrievedVectors

STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome

TEXTS = ("a", "A", "b", "c")  # "a" and "A" share a key
TTL = 100
MAX_ENTRIES = 2
ATTEMPTS = 2
MAX_PENDING = 2
MAX_WORKERS = 1

vector = ScriptedEmbeddings().vector

asker: contextvars.ContextVar[Waiter | None] = contextvars.ContextVar("asker", default=None)
"""On whose behalf a call is made."""


class ModelError(Exception):
    pass


class HeldCall:
    """A call of the model that hangs until it is answered."""

    def __init__(self, texts: list[str], *, on_loop: bool = False) -> None:
        self.texts = texts
        self.on_loop = on_loop
        self.asker = asker.get()
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
    result: Callable[[], Any] = lambda: None  # blocks until there is one
    task: Future[Any] | None = None  # of a coroutine
    recovers: bool = False
    makes_call: bool = False
    inline: Run | None = None  # the call that its own thread makes


@dataclasses.dataclass(eq=False)
class Flight:
    key: str
    text: str
    by_prefetch: bool
    asked_at: float
    on_loop: bool = False
    asks: int = 0
    state: State = State.QUEUED
    for_query: bool = False
    takes_place_on_loop: bool = False
    attempt: int = 0
    waiters: list[Waiter] = dataclasses.field(default_factory=list)
    runs: list[Run] = dataclasses.field(default_factory=list)
    failed_a_query: bool = False  # whether a call for a query has failed, while anybody waited
    served: bool = False
    started_at: float = 0.0
    called_at: float = 0.0
    finished_at: float = 0.0
    first_query_at: float | None = None
    look_at: float | None = None  # when it may be due another call


@dataclasses.dataclass(eq=False)
class Job:
    """Flights that share a place in the queue, or pause until then."""

    flights: list[Flight]
    due: float = 0.0


@dataclasses.dataclass(eq=False)
class Run:
    """A call of the model that is under way for some flights."""

    flights: list[Flight]
    for_query: bool
    own: bool  # whether a waiter makes it when it comes
    worker: Call[bool] | None = None
    call: HeldCall | None = None

    @property
    def keys(self) -> list[str]:
        return [flight.key for flight in self.flights]


class FlightMachine(RuleBasedStateMachine):
    """Does each step to the wrapper and to the dictionaries, and compares."""

    can_be_symmetric = True

    def __init__(self) -> None:
        super().__init__()
        self.pauses: deque[float] = deque()  # that have begun, and that the model has not noted
        self.fractions = itertools.count(1)
        self.patches = [
            mock.patch.object(landing, "_pause", self.pause),
            mock.patch.object(patience, "LEAST_DURATIONS", 1_000_000),
        ]
        for patch in self.patches:
            patch.start()  # type: ignore[attr-defined]
        self.model = Puppet()
        self.loop = asyncio.new_event_loop()
        self.loop_thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.loop_thread.start()
        # The dictionary model:
        self.map: dict[str, Flight] = {}
        self.arrived: list[Flight] = []  # the ready ones, in their order
        self.used: list[Flight] = []  # those of them that have served, in the order of their use
        self.detached: list[Flight] = []
        self.jobs: list[Job] = []
        self.pausing: list[Job] = []
        self.runs: list[Run] = []
        self.tickets: list[tuple[Any, Flight]] = []
        self.counts = Counters()
        self.refusing = self.closed = self.queried_in_threads = False
        self.failures = 0
        self.called_at = float("-inf")
        self.probe: Flight | None = None
        self.queries = 0
        self.late: list[tuple[Flight, Waiter]] = []  # served, and their thread still in its call

    def pause(self, attempt: int, *, paused: bool) -> float:
        """Stand in for the pause between attempts. No two events come at the same time."""
        self.pauses.append((PROBE_SECONDS if paused else 0.0) + next(self.fractions) / 4096)
        return self.pauses[-1]

    @initialize(symmetric=st.booleans())
    def wrap(self, symmetric: bool) -> None:
        self.symmetric = symmetric and self.can_be_symmetric
        self.embeddings = self.make(
            ttl=TTL,
            max_entries=MAX_ENTRIES,
            max_workers=MAX_WORKERS,
            max_pending=MAX_PENDING,
            attempts=ATTEMPTS,
            match=str.casefold,
            symmetric=self.symmetric,
        )

    def make(self, **options: Any) -> Any:
        return ManualPrefetchingEmbeddings(self.model, **options)

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
    def ask(self, text: str) -> None:
        expected = self.expect_prefetches([text])[0]
        outcome, ticket = self.embeddings.prefetcher.ask(text)
        assert outcome is expected
        assert (ticket is None) is (outcome in (READY, DROPPED))
        if ticket is not None:
            self.tickets.append((ticket, self.map[text.casefold()]))
        self.settle()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.tickets), label="ticket")
        ticket, flight = chosen
        self.tickets.remove(chosen)
        withdrawn = False
        if flight.state in (State.QUEUED, State.RUNNING):
            flight.asks -= 1
            withdrawn = flight.state is State.QUEUED and not flight.waiters and not flight.asks
        if withdrawn:
            self.end_in_failure(flight)
        assert self.embeddings.prefetcher.take_back(ticket) is withdrawn
        self.settle()
        assert not self.embeddings.prefetcher.take_back(ticket)

    @rule(text=st.sampled_from(TEXTS))
    def aprefetch(self, text: str) -> None:
        if self.queried_in_threads:
            outcome: PrefetchOutcome | None = self.expect_prefetches([text])[0]
        else:
            outcome = self.known(text)
            on_loops = [f for f in self.all() if f.takes_place_on_loop]
            if outcome is None and len(on_loops) >= MAX_PENDING:
                outcome = self.dropped()
            if outcome is None:
                flight = self.add(text)
                flight.on_loop = flight.takes_place_on_loop = True
                self.claim([flight], for_query=False)
                outcome = STARTED
        assert self.on_loop(self.embeddings.aprefetch(text)).result(PATIENCE) is outcome
        self.settle()

    def expect_prefetches(self, texts: list[str]) -> list[PrefetchOutcome]:
        outcomes = []
        job = Job([])
        for text in texts:
            outcome = self.known(text)
            full = self.places() >= MAX_PENDING + MAX_WORKERS
            if outcome is None and (full or self.refusing):
                outcome = self.dropped()
            if outcome is None:
                job.flights.append(self.add(text))
                outcome = STARTED
            outcomes.append(outcome)
        if job.flights:
            self.jobs.append(job)
        return outcomes

    def known(self, text: str) -> PrefetchOutcome | None:
        if self.closed or not text.strip():
            return self.dropped()
        flight = self.map.get(text.casefold())
        if flight is None:
            return None if self.may_speculate() else self.dropped()
        self.counts.prefetch_deduplicated += 1
        if flight.state is State.DONE:
            return READY
        flight.asks += 1
        flight.asked_at = self.now()
        return IN_FLIGHT

    def dropped(self) -> PrefetchOutcome:
        self.counts.prefetch_dropped += 1
        return DROPPED

    def add(self, text: str) -> Flight:
        self.counts.prefetch_started += 1
        key = text.casefold()
        flight = self.map[key] = Flight(key, text, True, self.now(), asks=1)
        self.note_probe(flight)
        return flight

    def places(self) -> int:
        queued = [f for f in self.all() if f.state is State.QUEUED and not f.on_loop]
        return len(queued) + self.busy()

    def busy(self) -> int:
        return len([run for run in self.runs if run.worker is not None])

    # --- The pause while calls keep failing ----------------------------------------------------

    def may_speculate(self) -> bool:
        return self.failures < FAILURES or self.now() - self.called_at >= PROBE_SECONDS

    def note_probe(self, flight: Flight) -> None:
        if self.failures >= FAILURES:
            self.probe = flight
            self.called_at = self.now()

    # --- Queries and waits ---------------------------------------------------------------------

    @rule(text=st.sampled_from(TEXTS))
    def query(self, text: str) -> None:
        if self.needs_a_thread_after_close(text):
            return
        waiter = Waiter(text, True, self.now())
        waiter.result = self.in_thread(waiter, self.embeddings.embed_query, text).result
        self.queried_in_threads = True
        self.enter(waiter)

    @rule(text=st.sampled_from(TEXTS))
    def aquery(self, text: str) -> None:
        waiter = Waiter(text, True, self.now())
        self.as_task(waiter, self.embeddings.aembed_query(text))
        self.queried_in_threads = False
        self.enter(waiter)

    def in_thread(self, waiter: Waiter, function: Callable[..., Any], *args: Any) -> Call[Any]:
        def call() -> Any:
            asker.set(waiter)
            return function(*args)

        return Call(call)

    def as_task(self, waiter: Waiter, coroutine: Coroutine[Any, Any, Any]) -> None:
        async def call() -> Any:
            asker.set(waiter)
            return await coroutine

        task = waiter.task = self.on_loop(call())
        waiter.result = lambda: task.result(PATIENCE)

    def enter(self, waiter: Waiter) -> None:
        self.queries += 1
        flight = self.map.get(waiter.text.casefold())
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

    def take_in(self, flight: Flight | None, waiter: Waiter) -> Flight:
        if flight is not None and flight.state is State.DONE:
            self.use(flight)
            self.serve(flight, waiter)
            return flight
        makes_call = False
        if flight is None:
            key = waiter.text.casefold()
            flight = self.map[key] = Flight(key, waiter.text, False, self.now())
        if flight.state is State.QUEUED:
            flight.text = waiter.text
            self.claim([flight], for_query=True, own=True)
            makes_call = True
        elif waiter.recovers and not flight.for_query and len(flight.runs) < MOST_CALLS:
            self.begin_run([flight], for_query=True, own=True)  # beside a newer prefetch's
            makes_call = True
        self.attend(flight, waiter, makes_call=makes_call)
        return flight

    def attend(self, flight: Flight, waiter: Waiter, *, makes_call: bool) -> None:
        flight.waiters.append(waiter)
        if waiter.query and flight.first_query_at is None:
            flight.first_query_at = self.now()
        if flight.state is State.RUNNING and not makes_call:
            self.watch(flight)
            self.look()

    @rule(text=st.sampled_from(TEXTS), how=st.sampled_from(["thread", "with timeout", "task"]))
    def wait(self, text: str, how: str) -> None:
        if self.needs_a_thread_after_close(text):
            return
        flight = self.map.get(text.casefold())
        waiter = Waiter(text, False, self.now())
        if how == "task":
            self.as_task(waiter, self.embeddings.await_for_prefetch(text))
        else:
            timeout = 1000.0 if how == "with timeout" else None
            function = self.embeddings.wait_for_prefetch
            waiter.result = self.in_thread(waiter, function, text, timeout).result
        if flight is None or flight.state is State.DONE:
            assert waiter.result() is (flight is not None)
        else:
            if flight.state is State.QUEUED and how != "with timeout":
                self.claim([flight], for_query=False)
                waiter.makes_call = True
            self.attend(flight, waiter, makes_call=waiter.makes_call)
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
            flight.failed_a_query = False
            on_loop = all(run.call is not None and run.call.on_loop for run in flight.runs)
            if flight.runs and on_loop and not flight.by_prefetch and not flight.asks:
                self.end_in_failure(flight)  # only queries wanted it, and they have gone
        self.settle()

    def tasks(self) -> list[tuple[Flight, Waiter]]:
        return [(f, w) for f in self.all() for w in f.waiters if w.task is not None]

    # --- The background ------------------------------------------------------------------------

    @rule()
    def run_next(self) -> None:
        claimed: list[Flight] = []
        while self.jobs and not claimed:
            for flight in self.jobs.pop(0).flights:
                waited_too_long = flight.asked_at < self.now() - TTL
                if waited_too_long or (self.failures >= FAILURES and flight is not self.probe):
                    self.end_in_failure(flight)
                else:
                    claimed.append(flight)
        if not claimed:
            assert not self.embeddings.executor.run_next()
        else:
            self.counts.prefetch_retried += sum(flight.attempt > 0 for flight in claimed)
            run = self.claim(claimed, for_query=False)
            run.worker = Call(self.embeddings.executor.run_next)
        self.settle()

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.runs))
        for flight in self.answer(run, None):
            self.succeed(flight, run)
        self.settle()

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.runs))
        again = []
        for flight in self.answer(run, ModelError()):
            flight.runs.remove(run)
            self.failures += 1
            flight.failed_a_query |= run.for_query
            if flight.runs:
                continue
            if self.tries_again(flight):
                flight.state = State.QUEUED
                again.append(flight)
            else:
                self.end_in_failure(flight)
        if again:
            until(lambda: self.pauses)
            self.pausing.append(Job(again, self.now() + self.pauses.popleft()))
        self.settle()

    def answer(self, run: Run, error: Exception | None) -> list[Flight]:
        """Answer a call; return the flights that it can end."""
        assert run.call is not None
        if error is None:
            run.call.answer.set_result(None)
        else:
            run.call.answer.set_exception(error)
        if run.worker is not None:
            assert run.worker.result()
        self.runs.remove(run)
        for flight, waiter in [each for each in self.late if each[1].inline is run]:
            self.late.remove((flight, waiter))
            flight.waiters.remove(waiter)
            self.serve(flight, waiter)
            self.use(flight)
        return [flight for flight in run.flights if run in flight.runs]

    def tries_again(self, flight: Flight) -> bool:
        return (
            flight.by_prefetch
            and not flight.for_query
            and not flight.waiters
            and self.map.get(flight.key) is flight
            and flight.asks > 0
            and flight.attempt < ATTEMPTS
            and not self.closed
        )

    def needs_a_thread_after_close(self, text: str) -> bool:
        """Tell whether a second call is due at once that can have no thread: not modelled."""
        flight = self.map.get(text.casefold())
        if flight is None or flight.state is not State.RUNNING or not self.closed:
            return False
        return flight.called_at + UNMEASURED_LIMIT <= self.now()

    # Nor is one that would be due later.
    @precondition(lambda self: not self.closed or not any(f.waiters for f in self.all()))
    @rule(seconds=st.sampled_from([0, 1, 3, 10, 60, TTL - 1, TTL]))
    def advance(self, seconds: int) -> None:
        end = self.now() + seconds
        while (event := self.next_event(end)) is not None:
            self.embeddings.time.advance(event - self.now())
            for job in [job for job in self.pausing if job.due == event]:
                self.pausing.remove(job)
                self.try_again(job)
            self.look()
            self.settle()
        self.embeddings.time.advance(end - self.now())
        for flight in list(self.arrived):
            if flight.finished_at + TTL <= self.now():
                self.drop_ready(flight)
        self.settle()

    def next_event(self, end: float) -> float | None:
        times = [job.due for job in self.pausing]
        times += [flight.look_at for flight in self.all() if flight.look_at is not None]
        return min((time for time in times if time <= end), default=None)

    def try_again(self, job: Job) -> None:
        waiting = [flight for flight in job.flights if flight.state is State.QUEUED]
        if not waiting:
            return
        on_loop = waiting[0].on_loop
        if not self.may_speculate():
            again = False
        else:
            self.note_probe(waiting[0])
            again = on_loop or not self.refusing
        if not again:
            for flight in waiting:
                self.end_in_failure(flight)
        elif on_loop:
            self.counts.prefetch_retried += 1
            self.claim(waiting, for_query=False)
        else:
            self.jobs.append(Job(waiting))

    @rule(refusing=st.booleans())
    def refuse(self, refusing: bool) -> None:
        self.refusing = self.embeddings.executor.refusing = refusing or self.closed

    # --- Removal -------------------------------------------------------------------------------

    @rule(text=st.sampled_from(TEXTS))
    def forget(self, text: str) -> None:
        flight = self.map.get(text.casefold())
        if flight is not None:
            self.let_go(flight)
        assert self.embeddings.forget(text) is (flight is not None)
        self.settle()

    @precondition(lambda self: len(self.map) > 2)
    @rule()
    def clear(self) -> None:
        for flight in list(self.map.values()):
            self.let_go(flight)
        self.embeddings.clear()
        self.settle()

    @precondition(lambda self: self.queries > 8)
    @rule()
    def close(self) -> None:
        self.closed = self.refusing = True
        self.embeddings.close()
        ended = [f for f in self.all() if f.state is not State.DONE and not f.for_query]
        for flight in list(self.arrived):
            self.drop_ready(flight)
        for flight in ended:
            self.remove(flight)
        for flight in ended:
            self.end_in_failure(flight)
        self.settle()

    # --- The dictionary model ------------------------------------------------------------------

    def now(self) -> float:
        now: float = self.embeddings.time()
        return now

    def all(self) -> list[Flight]:
        return [*self.map.values(), *self.detached]

    def claim(self, flights: list[Flight], *, for_query: bool, own: bool = False) -> Run:
        for flight in flights:
            flight.state = State.RUNNING
            flight.attempt += 1
            flight.started_at = self.now()
            flight.takes_place_on_loop &= not for_query
            self.leave_the_queue(flight)
        run = self.begin_run(flights, for_query=for_query, own=own)
        for flight in flights:
            if flight.waiters:
                self.watch(flight)
        return run

    def begin_run(self, flights: list[Flight], *, for_query: bool, own: bool = False) -> Run:
        run = Run(flights, for_query, own)
        self.runs.append(run)
        self.called_at = self.now()
        for flight in flights:
            flight.runs.append(run)
            flight.called_at = self.now()
            flight.for_query |= for_query
        return run

    def watch(self, flight: Flight) -> None:
        if flight.look_at is None:
            flight.look_at = flight.called_at + UNMEASURED_LIMIT

    def look(self) -> None:
        """Begin the calls that are due."""
        for flight in self.all():
            while flight.look_at is not None and flight.look_at <= self.now():
                flight.look_at = None
                waiters = [waiter for waiter in flight.waiters if not waiter.makes_call]
                if flight.state is not State.RUNNING or not waiters:
                    continue
                if flight.called_at + UNMEASURED_LIMIT <= self.now():
                    if len(flight.runs) >= MOST_CALLS:
                        self.remove(flight)
                        self.detached.append(flight)
                        continue
                    self.counts.overdue_calls += 1
                    self.begin_run([flight], for_query=waiters[-1].query)
                self.watch(flight)

    def leave_the_queue(self, flight: Flight) -> None:
        for job in self.jobs:
            if flight in job.flights:
                job.flights.remove(flight)
        self.jobs = [job for job in self.jobs if job.flights]

    def remove(self, flight: Flight) -> None:
        if self.map.get(flight.key) is flight:
            del self.map[flight.key]
        if flight in self.detached:
            self.detached.remove(flight)
        for ready in (self.arrived, self.used):
            if flight in ready:
                ready.remove(flight)

    def let_go(self, flight: Flight) -> None:
        if flight.state is State.DONE:
            self.drop_ready(flight)
        elif flight.state is State.QUEUED and not flight.waiters:
            self.end_in_failure(flight)
        else:
            self.remove(flight)
            self.detached.append(flight)

    def drop_ready(self, flight: Flight) -> None:
        self.remove(flight)
        self.count_if_wasted(flight)

    def count_if_wasted(self, flight: Flight) -> None:
        held = self.map.get(flight.key) is flight
        if flight.by_prefetch and not held and not flight.served and not flight.waiters:
            self.counts.prefetch_wasted += 1

    def succeed(self, flight: Flight, winner: Run) -> None:
        self.failures = 0
        self.probe = None
        flight.state = State.DONE
        flight.takes_place_on_loop = False
        flight.look_at = None
        flight.finished_at = self.now()
        self.cancel_runs(flight)
        self.counts.prefetch_succeeded += flight.by_prefetch
        keeps = self.map.get(flight.key) is flight and not self.closed
        self.remove(flight)
        waiters, flight.waiters = flight.waiters, []
        for waiter in waiters:
            if waiter.inline is not None and waiter.inline in self.runs:
                flight.waiters.append(waiter)  # its thread is in its call still
                self.late.append((flight, waiter))
            elif waiter.query:
                self.serve(flight, waiter)
            else:
                assert waiter.result() is True
        if keeps:
            self.map[flight.key] = flight
            self.arrived.append(flight)
            if flight.first_query_at is not None:
                self.use(flight)
            if len(self.arrived) > MAX_ENTRIES:
                self.drop_ready((self.used or self.arrived)[0])
        else:
            self.count_if_wasted(flight)

    def cancel_runs(self, flight: Flight) -> None:
        """Cancel the calls of a flight that has ended, where that can be."""
        for run in flight.runs:
            if run in self.runs and run.call is not None and run.call.on_loop:
                self.runs.remove(run)
        flight.runs = []

    def use(self, flight: Flight) -> None:
        if flight in self.used:
            self.used.remove(flight)
        if flight in self.arrived:
            self.used.append(flight)

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
        flight.look_at = None
        self.cancel_runs(flight)
        self.remove(flight)
        self.leave_the_queue(flight)
        waiters, flight.waiters = flight.waiters, []
        heir: Flight | None = None
        for waiter in waiters:
            if not waiter.query:
                assert waiter.result() is False
            elif flight.failed_a_query:
                self.counts.exposed_seconds += self.now() - waiter.began
                self.counts.query_failed += 1
                with pytest.raises(ModelError):
                    waiter.result()
            else:
                waiter.recovers, waiter.makes_call, waiter.inline = True, False, None
                if heir is None:
                    heir = self.take_in(self.map.get(flight.key), waiter)
                elif heir.state is State.DONE:
                    self.use(heir)
                    self.serve(heir, waiter)
                else:
                    self.attend(heir, waiter, makes_call=False)

    def on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    # --- Comparing -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until threads and tasks have done what the step leads to, and no more."""
        with suppress(AssertionError):
            until(lambda: self.observed() == self.expected())
        assert self.observed() == self.expected()
        until(self.the_next_look_is_planned)
        taken = [run.call for run in self.runs]
        for run in self.runs:
            if run.call is not None:
                continue
            run.call = next(
                call for call in self.model.open() if call not in taken and call.keys == run.keys
            )
            taken.append(run.call)
            for flight, text in zip(run.flights, run.call.texts, strict=True):
                flight.text = text  # of several who recover, anybody's
            if run.own and (waiter := run.call.asker) is not None:
                waiter.makes_call = True
                waiter.inline = None if run.call.on_loop else run

    def the_next_look_is_planned(self) -> bool:
        """Tell so. It is planned behind the step that makes it necessary, by the same thread."""
        looks = [flight.look_at for flight in self.all() if flight.look_at is not None]
        planned = {due for due, _, _ in list(self.embeddings.time._heap)}
        planned -= {job.due for job in self.pausing}
        return not looks or any(due <= min(looks) for due in planned)

    def observed(self) -> dict[str, Any]:
        stats = self.embeddings.stats()
        prefetcher = self.embeddings.prefetcher
        books = prefetcher._books
        with prefetcher.steps.lock:
            return {
                "stats": stats,
                "map": {f.key: self.shown(f) for f in books.shelf.flights()},
                "detached": sorted((f.key, *self.shown(f)) for f in books.detached),
                "ready": [flight.key for flight in books.shelf.ready()],
                "places": books.admission.places_taken,
                "busy": books.admission.workers_busy,
                "jobs": books.admission.jobs_waiting,
                "paused": books.admission.paused,
                "calls": sorted(call.keys for call in self.model.open()),
            }

    @staticmethod
    def shown(flight: Any) -> tuple[str, int, int]:
        return flight.state.name, len(flight.waiters), len(flight.runs)

    def expected(self) -> dict[str, Any]:
        queued = [f for f in self.all() if f.state is State.QUEUED and not f.on_loop]
        return {
            "stats": self.counts.snapshot(),
            "map": {key: self.shown(flight) for key, flight in self.map.items()},
            "detached": sorted((f.key, *self.shown(f)) for f in self.detached),
            "ready": [flight.key for flight in self.arrived],
            "places": len(queued) + len([f for f in self.all() if f.takes_place_on_loop]),
            "busy": self.busy(),
            "jobs": len(self.jobs),
            "paused": self.failures >= FAILURES,
            "calls": sorted(run.keys for run in self.runs),
        }

    @invariant()
    def the_counters_add_up(self) -> None:
        stats = self.embeddings.stats()
        known = {*self.all(), *(flight for flight, _ in self.late)}
        background = [flight for flight in known if flight.by_prefetch]
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
        assert len(self.arrived) <= MAX_ENTRIES
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
                run = self.runs[0]
                for flight in self.answer(run, None):
                    self.succeed(flight, run)
                self.settle()
            assert not self.late
            assert_no_leaks(self.embeddings)
        finally:
            for call in self.model.open():
                call.answer.set_result(None)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.loop_thread.join(PATIENCE)
            self.loop.close()
            for patch in self.patches:
                patch.stop()  # type: ignore[attr-defined]


class RetrievalMachine(FlightMachine):
    """The same with documents in the place of vectors."""

    can_be_symmetric = False

    def make(self, **options: Any) -> Any:
        return RetrievedVectors(self.model, ManualPrefetchingRetriever, **options)


EXAMPLES = os.environ.get("STATE_MACHINE_EXAMPLES")


@pytest.mark.parametrize("machine", [FlightMachine, RetrievalMachine])
def test_any_order_of_steps(machine: type[FlightMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(EXAMPLES or 100),
            stateful_step_count=50,
            derandomize=EXAMPLES is None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
