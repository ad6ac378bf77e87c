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
import weakref
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from prefetch_embeddings._background import forks

if TYPE_CHECKING:
    from collections.abc import Callable

    Job: TypeAlias = Callable[[], None]

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

    @property
    def accepts(self) -> bool:
        """Whether jobs are run at all, as far as is known before one comes."""

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

    A thread that sleeps keeps neither the pool nor the source alive; when the pool goes, it ends.
    """

    def __init__(
        self, source: Source, max_workers: int | None, *, name: str = "prefetch-embeddings"
    ) -> None:
        self._source: Final = source
        self._max_workers: Final = max_workers
        self._name: Final = name
        self.reset_after_fork()
        forks.register(self)

    def reset_after_fork(self) -> None:
        """Start anew: in a forked child none of the threads exist."""
        self._crew = crew = _Crew(self._max_workers)
        # Rung when the pool goes. A function in C: nothing is interrupted in it.
        crew.pool = weakref.ref(self, crew.bell.put)  # type: ignore[arg-type]

    @property
    def accepts(self) -> bool:
        """Whether jobs are run: until it is closed."""
        return self._crew.open

    def wake(self) -> bool:
        """Have a thread look at the source: one that sleeps, a new one, or the next to be free.

        Returns:
            False if none ever will: the pool is closed, or no thread can be started.
        """
        crew = self._crew
        if not crew.open:
            return False
        if crew.idle and crew.ring():
            return True
        if not crew.take_permit():
            return True  # all are busy, and each looks at the source before it sleeps
        thread = threading.Thread(target=_work, args=(crew,), name=self._name, daemon=True)
        try:
            crew.threads.add(thread)
            start(thread)
        except BaseException as error:
            crew.remove(thread)
            if not isinstance(error, RuntimeError):
                raise
            return self._max_workers is not None and bool(crew.threads)
        return True

    def take(self) -> Job | None:
        """Return the next job of the source; None if there is none."""
        return self._source.take()

    def has_work(self) -> bool:
        """Tell whether jobs wait."""
        return len(self._source) > 0

    def is_served_by(self, crew: object) -> bool:
        """Tell whether the threads of `crew` still are this pool's: not so in a forked child."""
        return self._crew is crew

    def close(self) -> None:
        """Start nothing more, and let the threads end after what waits. Does not wait."""
        self._crew.close()

    def join(self, timeout: float) -> bool:
        """Wait, `timeout` seconds at the most, until no thread is left; True if so."""
        give_up_at = time.monotonic() + timeout
        while self._crew.threads:  # each takes itself out as its last step
            if time.monotonic() > give_up_at:
                return False
            time.sleep(0.001)
        return True


class _Crew:
    """The threads of a pool, those that sleep among them.

    Invariants: there are at most as many marks in `idle` as threads that sleep, less the rings on
    their way: who rings takes a mark. And no job waits while a thread sleeps: a thread that found
    nothing to do first leaves its mark, and then looks once more; whoever adds a job does so before
    `wake` looks for a mark. One of the two sees the other. A ring too many does no harm.
    """

    def __init__(self, max_workers: int | None) -> None:
        self.open = True
        self.threads: set[threading.Thread] = set()
        self.idle: deque[None] = deque()  # a mark for each thread that sleeps
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # wakes one of them
        self.pool: weakref.ref[WorkerPool]
        # One for each thread that may still be started:
        self._permits = None if max_workers is None else deque(range(max_workers))

    def take_permit(self) -> bool:
        """Take the right to start a thread; False if there are enough."""
        if self._permits is None:
            return True
        try:
            self._permits.pop()
        except IndexError:
            return False
        return True

    def remove(self, thread: threading.Thread) -> None:
        """Note that a thread has ended, or was never started."""
        self.threads.discard(thread)
        if self._permits is not None:
            self._permits.append(0)

    def ring(self) -> bool:
        """Wake a thread; False if none sleeps."""
        if not self.idle:
            return False
        self.bell.put(None)
        self.take_mark()
        return True

    def take_mark(self) -> bool:
        """Take the mark of a thread that sleeps; False if there is none."""
        try:
            self.idle.pop()
        except IndexError:
            return False
        return True

    def close(self) -> None:
        """Let the threads end after what waits."""
        self.open = False
        while self.ring():
            pass


def _work(crew: _Crew) -> None:
    """Be one thread of a pool."""
    try:
        while (pool := crew.pool()) is not None and pool.is_served_by(crew):
            job = pool.take()
            if job is not None:
                del pool
                job()
                del job
                continue
            crew.idle.append(None)
            awake = (pool.has_work() or not crew.open) and crew.take_mark()
            ends = awake and not pool.has_work()
            del pool  # a sleeping thread keeps nothing alive
            if ends or not (awake or _sleep(crew)):
                return
    finally:
        crew.remove(threading.current_thread())
        pool = crew.pool()
        if pool is None:
            crew.bell.put(None)  # the next one is to end, too
        elif crew.open and pool.is_served_by(crew) and pool.has_work():
            pool.wake()  # whoever added it may have counted on this thread


def _sleep(crew: _Crew) -> bool:
    """Sleep until the bell rings; False when the thread should end instead."""
    try:
        crew.bell.get(timeout=IDLE_SECONDS)
    except queue.Empty:
        if crew.take_mark():
            return False
        with suppress(queue.Empty):  # somebody has taken it, to ring
            crew.bell.get(timeout=RINGING_SECONDS)
    return True


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
