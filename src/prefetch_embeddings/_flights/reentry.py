"""Who waits for whom, so that no ring of flights ever waits for itself.

A model may call back: to embed one text it may ask for others. Each such question is an edge from
the flight that is being run to the flight it waits for. An edge that would close a ring is refused
with a `RuntimeError` (without it, that question could never be answered).
"""

from __future__ import annotations

import threading
from collections import deque
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._background import forks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefetch_embeddings._flights.flight import Flight

running: Final[ContextVar[Flight[Any] | None]] = ContextVar(
    "prefetch_embeddings_running", default=None
)
"""The flight on whose behalf the current code runs."""

_lock = threading.Lock()
_waits_for: Final[dict[Flight[Any], list[Flight[Any]]]] = {}  # guarded by _lock
_ended: Final[deque[tuple[Flight[Any], Flight[Any]]]] = deque()  # to be taken off _waits_for


class waiting_for:  # noqa: N801 - reads as what it does, as contextlib's do
    """Notes for as long as the block lasts that the current code waits for `flight`.

    Args:
        flight: The flight.
        mine: Whether the current code is to run it. Then no ring can close.

    Raises:
        RuntimeError: If `flight` itself waits, over any number of steps, for the flight on whose
            behalf the current code runs.
    """

    __slots__ = ("_current", "_flight", "_mine")

    def __init__(self, flight: Flight[Any], *, mine: bool) -> None:
        self._flight = flight
        self._mine = mine
        self._current = running.get()  # if there is none, nobody waits for this code

    def __enter__(self) -> None:
        if self._current is None:
            return
        with _lock:
            _settle()
            if not self._mine and _reaches(self._flight, self._current):
                raise RuntimeError(
                    "the model asked for a text that cannot be embedded before its own call returns"
                )
            _add(self._current, self._flight)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._current is None:
            return
        # A destroyed coroutine takes no lock: the thread that destroys it may hold this one.
        _ended.append((self._current, self._flight))
        if kind is not GeneratorExit:
            with _lock:
                _settle()


class running_together:  # noqa: N801
    """Notes for as long as the block lasts that its code runs on behalf of all of `flights`.

    The first stands for the call; the others wait for it.
    """

    __slots__ = ("_flights", "_token")

    def __init__(self, flights: Sequence[Flight[Any]]) -> None:
        self._flights = flights

    def __enter__(self) -> None:
        first, *others = self._flights
        self._token = running.set(first)
        if others:
            with _lock:
                for other in others:
                    _add(other, first)

    def __exit__(self, *_: object) -> None:
        first, *others = self._flights
        if others:
            with _lock:
                for other in others:
                    _remove(other, first)
        running.reset(self._token)


def _settle() -> None:
    while _ended:
        _remove(*_ended.popleft())


def _add(waiter: Flight[Any], flight: Flight[Any]) -> None:
    _waits_for.setdefault(waiter, []).append(flight)


def _remove(waiter: Flight[Any], flight: Flight[Any]) -> None:
    edges = _waits_for.get(waiter, [])
    if flight in edges:  # not so in a forked child, which forgot its parent's waits
        edges.remove(flight)
    if not edges:
        _waits_for.pop(waiter, None)


def _reaches(start: Flight[Any], goal: Flight[Any]) -> bool:
    seen = {start}
    stack = [start]
    while stack:
        flight = stack.pop()
        if flight is goal:
            return True
        for after in _waits_for.get(flight, ()):
            if after not in seen:
                seen.add(after)
                stack.append(after)
    return False


def reset_after_fork() -> None:
    """Forget the parent's waits, and its lock, which another thread may have held."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    _waits_for.clear()
    _ended.clear()


forks.call_in_child(reset_after_fork)
