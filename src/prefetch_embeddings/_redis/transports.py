"""How jobs reach Redis: through threads that have connections of their own.

Whoever asks makes a `Job`, hands it to a lane and waits for it as long as it likes: it never
touches a connection. So a name server, a handshake or a reply that hangs holds up nobody, a caller
that leaves disturbs nobody, and what comes too late is still put to use. Jobs that come together
travel together.

A lane leads to one place: a server, or one node of a cluster. There are no locks: every step on
what threads share is atomic by itself, so that a lane may be used from a finaliser or a signal
handler, too.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

from prefetch_embeddings._background import pool as workers
from prefetch_embeddings._redis.jobs import Job, Refusal, more_time
from prefetch_embeddings._redis.lines import Line, Shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefetch_embeddings._redis.breaker import Health
    from prefetch_embeddings._redis.lines import Session

RESTED_SECONDS: Final = 5.0
"""What was idle for so long is suspect once a reply has failed to come: a firewall may have
forgotten it."""


class Lane(Protocol):
    """Leads to one place."""

    def submit(self, job: Job, *, patient: bool = False) -> bool:
        """Have `job` done. Never blocks. False: it will not be, as things are.

        `patient` jobs are also taken while a connection is being made that takes long.
        """

    def more(self, job: Job, seconds: float) -> float:
        """Return how many seconds more `job` may have of the `seconds` it was given; 0: none."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""

    def wanted(self) -> None:
        """Note that somebody would have asked, had the breaker let it."""

    def drop_connections(self) -> None:
        """Use no connection any more that is there now."""

    def close(self) -> None:
        """Take nothing more and let go of connections. Does not wait."""


class ThreadLane:
    """Threads, started as needed, with a session each; they take jobs from one queue.

    Args:
        open_session: Connects; may take long, may raise.
        most: Threads, and so sessions, at a time.
        health: Is told how it goes; None: nobody is.
        heed: Is told of refusals, and with None of lost connections, before whoever waits is.
        timeout: What a caller gives Redis, in seconds.
        queues: Whether jobs may wait for a thread; else those that would are not taken.
    """

    def __init__(
        self,
        open_session: Callable[[], Session],
        *,
        most: int,
        health: Health | None,
        heed: Callable[[Refusal | None], None],
        timeout: float,
        queues: bool = True,
    ) -> None:
        self._most = most
        self._queues = queues
        self._timeout = timeout
        self._shared = Shared(open_session, health, heed)

    def submit(self, job: Job, *, patient: bool = False) -> bool:
        """Have `job` done. Never blocks. False: it will not be, as things are."""
        shared = self._shared
        shared.wanted_at = job.submitted
        if shared.closed or not (patient or self._is_near(job.submitted)):
            return False
        if not self._queues and not shared.idle and len(shared.threads) >= self._most:
            return False
        shared.jobs.put(job)
        try:
            shared.idle.popitem()
        except KeyError:
            return self._start()
        return True

    def _is_near(self, now: float) -> bool:
        """Return whether there is a connection, or one might be there in time."""
        if self._shared.sessions:
            return True
        since = min(list(self._shared.connecting.values()), default=now)
        return now - since < self._timeout

    def more(self, job: Job, seconds: float) -> float:
        """Return how many seconds more `job` may have; see `more_time`."""
        shared = self._shared
        more = more_time(job, seconds, shared.moved_at)
        if more <= 0 and job.sent is not None:
            shared.suspect_before = time.monotonic() - RESTED_SECONDS
        return more

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return bool(self._shared.sessions)

    def wanted(self) -> None:
        """Note that somebody would have asked: with that it goes on trying to connect."""
        self._shared.wanted_at = time.monotonic()
        if not self._shared.threads:
            self._start()

    def drop_connections(self) -> None:
        """Use no connection any more that is there now."""
        self._shared.drop_before = time.monotonic()

    def close(self) -> None:
        """Take nothing more and let the threads end."""
        self._shared.closed = True
        self._shared.end_others()

    def _start(self) -> bool:
        """Start a thread if one more may help; return whether there is any."""
        shared = self._shared
        if shared.closed:
            return False
        if (shared.connecting and self._queues) or len(shared.threads) >= self._most:
            return bool(shared.threads)
        me = object()
        shared.threads[me] = None
        shared.connecting[me] = time.monotonic()
        thread = threading.Thread(
            target=Line(shared, me, together=self._queues).run,
            name="prefetch-embeddings-redis",
            daemon=True,
        )
        try:
            workers.start(thread)
        except BaseException as error:
            shared.threads.pop(me, None)
            shared.connecting.pop(me, None)
            if not isinstance(error, RuntimeError):
                raise
        return bool(shared.threads)
