"""What tests of several files need: threads, waits, and models that have one side only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings._background import Background
from prefetch_embeddings._background.pool import WorkerPool
from prefetch_embeddings.testing import ManualTime

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds after which a test gives up on what should have come long before."""


class Call(Generic[T]):
    """Calls a function in a thread of its own; daemonic, so that a hanging one fails one test."""

    def __init__(self, function: Callable[..., T], *args: object) -> None:
        self._result: T
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._result = function(*args)
            except BaseException as error:
                self._error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def result(self) -> T:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._result

    def error(self) -> BaseException:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the call hangs"
        assert self._error is not None, "the call succeeded"
        return self._error


def until(condition: Callable[[], object]) -> None:
    """Wait for another thread to bring about what has no event of its own."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.001)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it never came about")


async def auntil(condition: Callable[[], object]) -> None:
    """Do what `until` does, without blocking the loop."""
    for _ in range(int(PATIENCE / 0.001)):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came about")


class QueriesTakenIn:
    """Counts the queries that have met their flight, of whatever wrapper it is made for."""

    def __init__(self, embeddings: PrefetchingEmbeddings) -> None:
        self._embeddings = embeddings
        self.start_anew()

    def wait_for(self, number: int) -> None:
        """Wait until so many more have."""
        self._seen += number
        until(lambda: self._number() >= self._seen)

    def start_anew(self) -> None:
        """Forget those that nobody waited for."""
        self._seen = self._number()

    def _number(self) -> int:
        stats = self._embeddings.stats()
        return stats.query_ready + stats.query_joined + stats.query_claimed + stats.query_missed


class TimeByHand(PrefetchingEmbeddings):
    """A wrapper with real threads, whose clock stands still until the test advances it."""

    def __init__(self, underlying_embeddings: Embeddings, **options: Any) -> None:
        self.time = ManualTime()
        super().__init__(underlying_embeddings, **options)

    def _background(self) -> Background:
        return Background(self.time, self.time, WorkerPool)


def waiters(embeddings: PrefetchingEmbeddings, text: str) -> int:
    """Return how many queries and explicit waits wait for the flight of `text`."""
    return embeddings.prefetcher.waiters(text)


class SyncSideOnly(Embeddings):
    """A model whose async methods are LangChain's: the sync ones, in the loop's executor."""

    def __init__(self, model: Embeddings) -> None:
        self._model = model

    def embed_query(self, text: str) -> list[float]:
        return self._model.embed_query(text)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._model.embed_documents(texts)


class AsyncSideOnly(Embeddings):
    """A model that cannot be called without a loop."""

    def __init__(self, model: Embeddings) -> None:
        self._model = model

    def embed_query(self, text: str) -> list[float]:
        raise NotImplementedError

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    async def aembed_query(self, text: str) -> list[float]:
        return await self._model.aembed_query(text)
