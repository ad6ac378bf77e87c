"""What may run in the background: how many queue, run and are on loops, and when to pause."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._flights.flight import State

if TYPE_CHECKING:
    from prefetch_embeddings._flights.flight import Flight

FAILURES: Final = 3
"""Calls that fail in a row, after which prefetching pauses."""

PROBE_SECONDS: Final = 1.0
"""While prefetching pauses, one may try this long after anybody's last call."""

UNMENDABLE: Final = frozenset(range(400, 500)) - {408, 409, 425, 429}
"""HTTP statuses of errors that another try cannot mend."""


def can_be_mended(error: BaseException) -> bool:
    """Tell whether another try may succeed where this one failed."""
    if not isinstance(error, Exception):
        return False
    try:
        return getattr(error, "status_code", None) not in UNMENDABLE
    except Exception:  # noqa: BLE001 - it is anybody's class
        return True


class Admission:
    """Counts what is under way in the background. Guarded by the map's lock.

    A place is that of a flight in a queue or on a loop, or that of a job in a worker. Each is
    a member of a set, so that giving it back twice, or after a fork, does no harm.

    Args:
        max_queued: Flights that may wait for a worker.
        max_workers: Jobs that workers run at a time. They count in, so that the bound does not
            depend on how fast a thread wakes up.
        max_on_loops: Background flights that may be under way on event loops.
    """

    def __init__(self, max_queued: int, max_workers: int, max_on_loops: int) -> None:
        self._max_in_threads: Final = max_queued + max_workers
        self._max_on_loops: Final = max_on_loops
        # Flights that wait for a worker, in their order, each with those that share its call:
        self._queue: OrderedDict[Flight[Any], tuple[Flight[Any], ...]] = OrderedDict()
        self._queued: set[Flight[Any]] = set()  # the same, and those that pause between attempts
        self._working: set[object] = set()  # a token for each job in a worker
        self._on_loops: set[Flight[Any]] = set()
        self._failures = 0  # calls that failed since the last that succeeded
        self.paused = False
        """Whether prefetching pauses. Only looked at by others."""
        self.called_at = float("-inf")
        """When the last call began. Written by whoever begins one."""
        self._probe: Flight[Any] | None = None  # the last that was let in during a pause

    # --- The queue and its places --------------------------------------------------------------

    @property
    def jobs_waiting(self) -> int:
        """How many jobs wait for a worker."""
        return len({id(together) for together in self._queue.values()})

    @property
    def places_taken(self) -> int:
        """How many places flights take, in the queue and on loops."""
        return len(self._queued) + len(self._on_loops)

    @property
    def workers_busy(self) -> int:
        """How many jobs are in workers. One that has just landed its flights may still be."""
        return len(self._working)

    def lets_in(self, now: float) -> bool:
        """Tell whether one more flight may queue for the workers."""
        return len(self._queued) + len(self._working) < self._max_in_threads and (
            not self.paused or self.may_speculate(now)
        )

    def lets_onto_loop(self, now: float) -> bool:
        """Tell whether one more flight may be begun on a loop."""
        return len(self._on_loops) < self._max_on_loops and self.may_speculate(now)

    def on_loops(self) -> list[Flight[Any]]:
        """Return the flights that have a place on a loop."""
        return list(self._on_loops)

    def take_place(self, flight: Flight[Any]) -> None:
        """Give a flight of the background its place."""
        if flight.home is None:
            self._queued.add(flight)
        else:
            self._on_loops.add(flight)

    def give_back(self, flight: Flight[Any]) -> None:
        """Take a flight's place back, if it has one."""
        self._queue.pop(flight, None)
        self._queued.discard(flight)
        self._on_loops.discard(flight)

    def enqueue(self, *flights: Flight[Any]) -> None:
        """Give flights their places in the queue, as one job."""
        for flight in flights:
            self._queued.add(flight)
            self._queue[flight] = flights

    def next_job(self) -> tuple[Flight[Any], ...]:
        """Take the next job out of the queue: the flights of it that nobody has claimed."""
        if not self._queue:
            return ()
        together = next(iter(self._queue.values()))
        job = tuple(flight for flight in together if flight in self._queue)
        for flight in job:
            del self._queue[flight]
        return job

    def begin(self) -> object:
        """Give a job its place in a worker; return what stands for it."""
        token = object()
        self._working.add(token)
        return token

    def done(self, token: object) -> None:
        """Take that place back."""
        self._working.discard(token)

    def mend(self, unfinished: list[Flight[Any]]) -> None:
        """Give exactly those a place that should have one, after a step that was torn."""
        in_background = [f for f in unfinished if f.by_prefetch and not f.for_query]
        self._on_loops = {f for f in in_background if f.home is not None}
        self._queued = {f for f in in_background if f.home is None and f.state is State.QUEUED}
        for flight in [f for f in self._queue if f not in self._queued]:
            del self._queue[flight]
        for flight in self._queued.difference(self._queue):
            self.enqueue(flight)  # one that pauses between attempts only comes a little early

    # --- The pause while calls keep failing ----------------------------------------------------

    def may_speculate(self, now: float) -> bool:
        """Tell whether a call that nobody waits for may be begun now."""
        return not self.paused or now - self.called_at >= PROBE_SECONDS

    def note_probe(self, flight: Flight[Any], now: float) -> None:
        """Note that a flight was let in. In a pause it is the probe, the only one that may run."""
        if self.paused:
            self._probe = flight
            self.called_at = now

    def may_run(self, flight: Flight[Any]) -> bool:
        """Tell whether a flight that was let in may still be run in the background."""
        return not self.paused or flight is self._probe

    def note_failure(self) -> bool:
        """Note that a call failed; True if prefetching pauses from now on."""
        self._failures += 1
        begins = self._failures >= FAILURES and not self.paused
        self.paused = self.paused or begins
        return begins

    def note_success(self) -> bool:
        """Note that a call succeeded; True if prefetching paused until now."""
        paused, self.paused, self._failures, self._probe = self.paused, False, 0, None
        return paused
