"""Time and threads in the hands of a test."""

from __future__ import annotations

import heapq
import itertools
import threading
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from prefetch_embeddings._background import Background
from prefetch_embeddings.embeddings import PrefetchingEmbeddings
from prefetch_embeddings.retriever import PrefetchingRetriever

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.runnables import Runnable

    from prefetch_embeddings._background.pool import Source


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


class ManualPrefetchingRetriever(PrefetchingRetriever):
    """`PrefetchingRetriever` with its background and its time in the test's hands.

    Takes what `PrefetchingRetriever` takes. Queries run as ever, in their caller's thread.
    """

    _executor: ManualExecutor = PrivateAttr()
    _time: ManualTime = PrivateAttr(default_factory=ManualTime)

    def __init__(self, underlying_retriever: Runnable[str, list[Document]], **options: Any) -> None:
        super().__init__(underlying_retriever, **options)

    @property
    def executor(self) -> ManualExecutor:
        """Where prefetches queue until the test runs them."""
        return self._executor

    @property
    def time(self) -> ManualTime:
        """The clock that the time to live goes by, the pauses, and when a call is overdue."""
        return self._time

    def _background(self) -> Background:
        return Background(self._time, self._time, self._make_executor)

    def _make_executor(self, source: Source, max_workers: int) -> ManualExecutor:  # noqa: ARG002
        self._executor = ManualExecutor(source)
        return self._executor
