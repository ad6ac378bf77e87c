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

from prefetch_embeddings._background import forks

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOK_SECONDS: Final = 0.05
"""How often a waiter looks after the loop that runs its flight."""

LOOKS_BETWEEN_QUESTIONS: Final = 10
"""Looks from an answer to the next question: a question takes a turn of the loop and a thread."""

PATIENCE_LOOKS: Final = 60
"""Looks without an answer, three seconds of them, after which a loop counts as silent. Counted, not
timed, so that a process that was stopped for a while does not take its loops for silent; long,
because a loop of a starved process lives, and not to wait for it means a second call."""

MOST_NUDGES: Final = 10_000
"""Jobs handed to an executor, at the most, to make it start a thread."""


class Sign(enum.Enum):
    """What a look at a loop showed."""

    ALIVE = enum.auto()
    SILENT = enum.auto()
    DEAD = enum.auto()


class LoopWatch:
    """Tells whether a loop still turns, and its default executor with it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._answered = True
        self._looks = 0  # since the last question

    def look(self) -> Sign:
        """Look once; to be done every `LOOK_SECONDS`."""
        if self._loop.is_closed() or not self._loop.is_running():
            return Sign.DEAD
        self._looks += 1
        if not self._answered:
            return Sign.SILENT if self._looks > PATIENCE_LOOKS else Sign.ALIVE
        if self._looks >= LOOKS_BETWEEN_QUESTIONS:
            self._looks = 0
            self._answered = False
            try:
                self._loop.call_soon_threadsafe(self._ask)
            except RuntimeError:  # closed in between
                return Sign.DEAD
        return Sign.ALIVE

    def _ask(self) -> None:
        try:
            self._loop.run_in_executor(None, self._answer)
        except RuntimeError:  # the executor is shut down: no flight needs it any more
            self._answer()

    def _answer(self) -> None:
        self._answered = True


@contextmanager
def standing_aside(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Let another thread take this one's place in the loop's default executor while it blocks.

    There is no public way to any of this. Where it does not work, `LoopWatch` notices.
    """
    executor = _executor_to_make_way_in(loop)
    if executor is None:
        yield
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
        yield
    finally:
        with _lock:
            _blocked[executor] -= 1
            executor._max_workers -= 1  # noqa: SLF001


def _executor_to_make_way_in(loop: asyncio.AbstractEventLoop) -> Any:
    """Return the loop's default executor if this thread is one of its; None if it is not."""
    mine: Any = _own_executor()
    if mine is None or not (hasattr(mine, "_threads") and hasattr(mine, "_max_workers")):
        return None
    default = getattr(loop, "_default_executor", _unknown)
    if default is _unknown:
        # uvloop keeps it to itself. An executor of one thread is not made for speed, but so that
        # nothing runs beside: it keeps its one.
        return mine if mine._max_workers > 1 else None  # noqa: SLF001
    return mine if mine is default else None


def _own_executor() -> Any:
    """Return the `ThreadPoolExecutor` that runs this thread, if one does.

    Only the frame at the bottom of the thread's stack knows.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _WORKER:
        frame = frame.f_back
    if frame is None:
        return None
    names = frame.f_locals
    reference = names.get("executor_reference")
    if isinstance(names, dict):  # until Python 3.13 a copy that the frame keeps, with all in it
        names.clear()
    return None if reference is None else reference()


_WORKER: Final = getattr(getattr(concurrent.futures.thread, "_worker", None), "__code__", None)
"""What the threads of a `ThreadPoolExecutor` run. Where it is called otherwise, none are known."""

_unknown: Final = object()
_lock = threading.Lock()
_blocked: Final[weakref.WeakKeyDictionary[Any, int]] = weakref.WeakKeyDictionary()
"""How many threads of an executor stand aside; guarded by _lock."""


def _nothing() -> None:
    pass


def reset_after_fork() -> None:
    """Forget the parent's threads, and the lock, which one of them may have held."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    _blocked.clear()


forks.call_in_child(reset_after_fork)


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
