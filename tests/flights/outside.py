"""What the tests of promises share: models that count by calls, and programs of their own.

Only public names are used in here, and in the tests that build on it: they hold for any core.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.stats import PrefetchStats
from prefetch_embeddings.testing import Gate, ManualPrefetchingEmbeddings
from tests.helpers import PATIENCE, until

ROOT = Path(__file__).parents[2]

UNKNOWN_LIMIT = 3.0
"""Seconds after which a call is overdue before twenty were measured."""

LEAST_LIMIT = 1.0
"""Seconds that a call may always take."""

MEASURED = 20
"""Calls after which their durations count."""


_holding: weakref.WeakSet[CallByCall] = weakref.WeakSet()


def let_all_go() -> None:
    """Open the gates of every model that a test has left."""
    for model in list(_holding):
        model.open()


class CallByCall(Embeddings):
    """A model whose calls are numbered from 1, over all texts: the vector says which call it was.

    Args:
        holding: How many of the first calls are held until `open` lets them go.
        failing: What a call raises, by its number.
        only: The one text whose calls are numbered; calls for others answer at once.
    """

    def __init__(
        self,
        holding: int = 0,
        failing: dict[int, BaseException] | None = None,
        *,
        only: str | None = "q",
    ) -> None:
        _holding.add(self)
        self._gates = {number: Gate() for number in range(1, holding + 1)}
        self._failing = failing or {}
        self._only = only
        self._lock = threading.Lock()
        # Guarded by _lock:
        self.calls = 0
        self.running = 0
        self.most_running = 0
        self.cancelled: list[int] = []
        self.ended: list[int] = []

    def open(self, *numbers: int) -> None:
        """Let held calls go; all of them if none is named."""
        for number in numbers or tuple(self._gates):
            self._gates[number].open()

    def wait_until_entered(self, number: int) -> None:
        """Block until call `number`, one of those that are held, is under way."""
        self._gates[number].wait_until_entered()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return [await self.aembed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        if self._only not in (None, text):
            return [0.5]
        number = self._begin()
        try:
            if number in self._gates:
                self._gates[number].hold()
            return self._answer(number)
        finally:
            self._end(number)

    async def aembed_query(self, text: str) -> list[float]:
        if self._only not in (None, text):
            return [0.5]
        number = self._begin()
        try:
            if number in self._gates:
                await self._gates[number].ahold()
            return self._answer(number)
        except asyncio.CancelledError:
            with self._lock:
                self.cancelled.append(number)
            raise
        finally:
            self._end(number)

    def _begin(self) -> int:
        with self._lock:
            self.calls += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            return self.calls

    def _end(self, number: int) -> None:
        with self._lock:
            self.running -= 1
            self.ended.append(number)

    def _answer(self, number: int) -> list[float]:
        if number in self._failing:
            raise self._failing[number]
        return [float(number)]


def measure(embeddings: PrefetchingEmbeddings, calls: int = MEASURED + 5) -> None:
    """Have so many calls measured, each of which takes no time, or what the model makes of it."""
    for number in range(calls):
        embeddings.embed_query(f"measured {number}")


def until_joined(embeddings: PrefetchingEmbeddings, queries: int = 1) -> None:
    """Wait until so many queries have joined a flight."""
    until(lambda: embeddings.stats().query_joined >= queries)


async def auntil_joined(embeddings: PrefetchingEmbeddings, queries: int = 1) -> None:
    """Do what `until_joined` does, without blocking the loop."""
    for _ in range(int(PATIENCE / 0.001)):
        if embeddings.stats().query_joined >= queries:
            return
        await asyncio.sleep(0.001)
    raise AssertionError("the queries have not joined")


def let_pass(
    embeddings: ManualPrefetchingEmbeddings, seconds: float, condition: Callable[[], object]
) -> None:
    """Let so much time pass by hand, no more, and wait for what is due by then."""
    embeddings.time.advance(seconds)
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.001)):
        if condition():
            return
        pause.wait(0.001)
        embeddings.time.advance(0.0)  # for what was put on the clock too late for the first
    raise AssertionError("it never came about")


async def alet_pass(
    embeddings: ManualPrefetchingEmbeddings, seconds: float, condition: Callable[[], object]
) -> None:
    """Do what `let_pass` does, without blocking the loop."""
    embeddings.time.advance(seconds)
    for _ in range(int(PATIENCE / 0.001)):
        if condition():
            return
        await asyncio.sleep(0.001)
        embeddings.time.advance(0.0)
    raise AssertionError("it never came about")


def give_it_a_chance(seconds: float = 0.2) -> None:
    """Let other threads do what they had better not do. Never makes a right core fail."""
    threading.Event().wait(seconds)


def queries_counted(stats: PrefetchStats) -> int:
    """Return how many queries the counters tell of."""
    return stats.query_ready + stats.query_joined + stats.query_claimed + stats.query_missed


def places(embeddings: ManualPrefetchingEmbeddings) -> int:
    """Return how many prefetches could be queued now. Takes them back, and counts in `stats`."""
    taken = []
    for number in range(100_000):
        text = f"place {number}"
        if embeddings.prefetch(text) is not PrefetchOutcome.STARTED:
            break
        taken.append(text)
    for text in taken:
        embeddings.forget(text)
    return len(taken)


class OnItsLoop:
    """Runs coroutines on an event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine to its end, and return what it returned."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def start(self, coroutine: Any) -> Any:
        """Begin a coroutine; return a future of what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        """Have the loop turn no more, and leave it open, with whatever is on it."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the loop turns on"

    def close(self) -> None:
        """End the loop in the orderly way: its tasks are cancelled, and then it is closed."""
        if self.loop.is_closed():
            return
        if not self._thread.is_alive():
            self.loop.close()
            return

        async def cancel_all() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.run(cancel_all())
        self.stop()
        self.loop.close()


PRELUDE = """
import faulthandler, logging, sys
faulthandler.dump_traceback_later({limit}, exit=True)
logging.getLogger("prefetch_embeddings").setLevel(logging.CRITICAL)
"""


def run_program(source: str, *arguments: str, limit: float = 90.0, status: int = 0) -> list[str]:
    """Run a program in a process of its own; return the lines that it printed.

    One that hangs shows where each of its threads stands, and ends.

    Args:
        source: The program. `faulthandler`, `logging` and `sys` are imported.
        arguments: Its arguments, as `sys.argv[1:]`.
        limit: Seconds after which it counts as hanging.
        status: The exit status that is right.
    """
    program = PRELUDE.format(limit=limit) + textwrap.dedent(source)
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit + PATIENCE,
        check=False,
    )
    assert ran.returncode == status, (
        f"exit status {ran.returncode}, not {status}\n{ran.stdout[-2000:]}\n{ran.stderr[-6000:]}"
    )
    return ran.stdout.splitlines()
