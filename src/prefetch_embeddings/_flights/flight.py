"""The words of the core: a flight, the calls that are under way for it, and who waits for it.

A flight is one loading of one value: queued, running, then done or failed. It changes only in the
steps of the map, under the map's lock; a field that is read without the lock says why it may be.
"""

from __future__ import annotations

import enum
import itertools
import threading
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import asyncio
    import contextvars
    from collections.abc import Callable, Hashable
    from types import TracebackType

V = TypeVar("V")


class PrefetchOutcome(enum.StrEnum):
    """What a prefetch did."""

    STARTED = enum.auto()
    """A flight has been started."""
    IN_FLIGHT = enum.auto()
    """The text was under way already."""
    READY = enum.auto()
    """The text's value was there already."""
    DROPPED = enum.auto()
    """Nothing was done: queue full, text blank, calls keep failing, or closed."""


class State(enum.Enum):
    """Where a flight is on its way."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class Met(enum.StrEnum):
    """What a query met when it looked for its key."""

    READY = "ready"
    JOINED = "joined"
    CLAIMED = "claimed"
    MISSED = "missed"


class End(enum.Enum):
    """How a query parted from a flight."""

    SERVED = enum.auto()
    RECOVERED = enum.auto()
    FAILED = enum.auto()
    GOES_ON = enum.auto()  # to recover by another flight, where its whole wait will count
    GONE = enum.auto()


class AbandonedError(BaseException):
    """Nobody carries out this run: its loop has closed, its caller was thrown out, it was given up.

    Not an `Exception`: it says nothing of the model, and never reaches a caller.
    """


class Run:
    """A runner: one call under way for a flight, or about to begin."""

    __slots__ = ("began", "beside", "flight", "for_query", "loop", "started_at", "task", "thread")

    def __init__(
        self,
        flight: Flight[Any],
        started_at: float,
        loop: asyncio.AbstractEventLoop | None,
        *,
        for_query: bool,
        beside: bool = False,
    ) -> None:
        self.flight: Final = flight
        self.started_at: Final = started_at
        self.loop: Final = loop
        """The event loop that it runs on; None for a thread."""
        self.for_query: Final = for_query
        """Whether it was begun on behalf of a query, which then may see its error."""
        self.beside: Final = beside
        """Whether it was begun beside another one, as a hedge."""
        self.thread: Final = threading.get_ident()
        """Whose step made it."""
        self.began = False
        """Whether somebody runs it. Written by its runner; until then it may be taken back."""
        self.task: asyncio.Task[None] | None = None  # asyncio itself keeps tasks only weakly


class Waiter:
    """Somebody who waits for flights, one after the other: a query, or an explicit wait."""

    __slots__ = ("context", "for_query", "loop", "makes_call")

    loop: asyncio.AbstractEventLoop | None
    """The loop on which it waits; None for a thread."""
    context: contextvars.Context
    """What a call on its behalf runs in a copy of."""
    for_query: bool
    """Whether it is a query."""
    makes_call: bool
    """Whether a call for its flight is its own. Guarded by the map's lock."""

    def wake(self) -> None:
        """Tell it to look at its flight again. Called with no lock held."""
        raise NotImplementedError


class Failure(NamedTuple):
    """What a call that was made for a query has failed with.

    An `Exception` is the model's answer to all who wait. Anything else is its own caller's alone.
    """

    run: Run
    error: BaseException
    traceback: TracebackType | None


class Visit(Generic[V]):
    """One waiter's stay at a flight. The step that takes it in writes where it is.

    Written by steps, and not returned by them: an exception that a signal handler throws just
    when a step returns would lose a returned flight, and the call that it is owed.
    """

    __slots__ = ("after", "flight", "key", "met", "options", "run", "text", "waiter")

    def __init__(
        self, key: Hashable, text: str, options: Any, waiter: Waiter, after: Flight[V] | None = None
    ) -> None:
        self.key: Final = key
        self.text: Final = text
        self.options: Final = options
        self.waiter: Final = waiter
        self.after: Final = after
        """The flight that failed the waiter, which then was counted there."""
        self.flight: Flight[V] | None = None  # None before the visit and after it
        self.met: Met | None = None
        self.run: Run | None = None
        """The call that the waiter is to make; None if others make it."""


