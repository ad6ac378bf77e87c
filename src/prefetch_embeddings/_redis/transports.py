"""How jobs reach Redis: through threads that have connections of their own.

Whoever asks makes a `Job`, hands it to a lane and waits for it as long as it likes. So a name
server, a handshake or a reply that hangs holds up nobody, a caller that leaves disturbs nobody, and
what comes too late is still put to use. Jobs that come together travel together. A thread that asks
for one thing may borrow a session that is idle instead, and is cut off from it in time.

A lane leads to one place: a server, or one node of a cluster. There are no locks: every step on
what threads share is atomic by itself, so that a lane may be used from a finaliser or a signal
handler, too.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

from prefetch_embeddings._background import pool as workers
from prefetch_embeddings._redis.jobs import (
    LATE,
    NOT_AT_HAND,
    Gone,
    Job,
    Refusal,
    judge,
    more_time,
)
from prefetch_embeddings._redis.lines import Line
from prefetch_embeddings._redis.sessions import Shared, do_nothing

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefetch_embeddings._redis.breaker import Health
    from prefetch_embeddings._redis.jobs import Command
    from prefetch_embeddings._redis.sessions import Kept, Session

RESTED_SECONDS: Final = 5.0
"""What was idle for so long is suspect once a reply has failed to come: a firewall may have
forgotten it."""


AT_ONCE_SECONDS: Final = 0.0002
"""What an event loop may wait for a reply. Changing to another thread and back takes as long."""


class Lane(Protocol):
    """Leads to one place."""

    def submit(self, job: Job, *, patient: bool = False, at_once: bool = False) -> bool:
        """Have `job` done. Never blocks. False: it will not be, as things are.

        Args:
            job: What is to be done.
            patient: It is also taken while a connection is being made that takes long.
            at_once: It is one command for a reply. If the last one was here at once, as from a
                server on the same machine, this one may be waited for as long as that: it costs
                less than to change threads.
        """

    def ask(self, command: Command, seconds: float) -> Any:
        """Ask on the caller's thread, if a session is at hand; blocks for up to `seconds`.

        Returns:
            The reply; `LATE`: there was none in time; `NOT_AT_HAND`; or an exception, if it failed.
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
        lends: Whether callers may ask on their own threads.
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
        lends: bool = False,
    ) -> None:
        self._most = most
        self._queues = queues
        self._lends = lends
        self._timeout = timeout
        self._shared = Shared(open_session, health, heed)

    def submit(self, job: Job, *, patient: bool = False, at_once: bool = False) -> bool:
        """Have `job` done. Never blocks. False: it will not be, as things are."""
        shared = self._shared
        shared.wanted_at = job.submitted
        if at_once and shared.took < AT_ONCE_SECONDS and self._answer_at_once(job):
            return True
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

    def ask(self, command: Command, seconds: float) -> Any:
        """Ask on the caller's thread, if a session is at hand; see `Lane`."""
        shared = self._shared
        kept = shared.borrow(seconds)
        if kept is None:
            return NOT_AT_HAND
        shared.wanted_at = began = kept.deadline - seconds
        reply = self._use(kept, command, began, seconds)
        if reply is LATE:
            kept.owes = job = Job((command,), do_nothing)
            job.sent = began
            job.leave()
            shared.give_back(kept)
            self._note_late(began)
        return reply

    def _answer_at_once(self, job: Job) -> bool:
        """Ask on this thread, where the reply should be here at once; False: by the queue, then."""
        shared = self._shared
        kept = shared.borrow(AT_ONCE_SECONDS)
        if kept is None:
            return False
        job.sent = began = kept.deadline - AT_ONCE_SECONDS
        reply = self._use(kept, job.commands()[0], began, AT_ONCE_SECONDS)
        if reply is NOT_AT_HAND:
            job.sent = None
            return False
        if reply is LATE:
            shared.took = (
                AT_ONCE_SECONDS  # the next ones ask by the queue, and see how long it takes
            )
            kept.owes = job
            shared.give_back(kept)
            shared.nudge()
        elif isinstance(reply, Exception) and not isinstance(reply, Refusal):
            job.answer(reply)
        else:
            job.answer([reply])
        return True

    def _use(self, kept: Kept, command: Command, began: float, seconds: float) -> Any:
        """Ask by a borrowed session; what is `LATE` is left for the caller to give back."""
        shared = self._shared
        try:
            reply = kept.session.ask(command, seconds)
        except BaseException as error:
            was_cut = kept.broken
            kept.close()
            shared.give_back(kept)
            if not isinstance(error, Exception):
                raise
            if was_cut:  # since it took too long, whatever the session makes of it
                self._note_late(began)
                return TimeoutError()
            if isinstance(error, Gone):  # while it was idle, most likely; a new connection tells
                return NOT_AT_HAND
            if shared.health is not None:
                shared.health.failed(error, began, time.monotonic() - began)
            shared.heed(None)
            return error
        if reply is LATE:
            return reply
        kept.used_at = shared.moved_at = now = time.monotonic()
        shared.took = now - began
        shared.give_back(kept)
        judge((reply,), shared.health, began, shared.took, shared.heed)
        return reply

    def _note_late(self, began: float) -> None:
        shared = self._shared
        now = time.monotonic()
        shared.suspect_before = now - RESTED_SECONDS
        if shared.health is not None:
            shared.health.failed(TimeoutError(), began, now - began)

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
            target=Line(shared, me, together=self._queues, lends=self._lends).run,
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
