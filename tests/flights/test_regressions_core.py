"""What once went wrong in the core: rare orders of steps, each held still here."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import os
import threading
import time
from collections.abc import Callable

import pytest

from prefetch_embeddings import (
    Hedge,
    PrefetchEvent,
    PrefetchingEmbeddings,
    PrefetchOutcome,
    PrefetchStarted,
    PrefetchStats,
)
from prefetch_embeddings._background import Background
from prefetch_embeddings._background.pool import JobPool
from prefetch_embeddings._flights import joins
from prefetch_embeddings._flights.patience import UNMEASURED_LIMIT
from prefetch_embeddings.events import HedgeStarted
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import PATIENCE, Call, TimeByHand, until, waiters

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

Timed = Callable[..., TimeByHand]

NEVER = Hedge(after=1000.0)


def calls_under_way(embeddings: PrefetchingEmbeddings, text: str) -> int:
    flight = embeddings.prefetcher._flights.get(text)
    assert flight is not None
    return len(flight.runs)


def wait_for(gate: threading.Event) -> None:
    assert gate.wait(PATIENCE)


# Threads.


def test_a_pool_that_is_closed_still_runs_what_it_took() -> None:
    pool = JobPool(1)
    gate, ran = threading.Event(), threading.Event()
    pool.submit(lambda: wait_for(gate))
    pool.submit(ran.set)
    pool.close()
    gate.set()
    assert ran.wait(PATIENCE)
    assert pool.join(PATIENCE)
    assert not pool.submit(ran.set)


def test_closing_strands_no_query_that_waits_for_its_thread(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    for _ in range(50):
        embeddings = wrap(model, hedge=NEVER)
        embeddings.embed_query("a thread is there now, and idle")
        query = Call(embeddings.embed_query, "q")
        embeddings.close()
        assert query.result() == model.vector("q")


def test_where_no_thread_can_be_started_a_hedged_query_runs_inline(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = wrap(model, hedge=NEVER)
    stuck = model.hold("stuck")
    waiting = Call(embeddings.embed_query, "stuck")
    stuck.wait_until_entered()

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    query = threading.Thread(target=embeddings.embed_query, args=("q",), daemon=True)
    with monkeypatch.context() as patched:
        start = threading.Thread.start
        patched.setattr(
            threading.Thread, "start", lambda self: (start if self is query else refuse)(self)
        )
        query.start()
        query.join(PATIENCE)
        assert not query.is_alive()
    stuck.open()
    waiting.result()


def test_whatever_a_model_raises_in_a_thread_beside_reaches_its_query_and_nobody_else(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()  # that it is the thread's, too
    monkeypatch.setattr(threading, "excepthook", lambda _: told.set())
    embeddings = wrap(model, hedge=NEVER)
    model.fail("q", SystemExit("a model's own exit"))
    with pytest.raises(SystemExit):
        embeddings.embed_query("q")
    embeddings.close()
    assert embeddings.prefetcher.join(PATIENCE)
    assert told.wait(PATIENCE)


# Tasks.


async def test_a_task_cancelled_before_its_first_step_strands_nobody(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await asyncio.sleep(0)  # it has launched its flight's task, which has not had its turn
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await query
    assert model.calls == []
    assert await asyncio.wait_for(embeddings.aembed_query("q"), PATIENCE) == model.vector("q")


async def test_a_flight_closed_before_its_launch_makes_no_call(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    def close(event: PrefetchEvent) -> None:
        if isinstance(event, PrefetchStarted):
            embeddings.close()

    embeddings = wrap(model, on_event=close)
    assert await embeddings.aprefetch("q") is PrefetchOutcome.STARTED
    assert model.calls == []
    assert len(asyncio.all_tasks()) == 1


# Loops.


@pytest.mark.parametrize("failing", [False, True])
def test_all_who_wait_for_an_overdue_call_share_one_more_and_its_failure_is_nobodys(
    timed: Timed, model: ScriptedEmbeddings, failing: bool
) -> None:
    embeddings = timed(model)
    first, second, third = model.hold("q"), model.hold("q"), model.hold("q")
    embeddings.prefetch("q")
    first.wait_until_entered()
    queries = [Call(embeddings.embed_query, "q") for _ in range(8)]
    until(lambda: waiters(embeddings, "q") == 8)
    if failing:
        model.fail("q", ConnectionError("unreachable"))
    embeddings.time.advance(UNMEASURED_LIMIT)
    second.wait_until_entered()
    second.open()
    if failing:
        until(lambda: calls_under_way(embeddings, "q") == 1)
        embeddings.time.advance(UNMEASURED_LIMIT)
        third.wait_until_entered()
        third.open()
    for query in queries:
        assert query.result() == model.vector("q")
    first.open()
    assert model.calls_for("q") == 2 + failing
    stats = embeddings.stats()
    assert (stats.overdue_calls, stats.query_failed) == (1 + failing, 0)


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_a_flight_of_a_closed_loop_holds_no_query_at_all(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(joins, "LOOK_SECONDS", 1000.0)
    embeddings = wrap(model)
    model.hold("q")
    lost = asyncio.new_event_loop()
    lost.run_until_complete(embeddings.aprefetch("q"))
    tasks = asyncio.all_tasks(lost)
    lost.close()
    if kind == "thread":
        assert Call(embeddings.embed_query, "q").result() == model.vector("q")
    else:
        assert asyncio.run(asyncio.wait_for(embeddings.aembed_query("q"), PATIENCE)) == (
            model.vector("q")
        )
    for task in tasks:
        task.get_coro().close()
        task._log_destroy_pending = False  # type: ignore[attr-defined]


# Hedges.


def test_the_failure_of_the_first_call_while_the_second_is_refused_ends_the_flight(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    first = model.hold("q")
    model.fail("q", ConnectionError("unreachable"))

    def refuse(event: PrefetchEvent) -> None:
        if isinstance(event, HedgeStarted):
            embeddings.prefetcher._aside.close()
            first.open()
            until(lambda: calls_under_way(embeddings, "q") == 1)

    embeddings = wrap(model, hedge=Hedge(after=0.01), on_event=refuse)
    assert isinstance(Call(embeddings.embed_query, "q").error(), ConnectionError)
    assert model.calls_for("q") == 1


def test_a_denied_hedge_is_counted_once_for_all_who_wait(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=0.01))
    with embeddings.prefetcher.steps.lock:
        assert embeddings.prefetcher._books.patience.take_hedge()
    gate = model.hold("q")
    queries = [Call(embeddings.embed_query, "q") for _ in range(5)]
    gate.wait_until_entered()
    until(lambda: waiters(embeddings, "q") == 5)
    embeddings.time.advance(2.0)
    until(lambda: embeddings.stats().hedge_denied == 1)
    assert model.calls_for("q") == 1
    gate.open()
    for query in queries:
        query.result()


def test_a_batch_pays_for_extra_calls_as_one_call(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=0.5), symmetric=True)
    patience = embeddings.prefetcher._books.patience
    assert patience.take_hedge()  # the one that is lent
    embeddings.prefetch_many([str(number) for number in range(20)])
    embeddings.executor.run_all()
    patience.pay_in()  # with it, two calls have paid that one back
    assert not patience.take_hedge()
    for _ in range(2):
        patience.pay_in()
    assert patience.take_hedge()


request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="nobody's")


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_the_second_call_sees_the_context_of_a_query_that_waits(wrap: Wrap, kind: str) -> None:
    seen: list[str] = []

    class Noting(ScriptedEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            seen.append(request.get())
            return super().embed_query(text)

        async def aembed_query(self, text: str) -> list[float]:
            seen.append(request.get())
            return await super().aembed_query(text)

    model = Noting()
    embeddings = wrap(model, hedge=Hedge(after=0.01))
    gate = model.hold("q")

    def ask() -> None:
        request.set("the caller's")
        if kind == "thread":
            embeddings.embed_query("q")
        else:
            asyncio.run(embeddings.aembed_query("q"))

    Call(ask).result()
    gate.open()
    assert seen == ["the caller's"] * 2


# Counts and keys.


def test_a_claimed_flight_hides_nothing(model: ScriptedEmbeddings) -> None:
    class OnARealClock(ManualPrefetchingEmbeddings):
        def _background(self) -> Background:
            return dataclasses.replace(super()._background(), clock=time.monotonic)

    with OnARealClock(model) as embeddings:
        for text in "abcdefgh":
            embeddings.prefetch(text)
            embeddings.embed_query(text)
        stats = embeddings.stats()
    assert (stats.query_claimed, stats.hidden_seconds) == (8, 0.0)


def test_a_key_that_cannot_be_hashed_starts_nothing_of_a_batch(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, symmetric=True, match=lambda text: [text] if text == "b" else text)
    with pytest.raises(TypeError):
        embeddings.prefetch_many(["a", "b"])
    assert embeddings.stats() == PrefetchStats()
    assert len(embeddings.executor) == 0


# Forks.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("way", ["fails in a worker", "is run by a wait"])
def test_a_prefetch_that_returns_in_a_forked_child_leaves_no_trace_there(
    manual: Manual, way: str
) -> None:
    pids: list[int] = []

    class Forking(ScriptedEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            if not pids:
                pids.append(os.fork())
            if way == "fails in a worker" and pids == [0]:
                raise ConnectionError("unreachable")
            return super().embed_query(text)

    embeddings = manual(Forking())
    embeddings.prefetch("q")
    if way == "is run by a wait":
        embeddings.prefetcher._aside.close()  # no thread can be had: it runs in this one
        embeddings.wait_for_prefetch("q")
    else:
        embeddings.executor.run_next()
    if pids == [0]:
        clean = embeddings.stats() == PrefetchStats() and embeddings.time.calls_to_come == 0
        os._exit(0 if clean else 1)
    _, status = os.waitpid(pids[0], 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert embeddings.is_ready("q")
