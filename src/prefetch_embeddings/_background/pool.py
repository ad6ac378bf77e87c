"""Pools of daemon threads: each thread takes jobs while there are any, sleeps, and ends when idle.

They are our own because `ThreadPoolExecutor` keeps the interpreter alive until its whole queue has
run, and hangs in a forked child.

No lock: every shared structure is a deque, a set or a `SimpleQueue`, each changed by single steps
that are atomic by themselves. So a pool may be called from anywhere, also by a finaliser or a
signal handler that interrupts a call of the pool in the same thread.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from prefetch_embeddings._background import forks

if TYPE_CHECKING:
    from collections.abc import Callable

    Job: TypeAlias = Callable[[], None]
    Bell: TypeAlias = queue.SimpleQueue[None]

IDLE_SECONDS: Final = 30.0
"""After so long without work a thread ends, so that a forgotten pool leaves nothing behind."""

RINGING_SECONDS: Final = 1.0
"""How long a thread waits for a ring that is on its way. It comes at once, unless a signal handler
has thrown its sender out between two steps."""


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        RuntimeError: There can be no more threads, or the interpreter is shutting down. (Until
            Python 3.12 `Thread.start` could hang then.)
    """
    if sys.is_finalizing():
        raise RuntimeError("the interpreter is shutting down")
    thread.start()


class Source(Protocol):
    """Where threads take their jobs from."""

    def take(self) -> Job | None:
        """Return the next job, which is the caller's to run; None if there is none."""

    def __len__(self) -> int:
        """Return how many jobs wait."""


class Executor(Protocol):
    """What runs the jobs of a source in the background. `WorkerPool` does; tests bring others."""

    def wake(self) -> bool:
        """Have the source looked at soon, elsewhere. Never blocks. False: nobody ever will."""

    def close(self) -> None:
        """Start nothing more. Does not wait."""

    def join(self, timeout: float) -> bool:
        """Wait, `timeout` seconds at the most, until nothing runs any more; True if so."""

    def reset_after_fork(self) -> None:
        """Start anew in a forked child, where none of the threads exist."""


class WorkerPool:
    """Up to `max_workers` daemon threads that take jobs from a source; None for no limit.

    Invariant: no job waits while a thread sleeps. A thread that found nothing to do first puts its
    bell among the idle ones, and then looks once more; whoever adds a job does so before `wake`
    looks for a bell. One of the two sees the other.
    """

    def __init__(
        self, source: Source, max_workers: int | None, *, name: str = "prefetch-embeddings"
    ) -> None:
        self._source: Final = source
        self._max_workers: Final = max_workers
        self._name: Final = name
        self._start_anew()
        forks.register(self)

    def reset_after_fork(self) -> None:
        """Start anew: in a forked child none of the threads exist."""
        self._start_anew()

    def _start_anew(self) -> None:
        self._idle: deque[Bell] = deque()  # one bell for each thread that sleeps
        self._threads: set[threading.Thread] = set()
        # One for each thread that may still be started:
        self._permits = None if self._max_workers is None else deque(range(self._max_workers))
        self._closed = False

    def wake(self) -> bool:
        """Have a thread look at the source: one that sleeps, a new one, or the next to be free.

        Returns:
            False if none ever will: the pool is closed, or no thread can be started.
        """
        if self._closed:
            return False
        with suppress(IndexError):
            self._idle.pop().put(None)
            return True
        if self._permits is not None:
            try:
                self._permits.pop()
            except IndexError:
                return True  # all are busy, and each looks at the source before it sleeps
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._threads.add(thread)
        try:
            start(thread)
        except BaseException as error:
            self._gone(thread)
            if not isinstance(error, RuntimeError):
                raise
            return self._max_workers is not None and bool(self._threads)
        return True

    def close(self) -> None:
        """Start nothing more, and let the threads end after what waits. Does not wait."""
        self._closed = True
        with suppress(IndexError):
            while True:
                self._idle.pop().put(None)

    def join(self, timeout: float) -> bool:
        """Wait, `timeout` seconds at the most, until no thread is left; True if so."""
        give_up_at = time.monotonic() + timeout
        while self._threads:  # each takes itself out as its last step
            if time.monotonic() > give_up_at:
                return False
            time.sleep(0.001)
        return True

    def _work(self) -> None:
        idle = self._idle
        bell: Bell = queue.SimpleQueue()
        try:
            while True:
                while (job := self._source.take()) is not None:
                    job()
                    del job  # a sleeping thread keeps nothing alive
                    if self._idle is not idle:
                        return  # the job has forked: this is the child, and its only thread
                if not self._sleep(bell):
                    return
        finally:
            if self._idle is idle:
                self._gone(threading.current_thread())
                if len(self._source) and not self._closed:
                    self.wake()  # whoever added it may have counted on this thread

    def _sleep(self, bell: Bell) -> bool:
        """Sleep until the bell rings; False when the thread should end instead."""
        self._idle.append(bell)
        if (len(self._source) or self._closed) and self._put_away(bell):
            return len(self._source) > 0
        try:
            bell.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            if self._put_away(bell):
                return False
            with suppress(queue.Empty):  # somebody has it in hand to ring it
                bell.get(timeout=RINGING_SECONDS)
        return True

    def _put_away(self, bell: Bell) -> bool:
        """Take a bell from the idle ones; False if somebody else has taken it, to ring it."""
        try:
            self._idle.remove(bell)
        except ValueError:
            return False
        return True

    def _gone(self, thread: threading.Thread) -> None:
        self._threads.discard(thread)
        if self._permits is not None:
            self._permits.append(0)


class JobPool(WorkerPool):
    """A pool with a queue of its own. Without a limit of workers no job waits for another."""

    def __init__(self, max_workers: int | None, *, name: str = "prefetch-embeddings") -> None:
        self._jobs = _Jobs()
        super().__init__(self._jobs, max_workers, name=name)

    def submit(self, job: Job) -> bool:
        """Have `job()` called in a thread of the pool, after those that wait already.

        Returns:
            False if nothing will call it: the pool is closed, or no thread can be started.
        """
        self._jobs.append(job)
        if self.wake():
            return True
        try:
            self._jobs.remove(job)
        except ValueError:
            return True  # a thread that was about to end has taken it
        return False

    def reset_after_fork(self) -> None:
        """Start anew: what was queued is the parent's to run."""
        self._jobs.clear()
        super().reset_after_fork()


class _Jobs(deque["Job"]):
    """Jobs in the order in which they came."""

    def take(self) -> Job | None:
        try:
            return self.popleft()
        except IndexError:
            return None
