"""Queries that crowd a loop's default executor are answered, whatever waits in line behind them."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import chromadb
import pytest
import pytest_asyncio
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor
from langchain_core.vectorstores import VectorStoreRetriever

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings._flights.patience import UNMEASURED_LIMIT
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import PATIENCE, SyncSideOnly, TimeByHand, auntil, waiters

Wrap = Callable[..., PrefetchingEmbeddings]
Timed = Callable[..., TimeByHand]

TEXT = "how much is it?"
QUESTIONS = [f"question {number}" for number in range(50)]
THREADS = 6  # what the executor has by default on a machine with two cores


class Tokenizing(SyncSideOnly):
    """A model with an async client, that tokenizes in the loop's executor first, as OpenAI's."""

    async def aembed_query(self, text: str) -> list[float]:
        await run_in_executor(None, text.split)
        return await self._model.aembed_query(text)


class LookingUpHosts(SyncSideOnly):
    """A model whose async client needs the loop's executor late, as asyncio's getaddrinfo does."""

    async def aembed_query(self, text: str) -> list[float]:
        vector = await self._model.aembed_query(text)
        await run_in_executor(None, text.split)
        return vector


def async_client(model: ScriptedEmbeddings) -> Embeddings:
    return model


@pytest_asyncio.fixture
async def executor() -> AsyncIterator[ThreadPoolExecutor]:
    """The running loop's default executor."""
    with ThreadPoolExecutor(THREADS) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        yield threads


# 50 turns at once.


def retriever(embeddings: PrefetchingEmbeddings) -> VectorStoreRetriever:
    store = Chroma.from_texts(
        QUESTIONS,
        embeddings,
        client=chromadb.EphemeralClient(),
        collection_name=f"c{uuid.uuid4().hex}",
    )
    return store.as_retriever(search_kwargs={"k": 1})


async def cold(embeddings: PrefetchingEmbeddings, ask: Callable[[str], Any]) -> list[Any]:
    return await asyncio.gather(*map(ask, QUESTIONS))


async def prefetched(embeddings: PrefetchingEmbeddings, ask: Callable[[str], Any]) -> list[Any]:
    for question in QUESTIONS:
        assert embeddings.prefetch(question) is PrefetchOutcome.STARTED
    return await asyncio.gather(*map(ask, QUESTIONS))


async def aprefetched(embeddings: PrefetchingEmbeddings, ask: Callable[[str], Any]) -> list[Any]:
    for question in QUESTIONS:
        assert await embeddings.aprefetch(question) is PrefetchOutcome.STARTED
    return await asyncio.gather(*map(ask, QUESTIONS))


async def turn_by_turn(embeddings: PrefetchingEmbeddings, ask: Callable[[str], Any]) -> list[Any]:
    async def turn(question: str) -> Any:
        await embeddings.aprefetch(question)
        return await ask(question)

    return await asyncio.gather(*map(turn, QUESTIONS))


async def queries_ahead_of_their_prefetches(
    embeddings: PrefetchingEmbeddings, ask: Callable[[str], Any]
) -> list[Any]:
    queries = [asyncio.ensure_future(ask(question)) for question in QUESTIONS]
    await asyncio.gather(*map(embeddings.aprefetch, QUESTIONS))
    return await asyncio.gather(*queries)


MODELS = pytest.mark.parametrize(
    "make_model", [async_client, Tokenizing, LookingUpHosts, SyncSideOnly]
)
TURNS = pytest.mark.parametrize(
    "turns", [cold, prefetched, aprefetched, turn_by_turn, queries_ahead_of_their_prefetches]
)


@MODELS
@TURNS
async def test_50_turns_over_chroma_share_6_threads(
    wrap: Wrap,
    executor: ThreadPoolExecutor,
    make_model: Callable[[ScriptedEmbeddings], Embeddings],
    turns: Callable[..., Any],
) -> None:
    model = ScriptedEmbeddings()
    embeddings = wrap(make_model(model))
    ask = retriever(embeddings).ainvoke
    model_calls_before = len(model.calls)

    async with asyncio.timeout(PATIENCE):
        answers: list[list[Document]] = await turns(embeddings, ask)

    assert [document.page_content for (document,) in answers] == QUESTIONS
    assert sorted(texts for _, texts in model.calls[model_calls_before:]) == sorted(
        (question,) for question in QUESTIONS
    )
    stats = embeddings.stats()
    assert stats.query_recovered == stats.query_failed == 0


