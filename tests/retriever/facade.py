"""A prefetching retriever in the clothes of a model, for tests that ask for vectors."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever

from prefetch_embeddings import PrefetchingRetriever


class Searching(BaseRetriever):
    """Finds one document for a query, which has the query's vector in its metadata."""

    model: Embeddings

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [Document(query, metadata={"vector": self.model.embed_query(query)})]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [Document(query, metadata={"vector": await self.model.aembed_query(query)})]


class RetrievedVectors(Embeddings):
    """Embeds by retrieving, and passes all else on to the retriever."""

    def __init__(self, model: Embeddings, kind: type[PrefetchingRetriever], **options: Any) -> None:
        options.pop("symmetric", None)
        self.retriever = kind(Searching(model=model), **options)

    def embed_query(self, text: str) -> list[float]:
        return _vector(self.retriever.invoke(text))

    async def aembed_query(self, text: str) -> list[float]:
        return _vector(await self.retriever.ainvoke(text))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [_vector(documents) for documents in self.retriever.batch(texts)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.retriever, name)


def _vector(documents: list[Document]) -> list[float]:
    (document,) = documents
    vector: list[float] = document.metadata["vector"]
    return vector
