"""`PrefetchingRetriever` where LangChain's retrievers go, and in its traces."""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from langchain_chroma import Chroma
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.retrievers import (
    ContextualCompressionRetriever,
    EnsembleRetriever,
    MultiQueryRetriever,
    ParentDocumentRetriever,
)
from langchain_classic.storage import InMemoryStore
from langchain_core.callbacks import BaseCallbackHandler, Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, Runnable, RunnableConfig, RunnableLambda
from langchain_core.tools import create_retriever_tool
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_qdrant import QdrantVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests
from langchain_text_splitters import CharacterTextSplitter

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchingRetriever
from prefetch_embeddings.testing import (
    ScriptedEmbeddings,
    ScriptedRetriever,
    assert_no_leaks,
)

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`langchain-community` is being sunset", DeprecationWarning)
    from langchain_community.vectorstores import FAISS

TEXTS = ["red light", "gigabit tariff", "roaming abroad", "cancel a contract"]

Wrap = Callable[..., PrefetchingRetriever]


@pytest.fixture
def wrap() -> Iterator[Wrap]:
    made: list[PrefetchingRetriever] = []

    def make(retriever: Runnable[str, list[Document]], **options: Any) -> PrefetchingRetriever:
        made.append(PrefetchingRetriever(retriever, **options))
        return made[-1]

    yield make
    for retriever in made:
        retriever.close()
        assert_no_leaks(retriever)


class Few(BaseRetriever):
    """The standard tests want to say how many documents there are."""

    k: int = 3

    def _get_relevant_documents(
        self, query: str, *, k: int | None = None, **_: Any
    ) -> list[Document]:
        return [Document(f"{query} {n}") for n in range(k or self.k)]


class StandardRetriever(PrefetchingRetriever):
    def __init__(self, **options: Any) -> None:
        super().__init__(Few(**options))


