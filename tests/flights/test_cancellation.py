"""Cancellation is private: it stops one waiter, and neither the work nor another waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import Call, auntil

Wrap = Callable[..., PrefetchingEmbeddings]


async def _cancel(task: asyncio.Task[list[float]]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelling_the_leader_leaves_its_followers(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    leader = asyncio.create_task(embeddings.aembed_query("q"))
    await gate.await_until_entered()
    followers = [asyncio.create_task(embeddings.aembed_query("q")) for _ in range(3)]
    await auntil(lambda: embeddings.stats().query_joined == 3)
    await _cancel(leader)
    await _cancel(followers.pop())
    gate.open()
    assert await asyncio.gather(*followers) == [model.vector("q")] * 2
    assert model.calls_for("q") == 1


async def test_cancelling_the_only_waiter_keeps_the_work_of_a_prefetch(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    await embeddings.aprefetch("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil(lambda: embeddings.stats().query_joined == 1)
    await _cancel(query)
    gate.open()
    await auntil(lambda: embeddings.is_ready("q"))
    assert await embeddings.aembed_query("q") == model.vector("q")
    assert model.calls_for("q") == 1


async def test_cancelling_a_query_leaves_an_explicit_wait_for_its_flight(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    # What `asyncio.wrap_future` gets wrong: it would cancel the shared future for all.
    embeddings = wrap(model, max_workers=1)
    gate = model.hold("first")
    embeddings.prefetch("first")
    await gate.await_until_entered()
    query = asyncio.create_task(embeddings.aembed_query("first"))
    waiting = asyncio.create_task(embeddings.await_for_prefetch("first"))
    await auntil(lambda: embeddings.stats().query_joined == 1)
    await asyncio.sleep(0)
    await _cancel(query)
    gate.open()
    assert await waiting
    assert await embeddings.aembed_query("first") == model.vector("first")


async def test_cancelling_an_await_for_prefetch_keeps_the_prefetch(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    await embeddings.aprefetch("q")
    waiting = asyncio.create_task(embeddings.await_for_prefetch("q"))
    await gate.await_until_entered()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open()
    assert await embeddings.aembed_query("q") == model.vector("q")
    assert model.calls_for("q") == 1


async def test_cancelling_the_caller_of_aprefetch_keeps_the_prefetch(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")

    async def turn() -> None:
        await embeddings.aprefetch("q")
        await asyncio.Event().wait()

    caller = asyncio.create_task(turn())
    await gate.await_until_entered()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    gate.open()
    assert await embeddings.await_for_prefetch("q")


async def test_a_timeout_of_an_await_stops_only_the_wait(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    embeddings.prefetch("q")
    await gate.await_until_entered()
    assert await embeddings.await_for_prefetch("q", timeout=0.01) is False
    gate.open()
    assert await embeddings.await_for_prefetch("q") is True
    assert model.calls_for("q") == 1


async def test_a_cancelled_waiter_of_a_failing_flight_disturbs_nobody(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    model.fail("q", ValueError("late"))
    embeddings.prefetch("q")
    await gate.await_until_entered()
    gone = asyncio.create_task(embeddings.aembed_query("q"))
    stays = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil(lambda: embeddings.stats().query_joined == 2)
    await _cancel(gone)
    gate.open()
    assert await stays == model.vector("q")
    stats = embeddings.stats()
    assert (stats.query_joined, stats.query_recovered, stats.query_failed) == (2, 1, 0)


@pytest.mark.parametrize("how", ["aembed_query", "await_for_prefetch"])
def test_a_waiter_that_the_collector_destroys_takes_no_lock(
    wrap: Wrap, model: ScriptedEmbeddings, how: str
) -> None:
    # The collector may run in a thread that holds the lock of the map.
    embeddings = wrap(model)
    gate = model.hold("q")
    loop = asyncio.new_event_loop()
    embeddings.prefetch("q")
    gate.wait_until_entered()
    waiter = getattr(embeddings, how)("q")

    async def begin() -> None:
        waiter.send(None)

    loop.run_until_complete(begin())
    loop.close()

    steps = embeddings.prefetcher.steps

    def destroy() -> None:
        with steps.lock:
            steps.within = True
            waiter.close()
            steps.within = False
        assert len(steps.put_off) == 1, "it left within a step"

    Call(destroy).result()
    assert embeddings.prefetcher.waiters("q") == 0 or not steps.put_off
    gate.open()
    assert embeddings.embed_query("q") == model.vector("q")
    assert embeddings.stats().prefetch_used == 1
