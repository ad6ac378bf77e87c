"""A call that nobody wants any more ends; what somebody else asked for goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from prefetch_embeddings import (
    Hedge,
    PrefetchingEmbeddings,
    PrefetchOutcome,
    UtterancePrefetcher,
)
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.flights.outside import (
    CallByCall,
    OnItsLoop,
    alet_pass,
    auntil_joined,
    give_it_a_chance,
    places,
    until_joined,
)
from tests.helpers import PATIENCE, AsyncSideOnly, Call, auntil, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]


async def gone(*tasks: asyncio.Task[list[float]]) -> None:
    """Cancel tasks, and see them end."""
    for task in tasks:
        task.cancel()
    done, pending = await asyncio.wait(tasks, timeout=PATIENCE)
    assert not pending
    assert all(task.cancelled() for task in done)


# A call that only queries asked for.


async def test_the_call_of_a_query_that_left_is_cancelled(wrap: Wrap) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil(lambda: model.running == 1)
    await gone(query)
    await auntil(lambda: model.cancelled == [1])
    assert not embeddings.is_ready("q")
    assert await embeddings.aembed_query("q") == [2.0]
    stats = embeddings.stats()
    assert stats.query_missed == 2
    assert stats.query_failed == 0


async def test_a_time_out_frees_the_connection(wrap: Wrap) -> None:
    connections = asyncio.Semaphore(2)
    stuck = True

    class Model(AsyncSideOnly):
        async def aembed_query(self, text: str) -> list[float]:
            async with connections:
                if stuck:
                    await asyncio.sleep(3600)
                return [1.0]

    embeddings = wrap(Model(ScriptedEmbeddings()))
    for number in range(6):  # all of them with a text of their own
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await embeddings.aembed_query(f"q {number}")
    stuck = False
    async with asyncio.timeout(PATIENCE):
        assert await embeddings.aembed_query("later") == [1.0]
    assert not connections.locked()


async def test_the_last_to_leave_ends_it(wrap: Wrap) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    queries = [asyncio.create_task(embeddings.aembed_query("q")) for _ in range(4)]
    await auntil(lambda: model.running == 1)
    await auntil_joined(embeddings, 3)
    await gone(queries[0])  # who began it, and two who joined
    await gone(queries[1], queries[3])
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert model.cancelled == []
    assert model.running == 1
    await gone(queries[2])
    await auntil(lambda: model.cancelled == [1])
    assert await embeddings.aembed_query("q") == [2.0]


async def test_who_stays_is_answered(wrap: Wrap) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    queries = [asyncio.create_task(embeddings.aembed_query("q")) for _ in range(3)]
    await auntil(lambda: model.running == 1)
    await auntil_joined(embeddings, 2)
    await gone(queries[0], queries[1])
    model.open()
    assert await asyncio.wait_for(queries[2], PATIENCE) == [1.0]
    assert model.calls == 1


def test_a_thread_that_waits_for_it_keeps_it(wrap: Wrap) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    on = OnItsLoop()
    leader = on.start(embeddings.aembed_query("q"))
    model.wait_until_entered(1)
    thread = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    leader.cancel()
    give_it_a_chance()
    assert model.cancelled == []
    model.open()
    assert thread.result() == [1.0]
    assert model.calls == 1
    on.close()


def test_another_loops_waiter_keeps_it_and_ends_it(wrap: Wrap) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    one, other = OnItsLoop(), OnItsLoop()
    leader = one.start(embeddings.aembed_query("q"))
    model.wait_until_entered(1)
    follower = other.start(embeddings.aembed_query("q"))
    until_joined(embeddings)
    leader.cancel()
    give_it_a_chance()
    assert model.cancelled == []
    follower.cancel()  # the last one, on another loop than the call's
    until(lambda: model.cancelled == [1])
    assert one.run(embeddings.aembed_query("q")) == [2.0]
    one.close()
    other.close()


async def test_the_next_query_does_not_wait_for_the_end_of_what_was_cancelled(
    wrap: Wrap,
) -> None:
    """A client may take its time to unwind, or swallow the cancellation altogether."""
    unwinds = asyncio.Event()
    calls = 0

    class Model(AsyncSideOnly):
        async def aembed_query(self, text: str) -> list[float]:
            nonlocal calls
            calls += 1
            number = calls
            if number == 1:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)
                await unwinds.wait()
            return [float(number)]

    embeddings = wrap(Model(ScriptedEmbeddings()))
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil(lambda: calls == 1)
    await gone(query)
    async with asyncio.timeout(PATIENCE):
        assert await embeddings.aembed_query("q") == [2.0]
    unwinds.set()
    await auntil(lambda: len(asyncio.all_tasks()) == 1)
    assert await embeddings.aembed_query("q") == [2.0], "a late value took another's place"


async def test_a_query_that_comes_in_the_very_moment_is_answered(wrap: Wrap) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    leaving = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil(lambda: model.running == 1)
    leaving.cancel()
    coming = asyncio.create_task(embeddings.aembed_query("q"))
    for _ in range(10):
        await asyncio.sleep(0)
    model.open()
    vector = await asyncio.wait_for(coming, PATIENCE)
    assert vector in ([1.0], [2.0])
    assert leaving.cancelled()


async def test_both_calls_of_a_flight_end(manual: Manual) -> None:
    model = CallByCall(holding=2)
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=1.0))
    queries = [asyncio.create_task(embeddings.aembed_query("q")) for _ in range(2)]
    await auntil_joined(embeddings)
    await alet_pass(embeddings, 1.1, lambda: model.running == 2)
    await gone(*queries)
    await auntil(lambda: sorted(model.cancelled) == [1, 2])
    assert await embeddings.aembed_query("q") == [3.0]
    assert len(asyncio.all_tasks()) == 1


async def test_a_thousand_short_tempers_leave_nothing(wrap: Wrap) -> None:
    running = 0

    class Model(AsyncSideOnly):
        async def aembed_query(self, text: str) -> list[float]:
            nonlocal running
            running += 1
            try:
                await asyncio.sleep(3600)
            finally:
                running -= 1
            raise AssertionError

    embeddings = wrap(Model(ScriptedEmbeddings()))
    queries = [asyncio.create_task(embeddings.aembed_query(f"q {n % 100}")) for n in range(1000)]
    await auntil(lambda: running == 100)
    await gone(*queries)
    await auntil(lambda: running == 0)
    await auntil(lambda: len(asyncio.all_tasks()) == 1)
    assert_no_leaks(embeddings)


# A call that a prefetch asked for, too.


@pytest.mark.parametrize("order", ["prefetch, query", "query, prefetch", "query, aprefetch"])
async def test_a_prefetched_one_goes_on(wrap: Wrap, order: str) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    if order == "prefetch, query":
        await embeddings.aprefetch("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil(lambda: model.running == 1)
    if order == "prefetch, query":
        await auntil_joined(embeddings)
    elif order == "query, prefetch":
        assert embeddings.prefetch("q") is PrefetchOutcome.IN_FLIGHT
    else:
        assert await embeddings.aprefetch("q") is PrefetchOutcome.IN_FLIGHT
    await gone(query)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert model.cancelled == []
    model.open()
    await auntil(lambda: embeddings.is_ready("q"))
    assert await embeddings.aembed_query("q") == [1.0]
    assert model.calls == 1


async def test_a_prefetch_that_was_claimed_goes_on(manual: Manual) -> None:
    """A query ran what was queued, and left."""
    model = CallByCall(holding=1)
    embeddings = manual(model)
    embeddings.prefetch("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil(lambda: model.running == 1)
    await gone(query)
    for _ in range(20):
        await asyncio.sleep(0.001)
    model.open()
    embeddings.executor.run_all()
    await auntil(lambda: embeddings.is_ready("q"))
    await auntil(lambda: model.running == 0)


# What waits in the queue.


@pytest.mark.parametrize("queries", [False, True])
def test_what_has_queued_longer_than_ttl_is_dropped(manual: Manual, queries: bool) -> None:
    model = ScriptedEmbeddings()
    embeddings = manual(model, ttl=10.0, max_workers=1, max_pending=3)
    all_places = places(embeddings)
    for number in range(all_places):
        assert embeddings.prefetch(f"q {number}") is PrefetchOutcome.STARTED
    embeddings.time.advance(10.1)
    if queries:  # one that asks still gets its answer
        assert embeddings.embed_query("q 1") == model.vector("q 1")
    embeddings.executor.run_all()
    embeddings.time.advance(60.0)
    embeddings.executor.run_all()
    assert len(model.calls) == queries, "what nobody can want any more was paid for"
    assert places(embeddings) == all_places
    assert embeddings.prefetch("q 0") is PrefetchOutcome.STARTED
    embeddings.executor.run_all()
    assert embeddings.is_ready("q 0")


def test_what_has_queued_for_less_is_run(manual: Manual) -> None:
    model = ScriptedEmbeddings()
    embeddings = manual(model, ttl=10.0)
    embeddings.prefetch("q")
    embeddings.time.advance(9.5)
    embeddings.executor.run_all()
    assert embeddings.is_ready("q")
    embeddings.time.advance(9.5)
    assert embeddings.is_ready("q"), "the time to live counts from completion"


def test_a_batch_that_has_queued_too_long_is_dropped(manual: Manual) -> None:
    model = ScriptedEmbeddings()
    embeddings = manual(model, ttl=10.0, symmetric=True)
    embeddings.prefetch_many(["a", "b", "c"])
    embeddings.time.advance(10.1)
    embeddings.executor.run_all()
    assert model.calls == []


def test_asked_for_again_it_is_run(manual: Manual) -> None:
    """The second caller asked just now, whatever became of the first's."""
    model = ScriptedEmbeddings()
    embeddings = manual(model, ttl=10.0)
    embeddings.prefetch("q")
    embeddings.time.advance(10.1)
    assert embeddings.prefetch("q") in (PrefetchOutcome.STARTED, PrefetchOutcome.IN_FLIGHT)
    embeddings.executor.run_all()
    assert embeddings.is_ready("q")


