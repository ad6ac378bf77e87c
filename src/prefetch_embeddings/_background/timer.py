"""One thread that calls functions later: pauses between attempts, debounces, overdue calls."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from prefetch_embeddings._background import forks, pool
from prefetch_embeddings.reporting import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    Entry: TypeAlias = tuple[float, int, Callable[[], None]]

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
    """A daemon thread that lives while there are calls to come, and a little longer.

    Nothing here can be met half done by a finaliser or a signal handler that calls the timer
    while the same thread is inside it: the inbox is a `SimpleQueue`, the heap belongs to the thread
    alone, and `_running` is only ever tried, never waited for.

    Invariant: while the inbox holds something, `_running` is held by a thread that will look, or
    somebody is about to try for it. The thread lets go of `_running` before its last look, and
    `call_later` tries for it after its entry is in the inbox. One of the two sees the other.
    """

    def __init__(self) -> None:
        self.reset_after_fork()
        forks.register(self)

    def reset_after_fork(self) -> None:
        """Start anew: in a forked child the thread does not exist."""
        self._inbox: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()  # None: to close
        self._order = itertools.count()
        self._running = threading.Lock()  # held from the start of the thread to its end
        self._closed = False

    def call_later(self, seconds: float, call: Callable[[], None]) -> bool:
        """Call `call()` from the timer's thread in `seconds` seconds.

        Returns:
            False if it never will: after `close`, and where no thread can be started.
        """
        if self._closed:
            return False
        if type(self._inbox) is not queue.SimpleQueue:
            # gevent has patched the standard library since: the old inbox would stop all greenlets.
            self.reset_after_fork()
        if not self._has_thread():
            return False
        self._inbox.put((time.monotonic() + seconds, next(self._order), call))
        return self._has_thread()

    def close(self) -> None:
        """Call off everything and let the thread end."""
        self._closed = True
        self._inbox.put(None)

    def _has_thread(self) -> bool:
        """Start the thread unless there is one; False if there can be none."""
        if not self._running.acquire(blocking=False):
            return True
        try:
            pool.start(
                threading.Thread(target=self._work, name="prefetch-embeddings-timer", daemon=True)
            )
        except BaseException as error:
            self._running.release()
            if not isinstance(error, RuntimeError):
                raise
            return False
        return True

    def _work(self) -> None:
        inbox, running = self._inbox, self._running
        heap: list[Entry] = []
        while self._inbox is inbox:  # else a call has forked, and this is the child's only thread
            left = heap[0][0] - time.monotonic() if heap else LINGER_SECONDS
            if left <= 0:
                _call(heapq.heappop(heap)[2])
                continue
            try:
                entry = inbox.get(timeout=left)
            except queue.Empty:
                if heap:
                    continue
                running.release()
                if inbox.empty() or not running.acquire(blocking=False):
                    return
                continue
            if entry is None or self._closed:
                running.release()
                return
            heapq.heappush(heap, entry)
            del entry  # a thread that sleeps keeps nothing alive but what it will call


def _call(call: Callable[[], None]) -> None:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - one bad call must not stop the others
        logger.error("a timed call raised %s", type(error).__name__)
