"""Who waits for whom, so that no ring of flights ever waits for itself.

A model may call back: to load one text it may ask for others. Each such question is an edge from
the flight that is being run to the flight it waits for. An edge that would close a ring is refused
with a `RuntimeError` (without it, that question could never be answered).

An edge stands with the flight that it begins at, and goes with it. No lock: an edge is first added
and then looked at, each by single atomic steps. Of two threads that close a ring at the same time
at least one sees it.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prefetch_embeddings._flights.flight import Flight

running: Final[ContextVar[Flight[Any] | None]] = ContextVar(
    "prefetch_embeddings_running", default=None
)
"""The flight on whose behalf the current code runs."""


def begin_wait(flight: Flight[Any], *, mine: bool) -> Flight[Any] | None:
    """Note that the current code waits for `flight`.

    Args:
        flight: The flight.
        mine: Whether the current code is to run it. Then no ring can close.

    Returns:
        What `end_wait` needs: the flight on whose behalf the code runs; None if there is none.

    Raises:
        RuntimeError: If `flight` itself waits, over any number of steps, for the flight on whose
            behalf the current code runs.
    """
    current = running.get()
    if current is None:
        return None
    current.waits_for.append(flight)
    if not mine and _reaches(flight, current):
        end_wait(current, flight)
        raise RuntimeError(
            "the model asked for a text that cannot be embedded before its own call returns"
        )
    return current


def end_wait(current: Flight[Any], flight: Flight[Any]) -> None:
    """Note that the code which runs on behalf of `current` no longer waits for `flight`."""
    with suppress(ValueError):  # its call has returned before
        current.waits_for.remove(flight)


@contextmanager
def running_for(flights: Sequence[Flight[Any]]) -> Iterator[None]:
    """Note for as long as the block lasts that its code runs on behalf of all of `flights`.

    The first stands for the call; the others wait for it.
    """
    first = flights[0]
    for other in flights[1:]:
        other.waits_for.append(first)
    token = running.set(first)
    try:
        yield
    finally:
        running.reset(token)
        for flight in flights:
            flight.waits_for.clear()


def run_has_ended(flight: Flight[Any]) -> None:
    """Forget what was noted of a flight, for which the code itself had set `running`."""
    flight.waits_for.clear()


def _reaches(start: Flight[Any], goal: Flight[Any]) -> bool:
    seen = {start}
    stack = [start]
    while stack:
        flight = stack.pop()
        if flight is goal:
            return True
        for after in list(flight.waits_for):
            if after not in seen:
                seen.add(after)
                stack.append(after)
    return False
