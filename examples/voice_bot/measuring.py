"""Measuring what a turn waits for: thin wrappers around any embeddings, and any retriever."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable
from pydantic import PrivateAttr


@dataclass(frozen=True)
class Call:
    """One call: when it began (on `time.perf_counter`) and how many seconds it took."""

    began: float
    seconds: float


class Calls:
    """Keeps how long each call took."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, Call]] = []  # appending is atomic

    def calls_for(self, text: str) -> list[Call]:
        """The calls for one text, oldest first."""
        return [call for asked, call in self._calls if asked == text]

    @property
    def count(self) -> int:
        """How many calls there were."""
        return len(self._calls)

    def forget_calls(self) -> None:
        """Begin anew."""
        self._calls.clear()

    @contextmanager
    def timed(self, text: str) -> Iterator[None]:
        """Time one call for as long as the block lasts."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._calls.append((text, Call(began, time.perf_counter() - began)))


class MeasuredEmbeddings(Embeddings):
    """Keeps how long each query took.

    Args:
        underlying_embeddings: Does the work.
    """

    def __init__(self, underlying_embeddings: Embeddings) -> None:
        self.underlying_embeddings = underlying_embeddings
        self.calls = Calls()

    def embed_query(self, text: str) -> list[float]:
        """Embed a query, and keep how long it took."""
        with self.calls.timed(text):
            return self.underlying_embeddings.embed_query(text)

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query, and keep how long it took."""
        with self.calls.timed(text):
            return await self.underlying_embeddings.aembed_query(text)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, unmeasured."""
        return self.underlying_embeddings.embed_documents(texts)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, unmeasured."""
        return await self.underlying_embeddings.aembed_documents(texts)


class MeasuredRetriever(BaseRetriever):
    """Keeps how long each retrieval took.

    Args:
        underlying_retriever: Does the work.
    """

    underlying_retriever: Runnable[str, list[Document]]
    _calls: Calls = PrivateAttr(default_factory=Calls)

    @property
    def calls(self) -> Calls:
        """The retrievals so far."""
        return self._calls

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        with self._calls.timed(query):
            return self.underlying_retriever.invoke(query)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        with self._calls.timed(query):
            return await self.underlying_retriever.ainvoke(query)
