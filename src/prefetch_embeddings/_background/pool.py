"""The bounded pool of prefetch threads: runs jobs in order, and gives queued ones back."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

IDLE_SECONDS: Final = 30.0
"""After so long without work a thread ends, so that a forgotten pool leaves nothing behind."""


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        RuntimeError: There can be no more threads, or the interpreter is shutting down. (Until
            Python 3.12 `Thread.start` could hang then.)
    """
    if sys.is_finalizing():
        raise RuntimeError("the interpreter is shutting down")
    thread.start()


class Executor(Protocol):
    """What runs jobs in the background. `WorkerPool` does; tests bring others."""

    def submit(self, job: Hashable, run: Callable[[Any], None]) -> bool:
        """Have `run(job)` called soon, elsewhere. Never blocks. False: refused."""

    def withdraw(self, job: Hashable) -> None:
        """Forget `job` if it is still queued."""

    def close(self) -> None:
        """Take nothing more. Does not wait."""

    def reset_after_fork(self) -> None:
        """Start anew in a forked child, where none of the threads exist."""


class WorkerPool:
    """Up to `max_workers` daemon threads, started as needed; None: no job waits for another.

    Daemon threads, and a queue of its own, because `ThreadPoolExecutor` keeps the interpreter
    alive until its whole queue has run, and hangs in a forked child.

    Invariant: a thread that found the queue empty has counted itself in `_idle` under the same
    lock; `submit` takes one off `_idle` for each token it puts into `_wakeups`. So threads that
    wait = `_idle` + tokens on their way, and no job stays queued while a thread sleeps.
    """

    def __init__(self, max_workers: int | None, *, name: str = "prefetch-embeddings") -> None:
        self._max_workers = max_workers
        self._name = name
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start anew: in a forked child none of the threads exist."""
        self._lock = threading.Lock()
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        # Guarded by _lock:
        self._jobs: OrderedDict[Hashable, Callable[[Any], None]] = OrderedDict()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def submit(self, job: Hashable, run: Callable[[Any], None]) -> bool:
        """Have `run(job)` called in a worker thread, after the jobs that were there before.

        Returns:
            False if nothing will run it: the pool is closed, or no thread can be started.
        """
        with self._lock:
            if self._closed:
                return False
            self._jobs[job] = run
            wake = self._idle > 0
            if wake:
                self._idle -= 1
            elif self._full():
                return True  # all are busy; the next to finish looks into the queue
        if wake:
            self._wakeups.put(None)
            return True
        return self._start_thread(job)

    def _start_thread(self, job: Hashable) -> bool:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        with self._lock:
            if self._full():
                return True
            self._threads.add(thread)
        try:
            start(thread)
        except RuntimeError:
            with self._lock:
                self._threads.discard(thread)
                if not self._threads or self._max_workers is None:
                    return self._jobs.pop(job, None) is None  # gone: another thread has taken it
        return True

    def _full(self) -> bool:
        return self._max_workers is not None and len(self._threads) >= self._max_workers

    def withdraw(self, job: Hashable) -> None:
        """Forget `job` if it is still queued."""
        with self._lock:
            self._jobs.pop(job, None)

    def close(self) -> None:
        """Take nothing more, and let the threads end after what is queued. Does not wait."""
        with self._lock:
            self._closed = True
            tokens, self._idle = self._idle, 0
        for _ in range(tokens):
            self._wakeups.put(None)

    def join(self, timeout: float) -> bool:
        """Wait, `timeout` seconds at the most, until no thread is left; True if so."""
        give_up_at = time.monotonic() + timeout
        while self._threads:  # each takes itself out as its last step
            if time.monotonic() > give_up_at:
                return False
            time.sleep(0.001)
        return True

    def _work(self) -> None:
        lock = self._lock
        while (
            self._lock is lock
        ):  # else a job has forked, and this is the child, and its last thread
            with lock:
                if self._jobs:
                    job, run = self._jobs.popitem(last=False)
                elif self._closed:
                    self._threads.discard(threading.current_thread())
                    return
                else:
                    self._idle += 1
                    run = None
            if run is not None:
                run(job)
                del job, run  # a parked thread keeps nothing alive
            elif not self._park():
                return

    def _park(self) -> bool:
        """Wait for a token; False when none came for so long that the thread should end."""
        try:
            self._wakeups.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            with self._lock:
                if self._idle:
                    self._idle -= 1
                    self._threads.discard(threading.current_thread())
                    return False
            self._wakeups.get()  # a submit counted on this thread: its token is on its way
        return True
