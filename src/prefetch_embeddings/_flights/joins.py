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
from prefetch_embeddings._flights.flight import Visit

if TYPE_CHECKING:
    from collections.abc import Generator

    from prefetch_embeddings._flights.flight import Flight
    from prefetch_embeddings._flights.landing import Landing

LOOK_SECONDS: Final = 0.04
"""How often a waiter looks after a loop that runs its flight and is not its own."""


class ThreadVisit(Visit[Any]):
    """A thread that waits. Its bell is a queue in C: it may be rung from anywhere."""

    _bell: queue.SimpleQueue[None] | None = None  # none before it waits

    def wake(self) -> None:
        """Tell it to look at its flight again."""
        if self._bell is not None:
            self._bell.put(None)

    def make_ready(self) -> None:
        """Be ready to be woken. The flight is to be looked at after this, and before `wait`."""
        if self._bell is None:
            self._bell = queue.SimpleQueue()

    def wait(self, seconds: float | None) -> None:
        """Block until woken, `seconds` at the most; None for no limit."""
        if self._bell is not None:
            with suppress(queue.Empty):
                self._bell.get(timeout=seconds)


class LoopVisit(Visit[Any]):
    """A coroutine that waits on its loop."""

    loop: asyncio.AbstractEventLoop
    _bell: asyncio.Future[None] | None = None  # none before it waits

    def wake(self) -> None:
        """Tell it to look at its flight again: at once on its own loop, else through the loop."""
        if self._bell is None:
            return
        if loops.running_loop() is self.loop:
            self._ring()
        else:
            with suppress(RuntimeError):  # its loop has closed
                self.loop.call_soon_threadsafe(self._ring)

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def make_ready(self) -> None:
        """Be ready to be woken. The flight is to be looked at after this, and before `wait`."""
        if self._bell is None or self._bell.done():
            self._bell = self.loop.create_future()

    async def wait(self, seconds: float | None) -> None:
        """Wait until woken, `seconds` at the most; None for no limit."""
        if self._bell is None:
            return
        if seconds is None:
            await self._bell
        else:
            await asyncio.wait((self._bell,), timeout=seconds)


def joining(
    flight: Flight[Any],
    visit: ThreadVisit | LoopVisit,
    landing: Landing[Any],
    timeout: float | None = None,
) -> Generator[float | None]:
    """Wait for a flight that others run: yields how long, in seconds, to wait for the next look.

    Ends when the flight has ended, or after `timeout` seconds.
    """
    until = None if timeout is None else time.monotonic() + timeout
    while not flight.ended:
        visit.make_ready()
        seconds = None
        for run in flight.runs:
            if run.loop is None or run.loop is visit.loop:
                continue
            if loops.is_dead(run.loop):
                landing.lose(run)
            seconds = LOOK_SECONDS
        if flight.home is not None and flight.home is not visit.loop:
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
