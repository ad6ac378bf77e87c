"""The words of the core: a flight, the calls that are under way for it, and who waits for it.

A flight is one loading of one value: queued, running, then done or failed. It changes only in the
steps of the map, under the map's lock; a field that is read without the lock says why it may be.
"""

from __future__ import annotations

import contextvars
import enum
import itertools
import threading
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Hashable
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

    beside = False
    """Whether it was begun beside another one, as a hedge."""
    aside = False
    """Whether a thread of its own carries it out, and not the one whose step made it."""
    began = False
    """Whether somebody runs it. Written by its runner; until then it may be taken back."""
    task: asyncio.Task[None] | None = None  # asyncio itself keeps tasks only weakly

    def __init__(
        self,
        flight: Flight[Any],
        started_at: float,
        loop: asyncio.AbstractEventLoop | None,
        *,
        for_query: bool,
    ) -> None:
        self.flight: Final = flight
        self.started_at: Final = started_at
        self.loop: Final = loop
        """The event loop that it runs on; None for a thread."""
        self.for_query: Final = for_query
        """Whether it was begun on behalf of a query, which then may see its error."""
        self.thread: Final = threading.get_ident()
        """Whose step made it."""


class Failure(NamedTuple):
    """What a call that was made for a query has failed with.

    An `Exception` is the model's answer to all who wait. Anything else is its own caller's alone.
    """

    run: Run
    error: BaseException
    traceback: TracebackType | None


class Visit(Generic[V]):
    """Somebody who waits for flights, one after the other: a query, or an explicit wait.

    The step that takes it in writes where it is, and returns nothing: an exception that a signal
    handler throws just when a step returns would lose the flight, and the call that it is owed.
    """

    # Class attributes are the values of those that few visits ever set.
    loop: asyncio.AbstractEventLoop | None = None
    """The loop on which it waits; None for a thread."""
    met: Met | None = None
    """What it met first."""
    after: Flight[V] | None = None
    """The flight that failed it before."""
    # Written by steps:
    flight: Flight[V] | None = None
    """Where it is; None before and after."""
    run: Run | None = None
    """The call that it is to make; None if others make it."""

    def __init__(self, key: Hashable, text: str, options: Any, *, for_query: bool) -> None:
        self.key: Final = key
        self.text: Final = text
        self.options: Final = options
        self.for_query: Final = for_query
        self.context: Final = contextvars.copy_context()
        """What a call on its behalf runs in a copy of."""

    def wake(self) -> None:
        """Tell it to look at its flight again. Called with no lock held."""
        raise NotImplementedError


class Flight(Generic[V]):
    """One loading of one value."""

    value: V  # written when it is done, before anybody is told, then only read

    # Class attributes are the values of those fields that few flights ever set. All are guarded by
    # the map's lock:
    asks = 0  # prefetches that asked for it and have not taken that back
    state = State.QUEUED
    attempt = 0  # how often it went from queued to running
    started_at = 0.0  # when it last did
    called_at = 0.0  # when the latest call for it began
    for_query = False  # whether a call was ever begun for it on behalf of a query
    runs: tuple[Run, ...] = ()  # the calls under way, in the order of their beginning
    hedge_denied = False  # whether its hedge was due, and beyond the budget
    watched = False  # whether it stands among those that may be due another call
    first_query_at: float | None = None  # when the first of the queries that wait came
    served = False  # whether any query got its value
    successor: Flight[V] | None = None  # the one flight by which its waiters recover
    to_come = 0  # queries that recover by it, and have not come yet
    held = True  # whether it is in the map
    # Read without the lock, too; once it has ended it stays so:
    ended = False  # whether it is done or failed
    failure: Failure | None = None  # of its last call for a query, while anybody waits
    finished_at = 0.0
    expires_at = 0.0

    def __init__(
        self,
        key: Hashable,
        text: str,
        options: Any,
        asked_at: float,
        era: object,
        by_prefetch: bool,  # noqa: FBT001 - by place, since prefetching is to take microseconds
        context: contextvars.Context | None = None,
        home: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # Written before the flight is shared, then only read:
        self.key: Final = key
        self.by_prefetch = by_prefetch
        self.home: Final = home
        """The loop that runs it in the background; None for the worker threads."""
        self.era: Final = era
        """Of the map: a flight from before a fork is not counted after it."""
        self.number: Final = next(_numbers)
        """No other flight has it."""
        self.waits_for: list[Flight[Any]] = []
        """What its model asks for while it runs (see `reentry`). Not guarded by any lock."""

        # Guarded by the map's lock:
        self.text = text  # a query that claims the flight puts its own in place, and its options
        self.options = options
        self.context = context  # of the prefetch's caller; runs in the background copy it
        self.asked_at = asked_at  # when a prefetch last asked for it
        self.waiters: dict[Visit[V], None] = {}  # those who entered it and have not left

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for it, or has asked for it and not taken that back."""
        return bool(self.waiters) or self.asks > 0

    def is_carried_by(self, thread: int) -> bool:
        """Tell whether a thread has it to run, and so cannot wait for it."""
        carried = [r.thread == thread and r.loop is None and not r.aside for r in self.runs]
        return any(carried)

    def is_left_alone(self) -> bool:
        """Tell whether nothing will come of it: all loops that would run it have closed."""
        if not self.runs:
            return self.home is not None and self.home.is_closed()
        closed = [run.loop is not None and run.loop.is_closed() for run in self.runs]
        return all(closed)

    def runs_only_on(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Tell whether nothing can come of it while `loop` does not turn."""
        return bool(self.runs) and {run.loop for run in self.runs} == {loop}


class Ticket(Generic[V]):
    """Stands for one prefetch's ask, so that its holder can take back that one and no other's."""

    __slots__ = ("flight",)

    def __init__(self, flight: Flight[V]) -> None:
        self.flight: Flight[V] | None = flight  # None once taken back; guarded by the map's lock


_numbers: Final = itertools.count(1)
