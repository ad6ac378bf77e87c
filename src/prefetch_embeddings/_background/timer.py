"""One thread that calls functions later: pauses between attempts, debounces, hedges."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

from prefetch_embeddings._background import pool as workers
from prefetch_embeddings.events import logger

if TYPE_CHECKING:
    from collections.abc import Callable

LINGER_SECONDS: Final = 5.0
"""How long the thread waits for a next call before it ends."""


class Scheduler(Protocol):
    """What calls functions later. `Timer` does; tests bring others.

    No call can be called off: each looks, when its time has come, whether it is still wanted.
    """

    def call_later(self, seconds: float, call: Callable[[], None]) -> bool:
        """Call `call()` in `seconds` seconds; False if that can never be.

        `call` must be quick and must not raise.
        """

    def close(self) -> None:
        """Call off everything."""

    def reset_after_fork(self) -> None:
        """Start anew in a forked child."""


class Timer:
    """A heap of calls to come, and one daemon thread while there are any.

    Invariant: while `_heap` is not empty there is a thread, and it sleeps no longer than until
    the earliest entry; who puts in an earlier one wakes it.
    """

    def __init__(self) -> None:
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start anew: in a forked child the thread does not exist."""
        self._changed = threading.Condition(threading.Lock())
        # Guarded by _changed:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def call_later(self, seconds: float, call: Callable[[], None]) -> bool:
        """Call `call()` from the timer's thread in `seconds` seconds.

        Returns:
            False if it never will: after `close`, and where no thread can be started.
        """
        with self._changed:
            if self._closed:
                return False
            if self._thread is None:
                thread = threading.Thread(
                    target=self._work, name="prefetch-embeddings-timer", daemon=True
                )
                try:
                    workers.start(thread)  # it has nothing to do before the lock is free
                except RuntimeError:
                    return False
                self._thread = thread
            entry = (time.monotonic() + seconds, next(self._order), call)
            heapq.heappush(self._heap, entry)
            if self._heap[0] is entry:
                self._changed.notify()
            return True

    def close(self) -> None:
        """Call off everything and let the thread end."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()

    def _work(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - one bad call must not stop the others
                logger.error("a timed call raised %s", type(error).__name__)
            del call  # a thread that sleeps keeps nothing alive

    def _next(self) -> Callable[[], None] | None:
        """Sleep until a call is due and return it; None when there was none for a while."""
        with self._changed:
            lingered = False
            while True:
                if self._heap:
                    left = self._heap[0][0] - time.monotonic()
                    if left <= 0:
                        return heapq.heappop(self._heap)[2]
                    lingered = False
                    self._changed.wait(left)
                elif lingered or self._closed:
                    self._thread = None
                    return None
                else:
                    lingered = not self._changed.wait(LINGER_SECONDS)
