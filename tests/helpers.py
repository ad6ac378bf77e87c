"""What tests of several files need: threads, waits, and models that have one side only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings

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

    def __init__(self, embeddings: PrefetchingEmbeddings, monkeypatch: pytest.MonkeyPatch) -> None:
        self._taken_in = threading.Semaphore(0)
        enter = embeddings._flights.enter

        def telling(*args: Any, **options: Any) -> Any:
            met = enter(*args, **options)
            self._taken_in.release()
            return met

        monkeypatch.setattr(embeddings._flights, "enter", telling)

    def wait_for(self, number: int) -> None:
        """Wait until so many more have."""
        for _ in range(number):
            assert self._taken_in.acquire(timeout=PATIENCE), "a query has met no flight"

    def start_anew(self) -> None:
        """Forget those that nobody waited for."""
        self._taken_in = threading.Semaphore(0)


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
