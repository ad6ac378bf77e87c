"""Threads whose results a test collects."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds after which a test gives up on what should have come long before."""


class Call(Generic[T]):
    """Calls a function in a thread of its own; daemonic, so that a hanging one fails one test."""

    def __init__(self, function: Callable[..., T], *args: object) -> None:
        self._result: T
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._result = function(*args)
            except BaseException as error:
                self._error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def result(self) -> T:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._result

    def error(self) -> BaseException:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the call hangs"
        assert self._error is not None, "the call succeeded"
        return self._error


def until(condition: Callable[[], object]) -> None:
    """Wait for another thread to bring about what has no event of its own."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.001)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it never came about")


async def auntil(condition: Callable[[], object]) -> None:
    """Do what `until` does, without blocking the loop."""
    for _ in range(int(PATIENCE / 0.001)):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came about")
