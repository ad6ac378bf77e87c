"""No wait lasts for ever: not for what waits for its waiters, not for a loop that is gone."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import anyio.to_thread
import pytest
from langchain_core.runnables import RunnableLambda, RunnableParallel

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings._flights.patience import UNMEASURED_LIMIT
from prefetch_embeddings._flights.steps import step
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import PATIENCE, Call, TimeByHand, auntil, waiters

Wrap = Callable[..., PrefetchingEmbeddings]
Timed = Callable[..., TimeByHand]


class NeedingThreads(ScriptedEmbeddings):
    """A model whose async client needs a thread when its answer has come."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.answered = threading.Event()

    async def thread(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, str)

    async def aembed_query(self, text: str) -> list[float]:
        vector = await super().aembed_query(text)
        self.entered.release()
        await auntil(self.answered.is_set)
        await self.thread()
        return vector


async def overdue(embeddings: TimeByHand, text: str) -> None:
    """Wait until two wait for a text, and for longer than a call usually takes."""
    await auntil(lambda: waiters(embeddings, text) == 2)
    embeddings.time.advance(UNMEASURED_LIMIT)


# What waits in ways that nobody can see.


async def test_an_executor_that_waits_for_a_thread_which_waits_for_it(
    timed: Timed,
) -> None:
    class CallingBack(NeedingThreads):
        def embed_query(self, text: str) -> list[float]:
            if text == "whole":
                embeddings.embed_query("part")
            return super().embed_query(text)

        # With only the sync method overridden here, the async one would be taken to go around it.
        async def aembed_query(self, text: str) -> list[float]:
            return await super().aembed_query(text)

    model = CallingBack()
    embeddings = timed(model)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(2) as threads:
        loop.set_default_executor(threads)
        await embeddings.aprefetch("part")
        embeddings.prefetch("whole")
        await auntil(lambda: waiters(embeddings, "part") == 1)
        queries = [loop.run_in_executor(threads, embeddings.embed_query, "whole") for _ in range(2)]
        await auntil(lambda: waiters(embeddings, "whole") == 2)
        model.answered.set()
        embeddings.time.advance(UNMEASURED_LIMIT)
        async with asyncio.timeout(PATIENCE):
            vectors = await asyncio.gather(*queries)
    assert vectors == [model.vector("whole")] * 2


async def test_an_executor_whose_threads_wait_for_threads_of_others(timed: Timed) -> None:
    model = NeedingThreads()
    embeddings = timed(model)
    ask = RunnableParallel(
        vector=RunnableLambda(embeddings.embed_query), length=RunnableLambda(len)
    )
    chain = RunnableLambda(lambda text: ask.invoke(text)["vector"])
    with ThreadPoolExecutor(2) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        await embeddings.aprefetch("q")
        queries = [asyncio.create_task(chain.ainvoke("q")) for _ in range(2)]
        await overdue(embeddings, "q")
        model.answered.set()
        async with asyncio.timeout(PATIENCE):
            vectors = await asyncio.gather(*queries)
    assert vectors == [model.vector("q")] * 2


async def test_a_pool_of_another_kind(timed: Timed) -> None:
    class NeedingWorkerThreads(NeedingThreads):
        async def thread(self) -> None:
            await anyio.to_thread.run_sync(str)

    model = NeedingWorkerThreads()
    embeddings = timed(model)
    anyio.to_thread.current_default_thread_limiter().total_tokens = 2
    await embeddings.aprefetch("q")
    queries = [
        asyncio.create_task(anyio.to_thread.run_sync(embeddings.embed_query, "q")) for _ in range(2)
    ]
    await overdue(embeddings, "q")
    model.answered.set()
    async with asyncio.timeout(PATIENCE):
        vectors = await asyncio.gather(*queries)
    assert vectors == [model.vector("q")] * 2


# Loops that are gone.


def test_a_ready_flight_keeps_no_loop(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(embeddings.aembed_query("q"))
    loop.close()
    kept = weakref.ref(loop)
    del loop
    gc.collect()
    assert kept() is None
    assert embeddings.is_ready("q")


def test_a_batch_takes_over_from_a_closed_loop(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model, symmetric=True)
    gate = model.hold("q")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(embeddings.aprefetch("q"))
    loop.close()
    gate.open()
    assert embeddings.prefetch_many(["q"]) == [PrefetchOutcome.STARTED]
    assert embeddings.wait_for_prefetch("q")


def test_the_collector_may_destroy_a_call_that_ends_in_another_error(
    wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Translating(ScriptedEmbeddings):
        async def aembed_query(self, text: str) -> list[float]:
            try:
                await asyncio.get_running_loop().create_future()
            except BaseException:
                raise ConnectionError from None
            return []

    model = Translating()
    embeddings = wrap(model)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(embeddings.aprefetch("q"))
    loop.close()
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)  # asyncio's own, about the task
    assert embeddings.embed_query("q") == model.vector("q")
    del loop

    class Collecting:
        steps = embeddings.prefetcher.steps

        @step
        def collect(self) -> None:  # as any allocation may
            gc.collect()

    Call(Collecting().collect).result()
