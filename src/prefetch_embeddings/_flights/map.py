"""The map from key to flight: who may run what, what is kept, and for how long.

A flight is one loading of one value: queued, running, then done or failed. This module decides and
counts; it runs nothing, waits for nothing and calls nobody. Every method is one step under one
lock, so the states of a flight and of the map are those between two method calls, and no others:

* A flight is queued, then running, then done or failed; a failed attempt in the background may put
  it back from running to queued. Whoever takes it from queued to running (the claim) runs it.
* A key has at most one flight in the map, under way or ready. A flight that has left the map never
  returns, and changes nothing there: each removal checks that the entry is this very flight.
* A flight leaves the map, or becomes ready in it, before its future completes.
* How a flight ended, and with which value or error, is written once, before anybody is told.
"""

from __future__ import annotations

import enum
import itertools
import threading
from collections import deque
from collections.abc import Hashable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from cachetools import TTLCache

from prefetch_embeddings._flights.patience import LEAST_DURATIONS, Budget
from prefetch_embeddings.stats import Counters, PrefetchStats, RecentDurations

if TYPE_CHECKING:
    import asyncio
    import contextvars
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from prefetch_embeddings._flights.patience import Hedge

V = TypeVar("V")

UNUSED_KEPT: Final = 256
"""How many prefetched texts that no query used are remembered, to tell why queries missed."""


class PrefetchOutcome(enum.StrEnum):
    """What a prefetch did."""

    STARTED = enum.auto()
    """A flight has been started."""
    IN_FLIGHT = enum.auto()
    """The text was under way already."""
    READY = enum.auto()
    """The text's vector was there already."""
    DROPPED = enum.auto()
    """Nothing was done: the queue is full, the wrapper is closed or the text is blank."""


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
    GONE = enum.auto()


class AbandonedError(BaseException):
    """Nobody will finish this flight: its loop stopped, or its wrapper was closed.

    Not an `Exception`: it tells waiters to see to themselves and never reaches a caller.
    """


_numbers: Final = itertools.count(1)


class Flight(Generic[V]):
    """One loading of one value."""

    # Written before the flight is shared, then only read:
    key: Hashable
    by_prefetch: bool
    asked_at: float
    number: int  # no other flight has it
    era: object  # of the map: a flight from before a fork is not counted after it

    # What the executor queues: the flight itself, or the batch it is in. Written by who queues it.
    # Who takes it off the queue may see an older one; that is harmless, since claims decide.
    job: Hashable

    # Guarded by the map's lock:
    state = State.QUEUED
    text: str  # a claiming query puts its own in place
    context: contextvars.Context | None  # of the prefetch's caller; a worker runs in it
    asks = 1  # prefetches that count on it
    attempt = 0  # how often it was claimed
    started_at = 0.0  # when it was last claimed
    for_query = False  # whether a query claimed it
    hedge_denied = False  # whether its second call has been due, and beyond the budget
    loop: asyncio.AbstractEventLoop | None = None  # the loop that runs it
    runners = 0  # calls under way for it: one, or more if somebody would not wait for that one
    # asyncio itself keeps tasks only weakly. None is added after the end, and who ended it, and so
    # needs no lock, takes them all.
    tasks: tuple[asyncio.Task[None], ...] = ()
    waiters = 0  # queries and explicit waits that have not parted from it
    served = False  # whether any query got its value
    first_query_at: float | None = None  # when the first of the queries that wait came
    successor: Flight[V] | None = None  # the one flight by which its waiters recover
    held = True  # whether it is in the map

    # Made under the map's lock for the first to wait, and completed once the flight has ended.
    # Nobody ever cancels it. A flight that has ended needs none.
    future: Future[V] | None = None

    # Written under the map's lock when the flight ends, then only read:
    value: V
    error: BaseException | None = None
    traceback: TracebackType | None = None
    finished_at = 0.0

    def __init__(
        self,
        key: Hashable,
        text: str,
        by_prefetch: bool,  # noqa: FBT001 - prefetching is to take microseconds
        asked_at: float,
        era: object,
        context: contextvars.Context | None,
    ) -> None:
        self.key = key
        self.text = text
        self.by_prefetch = by_prefetch
        self.asked_at = asked_at
        self.number = next(_numbers)
        self.era = era
        self.context = context
        self.job = self

    @property
    def ended(self) -> bool:
        """Whether it is done or failed."""
        return self.state is State.DONE or self.state is State.FAILED

    @property
    def duration(self) -> float:
        """Seconds its last run took."""
        return self.finished_at - self.started_at


