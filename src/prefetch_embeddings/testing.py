"""What it takes to test a bot without sleeping: a model with a script, time and threads by hand.

Example:
    ```python
    model = ScriptedEmbeddings()
    with ManualPrefetchingEmbeddings(model) as embeddings:
        embeddings.prefetch("how much is it?")  # queued, and nothing runs it by itself
        embeddings.executor.run_next()
        assert embeddings.is_ready("how much is it?")
        embeddings.time.advance(301.0)
        assert not embeddings.is_ready("how much is it?")
    assert_no_leaks(embeddings)
    ```
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.embeddings import Embeddings

from prefetch_embeddings._background import Background
from prefetch_embeddings.embeddings import PrefetchingEmbeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prefetch_embeddings._background.pool import Source

T = TypeVar("T")

__all__ = [
    "Gate",
    "ManualExecutor",
    "ManualPrefetchingEmbeddings",
    "ManualTime",
    "ScriptedEmbeddings",
    "assert_no_leaks",
]

PATIENCE = 30.0
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


class ScriptedEmbeddings(Embeddings):
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
        self._delays = delays
        # Changed by single atomic steps, without a lock that a fork could leave held:
        self._calls: list[tuple[str, tuple[str, ...]]] = []
        self._failures: dict[str, deque[BaseException]] = {}
        self._gates: dict[str, deque[Gate]] = {}

    def vector(self, text: str) -> list[float]:
        """Return the right vector of `text`."""
        seed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        return [(seed[i % len(seed)] + 1) / (i + 1) * (-1) ** i for i in range(self.dimensions)]

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

    def embed_query(self, text: str) -> list[float]:
        """Embed a query by the script."""
        return self._answer("embed_query", [text])[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents by the script."""
        return self._answer("embed_documents", texts)

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query by the script, on the event loop."""
        return (await self._aanswer("aembed_query", [text]))[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents by the script, on the event loop."""
        return await self._aanswer("aembed_documents", texts)

    def _answer(self, method: str, texts: list[str]) -> list[list[float]]:
        gates, errors, delay = self._next(method, texts)
        for gate in gates:
            gate.hold()
        if delay:
            time.sleep(delay)
        for error in errors:
            raise error
        return [self.vector(text) for text in texts]

    async def _aanswer(self, method: str, texts: list[str]) -> list[list[float]]:
        gates, errors, delay = self._next(method, texts)
        for gate in gates:
            await gate.ahold()
        if delay:
            await asyncio.sleep(delay)
        for error in errors:
            raise error
        return [self.vector(text) for text in texts]

    def _next(self, method: str, texts: list[str]) -> tuple[list[Gate], list[BaseException], float]:
        self._calls.append((method, tuple(texts)))
        gates = _take(self._gates, texts)
        errors = _take(self._failures, texts)
        if self._delays is None:
            return gates, errors, 0.0
        if callable(self._delays):
            return gates, errors, max(self._delays(text) for text in texts)
        return gates, errors, max(self._delays.get(text, 0.0) for text in texts)


def _take(script: dict[str, deque[T]], texts: list[str]) -> list[T]:
    """Take the next entry of each text that has one."""
    taken = []
    for text in texts:
        with suppress(KeyError, IndexError):
            taken.append(script[text].popleft())
    return taken


class ManualTime:
    """A monotonic clock that stands still until told to advance; calls what is due by then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._now = 1000.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self._now

    def call_later(self, seconds: float, call: Callable[[], None]) -> bool:
        """Have `call()` called by the `advance` that reaches its time."""
        with self._lock:
            heapq.heappush(self._heap, (self._now + seconds, next(self._order), call))
        return True

    def advance(self, seconds: float) -> None:
        """Let time pass, and make the calls that become due, in their order."""
        with self._lock:
            until = self._now + seconds
        while True:
            with self._lock:
                if not self._heap or self._heap[0][0] > until:
                    self._now = until
                    return
                due, _, call = heapq.heappop(self._heap)
                self._now = max(self._now, due)
            call()

    @property
    def calls_to_come(self) -> int:
        """How many calls have not been made yet."""
        with self._lock:
            return len(self._heap)

    def close(self) -> None:
        """Call off everything."""
        with self._lock:
            self._heap.clear()

    def reset_after_fork(self) -> None:
        """Start anew in a forked child."""
        self._lock = threading.Lock()
        self._heap = []


class ManualExecutor:
    """Holds back what is to run in the background, and runs it when told, in the calling thread.

    Args:
        source: Where it takes its jobs from.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.refusing = False
        """Set to refuse what comes, as a pool does that can start no thread."""

    def __len__(self) -> int:
        """Return how many jobs are queued."""
        return len(self._source)

    @property
    def accepts(self) -> bool:
        """Whether it does not refuse."""
        return not self.refusing

    def wake(self) -> bool:
        """Do nothing yet; False if it never will."""
        return not self.refusing

    def run_next(self) -> bool:
        """Run the oldest job; False if there is none."""
        job = self._source.take()
        if job is not None:
            job()
        return job is not None

    def run_all(self) -> int:
        """Run jobs until there are none; return how many."""
        ran = 0
        while self.run_next():
            ran += 1
        return ran

    def close(self) -> None:
        """Refuse what comes."""
        self.refusing = True

    def join(self, timeout: float) -> bool:  # noqa: ARG002 - there are no threads
        """Return True: nothing runs but in the test's own calls."""
        return True

    def reset_after_fork(self) -> None:
        """Do nothing: it has no threads that could be missing in a forked child."""


class ManualPrefetchingEmbeddings(PrefetchingEmbeddings):
    """`PrefetchingEmbeddings` with its background and its time in the test's hands.

    Takes what `PrefetchingEmbeddings` takes. Queries run as ever, in their caller's thread.

    Attributes:
        executor: Where prefetches queue until the test runs them.
        time: The clock that the time to live goes by, the pauses between attempts, and when a
            call is overdue.
    """

    executor: ManualExecutor

    def __init__(self, underlying_embeddings: Embeddings, **options: Any) -> None:
        self.time = ManualTime()
        super().__init__(underlying_embeddings, **options)

    def _background(self) -> Background:
        return Background(self.time, self.time, self._make_executor)

    def _make_executor(self, source: Source, max_workers: int) -> ManualExecutor:  # noqa: ARG002
        self.executor = ManualExecutor(source)
        return self.executor


def assert_no_leaks(embeddings: PrefetchingEmbeddings) -> None:
    """Assert that nothing is under way, nothing hangs and the counters add up.

    To be called when the test's own calls have returned. A wrapper that was closed must have no
    worker thread left either; those that still run a call get some time to notice.

    Raises:
        AssertionError: If something leaked.
    """
    prefetcher = embeddings.prefetcher
    if prefetcher.closed:
        assert prefetcher.join(PATIENCE), "worker threads outlive their pool"
    leaks = prefetcher.leaks()
    assert not leaks, "; ".join(leaks)
