"""`close()` leaves no waiter hanging; queries work on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.helpers import Call, auntil, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]


def test_waiters_of_a_hanging_prefetch_are_let_go(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model, max_workers=1)
    gate = model.hold("hanging")
    embeddings.prefetch("hanging")
    embeddings.prefetch("queued")
    gate.wait_until_entered()
    query = Call(embeddings.embed_query, "hanging")
    waits = [
        Call(embeddings.wait_for_prefetch, "hanging"),
        Call(embeddings.wait_for_prefetch, "queued", 60.0),
    ]
    waiters = embeddings.prefetcher.waiters
    until(lambda: (waiters("hanging"), waiters("queued")) == (2, 1))
    embeddings.close()
    assert [wait.result() for wait in waits] == [False, False]
    assert query.result() == model.vector("hanging"), "the query had to make a call of its own"
    assert embeddings.stats().query_recovered == 1
    gate.open()


async def test_coroutines_of_a_hanging_prefetch_are_let_go(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    await embeddings.aprefetch("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    waiting = asyncio.create_task(embeddings.await_for_prefetch("q"))
    await auntil(lambda: embeddings.prefetcher.waiters("q") == 2)
    embeddings.close()
    assert await waiting is False
    assert await query == model.vector("q")
    gate.open()


def test_a_forgotten_flight_is_closed_too(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    embeddings.prefetch("q")
    gate.wait_until_entered()
    query = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.stats().query_joined == 1)
    embeddings.forget("q")
    embeddings.close()
    assert query.result() == model.vector("q")
    gate.open()


def test_queries_work_on_and_nothing_is_kept(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    embeddings.embed_query("q")
    embeddings.close()
    embeddings.close()
    assert embeddings.prefetch("q") is PrefetchOutcome.DROPPED
    assert asyncio.run(embeddings.aprefetch("q")) is PrefetchOutcome.DROPPED
    assert embeddings.prefetch_many(["q"]) == [PrefetchOutcome.DROPPED]
    assert not embeddings.is_ready("q")
    for _ in range(2):
        assert embeddings.embed_query("q") == model.vector("q")
    assert asyncio.run(embeddings.aembed_query("q")) == model.vector("q")
    assert embeddings.embed_documents(["q"]) == [model.vector("q")]
    assert model.calls_for("q") == 5
    assert embeddings.wait_for_prefetch("q") is False


def test_unused_vectors_are_counted(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    embeddings.prefetch("ready")
    embeddings.executor.run_all()
    embeddings.prefetch("queued")
    embeddings.close()
    stats = embeddings.stats()
    assert (stats.prefetch_wasted, stats.prefetch_withdrawn) == (1, 1)
    assert model.calls_for("queued") == 0


def test_closing_calls_off_the_next_attempt(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    model.fail("q", ValueError())
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    embeddings.close()
    embeddings.time.advance(60.0)
    assert embeddings.executor.run_all() == 0
    assert embeddings.stats().prefetch_failed == 1


async def test_context_managers(model: ScriptedEmbeddings) -> None:
    with PrefetchingEmbeddings(model) as embeddings:
        assert embeddings.prefetch("q") is PrefetchOutcome.STARTED
        assert embeddings.wait_for_prefetch("q")
    assert embeddings.prefetch("q") is PrefetchOutcome.DROPPED
    assert_no_leaks(embeddings)
    async with PrefetchingEmbeddings(model) as other:
        await other.aprefetch("q")
        assert await other.await_for_prefetch("q")
    assert await other.aprefetch("q") is PrefetchOutcome.DROPPED
    assert_no_leaks(other)
