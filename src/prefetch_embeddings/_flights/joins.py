"""The rules of waiting, written once, for a thread and for a coroutine.

`joining` says how long to wait before the next look, and the waiter waits in its own way, until it
is woken. It needs no patience of its own: a flight that takes too long gets another call (see
`overdue`). Only a loop that has closed under the flight is to be looked after.
"""

from __future__ import annotations

import asyncio
import queue
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._flights import loops
from prefetch_embeddings._flights.flight import Waiter

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Generator

    from prefetch_embeddings._flights.flight import Flight
    from prefetch_embeddings._flights.landing import Landing

LOOK_SECONDS: Final = 0.04
"""How often a waiter looks after a loop that runs its flight and is not its own."""


class ThreadWaiter(Waiter):
    """A thread that waits. Its bell is a queue in C: it may be rung from anywhere."""

    __slots__ = ("_bell",)

    def __init__(self, context: contextvars.Context, *, for_query: bool) -> None:
        self.loop = None
        self.context = context
        self.for_query = for_query
        self.makes_call = False
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def wake(self) -> None:
        """Tell it to look at its flight again."""
        self._bell.put(None)

    def wait(self, seconds: float | None) -> None:
        """Block until woken, `seconds` at the most; None for no limit."""
        with suppress(queue.Empty):
            self._bell.get(timeout=seconds)


class LoopWaiter(Waiter):
    """A coroutine that waits on its loop."""

    __slots__ = ("_loop", "_woken")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, context: contextvars.Context, *, for_query: bool
    ) -> None:
        self._loop = self.loop = loop
        self.context = context
        self.for_query = for_query
        self.makes_call = False
        self._woken: asyncio.Future[None] = loop.create_future()

    def wake(self) -> None:
        """Tell it to look at its flight again: at once on its own loop, else through the loop."""
        if loops.running_loop() is self._loop:
            self._wake_here()
        else:
            with suppress(RuntimeError):  # its loop has closed
                self._loop.call_soon_threadsafe(self._wake_here)

    def _wake_here(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    async def wait(self, seconds: float | None) -> None:
        """Wait until woken, `seconds` at the most; None for no limit."""
        if seconds is None:
            await self._woken
        else:
            await asyncio.wait((self._woken,), timeout=seconds)
        if self._woken.done():
            self._woken = self._loop.create_future()


def joining(
    flight: Flight[Any], waiter: Waiter, landing: Landing[Any], timeout: float | None = None
) -> Generator[float | None]:
    """Wait for a flight that others run: yields how long, in seconds, to wait for the next look.

    Ends when the flight has ended, or after `timeout` seconds.
    """
    until = None if timeout is None else time.monotonic() + timeout
    while not flight.ended:
        seconds = None
        for run in flight.runs:
            if run.loop is None or run.loop is waiter.loop:
                continue
            if loops.is_dead(run.loop):
                landing.lose(run)
            seconds = LOOK_SECONDS
        if flight.home is not None and flight.home is not waiter.loop:
            seconds = LOOK_SECONDS
            if not flight.runs and loops.is_dead(flight.home):
                landing.abandon(flight, only_queued=True)
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                return
            seconds = left if seconds is None else min(left, seconds)
        if not flight.ended:
            yield seconds