def test_a_thread_comes_free_too_late(wrap: Wrap) -> None:
    model = ScriptedEmbeddings()
    embeddings = wrap(model, ttl=0.05, max_workers=1)
    gate = model.hold("first")
    embeddings.prefetch("first")
    gate.wait_until_entered()
    embeddings.prefetch("q")
    give_it_a_chance(0.2)
    gate.open()
    embeddings.prefetch("last")
    until(lambda: model.calls_for("last") == 1)
    assert model.calls_for("q") == 0


# Who took it back is not served by a second try.


@pytest.mark.parametrize("how", ["superseded", "hung up"])
def test_what_was_taken_back_is_not_retried(manual: Manual, how: str) -> None:
    model = ScriptedEmbeddings()
    embeddings = manual(model, attempts=3)
    speech = UtterancePrefetcher(embeddings, debounce=0.0, min_words=1)
    gate = model.hold("how much is")
    model.fail("how much is", OSError())
    speech.on_partial("how much is")
    worker = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    if how == "superseded":
        speech.on_partial("what about tomorrow")
    else:
        speech.reset()
    gate.open()
    worker.result()
    for _ in range(10):
        embeddings.executor.run_all()
        embeddings.time.advance(1.0)
    assert model.calls_for("how much is") == 1
    assert embeddings.is_ready("what about tomorrow") == (how == "superseded")


