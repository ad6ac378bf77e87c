"""Who waits for whom, so that no ring of flights ever waits for itself.

A model may call back: to embed one text it may ask for others. Each such question is an edge from
the flight that is being run to the flight it waits for. An edge that would close a ring is refused
with a `RuntimeError` (without it, that question could never be answered).
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prefetch_embeddings.flights import Flight

running: Final[ContextVar[Flight[Any] | None]] = ContextVar(
    "prefetch_embeddings_running", default=None
)
"""The flight on whose behalf the current code runs."""

_lock: Final = threading.Lock()
_waits_for: Final[dict[Flight[Any], list[Flight[Any]]]] = {}  # guarded by _lock


@contextmanager
def waiting_for(flight: Flight[Any]) -> Iterator[None]:
    """Note for as long as the block lasts that the current code waits for `flight`.

    Raises:
        RuntimeError: If `flight` itself waits, over any number of steps, for the flight on whose
            behalf the current code runs.
    """
    current = running.get()
    if current is None:  # nobody waits for this code: no ring can close here
        yield
        return
    with _lock:
        if _reaches(flight, current):
            raise RuntimeError(
                "the model asked for a text that cannot be embedded before its own call returns"
            )
        _add(current, flight)
    try:
        yield
    finally:
        with _lock:
            _remove(current, flight)


@contextmanager
def running_together(flights: Sequence[Flight[Any]]) -> Iterator[None]:
    """Note for as long as the block lasts that its code runs on behalf of all of `flights`.

    The first stands for the call; the others wait for it.
    """
    token = running.set(flights[0])
    with _lock:
        for other in flights[1:]:
            _add(other, flights[0])
    try:
        yield
    finally:
        with _lock:
            for other in flights[1:]:
                _remove(other, flights[0])
        running.reset(token)


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
    _lock = threading.Lock()  # type: ignore[misc]
    _waits_for.clear()
