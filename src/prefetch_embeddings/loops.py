"""Blocking a thread on a flight that an event loop runs, without blocking the flight itself.

A loop can stop turning under a flight: it is closed, or stopped, or its thread is blocked. And a
flight can need the very thread that waits for it: parts of async work run in the loop's default
executor (name resolution does, OpenAI's tokenizer, LangChain's default `aembed_query`), which is
also where LangChain's `ainvoke` runs the sync `embed_query` of stores like Chroma. Were all its
threads waiting for flights, none would be left for the flights.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import enum
import inspect
import threading
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor

LOOK_SECONDS: Final = 0.05
"""How often a waiter looks after the loop that runs its flight."""

PATIENCE_LOOKS: Final = 60
"""Looks without a sign of life, three seconds of them, after which a waiter gives a loop up.
Counted, not timed, so that a process that was stopped for a while does not take its loops for dead;
long, because a loop of a starved process lives, and giving it up means a second call."""

MOST_NUDGES: Final = 10_000
"""Jobs handed to an executor, at the most, to make it start a thread."""


class Sign(enum.Enum):
    """What a look at a loop showed."""

    ALIVE = enum.auto()
    SILENT = enum.auto()
    DEAD = enum.auto()


class LoopWatch:
    """Tells whether a loop still turns.

    Args:
        loop: The loop.
        through_executor: Whether its default executor must turn as well.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, through_executor: bool) -> None:
        self._loop = loop
        self._through_executor = through_executor
        self._answered = True
        self._looks = 0

    def look(self) -> Sign:
        """Look once; to be done every `LOOK_SECONDS`."""
        if self._loop.is_closed() or not self._loop.is_running():
            return Sign.DEAD
        if not self._answered:
            self._looks += 1
            return Sign.SILENT if self._looks > PATIENCE_LOOKS else Sign.ALIVE
        self._answered = False
        self._looks = 0
        try:
            self._loop.call_soon_threadsafe(self._ask)
        except RuntimeError:  # closed in between
            return Sign.DEAD
        return Sign.ALIVE

    def _ask(self) -> None:
        if self._through_executor:
            with suppress(RuntimeError):  # the executor is shut down
                self._loop.run_in_executor(None, self._answer)
                return
        self._answer()

    def _answer(self) -> None:
        self._answered = True


@contextmanager
def standing_aside() -> Iterator[bool]:
    """Let another thread take this one's place in its executor while it blocks.

    Yields:
        False if it holds a place in an executor all the same.
    """
    executor: Any = own_executor()
    if executor is None:
        yield True
        return
    if not (hasattr(executor, "_threads") and hasattr(executor, "_max_workers")):
        yield False  # there is no public way to do it
        return
    with _lock:
        blocked = _blocked[executor] = _blocked.get(executor, 0) + 1
        executor._max_workers += 1  # noqa: SLF001
    try:
        with suppress(RuntimeError):  # shut down: then nothing waits for a thread
            # `submit` starts a thread if it counts none as idle; Python 3.11 counts too many.
            for _ in range(MOST_NUDGES):
                if len(executor._threads) > blocked:  # noqa: SLF001
                    break
                executor.submit(_nothing)
        yield True
    finally:
        with _lock:
            _blocked[executor] -= 1
            executor._max_workers -= 1  # noqa: SLF001


def own_executor() -> Executor | None:
    """Return the thread pool executor that runs this thread, if one does.

    Only the frame at the bottom of the thread's stack knows. A loop would know its own executor,
    but some keep it to themselves (uvloop does), and it need not be this thread's.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _WORKER:
            reference = frame.f_locals.get("executor_reference")
            return None if reference is None else reference()
        frame = frame.f_back
    return None


_WORKER: Final = getattr(getattr(concurrent.futures.thread, "_worker", None), "__code__", None)
"""What the threads of a `ThreadPoolExecutor` run. Where it is called otherwise, none are known."""

_lock: Final = threading.Lock()
_blocked: Final[weakref.WeakKeyDictionary[Any, int]] = weakref.WeakKeyDictionary()
"""How many threads of an executor stand aside; guarded by _lock."""


def _nothing() -> None:
    pass


def reset_after_fork() -> None:
    """Forget the parent's threads, and the lock, which one of them may have held."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()  # type: ignore[misc]
    _blocked.clear()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def current_task() -> asyncio.Task[Any] | None:
    """Return the task that runs in this thread, if one does."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