# All threads of the executor wait for a flight that waits for one of them.


async def gathered(
    embeddings: PrefetchingEmbeddings, queries: list[asyncio.Future[list[float]]]
) -> list[list[float]]:
    try:
        async with asyncio.timeout(PATIENCE):
            return await asyncio.gather(*queries)
    finally:
        embeddings.close()  # lets go of threads that hang


async def overdue(embeddings: TimeByHand, number: int) -> None:
    """Wait until so many wait for the text, and for longer than a call usually takes."""
    await auntil(lambda: waiters(embeddings, TEXT) == number)
    embeddings.time.advance(UNMEASURED_LIMIT)
    assert embeddings.stats().overdue_calls == 1


@pytest.mark.parametrize("make_model", [Tokenizing, SyncSideOnly])
async def test_threads_that_join_a_flight_in_line_behind_them_get_answers(
    timed: Timed,
    executor: ThreadPoolExecutor,
    make_model: Callable[[ScriptedEmbeddings], Embeddings],
) -> None:
    model = ScriptedEmbeddings()
    embeddings = timed(make_model(model))
    loop = asyncio.get_running_loop()
    in_line = threading.Event()
    busy = threading.Semaphore(0)

    def query() -> list[float]:
        busy.release()
        in_line.wait()
        return embeddings.embed_query(TEXT)

    queries = [loop.run_in_executor(executor, query) for _ in range(THREADS)]
    for _ in range(THREADS):
        assert busy.acquire(timeout=PATIENCE)
    if make_model is Tokenizing:
        assert await embeddings.aprefetch(TEXT) is PrefetchOutcome.STARTED
    else:
        queries.append(asyncio.create_task(embeddings.aembed_query(TEXT)))
        await asyncio.sleep(0)
    in_line.set()
    await overdue(embeddings, len(queries))

    vectors = await gathered(embeddings, queries)

    assert vectors == [model.vector(TEXT)] * len(queries)
    assert embeddings.stats().query_failed == 0
    assert model.calls_for(TEXT) <= 2  # the first one begins if a thread is free before its end


def in_the_thread(embeddings: PrefetchingEmbeddings) -> list[float]:
    return embeddings.embed_query(TEXT)


def on_a_loop_in_the_thread(embeddings: PrefetchingEmbeddings) -> list[float]:
    return asyncio.run(embeddings.aembed_query(TEXT))


@pytest.mark.parametrize("query", [in_the_thread, on_a_loop_in_the_thread])
async def test_threads_that_join_a_flight_which_needs_one_of_them_later_get_answers(
    timed: Timed,
    executor: ThreadPoolExecutor,
    query: Callable[[PrefetchingEmbeddings], list[float]],
) -> None:
    model = ScriptedEmbeddings()
    embeddings = timed(LookingUpHosts(model))
    loop = asyncio.get_running_loop()
    gate = model.hold(TEXT)
    await embeddings.aprefetch(TEXT)
    queries = [loop.run_in_executor(executor, query, embeddings) for _ in range(THREADS)]
    await auntil(lambda: waiters(embeddings, TEXT) == THREADS)
    gate.open()
    await overdue(embeddings, THREADS)

    vectors = await gathered(embeddings, queries)

    assert vectors == [model.vector(TEXT)] * THREADS
    assert model.calls_for(TEXT) == 2


async def test_where_queries_come_in_threads_a_prefetch_needs_no_thread_of_the_executor(
    wrap: Wrap, executor: ThreadPoolExecutor
) -> None:
    model = ScriptedEmbeddings()
    embeddings = wrap(LookingUpHosts(model))
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(executor, embeddings.embed_query, "an earlier turn")
    gate = model.hold(TEXT)
    await embeddings.aprefetch(TEXT)
    queries = [loop.run_in_executor(executor, embeddings.embed_query, TEXT) for _ in range(THREADS)]
    await auntil(lambda: waiters(embeddings, TEXT) == THREADS)
    gate.open()

    assert await gathered(embeddings, queries) == [model.vector(TEXT)] * THREADS

    assert model.calls == [("embed_query", ("an earlier turn",)), ("embed_query", (TEXT,))]
