"""The tap: what flows through a chain is prefetched, and passed on unchanged."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
from langchain_classic.chains import create_history_aware_retriever
from langchain_classic.retrievers import MultiQueryRetriever
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.vectorstores import InMemoryVectorStore

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.misses import MissReason
from prefetch_embeddings.tap import prefetch_tap
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import PATIENCE

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

ASKED = "and how much is it?"
REWRITTEN = "How much is the gigabit tariff?"
VARIANTS = ["What does it cost?", "What is the price?", "How expensive is it?"]

PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Rewrite."), MessagesPlaceholder("chat_history"), ("human", "{input}")]
)
TURN = {"input": ASKED, "chat_history": [HumanMessage("Tell me about the gigabit tariff.")]}


def _store(embeddings: PrefetchingEmbeddings) -> InMemoryVectorStore:
    store = InMemoryVectorStore(embeddings)
    store.add_documents([Document("It is 40 euros."), Document("It is fast.")])
    return store


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("flowing", ["how much?", ["how much?", "what price?"], []])
def test_it_prefetches_and_passes_on(
    manual: Manual, model: ScriptedEmbeddings, flowing: Any, native: bool
) -> None:
    embeddings = manual(model)
    tap = prefetch_tap(embeddings)
    passed = asyncio.run(tap.ainvoke(flowing)) if native else tap.invoke(flowing)
    assert passed is flowing
    questions = [flowing] if isinstance(flowing, str) else flowing
    assert embeddings.stats().prefetch_started == len(embeddings.executor) == len(questions)
    embeddings.executor.run_all()
    assert all(embeddings.is_ready(question) for question in questions)


def test_several_questions_are_one_call_to_a_symmetric_model(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, symmetric=True)
    prefetch_tap(embeddings).invoke(VARIANTS)
    embeddings.executor.run_all()
    assert model.calls == [("embed_documents", tuple(VARIANTS))]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("flowing", [None, 7, {"input": "q"}, ["q", 7]])
def test_anything_else_is_a_mistake_that_shows(
    manual: Manual, model: ScriptedEmbeddings, flowing: Any, native: bool
) -> None:
    embeddings = manual(model)
    tap = prefetch_tap(embeddings)
    with pytest.raises(TypeError, match="must be a str"):
        asyncio.run(tap.ainvoke(flowing)) if native else tap.invoke(flowing)
    assert embeddings.stats().prefetch_started == 0


def test_a_wrapper_that_takes_nothing_stops_no_chain(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    embeddings.close()
    tap = prefetch_tap(embeddings)
    assert tap.invoke("q") == "q"
    assert tap.invoke("") == ""
    assert tap.invoke(["q", " "]) == ["q", " "]


def test_a_stream_flows_through_and_is_prefetched_whole(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)

    def words(question: str) -> Any:
        yield from (f"{word} " for word in question.split())

    chain = RunnableLambda(words) | prefetch_tap(embeddings)
    chunks = []
    for chunk in chain.stream("how much is it"):
        chunks.append(chunk)
        assert len(chunks) < 4 or not len(embeddings.executor)
    assert chunks == ["how ", "much ", "is ", "it "]
    embeddings.executor.run_all()
    assert model.calls == [("embed_query", ("how much is it ",))]


def test_the_worker_sees_the_context_of_the_chain(
    manual: Manual, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")
    seen = []
    embed = model.embed_query

    def embed_query(text: str) -> list[float]:
        seen.append(trace.get())
        return embed(text)

    monkeypatch.setattr(model, "embed_query", embed_query)
    embeddings = manual(model)
    token = trace.set("this turn")
    prefetch_tap(embeddings).invoke("q")
    trace.reset(token)
    embeddings.executor.run_all()
    assert seen == ["this turn"]


# --- With the chains that rewrite a question ----------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_a_history_aware_retriever_without_a_tap_shows_up_as_rewritten(
    manual: Manual, model: ScriptedEmbeddings, native: bool
) -> None:
    embeddings = manual(model)
    retriever = _store(embeddings).as_retriever()
    chain = create_history_aware_retriever(
        FakeListChatModel(responses=[REWRITTEN]), retriever, PROMPT
    )
    embeddings.prefetch(ASKED)
    embeddings.executor.run_all()
    assert asyncio.run(chain.ainvoke(TURN)) if native else chain.invoke(TURN)
    stats = embeddings.stats()
    assert (stats.query_missed, stats.query_ready) == (1, 0)
    miss = embeddings.explain_miss(REWRITTEN)
    assert miss is not None
    assert miss.reason is MissReason.REWRITTEN


@pytest.mark.parametrize("native", [True, False])
def test_a_tap_in_a_history_aware_retriever_prefetches_the_rewritten_question(
    wrap: Wrap, model: ScriptedEmbeddings, native: bool
) -> None:
    embeddings = wrap(model)
    retriever = _store(embeddings).as_retriever()

    def rerank_model_loads(question: str) -> str:
        assert embeddings.wait_for_prefetch(question, timeout=PATIENCE)
        return question

    chain = create_history_aware_retriever(
        FakeListChatModel(responses=[REWRITTEN]),
        prefetch_tap(embeddings) | RunnableLambda(rerank_model_loads) | retriever,
        PROMPT,
    )
    assert asyncio.run(chain.ainvoke(TURN)) if native else chain.invoke(TURN)
    stats = embeddings.stats()
    assert (stats.prefetch_started, stats.query_ready, stats.query_missed) == (1, 1, 0)
    assert model.calls_for(REWRITTEN) == 1
    assert model.calls_for(ASKED) == 0


def test_a_streamed_history_aware_retriever_is_tapped_before_it_retrieves(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    chain = create_history_aware_retriever(
        FakeListChatModel(responses=[REWRITTEN]),
        prefetch_tap(embeddings) | _store(embeddings).as_retriever(),
        PROMPT,
    )
    assert list(chain.stream(TURN))
    stats = embeddings.stats()
    assert (stats.prefetch_started, stats.query_claimed) == (1, 1)
    assert model.calls_for(REWRITTEN) == 1


def test_a_tap_beside_the_retriever_gains_what_the_retriever_does_first(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    chain = prefetch_tap(embeddings) | RunnableParallel(
        documents=_store(embeddings).as_retriever(), question=RunnableLambda(str)
    )
    assert chain.invoke("how much?")["question"] == "how much?"
    assert model.calls_for("how much?") == 1


@pytest.mark.parametrize("native", [True, False])
def test_a_multi_query_retriever_asks_for_all_variants_at_once(
    wrap: Wrap, model: ScriptedEmbeddings, native: bool
) -> None:
    embeddings = wrap(model)
    retriever = MultiQueryRetriever.from_llm(
        _store(embeddings).as_retriever(), FakeListChatModel(responses=["\n".join(VARIANTS)])
    )
    retriever.llm_chain = retriever.llm_chain | prefetch_tap(embeddings)
    gates = [model.hold(variant) for variant in VARIANTS]

    def open_when_all_are_under_way() -> None:
        for gate in gates:
            gate.wait_until_entered()
        for gate in gates:
            gate.open()

    opener = threading.Thread(target=open_when_all_are_under_way, daemon=True)
    opener.start()
    documents = asyncio.run(retriever.ainvoke(ASKED)) if native else retriever.invoke(ASKED)
    opener.join(PATIENCE)
    assert documents
    assert [model.calls_for(variant) for variant in VARIANTS] == [1, 1, 1]
    stats = embeddings.stats()
    assert (stats.prefetch_started, stats.query_missed) == (3, 0)


def test_a_multi_query_retriever_without_a_tap_misses_with_every_variant(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    variants = ["How much does it cost?", "How much is the price of it?"]
    retriever = MultiQueryRetriever.from_llm(
        _store(embeddings).as_retriever(), FakeListChatModel(responses=["\n".join(variants)])
    )
    embeddings.prefetch(ASKED)
    embeddings.executor.run_all()
    retriever.invoke(ASKED)
    assert embeddings.stats().query_missed == 2
    for variant in variants:
        miss = embeddings.explain_miss(variant)
        assert miss is not None
        assert miss.reason is MissReason.REWRITTEN