class Unused(NamedTuple):
    """A prefetched text that no query has used."""

    key: Hashable
    text: str
    asked_at: float


class Batch(Generic[V]):
    """Flights that one model call may serve together."""

    __slots__ = ("flights",)

    def __init__(self, flights: Sequence[Flight[V]]) -> None:
        self.flights = flights


class _ReadyFlights(TTLCache[Hashable, Flight[Any]]):
    """Ready flights, that tells of each one which leaves for age or for size."""

    def __init__(
        self,
        maxsize: int,
        ttl: float,
        clock: Callable[[], float],
        on_left: Callable[[Flight[Any]], None],
    ) -> None:
        super().__init__(maxsize, ttl, timer=clock)
        self._on_left = on_left

    def expire(self, time: float | None = None) -> list[tuple[Hashable, Flight[Any]]]:
        expired = list(super().expire(time))
        for _, flight in expired:
            self._on_left(flight)
        return expired

    def popitem(self) -> tuple[Hashable, Flight[Any]]:
        key, flight = super().popitem()
        self._on_left(flight)
        return key, flight


class FlightMap(Generic[V]):
    """Flights by key, and the counts of what became of them.

    Args:
        ttl: Seconds that a ready flight is kept, from its completion.
        max_entries: Ready flights kept; the least recently used leave first.
        capacity: Background flights queued and on workers, all told.
        max_on_loops: Background flights under way on event loops.
        attempts: Tries of a background flight that nobody waits for.
        hedge: When a flight that is waited for gets a second runner; None for never.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        *,
        ttl: float,
        max_entries: int,
        capacity: int,
        max_on_loops: int,
        attempts: int,
        hedge: Hedge | None,
        clock: Callable[[], float],
    ) -> None:
        self._ttl: Final = ttl
        self._max_entries: Final = max_entries
        self._capacity: Final = capacity
        self._max_on_loops: Final = max_on_loops
        self._attempts: Final = attempts
        self._hedge: Final = hedge
        self.clock: Final = clock
        self._closed = False  # guarded by _lock
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start anew and empty: what was under way is under way in the parent."""
        self._lock = threading.Lock()
        self._era = object()
        # Guarded by _lock:
        self._by_key: dict[Hashable, Flight[V]] = {}  # the map: flights under way, and ready ones
        self._ready = _ReadyFlights(self._max_entries, self._ttl, self.clock, self._left)
        self._detached: set[Flight[V]] = set()  # unfinished, and not in the map, or no longer
        self._queued: set[Flight[V]] = set()  # those for workers; between attempts included
        self._busy = 0  # workers that run a flight
        self._on_loops: set[Flight[V]] = set()  # background flights that event loops run
        self._lost: deque[Unused] = deque(maxlen=UNUSED_KEPT)  # left the map, or failed, unused
        self._counts = Counters()
        # Appended to without the lock, see `leave_later`:
        self._deferred: deque[tuple[Flight[V], str, float, End]] = deque()
        self._durations = RecentDurations()
        self._budget = None if self._hedge is None else Budget(self._hedge.budget)

    # --- Queries -------------------------------------------------------------------------------

    def ready(self, key: Hashable, text: str) -> Flight[V] | None:
        """Serve a query from a ready flight, or return None. The hot path."""
        with self._lock:
            flight = self._by_key.get(key)
            if flight is None or flight.state is not State.DONE or not self._touch(flight):
                return None
            self._counts.query_ready += 1
            if flight.text != text:
                self._counts.query_matched += 1
            if not flight.served:
                self._first_served(flight)
            return flight

    def enter(
        self,
        key: Hashable,
        text: str,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        after: Flight[V] | None = None,
    ) -> tuple[Flight[V], Met]:
        """Take a query in: hand it the flight of its key, a new one if there is none.

        A flight that was CLAIMED or MISSED is the caller's to run. In every case the caller waits
        for it from now on, and must `leave` it.

        All who recover from one flight do so by one other, its successor, even those who come when
        that has ended, too. It is never one that a prefetch runs: that could fail them again. Where
        such a one is in the map by then, it stays there, and the successor never comes into it. A
        flight that somebody has given up while it runs goes on, for those who still wait for it.

        Args:
            key: The query's key.
            text: The query's text, which a flight that it runs will load.
            loop: The event loop on which the caller would run it.
            after: The flight that failed the query, or that it has given up; it was counted there.
        """
        with self._lock:
            now = self.clock()  # before a claim: all of its run is this query's wait
            self._settle_deferred()
            if after is not None and after.successor is not None:
                heir = after.successor
                self._attend(heir)
                return heir, Met.READY if heir.state is State.DONE else Met.JOINED
            flight = self._look_up(key)
            apart = False  # whether the map is another flight's
            if after is not None and flight is not None and flight.state is State.RUNNING:
                if flight is after:
                    self._let_go(flight)
                    flight = None
                elif not flight.for_query:
                    apart, flight = True, None
            if flight is None:
                met = Met.MISSED
                flight = Flight(key, text, False, now, self._era, None)  # noqa: FBT003
                if apart:
                    flight.held = False
                    self._detached.add(flight)
                else:
                    self._by_key[key] = flight
                self._start(flight, for_query=True, loop=loop)
            elif flight.state is State.DONE:
                met = Met.READY
            elif flight.state is State.QUEUED:
                met = Met.CLAIMED
                flight.text = text
                self._start(flight, for_query=True, loop=loop)
            else:
                met = Met.JOINED
            self._attend(flight)
            if flight.first_query_at is None and not flight.ended:
                flight.first_query_at = now
            if after is not None:
                after.successor = flight
            else:
                counts = self._counts
                if met is Met.READY:
                    counts.query_ready += 1
                elif met is Met.JOINED:
                    counts.query_joined += 1
                elif met is Met.CLAIMED:
                    counts.query_claimed += 1
                else:
                    counts.query_missed += 1
            return flight, met

    def leave(self, flight: Flight[V], text: str, waited: float, end: End) -> None:
        """Part the query for `text` from a flight that it entered, after `waited` seconds."""
        with self._lock:
            self._leave(flight, text, waited, end)

    def leave_later(self, flight: Flight[V], text: str, waited: float, end: End) -> None:
        """Do what `leave` does, but with the next query or look.

        For a waiter that the garbage collector destroys: that can happen at any moment, also while
        this very thread holds the lock.
        """
        self._deferred.append((flight, text, waited, end))

    # --- Prefetches ----------------------------------------------------------------------------

    def begin(
        self, key: Hashable, text: str, context: contextvars.Context
    ) -> tuple[PrefetchOutcome, Flight[V] | None]:
        """Queue a flight for a worker, unless the key has one."""
        with self._lock:
            outcome, flight = self._find(key, text)
            if outcome is None:
                return self._enqueue(key, text, context)
            return outcome, flight

    def begin_batch(
        self, items: Iterable[tuple[Hashable, str]], context: contextvars.Context
    ) -> tuple[list[PrefetchOutcome], Batch[V]]:
        """Queue one batch with a flight for each key that has none."""
        outcomes = []
        started: list[Flight[V]] = []
        batch = Batch(started)
        with self._lock:
            for key, text in items:
                outcome, flight = self._find(key, text)
                if outcome is None:
                    outcome, flight = self._enqueue(key, text, context)
                    if flight is not None:
                        flight.job = batch
                        started.append(flight)
                outcomes.append(outcome)
        return outcomes, batch

    def begin_on_loop(
        self, key: Hashable, text: str, loop: asyncio.AbstractEventLoop
    ) -> tuple[PrefetchOutcome, Flight[V] | None]:
        """Start a flight that `loop` runs, unless the key has one."""
        dead: list[Flight[V]] = []
        try:
            with self._lock:
                outcome, flight = self._find(key, text)
                if outcome is not None:
                    return outcome, flight
                if len(self._on_loops) >= self._max_on_loops:
                    dead = [f for f in self._on_loops if not (f.loop and f.loop.is_running())]
                    for each in dead:
                        self._end(each, State.FAILED, AbandonedError())
                if len(self._on_loops) >= self._max_on_loops:
                    self._counts.prefetch_dropped += 1
                    return PrefetchOutcome.DROPPED, None
                flight = self._add(key, text, None)
                self._start(flight, for_query=False, loop=loop)
                self._on_loops.add(flight)
                return PrefetchOutcome.STARTED, flight
        finally:
            for each in dead:
                _publish(each)

    def undo(self, flight: Flight[V]) -> bool:
        """Take back a flight that the executor refused; False if a query has claimed it."""
        with self._lock:
            if flight.state is not State.QUEUED:
                return False
            self._end(flight, State.FAILED, AbandonedError())
            counts = self._counts  # as if it had never been started
            counts.prefetch_started -= 1
            counts.prefetch_withdrawn -= 1
            counts.prefetch_dropped += 1
        _publish(flight)
        return True

    def claim(self, flights: Iterable[Flight[V]]) -> list[Flight[V]]:
        """Claim those of `flights` that are still queued, for one worker.

        Where it got any, the worker must call `worker_done` in the end.
        """
        with self._lock:
            claimed = [flight for flight in flights if flight.state is State.QUEUED]
            for flight in claimed:
                # The budget of extra calls grows by calls, of which a batch is one.
                self._start(flight, for_query=False, loop=None, pays=flight is claimed[0])
                if flight.attempt > 1:
                    self._counts.prefetch_retried += 1
            if claimed:
                self._busy += 1
            return claimed

    def worker_done(self) -> None:
        """Give back the place that `claim` took."""
        with self._lock:
            self._busy = max(0, self._busy - 1)  # a forked worker gives back what it left behind

    def reclaim(self, flight: Flight[V], loop: asyncio.AbstractEventLoop) -> bool:
        """Claim a flight that paused on `loop` after a failed attempt."""
        with self._lock:
            if flight.state is not State.QUEUED:
                return False
            self._start(flight, for_query=False, loop=loop)
            self._on_loops.add(flight)
            self._counts.prefetch_retried += 1
            return True

    # --- Ends ----------------------------------------------------------------------------------

    def complete(self, flight: Flight[V], value: V, *, hedge: bool = False) -> bool:
        """Finish a running flight; False, and no effect, if it has ended already.

        Args:
            flight: The flight.
            value: Its value.
            hedge: Whether its second runner brings it.
        """
        with self._lock:
            if flight.state is not State.RUNNING:
                return False
            flight.value = value
            self._counts.hedge_won += hedge and flight.era is self._era
            self._end(flight, State.DONE)
        _publish(flight)
        return True

    def fail(self, flight: Flight[V], error: BaseException) -> State | None:
        """Take in a failed run.

        Returns:
            QUEUED if the flight's runner is to see to another attempt, FAILED if this was the end
            of it, None if it goes on without this runner, or had ended already.
        """
        with self._lock:
            if flight.state is not State.RUNNING:
                return None
            flight.runners -= 1
            if flight.runners:
                return None
            if (
                flight.by_prefetch
                and not flight.for_query
                and not flight.waiters
                and flight.held
                and flight.attempt < self._attempts
                and flight.era is self._era
                and isinstance(error, Exception)
            ):
                flight.state = State.QUEUED
                if flight.loop is None:
                    self._queued.add(flight)
                return State.QUEUED
            self._end(flight, State.FAILED, error)
        _publish(flight)
        return State.FAILED

    def abandon(
        self,
        flight: Flight[V],
        *,
        only_queued: bool = False,
        only_on: asyncio.AbstractEventLoop | None = None,
    ) -> bool:
        """Fail a flight that nobody will finish; its waiters see to themselves.

        Args:
            flight: The flight.
            only_queued: Not if somebody runs it.
            only_on: Not if it is no longer this loop's to run.
        """
        with self._lock:
            if flight.ended or (only_queued and flight.state is not State.QUEUED):
                return False
            if only_on is not None and flight.loop is not only_on:
                return False
            self._end(flight, State.FAILED, AbandonedError())
        _publish(flight)
        return True

    # --- Hedges --------------------------------------------------------------------------------

    @property
    def hedging(self) -> bool:
        """Whether any flight gets a second runner."""
        return self._hedge is not None

    def hedge_due_in(self, flight: Flight[V]) -> float | None:
        """Return in how many seconds a flight gets its second runner; None for never."""
        with self._lock:
            hedge = self._hedge
            if hedge is None or flight.state is not State.RUNNING:
                return None
            after = hedge.after
            if hedge.quantile is not None:
                if len(self._durations) < LEAST_DURATIONS:
                    return None
                after = self._durations.quantile(hedge.quantile)
            return None if after is None else after - (self.clock() - flight.started_at)

    def hold_task(self, flight: Flight[V], task: asyncio.Task[None]) -> bool:
        """Keep a task alive as long as the flight that it runs; False if that has ended."""
        with self._lock:
            if flight.ended:
                return False
            flight.tasks = (*flight.tasks, task)
            return True

    def add_hedge(self, flight: Flight[V]) -> bool:
        """Admit a second runner to a flight that somebody waits for, if the budget has one."""
        with self._lock:
            if flight.state is not State.RUNNING or flight.runners != 1 or not flight.waiters:
                return False
            if self._budget is None or not self._budget.take():
                self._counts.hedge_denied += not flight.hedge_denied
                flight.hedge_denied = True
                return False
            self._counts.hedge_started += 1
            flight.runners += 1
            return True

    def remove_hedge(self, flight: Flight[V]) -> None:
        """Take back an admitted second runner that could not be had."""
        with self._lock:
            self._counts.hedge_started -= 1
        self.fail(flight, AbandonedError())  # ends the flight if the first has failed meanwhile

    # --- Explicit waits and looks --------------------------------------------------------------

    def attend(
        self, key: Hashable, *, claim: bool, loop: asyncio.AbstractEventLoop | None = None
    ) -> tuple[Flight[V] | None, bool]:
        """Wait for the key's flight, if it has one; the caller must `leave` it, as GONE.

        Args:
            key: The key.
            claim: Whether to claim the flight if it is queued.
            loop: The event loop on which the caller would run it.

        Returns:
            The flight, and whether the caller claimed it and so is to run it.
        """
        with self._lock:
            flight = self._look_up(key)
            if flight is None:
                return None, False
            mine = claim and flight.state is State.QUEUED
            if mine:
                self._start(flight, for_query=False, loop=loop)
            self._attend(flight)
            return flight, mine

    def is_ready(self, key: Hashable) -> bool:
        """Tell whether a query for `key` would be answered at once. Changes nothing."""
        with self._lock:
            return key in self._ready

    def expected_wait(self, key: Hashable) -> float:
        """Estimate, in seconds, what a query for `key` would wait now. Changes nothing."""
        with self._lock:
            if key in self._ready:
                return 0.0
            flight = self._by_key.get(key)
            elapsed = 0.0
            if flight is not None and flight.state is State.RUNNING:
                elapsed = self.clock() - flight.started_at
            return self._durations.remaining(elapsed)

    def unused(self, key: Hashable) -> list[Unused] | None:
        """Return the most recent prefetches that no query uses; those in the map come last.

        None if `key` has a prefetch that a query for it can use, or has used.
        """
        with self._lock:
            self._ready.expire()
            found = self._by_key.get(key)
            if found is not None and found.by_prefetch:
                return None
            held = [
                Unused(flight.key, flight.text, flight.asked_at)
                for flight in self._by_key.values()
                if flight.by_prefetch and not flight.served and not flight.waiters
            ]
            return [*self._lost, *held][-UNUSED_KEPT:]

    def stats(self) -> PrefetchStats:
        """Return the counts; what has outlived its time counts as gone."""
        with self._lock:
            self._settle_deferred()
            self._ready.expire()
            return self._counts.snapshot()

    # --- Removal -------------------------------------------------------------------------------

    def forget(self, key: Hashable) -> Flight[V] | None:
        """Take the key's flight out of the map; who waits for it still gets its value."""
        with self._lock:
            flight = self._look_up(key)
            kept = [lost for lost in self._lost if lost.key != key]
            self._lost = deque(kept, maxlen=UNUSED_KEPT)
            if flight is None:
                return None
            withdrawn = self._let_go(flight)
        if withdrawn:
            _publish(flight)
        return flight

    def get(self, key: Hashable) -> Flight[V] | None:
        """Return the flight that stands under `key`, if one does. Changes nothing."""
        with self._lock:
            return self._by_key.get(key)

    def withdraw(self, key: Hashable, number: int, asks: int) -> Flight[V] | None:
        """End a flight that is still queued, if nobody else waits for it or counts on it.

        Args:
            key: Its key.
            number: Its number: the key may have another one by now.
            asks: How many of the prefetches that count on it are the caller's own.
        """
        with self._lock:
            flight = self._by_key.get(key)
            if (
                flight is None
                or flight.number != number
                or flight.state is not State.QUEUED
                or flight.waiters
                or flight.asks != asks
            ):
                return None
            self._end(flight, State.FAILED, AbandonedError())
        _publish(flight)
        return flight

    def clear(self) -> list[Flight[V]]:
        """Take every flight out of the map, as `forget` does.

        Returns:
            The flights that were queued and now will not run.
        """
        with self._lock:
            self._ready.expire()
            withdrawn = [flight for flight in [*self._by_key.values()] if self._let_go(flight)]
            self._lost.clear()
        for flight in withdrawn:
            _publish(flight)
        return withdrawn

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> list[Flight[V]]:
        """Begin nothing more, keep nothing more, and end every flight that no query runs.

        Returns:
            The flights that this ended.
        """
        with self._lock:
            self._closed = True
            self._ready.expire()
            ended = []
            for flight in (*self._by_key.values(), *self._detached):
                if flight.state is State.DONE:
                    self._let_go(flight)
                elif not flight.for_query:
                    self._end(flight, State.FAILED, AbandonedError())
                    ended.append(flight)
            self._lost.clear()
        for flight in ended:
            _publish(flight)
        return ended

    # --- Under the lock ------------------------------------------------------------------------

    def _touch(self, flight: Flight[V]) -> bool:
        """Note that a ready flight is used; False if its time is up, and then it is gone."""
        try:
            self._ready[flight.key]
        except KeyError:
            self._ready.expire()
            return False
        return True

    def _look_up(self, key: Hashable) -> Flight[V] | None:
        """Return the flight in the map, and note that it is used."""
        flight = self._by_key.get(key)
        if flight is not None and flight.state is State.DONE and not self._touch(flight):
            return None
        return flight

    def _attend(self, flight: Flight[V]) -> None:
        """Note one more that waits for a flight."""
        flight.waiters += 1
        if flight.future is None and not flight.ended:
            flight.future = Future()

    def _find(self, key: Hashable, text: str) -> tuple[PrefetchOutcome | None, Flight[V] | None]:
        """Return what settles a prefetch at once, and count it; None if nothing does."""
        if self._closed or not text or text.isspace():
            self._counts.prefetch_dropped += 1
            return PrefetchOutcome.DROPPED, None
        flight = self._look_up(key)
        if flight is None:
            return None, None
        flight.asks += 1
        self._counts.prefetch_deduplicated += 1
        ready = flight.state is State.DONE
        return PrefetchOutcome.READY if ready else PrefetchOutcome.IN_FLIGHT, flight

    def _enqueue(
        self, key: Hashable, text: str, context: contextvars.Context
    ) -> tuple[PrefetchOutcome, Flight[V] | None]:
        # Counting workers in, not just the queue, makes the bound independent of how fast a
        # worker thread wakes up.
        if len(self._queued) + self._busy >= self._capacity:
            self._counts.prefetch_dropped += 1
            return PrefetchOutcome.DROPPED, None
        flight = self._add(key, text, context)
        self._queued.add(flight)
        return PrefetchOutcome.STARTED, flight

    def _add(self, key: Hashable, text: str, context: contextvars.Context | None) -> Flight[V]:
        self._counts.prefetch_started += 1
        flight: Flight[V] = Flight(key, text, True, self.clock(), self._era, context)  # noqa: FBT003
        self._by_key[key] = flight
        return flight

    def _start(
        self,
        flight: Flight[V],
        *,
        for_query: bool,
        loop: asyncio.AbstractEventLoop | None,
        pays: bool = True,
    ) -> None:
        """Take a flight from queued to running: the claim."""
        self._queued.discard(flight)
        self._on_loops.discard(flight)
        flight.state = State.RUNNING
        flight.for_query = for_query
        flight.loop = loop
        flight.runners = 1
        flight.attempt += 1
        flight.started_at = self.clock()
        if self._budget is not None and pays:
            self._budget.pay_in()

    def _end(self, flight: Flight[V], state: State, error: BaseException | None = None) -> None:
        """Take an unfinished flight to its end; the caller publishes it after the lock."""
        self._queued.discard(flight)
        self._on_loops.discard(flight)
        self._detached.discard(flight)
        flight.state = state
        flight.finished_at = self.clock()
        flight.context = None
        flight.loop = None  # a ready flight keeps no loop alive
        flight.error = error
        flight.traceback = None if error is None else error.__traceback__
        if flight.era is not self._era:
            flight.held = False
            return
        counts = self._counts
        if state is State.DONE:
            self._durations.add(flight.duration)
            counts.prefetch_succeeded += flight.by_prefetch
        else:
            if flight.by_prefetch and flight.attempt:
                counts.prefetch_failed += 1
            elif flight.by_prefetch:
                counts.prefetch_withdrawn += 1
            self._note_if_lost(flight)
        if state is not State.DONE or self._closed:
            self._remove(flight)
        elif self._by_key.get(flight.key) is flight:
            self._ready[flight.key] = flight
        self._count_if_wasted(flight)

    def _remove(self, flight: Flight[V]) -> None:
        """Take a flight out of the map, if it is still the one that is there for its key."""
        flight.held = False
        if self._by_key.get(flight.key) is flight:
            del self._by_key[flight.key]

    def _let_go(self, flight: Flight[V]) -> bool:
        """Take a flight out of the map before its time; True if that ended it."""
        self._remove(flight)
        if flight.state is State.QUEUED and not flight.waiters:
            self._end(flight, State.FAILED, AbandonedError())
            return True
        if flight.state is State.DONE:
            with suppress(KeyError):  # raised, after the removal, if its time is up by now
                del self._ready[flight.key]
            self._count_if_wasted(flight)
        else:
            self._detached.add(flight)
        return False

    def _left(self, flight: Flight[V]) -> None:
        """Note that a ready flight has left for age or for size."""
        self._note_if_lost(flight)
        self._remove(flight)
        self._count_if_wasted(flight)

    def _leave(self, flight: Flight[V], text: str, waited: float, end: End) -> None:
        flight.waiters -= 1
        if flight.era is not self._era:
            return
        counts = self._counts
        counts.exposed_seconds += waited
        if end is End.RECOVERED:
            counts.query_recovered += 1
        elif end is End.FAILED:
            counts.query_failed += 1
        served = end in (End.SERVED, End.RECOVERED)
        counts.query_matched += served and flight.text != text
        if served and not flight.served:
            self._first_served(flight)
        elif not flight.waiters and not flight.ended:
            flight.first_query_at = None  # the queries that came have gone, unserved
        self._count_if_wasted(flight)

    def _settle_deferred(self) -> None:
        while self._deferred:
            self._leave(*self._deferred.popleft())

    def _first_served(self, flight: Flight[V]) -> None:
        flight.served = True
        if flight.by_prefetch:
            self._counts.prefetch_used += 1
            came = flight.first_query_at
            exposed = 0.0 if came is None else max(0.0, flight.finished_at - came)
            self._counts.hidden_seconds += max(0.0, flight.duration - exposed)

    def _note_if_lost(self, flight: Flight[V]) -> None:
        """Remember the text of a prefetch that is about to leave the map unused."""
        if (
            flight.by_prefetch
            and flight.held
            and not flight.for_query
            and not flight.served
            and not flight.waiters
        ):
            self._lost.append(Unused(flight.key, flight.text, flight.asked_at))

    def _count_if_wasted(self, flight: Flight[V]) -> None:
        """Count a flight whose value nobody got and nobody can get any more.

        Called after each of the three steps that can make this true: the flight is done, it has
        left the map, its last waiter has parted. None of them is ever undone, so it counts once.
        """
        if (
            flight.by_prefetch
            and flight.state is State.DONE
            and not flight.held
            and not flight.served
            and not flight.waiters
        ):
            self._counts.prefetch_wasted += 1


def _publish(flight: Flight[V]) -> None:
    """Wake those who wait for an ended flight. Callbacks run: no lock may be held."""
    future = flight.future
    if future is None:
        return
    if flight.error is None:
        future.set_result(flight.value)
    else:
        future.set_exception(flight.error)
    flight.future = None  # a ready flight keeps nothing of those who waited for it