@pytest.mark.parametrize("before", [True, False])
def test_what_somebody_else_asked_for_is_retried(manual: Manual, before: bool) -> None:
    model = ScriptedEmbeddings()
    embeddings = manual(model, attempts=3)
    speech = UtterancePrefetcher(embeddings, debounce=0.0, min_words=1)
    gate = model.hold("how much is")
    model.fail("how much is", OSError())
    if before:
        embeddings.prefetch("how much is")
    speech.on_partial("how much is")
    if not before:
        embeddings.prefetch("how much is")
    worker = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    speech.reset()
    gate.open()
    worker.result()
    for _ in range(10):
        embeddings.executor.run_all()
        embeddings.time.advance(1.0)
    assert model.calls_for("how much is") == 2
    assert embeddings.is_ready("how much is")


# Whoever was the last to run it.


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("native", [False, True])
async def test_all_have_left_and_both_calls_fail(manual: Manual, native: bool, last: int) -> None:
    """The flight is tried again or ends; its place in the queue comes back either way."""
    model = CallByCall(holding=2, failing={1: TimeoutError(), 2: TimeoutError()})
    embeddings = manual(model, max_workers=2, max_pending=2, hedge=Hedge(after=0.05, budget=1.0))
    all_places = places(embeddings)
    worker = None
    if native:
        await embeddings.aprefetch("q")
    else:
        embeddings.prefetch("q")
        worker = Call(embeddings.executor.run_next)
    await auntil(lambda: model.running == 1)
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil_joined(embeddings)
    await alet_pass(embeddings, 0.1, lambda: model.calls == 2)
    await gone(query)
    model.open(3 - last)
    await auntil(lambda: 3 - last in model.ended)
    model.open(last)
    await auntil(lambda: model.running == 0)
    if worker is not None:
        await asyncio.to_thread(worker.result)

    def settled() -> bool:
        embeddings.time.advance(0.5)
        embeddings.executor.run_all()
        stats = embeddings.stats()
        return stats.prefetch_started == (
            stats.prefetch_succeeded + stats.prefetch_failed + stats.prefetch_withdrawn
        )

    if native:  # the pause between its tries may be the loop's own
        await asyncio.sleep(0.5)
    await auntil(settled)
    assert_no_leaks(embeddings)
    assert places(embeddings) == all_places


async def test_callers_leave_while_everything_fails(wrap: Wrap) -> None:
    """As it looks from outside, in threads and on the loop; then the provider is well again."""
    down = True

    class Model(AsyncSideOnly):
        def embed_query(self, text: str) -> list[float]:
            give_it_a_chance(0.02)
            if down:
                raise TimeoutError
            return [1.0]

        async def aembed_query(self, text: str) -> list[float]:
            await asyncio.sleep(0.02)
            if down:
                raise TimeoutError
            return [1.0]

    embeddings = wrap(
        Model(ScriptedEmbeddings()),
        max_workers=4,
        max_pending=4,
        hedge=Hedge(after=0.005, budget=1.0),
    )
    for number in range(40):
        text = f"q {number}"
        if number % 2:
            await embeddings.aprefetch(text)
        else:
            embeddings.prefetch(text)
        query = asyncio.create_task(embeddings.aembed_query(text))
        await asyncio.sleep(0.012)
        query.cancel()
        await asyncio.wait([query])
    down = False
    await embeddings.aembed_query("how are you?")

    def at_rest() -> bool:
        stats = embeddings.stats()
        return stats.prefetch_started == (
            stats.prefetch_succeeded + stats.prefetch_failed + stats.prefetch_withdrawn
        )

    await auntil(at_rest)
    for number in range(8):
        outcome = await embeddings.aprefetch(f"new {number}")
        assert outcome is PrefetchOutcome.STARTED
        await auntil(lambda number=number: embeddings.is_ready(f"new {number}"))  # type: ignore[misc]
    assert_no_leaks(embeddings)
