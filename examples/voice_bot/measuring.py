"""Measuring what a turn waits for: a thin wrapper around any embeddings."""

import time
from dataclasses import dataclass

from langchain_core.embeddings import Embeddings


@dataclass(frozen=True)
class Call:
    """One query: when it began (on `time.perf_counter`) and how many seconds it took."""

    began: float
    seconds: float


class MeasuredEmbeddings(Embeddings):
    """Keeps how long each query took.

    Between the vector store and its embeddings it sees what the chain waits for; around the model
    it sees what the model was asked.

    Args:
        underlying_embeddings: Does the work.
    """

    def __init__(self, underlying_embeddings: Embeddings) -> None:
        self.underlying_embeddings = underlying_embeddings
        self._calls: list[tuple[str, Call]] = []  # appending is atomic

    def calls_for(self, text: str) -> list[Call]:
        """The queries for one text, oldest first."""
        return [call for asked, call in self._calls if asked == text]

    @property
    def count(self) -> int:
        """How many queries there were."""
        return len(self._calls)

    def forget_calls(self) -> None:
        """Begin anew."""
        self._calls.clear()

    def embed_query(self, text: str) -> list[float]:
        """Embed a query, and keep how long it took."""
        began = time.perf_counter()
        try:
            return self.underlying_embeddings.embed_query(text)
        finally:
            self._calls.append((text, Call(began, time.perf_counter() - began)))

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query, and keep how long it took."""
        began = time.perf_counter()
        try:
            return await self.underlying_embeddings.aembed_query(text)
        finally:
            self._calls.append((text, Call(began, time.perf_counter() - began)))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, unmeasured."""
        return self.underlying_embeddings.embed_documents(texts)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, unmeasured."""
        return await self.underlying_embeddings.aembed_documents(texts)
