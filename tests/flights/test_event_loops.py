"""Event loops that stop, close or stand still under a flight strand nobody elsewhere."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings._flights.patience import UNMEASURED_LIMIT
from prefetch_embeddings._flights.steps import step
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import PATIENCE, AsyncSideOnly, Call, QueriesTakenIn, TimeByHand, until, waiters

T = TypeVar("T")
Wrap = Callable[..., PrefetchingEmbeddings]
Timed = Callable[..., TimeByHand]

TEXT = "how much is it?"


class LoopThread:
    """An event loop that turns in a thread of its own until it is told otherwise."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.start(coroutine).result(PATIENCE)

    def stop(self) -> None:
        """Stop without a word to the tasks."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive()

    def close(self) -> None:
        """Stop and close without a word to the tasks."""
        self.stop()
        self.loop.close()


@pytest.fixture
def new_loop() -> Iterator[Callable[[], LoopThread]]:
    made: list[LoopThread] = []

    def make() -> LoopThread:
        made.append(LoopThread())
        return made[-1]

    yield make
    for each in made:
        each.close()
    gc.collect()  # the tasks that were left, while this test can still be blamed for them


# A loop that goes away.


def test_a_prefetch_that_its_loop_cancels_at_the_end_costs_the_next_query_nothing(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    model.hold(TEXT)

    assert asyncio.run(embeddings.aprefetch(TEXT)) is PrefetchOutcome.STARTED
    vector = embeddings.embed_query(TEXT)

    assert vector == model.vector(TEXT)
    stats = embeddings.stats()
    assert (stats.prefetch_failed, stats.query_missed, stats.query_recovered) == (1, 1, 0)


def test_a_prefetch_of_a_closed_loop_is_found_again_on_another_loop(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    model.hold(TEXT)

    asyncio.run(embeddings.aprefetch(TEXT))
    assert asyncio.run(embeddings.aprefetch(TEXT)) is PrefetchOutcome.STARTED

    assert asyncio.run(embeddings.aembed_query(TEXT)) == model.vector(TEXT)
    assert model.calls_for(TEXT) == 2


@pytest.mark.parametrize("end", [LoopThread.stop, LoopThread.close], ids=["stopped", "closed"])
def test_waiters_everywhere_recover_together_when_the_loop_goes_away(
    wrap: Wrap,
    model: ScriptedEmbeddings,
    new_loop: Callable[[], LoopThread],
    end: Callable[[LoopThread], None],
) -> None:
    embeddings = wrap(model)
    queries = QueriesTakenIn(embeddings)
    running, elsewhere = new_loop(), new_loop()
    gate = model.hold(TEXT)
    running.run(embeddings.aprefetch(TEXT))
    with ThreadPoolExecutor(3) as threads:
        waiters = [threads.submit(embeddings.embed_query, TEXT) for _ in range(3)]
        waiters += [elsewhere.start(embeddings.aembed_query(TEXT)) for _ in range(3)]
        queries.wait_for(6)

        end(running)

        vectors = [waiter.result(PATIENCE) for waiter in waiters]
    gate.open()
    assert vectors == [model.vector(TEXT)] * 6
    assert model.calls_for(TEXT) == 2  # the one that was lost, and one for all six
    stats = embeddings.stats()
    assert (stats.query_joined, stats.query_recovered, stats.query_failed) == (6, 6, 0)
    assert stats.prefetch_failed == 1


@pytest.mark.parametrize("end", [LoopThread.stop, LoopThread.close], ids=["stopped", "closed"])
@pytest.mark.parametrize("wait", ["wait_for_prefetch", "await_for_prefetch"])
def test_explicit_waits_end_when_the_loop_goes_away(
    wrap: Wrap,
    model: ScriptedEmbeddings,
    new_loop: Callable[[], LoopThread],
    end: Callable[[LoopThread], None],
    wait: str,
) -> None:
    embeddings = wrap(model)
    running = new_loop()
    model.hold(TEXT)
    running.run(embeddings.aprefetch(TEXT))
    end(running)

    if wait == "wait_for_prefetch":
        assert not embeddings.wait_for_prefetch(TEXT)
    else:
        assert not asyncio.run(embeddings.await_for_prefetch(TEXT))


@pytest.mark.parametrize("prefetch", ["prefetch", "aprefetch"])
def test_a_prefetch_takes_over_from_a_closed_loop(
    wrap: Wrap, model: ScriptedEmbeddings, new_loop: Callable[[], LoopThread], prefetch: str
) -> None:
    embeddings = wrap(model)
    running, later = new_loop(), new_loop()
    model.hold(TEXT)
    running.run(embeddings.aprefetch(TEXT))
    running.close()

    if prefetch == "prefetch":
        assert embeddings.prefetch(TEXT) is PrefetchOutcome.STARTED
    else:
        assert later.run(embeddings.aprefetch(TEXT)) is PrefetchOutcome.STARTED

    assert embeddings.wait_for_prefetch(TEXT)
    assert embeddings.embed_query(TEXT) == model.vector(TEXT)
    assert model.calls_for(TEXT) == 2


def test_a_query_that_ran_the_flight_on_a_lost_loop_leaves_its_joiners_a_call_of_their_own(
    wrap: Wrap,
    model: ScriptedEmbeddings,
    new_loop: Callable[[], LoopThread],
) -> None:
    embeddings = wrap(model)
    queries = QueriesTakenIn(embeddings)
    running = new_loop()
    gate = model.hold(TEXT)
    running.start(embeddings.aembed_query(TEXT))
    gate.wait_until_entered()
    with ThreadPoolExecutor(1) as threads:
        waiter = threads.submit(embeddings.embed_query, TEXT)
        queries.wait_for(2)

        running.close()

        assert waiter.result(PATIENCE) == model.vector(TEXT)
    assert model.calls_for(TEXT) == 2


# A waiter whose loop goes away.


def test_a_waiter_whose_own_loop_closes_harms_neither_the_flight_nor_other_waiters(
    wrap: Wrap,
    model: ScriptedEmbeddings,
    new_loop: Callable[[], LoopThread],
    caplog: pytest.LogCaptureFixture,
) -> None:
    embeddings = wrap(model)
    queries = QueriesTakenIn(embeddings)
    lost, alive = new_loop(), new_loop()
    gate = model.hold(TEXT)
    embeddings.prefetch(TEXT)
    gate.wait_until_entered()
    lost.start(embeddings.aembed_query(TEXT))
    waiter = alive.start(embeddings.aembed_query(TEXT))
    queries.wait_for(2)

    lost.close()
    gate.open()

    assert waiter.result(PATIENCE) == model.vector(TEXT)
    assert embeddings.embed_query(TEXT) == model.vector(TEXT)
    assert model.calls_for(TEXT) == 1
    assert embeddings.stats().query_recovered == 0
    assert "concurrent.futures" not in {record.name for record in caplog.records}


class Collecting:
    """Has the collector come within a step, as it may at any allocation."""

    def __init__(self, embeddings: PrefetchingEmbeddings) -> None:
        self.steps = embeddings.prefetcher.steps

    @step
    def collect(self) -> None:
        gc.collect()


@pytest.mark.parametrize("wait", ["aembed_query", "await_for_prefetch"])
def test_the_collector_may_come_for_a_lost_waiter_within_a_step(
    wrap: Wrap,
    model: ScriptedEmbeddings,
    new_loop: Callable[[], LoopThread],
    wait: str,
) -> None:
    embeddings = wrap(model)
    lost = new_loop()
    gate = model.hold(TEXT)
    embeddings.prefetch(TEXT)
    gate.wait_until_entered()
    lost.start(getattr(embeddings, wait)(TEXT))
    until(lambda: waiters(embeddings, TEXT) == 1)
    lost.close()
    gate.open()
    assert embeddings.wait_for_prefetch(TEXT)
    embeddings.forget(TEXT)
    assert embeddings.stats().prefetch_wasted == 0  # the lost waiter never came to leave

    Call(Collecting(embeddings).collect).result()

    assert embeddings.stats().prefetch_wasted == 1, "it leaves as soon as the step is over"


# A loop that stands still.


async def test_a_sync_query_on_the_loop_that_runs_the_flight_answers(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold(TEXT)
    await embeddings.aprefetch(TEXT)
    waiter = asyncio.create_task(embeddings.aembed_query(TEXT))
    await gate.await_until_entered()

    assert embeddings.embed_query(TEXT) == model.vector(TEXT)  # blocks this loop
    assert await waiter == model.vector(TEXT)

    assert model.calls_for(TEXT) == 2


async def test_a_sync_wait_on_the_loop_that_runs_the_flight_returns_and_leaves_it_alone(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold(TEXT)
    await embeddings.aprefetch(TEXT)

    assert not embeddings.wait_for_prefetch(TEXT)
    gate.open()

    assert await embeddings.aembed_query(TEXT) == model.vector(TEXT)
    assert model.calls_for(TEXT) == 1


def test_two_loops_that_ask_each_other_by_sync_queries_both_get_answers(
    timed: Timed,
    model: ScriptedEmbeddings,
    new_loop: Callable[[], LoopThread],
) -> None:
    embeddings = timed(model)
    texts = ("one", "two")
    loops = (new_loop(), new_loop())
    gates = [model.hold(text) for text in texts]
    for loop, text in zip(loops, texts, strict=True):
        loop.run(embeddings.aprefetch(text))
    both = threading.Barrier(2, timeout=PATIENCE)

    async def ask(text: str) -> list[float]:
        both.wait()
        return embeddings.embed_query(text)  # blocks its loop

    asked = list(zip(loops, reversed(texts), strict=True))
    answers = [loop.start(ask(text)) for loop, text in asked]
    until(lambda: all(waiters(embeddings, text) == 1 for text in texts))
    for gate in gates:  # the calls would end now, if the loops turned
        gate.open()
    embeddings.time.advance(UNMEASURED_LIMIT)

    for (_, text), answer in zip(asked, answers, strict=True):
        assert answer.result(PATIENCE) == model.vector(text)
        assert model.calls_for(text) <= 2


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_a_loop_that_waits_for_the_waiter_itself_gets_its_answer_by_another_call(
    timed: Timed, model: ScriptedEmbeddings, new_loop: Callable[[], LoopThread], kind: str
) -> None:
    embeddings = timed(model)
    blocked, elsewhere = new_loop(), new_loop()
    model.hold(TEXT)
    blocked.run(embeddings.aprefetch(TEXT))

    async def block(threads: ThreadPoolExecutor) -> list[float]:
        if kind == "thread":
            waiter = threads.submit(embeddings.embed_query, TEXT)
        else:
            waiter = elsewhere.start(embeddings.aembed_query(TEXT))
        return waiter.result(PATIENCE)  # the loop stands still meanwhile

    with ThreadPoolExecutor(1) as threads:
        answer = blocked.start(block(threads))
        until(lambda: waiters(embeddings, TEXT) == 1)
        embeddings.time.advance(UNMEASURED_LIMIT)
        assert answer.result(PATIENCE) == model.vector(TEXT)
    assert model.calls_for(TEXT) == 2
    stats = embeddings.stats()
    assert (stats.overdue_calls, stats.query_recovered, stats.query_failed) == (1, 0, 0)


# The bound of aprefetch.


async def test_aprefetch_is_bounded(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model, max_pending=2)
    gates = [model.hold(text) for text in ("one", "two")]

    outcomes = [await embeddings.aprefetch(text) for text in ("one", "two", "three")]
    for gate in gates:
        gate.open()
    for text in ("one", "two"):
        assert await embeddings.await_for_prefetch(text)

    assert outcomes == [PrefetchOutcome.STARTED] * 2 + [PrefetchOutcome.DROPPED]
    assert await embeddings.aprefetch("three") is PrefetchOutcome.STARTED
    assert await embeddings.await_for_prefetch("three")
    assert embeddings.stats().prefetch_dropped == 1
    assert model.calls_for("three") == 1


def test_a_closed_loop_gives_its_places_back(
    wrap: Wrap, model: ScriptedEmbeddings, new_loop: Callable[[], LoopThread]
) -> None:
    embeddings = wrap(model, max_pending=2)
    lost, alive = new_loop(), new_loop()
    for text in ("one", "two"):
        model.hold(text)
        lost.run(embeddings.aprefetch(text))
    assert alive.run(embeddings.aprefetch("three")) is PrefetchOutcome.DROPPED

    lost.close()

    for text in ("three", "four"):
        assert alive.run(embeddings.aprefetch(text)) is PrefetchOutcome.STARTED
        assert embeddings.wait_for_prefetch(text)
    assert embeddings.stats().prefetch_failed == 2


def test_loops_that_end_in_order_give_their_places_back(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model, max_pending=1)
    for number in range(3):
        text = f"question {number}"
        model.hold(text)
        assert asyncio.run(embeddings.aprefetch(text)) is PrefetchOutcome.STARTED
    assert embeddings.stats().prefetch_failed == 3


# Models with a working async side alone.


async def test_an_async_only_model_serves_async_callers(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(AsyncSideOnly(model))

    assert await embeddings.aprefetch("one") is PrefetchOutcome.STARTED
    assert await embeddings.aembed_query("one") == model.vector("one")
    assert await embeddings.aembed_query("two") == model.vector("two")

    assert model.calls == [("aembed_query", ("one",)), ("aembed_query", ("two",))]


async def test_an_async_only_model_serves_sync_queries_for_what_was_prefetched(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(AsyncSideOnly(model))
    queries = QueriesTakenIn(embeddings)
    gate = model.hold(TEXT)
    await embeddings.aprefetch(TEXT)
    joining = asyncio.create_task(asyncio.to_thread(embeddings.embed_query, TEXT))
    await asyncio.to_thread(queries.wait_for, 1)
    gate.open()

    assert await joining == model.vector(TEXT)
    assert embeddings.embed_query(TEXT) == model.vector(TEXT)  # ready
    with pytest.raises(NotImplementedError):
        embeddings.embed_query("never prefetched")


async def test_a_query_claims_an_async_only_models_flight_from_the_queue_of_threads(
    manual: Callable[..., ManualPrefetchingEmbeddings], model: ScriptedEmbeddings
) -> None:
    embeddings = manual(AsyncSideOnly(model), attempts=1)

    embeddings.prefetch(TEXT)  # in a thread this model can only fail

    assert await embeddings.aembed_query(TEXT) == model.vector(TEXT)
    assert embeddings.stats().query_claimed == 1
    assert model.calls_for(TEXT) == 1
