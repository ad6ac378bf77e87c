"""Retrievers over real vector stores find what was prefetched, with one call to the model."""

from __future__ import annotations

import asyncio
import uuid
import warnings
from collections.abc import Callable
from typing import Any, Literal

import chromadb
import pytest
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_qdrant import QdrantVectorStore

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import QueriesTakenIn

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`langchain-community` is being sunset", DeprecationWarning)
    from langchain_community.vectorstores import FAISS

# Cosines of Qdrant may exceed 1 by a rounding error.
pytestmark = pytest.mark.filterwarnings("ignore:Relevance scores must be between 0 and 1")

Wrap = Callable[..., PrefetchingEmbeddings]
Search = Literal["similarity", "mmr", "similarity_score_threshold"]

DOCUMENTS = [f"the answer to question {number}" for number in range(5)]
QUESTION, ANSWER = "and what about number three?", DOCUMENTS[3]


class LexiconEmbeddings(ScriptedEmbeddings):
    """Places the question exactly where its answer is, though the texts differ."""

    def vector(self, text: str) -> list[float]:
        return super().vector(ANSWER if text == QUESTION else text)


def chroma(embeddings: PrefetchingEmbeddings) -> VectorStore:
    return Chroma.from_texts(
        DOCUMENTS,
        embeddings,
        client=chromadb.EphemeralClient(),
        collection_name=f"c{uuid.uuid4().hex}",
    )


def faiss(embeddings: PrefetchingEmbeddings) -> VectorStore:
    return FAISS.from_texts(DOCUMENTS, embeddings)


def qdrant(embeddings: PrefetchingEmbeddings) -> VectorStore:
    return QdrantVectorStore.from_texts(
        DOCUMENTS, embeddings, location=":memory:", collection_name=f"c{uuid.uuid4().hex}"
    )


class ScoredInMemoryVectorStore(InMemoryVectorStore):
    """Adds what LangChain's own lacks for score thresholds: its scores are relevances already."""

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda score: min(score, 1.0)  # cosines may exceed 1 by a rounding error


def in_memory(embeddings: PrefetchingEmbeddings) -> VectorStore:
    return ScoredInMemoryVectorStore.from_texts(DOCUMENTS, embeddings)


STORES = pytest.mark.parametrize("make_store", [chroma, faiss, qdrant, in_memory])
SEARCHES = pytest.mark.parametrize("search", ["similarity", "mmr", "similarity_score_threshold"])
CALLS = pytest.mark.parametrize("call", ["invoke", "ainvoke"])
PREFETCHES = pytest.mark.parametrize("prefetch", ["prefetch", "aprefetch"])


async def ask(store: VectorStore, search: Search, call: str) -> list[Document]:
    options: dict[str, Any] = {"k": 1}
    if search == "mmr":
        options["fetch_k"] = 3
    elif search == "similarity_score_threshold":
        options["score_threshold"] = 0.9
    retriever = store.as_retriever(search_type=search, search_kwargs=options)
    if call == "ainvoke":
        return await retriever.ainvoke(QUESTION)
    return await asyncio.to_thread(retriever.invoke, QUESTION)


async def start(embeddings: PrefetchingEmbeddings, prefetch: str) -> None:
    if prefetch == "aprefetch":
        outcome = await embeddings.aprefetch(QUESTION)
    else:
        outcome = embeddings.prefetch(QUESTION)
    assert outcome is PrefetchOutcome.STARTED


def assert_answered(documents: list[Document]) -> None:
    assert [document.page_content for document in documents] == [ANSWER]


@STORES
@SEARCHES
@CALLS
@PREFETCHES
async def test_a_retriever_finds_the_vector_ready(
    wrap: Wrap,
    make_store: Callable[[PrefetchingEmbeddings], VectorStore],
    search: Search,
    call: str,
    prefetch: str,
) -> None:
    model = LexiconEmbeddings()
    embeddings = wrap(model)
    store = make_store(embeddings)
    await start(embeddings, prefetch)
    assert await embeddings.await_for_prefetch(QUESTION)

    documents = await ask(store, search, call)

    assert_answered(documents)
    assert model.calls_for(QUESTION) == 1
    assert embeddings.stats().query_ready == 1


@STORES
@SEARCHES
@CALLS
@PREFETCHES
async def test_a_retriever_joins_the_flight_under_way(
    wrap: Wrap,
    make_store: Callable[[PrefetchingEmbeddings], VectorStore],
    search: Search,
    call: str,
    prefetch: str,
) -> None:
    model = LexiconEmbeddings()
    embeddings = wrap(model)
    store = make_store(embeddings)
    gate = model.hold(QUESTION)
    queries = QueriesTakenIn(embeddings)
    await start(embeddings, prefetch)
    await gate.await_until_entered()

    asking = asyncio.create_task(ask(store, search, call))
    await asyncio.to_thread(queries.wait_for, 1)
    gate.open()

    assert_answered(await asking)
    assert model.calls_for(QUESTION) == 1
    assert embeddings.stats().query_joined == 1


@STORES
@SEARCHES
@CALLS
async def test_a_retriever_claims_the_flight_that_no_worker_has_begun(
    wrap: Wrap,
    make_store: Callable[[PrefetchingEmbeddings], VectorStore],
    search: Search,
    call: str,
) -> None:
    model = LexiconEmbeddings()
    embeddings = wrap(model, max_workers=1)
    store = make_store(embeddings)
    gate = model.hold("an earlier question")
    embeddings.prefetch("an earlier question")
    await gate.await_until_entered()
    await start(embeddings, "prefetch")

    try:
        documents = await ask(store, search, call)
    finally:
        gate.open()

    assert_answered(documents)
    assert model.calls_for(QUESTION) == 1
    assert embeddings.stats().query_claimed == 1
    assert await embeddings.await_for_prefetch("an earlier question")
