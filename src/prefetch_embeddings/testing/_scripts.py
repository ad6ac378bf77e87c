"""A model and a retriever that answer by a script."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from pydantic import PrivateAttr

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
    )

T = TypeVar("T")

PATIENCE: Final = 30.0
"""Seconds after which a wait that a test relies on is given up as hanging."""


class Gate:
    """Holds calls of a model until it is opened, for threads and coroutines alike."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._entered = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []  # by _lock

    def open(self) -> None:
        """Let every held call go on, and later ones pass."""
        self._open.set()
        with self._lock:
            sleepers, self._sleepers = self._sleepers, []
        for loop, event in sleepers:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(event.set)

    def wait_until_entered(self) -> None:
        """Block until one more call has come to the gate.

        Raises:
            TimeoutError: If none comes.
        """
        if not self._entered.acquire(timeout=PATIENCE):
            raise TimeoutError("no call has come to the gate")

    async def await_until_entered(self) -> None:
        """Do what `wait_until_entered` does, without blocking the loop."""
        await asyncio.to_thread(self.wait_until_entered)

    def hold(self) -> None:
        """Hold the calling thread until the gate is open."""
        self._entered.release()
        self._open.wait()

    async def ahold(self) -> None:
        """Hold the calling coroutine until the gate is open."""
        event = asyncio.Event()
        with self._lock:
            if not self._open.is_set():
                self._sleepers.append((asyncio.get_running_loop(), event))
            else:
                event.set()
        self._entered.release()
        await event.wait()


class _Script:
    """What calls are to do, and which there were."""

    def __init__(self, delays: Mapping[str, float] | Callable[[str], float] | None) -> None:
        self._delays = delays
        # Changed by single atomic steps, without a lock that a fork could leave held:
        self._calls: list[tuple[str, tuple[str, ...]]] = []
        self._failures: dict[str, deque[BaseException]] = {}
        self._gates: dict[str, deque[Gate]] = {}

    def fail(self, text: str, *errors: BaseException) -> None:
        """Make the next calls for `text` raise these errors, one each."""
        self._failures.setdefault(text, deque()).extend(errors)

    def hold(self, text: str) -> Gate:
        """Hold the next call for `text` until the returned gate is opened."""
        gate = Gate()
        self._gates.setdefault(text, deque()).append(gate)
        return gate

    @property
    def calls(self) -> list[tuple[str, tuple[str, ...]]]:
        """The calls so far: the method's name and the texts."""
        return list(self._calls)

    def calls_for(self, text: str) -> int:
        """Return how many calls asked for `text`."""
        return sum(text in texts for _, texts in self.calls)

    def play(self, method: str, texts: list[str]) -> None:
        """Do what the script says of a call."""
        gates, errors, delay = self._next(method, texts)
        for gate in gates:
            gate.hold()
        if delay:
            time.sleep(delay)
        for error in errors:
            raise error

    async def aplay(self, method: str, texts: list[str]) -> None:
        """Do what the script says of a call, on the event loop."""
        gates, errors, delay = self._next(method, texts)
        for gate in gates:
            await gate.ahold()
        if delay:
            await asyncio.sleep(delay)
        for error in errors:
            raise error

    def _next(self, method: str, texts: list[str]) -> tuple[list[Gate], list[BaseException], float]:
        self._calls.append((method, tuple(texts)))
        gates = _take(self._gates, texts)
        errors = _take(self._failures, texts)
        if self._delays is None:
            return gates, errors, 0.0
        if callable(self._delays):
            return gates, errors, max(self._delays(text) for text in texts)
        return gates, errors, max(self._delays.get(text, 0.0) for text in texts)


class _Scripted:
    """The part of a scripted model or retriever that the test talks to."""

    _script: _Script

    def fail(self, text: str, *errors: BaseException) -> None:
        """Make the next calls for `text` raise these errors, one each."""
        self._script.fail(text, *errors)

    def hold(self, text: str) -> Gate:
        """Hold the next call for `text` until the returned gate is opened."""
        return self._script.hold(text)

    @property
    def calls(self) -> list[tuple[str, tuple[str, ...]]]:
        """The calls so far: the method's name and the texts."""
        return self._script.calls

    def calls_for(self, text: str) -> int:
        """Return how many calls asked for `text`."""
        return self._script.calls_for(text)


class ScriptedEmbeddings(_Scripted, Embeddings):
    """A model that answers by a script, at once if the script says nothing.

    The vector of a text depends on the text alone, so that a wrong one is seen.

    Args:
        dimensions: The length of its vectors.
        delays: Seconds that a call takes: by text, or returned by a function of the text.
    """

    def __init__(
        self,
        dimensions: int = 8,
        *,
        delays: Mapping[str, float] | Callable[[str], float] | None = None,
    ) -> None:
        self.dimensions = dimensions
        self._script = _Script(delays)

    def vector(self, text: str) -> list[float]:
        """Return the right vector of `text`."""
        seed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        return [(seed[i % len(seed)] + 1) / (i + 1) * (-1) ** i for i in range(self.dimensions)]

    def embed_query(self, text: str) -> list[float]:
        """Embed a query by the script."""
        self._script.play("embed_query", [text])
        return self.vector(text)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents by the script."""
        self._script.play("embed_documents", texts)
        return [self.vector(text) for text in texts]

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query by the script, on the event loop."""
        await self._script.aplay("aembed_query", [text])
        return self.vector(text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents by the script, on the event loop."""
        await self._script.aplay("aembed_documents", texts)
        return [self.vector(text) for text in texts]


class ScriptedRetriever(_Scripted, BaseRetriever):
    """A retriever that answers by a script, at once if the script says nothing.

    Its documents depend on the query alone, so that wrong ones are seen.

    Args:
        delays: Seconds that a call takes: by text, or returned by a function of the text.
    """

    _script: _Script = PrivateAttr()

    def __init__(
        self, *, delays: Mapping[str, float] | Callable[[str], float] | None = None
    ) -> None:
        super().__init__()
        self._script = _Script(delays)

    def documents(self, text: str) -> list[Document]:
        """Return the right documents for `text`."""
        return [Document(f"{text} {n}", metadata={"rank": n, "for": [text]}) for n in (1, 2)]

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        self._script.play("invoke", [query])
        return self.documents(query)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        await self._script.aplay("ainvoke", [query])
        return self.documents(query)


def _take(script: dict[str, deque[T]], texts: list[str]) -> list[T]:
    """Take the next entry of each text that has one."""
    taken = []
    for text in texts:
        with suppress(KeyError, IndexError):
            taken.append(script[text].popleft())
    return taken