class TestStandard(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[StandardRetriever]:
        return StandardRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {}

    @property
    def retriever_query_example(self) -> str:
        return "q"


# --- Stores, searches, callers -------------------------------------------------------------------


numbers = itertools.count()

STORES: dict[str, Callable[[PrefetchingEmbeddings], VectorStore]] = {
    "Chroma": lambda e: Chroma.from_texts(TEXTS, e, collection_name=f"retriever-{next(numbers)}"),
    "FAISS": lambda e: FAISS.from_texts(TEXTS, e),
    "InMemory": lambda e: InMemoryVectorStore.from_texts(TEXTS, e),
    "Qdrant": lambda e: QdrantVectorStore.from_texts(TEXTS, e, location=":memory:"),
}
SEARCHES: dict[str, dict[str, Any]] = {
    "similarity": {"k": 2},
    "mmr": {"k": 2, "fetch_k": 3},
    "similarity_score_threshold": {"k": 2, "score_threshold": -1e9},
}


@pytest.mark.filterwarnings("ignore:.*(R|r)elevance scores.*")
@pytest.mark.parametrize("caller", ["sync", "async"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("store", STORES)
def test_every_store_and_search(wrap: Wrap, store: str, search: str, caller: str) -> None:
    if search == "similarity_score_threshold" and store == "InMemory":
        pytest.skip("it knows no relevance score")
    model = ScriptedEmbeddings()
    with PrefetchingEmbeddings(model) as embeddings:
        made = STORES[store](embeddings)
        inner = made.as_retriever(search_type=search, search_kwargs=SEARCHES[search])
        right = inner.invoke("q")
        embeddings.clear()
        before = model.calls_for("q")
        retriever = wrap(inner)

        async def on_a_loop() -> list[Document]:
            await retriever.aprefetch("q")
            return await retriever.ainvoke("q")

        if caller == "sync":
            retriever.prefetch("q")
            found = retriever.invoke("q")
        else:
            found = asyncio.run(on_a_loop())
        assert [d.page_content for d in found] == [d.page_content for d in right]
        assert len(found) == 2
        stats = retriever.stats()
        assert stats.query_missed == 0
        assert stats.query_ready + stats.query_joined + stats.query_claimed == 1
        assert model.calls_for("q") - before == 1
    assert_no_leaks(embeddings)


# --- Retrievers of retrievers --------------------------------------------------------------------


class Rank(BaseDocumentCompressor):
    """A reranker that writes its scores into the metadata, as they do."""

    def compress_documents(
        self,
        documents: Any,
        query: str,
        callbacks: Callbacks = None,
    ) -> list[Document]:
        for number, document in enumerate(documents):
            document.metadata["relevance_score"] = number
        return list(reversed(documents))


def _answers(text: str) -> Any:
    """Return a language model that always says the same."""
    return RunnableLambda(lambda _: AIMessage(text))


def _parents(embeddings: PrefetchingEmbeddings) -> BaseRetriever:
    retriever = ParentDocumentRetriever(
        vectorstore=InMemoryVectorStore(embeddings),
        docstore=InMemoryStore(),
        child_splitter=CharacterTextSplitter(separator=" ", chunk_size=6, chunk_overlap=0),
    )
    retriever.add_documents([Document(text) for text in TEXTS])
    return retriever


def _stored(embeddings: PrefetchingEmbeddings) -> BaseRetriever:
    return InMemoryVectorStore.from_texts(TEXTS, embeddings).as_retriever()


COMPOSED: dict[str, Callable[[PrefetchingEmbeddings], Runnable[str, list[Document]]]] = {
    "ensemble": lambda e: EnsembleRetriever(
        retrievers=[_stored(e), ScriptedRetriever()], weights=[0.5, 0.5]
    ),
    "compression": lambda e: ContextualCompressionRetriever(
        base_retriever=_stored(e), base_compressor=Rank()
    ),
    "multi query": lambda e: MultiQueryRetriever.from_llm(
        _stored(e), _answers("one\ntwo"), PromptTemplate.from_template("{question}")
    ),
    "parent document": _parents,
    "chain": lambda e: RunnableLambda(str.casefold) | _stored(e) | RunnableLambda(lambda d: d[:1]),
}


@pytest.mark.parametrize("caller", ["sync", "async"])
@pytest.mark.parametrize("what", COMPOSED)
def test_retrievers_of_retrievers(wrap: Wrap, what: str, caller: str) -> None:
    model = ScriptedEmbeddings()
    with PrefetchingEmbeddings(model) as embeddings:
        inner = COMPOSED[what](embeddings)
        right = inner.invoke("red light")
        calls = len(model.calls)
        embeddings.clear()
        retriever = wrap(inner)
        retriever.prefetch("red light")
        assert retriever.wait_for_prefetch("red light")
        calls = len(model.calls)
        if caller == "sync":
            found = retriever.invoke("red light")
        else:
            found = asyncio.run(retriever.ainvoke("red light"))
        assert [d.page_content for d in found] == [d.page_content for d in right]
        assert len(model.calls) == calls
        assert retriever.stats().query_ready == 1


# --- Chains around it ----------------------------------------------------------------------------

PROMPT = ChatPromptTemplate.from_template("{input} {context}")


@pytest.fixture
def searching() -> ScriptedRetriever:
    return ScriptedRetriever()


@pytest.fixture
def ready(wrap: Wrap, searching: ScriptedRetriever) -> PrefetchingRetriever:
    retriever = wrap(searching)
    retriever.prefetch("q")
    assert retriever.wait_for_prefetch("q")
    return retriever


def _question(_: Any) -> str:
    return "q"


USES: dict[str, Callable[[PrefetchingRetriever], Any]] = {
    "retrieval chain": lambda r: create_retrieval_chain(r, PROMPT | _answers("a")).invoke(
        {"input": "q"}
    ),
    "history": lambda r: create_history_aware_retriever(
        _answers("q"), r, ChatPromptTemplate.from_template("{input}")
    ).invoke({"input": "and that?", "chat_history": [HumanMessage("h")]}),
    "tool": lambda r: create_retriever_tool(r, "search", "Searches.").invoke({"query": "q"}),
    "ensemble": lambda r: EnsembleRetriever(retrievers=[r], weights=[1.0]).invoke("q"),
    "pipe": lambda r: (RunnableLambda(_question) | r | RunnableLambda(len)).invoke({}),
    "batch": lambda r: r.batch(["q"]),
    "abatch": lambda r: asyncio.run(r.abatch(["q"])),
    "stream": lambda r: list(r.stream("q")),
    "with_config": lambda r: r.with_config(tags=["t"]).invoke("q"),
    "with_retry": lambda r: r.with_retry().invoke("q"),
    "with_fallbacks": lambda r: r.with_fallbacks([ScriptedRetriever()]).invoke("q"),
    "configurable": lambda r: r.configurable_fields(
        underlying_retriever=ConfigurableField(id="retriever")
    ).invoke("q"),
}


@pytest.mark.parametrize("use", USES)
def test_what_is_built_around_it_finds_the_prefetch(
    ready: PrefetchingRetriever, searching: ScriptedRetriever, use: str
) -> None:
    assert USES[use](ready)
    assert searching.calls_for("q") == 1
    assert ready.stats().query_ready == 1


def test_a_bound_config_goes_with_prefetches_and_queries(
    wrap: Wrap, searching: ScriptedRetriever
) -> None:
    retriever = wrap(searching)
    bound: Any = retriever.with_config(configurable={"tenant": "a"})
    bound.prefetch("q")
    assert bound.wait_for_prefetch("q")
    bound.invoke("q")
    assert searching.calls_for("q") == 1
    assert not retriever.is_ready("q")


def test_another_retriever_by_configuration(ready: PrefetchingRetriever) -> None:
    other = ScriptedRetriever()
    chosen = ready.configurable_alternatives(
        ConfigurableField(id="which"), default_key="ours", other=other
    )
    assert chosen.invoke("q", {"configurable": {"which": "other"}}) == other.documents("q")
    assert other.calls_for("q") == 1


# --- Traces --------------------------------------------------------------------------------------


class Runs(BaseCallbackHandler):
    """Notes which retriever ran below which run."""

    def __init__(self) -> None:
        self.names: dict[UUID, str] = {}
        self.parents: dict[str, list[str]] = {}
        self.ended: list[str] = []

    def _began(self, name: str, run_id: UUID, parent_run_id: UUID | None) -> None:
        self.names[run_id] = name
        above = "" if parent_run_id is None else self.names[parent_run_id]
        self.parents.setdefault(name, []).append(above)

    def on_retriever_start(
        self,
        serialized: Any,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        self._began(kwargs["name"], run_id, parent_run_id)

    def on_chain_start(
        self,
        serialized: Any,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        self._began(kwargs["name"], run_id, parent_run_id)

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.ended.append(self.names[run_id])


@pytest.mark.parametrize("caller", ["sync", "async"])
def test_a_prefetch_is_a_run_of_the_retriever_where_it_was_asked_for(
    wrap: Wrap, searching: ScriptedRetriever, caller: str
) -> None:
    retriever, runs = wrap(searching), Runs()

    def step(text: str) -> str:
        retriever.prefetch(text)
        assert retriever.wait_for_prefetch(text)
        return text

    async def astep(text: str) -> str:
        await retriever.aprefetch(text)
        assert await retriever.await_for_prefetch(text)
        return text

    first = RunnableLambda(step, astep, name="handler")
    config = RunnableConfig(callbacks=[runs])
    if caller == "sync":
        first.invoke("q", config)
        retriever.invoke("q", config)
    else:
        asyncio.run(first.ainvoke("q", config))
        asyncio.run(retriever.ainvoke("q", config))
    assert runs.parents["ScriptedRetriever"] == ["handler"]
    assert runs.parents["PrefetchingRetriever"] == [""]
    assert runs.ended == ["ScriptedRetriever", "PrefetchingRetriever"]


@pytest.mark.parametrize("caller", ["sync", "async"])
def test_a_query_that_finds_nothing_has_the_retrievers_run_below_its_own(
    wrap: Wrap, searching: ScriptedRetriever, caller: str
) -> None:
    retriever, runs = wrap(searching), Runs()
    config = RunnableConfig(callbacks=[runs], run_name="mine")
    if caller == "sync":
        retriever.invoke("q", config)
    else:
        asyncio.run(retriever.ainvoke("q", config))
    assert runs.parents == {"mine": [""], "ScriptedRetriever": ["mine"]}


def test_a_prefetch_takes_its_callbacks_from_its_config(
    wrap: Wrap, searching: ScriptedRetriever
) -> None:
    retriever, runs = wrap(searching), Runs()
    retriever.prefetch("q", RunnableConfig(callbacks=[runs], run_name="ahead"))
    assert retriever.wait_for_prefetch("q")
    assert runs.parents == {"ahead": [""]}
    assert runs.ended == ["ahead"]