class Flight(Generic[V]):
    """One loading of one value."""

    # Without a __dict__: thousands of them are kept, and the garbage collector walks over each.
    __slots__ = (
        "__weakref__",
        "asked_at",
        "asks",
        "attempt",
        "by_prefetch",
        "called_at",
        "context",
        "era",
        "expires_at",
        "failure",
        "finished_at",
        "first_query_at",
        "for_query",
        "hedge_denied",
        "held",
        "home",
        "key",
        "number",
        "options",
        "runs",
        "served",
        "started_at",
        "state",
        "successor",
        "text",
        "value",
        "waiters",
        "watched",
    )

    value: V  # written when it is done, before anybody is told, then only read

    def __init__(
        self,
        key: Hashable,
        text: str,
        options: Any,
        asked_at: float,
        era: object,
        *,
        by_prefetch: bool,
        context: contextvars.Context | None = None,
        home: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # Written before the flight is shared, then only read:
        self.key: Final = key
        self.by_prefetch: Final = by_prefetch
        self.home: Final = home
        """The loop that runs it in the background; None for the worker threads."""
        self.era: Final = era
        """Of the map: a flight from before a fork is not counted after it."""
        self.number: Final = next(_numbers)
        """No other flight has it."""

        # Guarded by the map's lock:
        self.text = text  # a query that claims the flight puts its own in place, and its options
        self.options = options
        self.context = context  # of the prefetch's caller; runs in the background copy it
        self.asked_at = asked_at  # when a prefetch last asked for it
        self.asks = 0  # prefetches that asked for it and have not taken that back
        self.state = State.QUEUED
        self.attempt = 0  # how often it went from queued to running
        self.started_at = 0.0  # when it last did
        self.called_at = 0.0  # when the latest call for it began
        self.for_query = False  # whether a call was ever begun for it on behalf of a query
        self.runs: tuple[Run, ...] = ()  # the calls under way, in the order of their beginning
        self.hedge_denied = False  # whether its hedge was due, and beyond the budget
        self.watched = False  # whether it stands among those that may be due another call
        self.waiters: dict[Waiter, None] = {}  # those who entered it and have not left
        self.first_query_at: float | None = None  # when the first of the queries that wait came
        self.served = False  # whether any query got its value
        self.successor: Flight[V] | None = None  # the one flight by which its waiters recover
        self.held = True  # whether it is in the map

        # Written under the lock; read without it by those who saw the flight ended:
        self.failure: Failure | None = None  # of its last call for a query, while anybody waits
        self.finished_at = 0.0
        self.expires_at = 0.0

    @property
    def ended(self) -> bool:
        """Whether it is done or failed. Once true it stays so: it may be read without the lock."""
        return self.state is State.DONE or self.state is State.FAILED

    @property
    def duration(self) -> float:
        """Seconds from its last start to its end."""
        return self.finished_at - self.started_at

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for it, or has asked for it and not taken that back."""
        return bool(self.waiters) or self.asks > 0

    def is_left_alone(self) -> bool:
        """Tell whether nothing will come of it: all loops that would run it have closed."""
        carriers = [run.loop for run in self.runs] if self.runs else [self.home]
        return all(loop is not None and loop.is_closed() for loop in carriers)

    def runs_only_on(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Tell whether nothing can come of it while `loop` does not turn."""
        return bool(self.runs) and all(run.loop is loop for run in self.runs)


class Ticket(Generic[V]):
    """Stands for one prefetch's ask, so that its holder can take back that one and no other's."""

    __slots__ = ("flight",)

    def __init__(self, flight: Flight[V]) -> None:
        self.flight: Flight[V] | None = flight  # None once taken back; guarded by the map's lock


def full_key(key: Callable[[str], Hashable], text: str, variant: Hashable) -> Hashable:
    """Return the key of a text, and of what parts it from others that are the same otherwise."""
    plain = key(text)
    return plain if variant is None else (plain, variant)


_numbers: Final = itertools.count(1)
