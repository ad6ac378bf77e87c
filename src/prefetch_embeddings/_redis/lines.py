"""The threads of a lane: each has a session of its own, and all take jobs from one queue."""

from __future__ import annotations

import contextlib
import queue
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

from prefetch_embeddings._redis.jobs import (
    Gone,
    Job,
    NotAsked,
    Refusal,
    as_exception,
    counted,
    judge,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prefetch_embeddings._redis.breaker import Health
    from prefetch_embeddings._redis.jobs import Command

MOST_JOBS: Final = 64
"""Jobs that travel together."""

MOST_COMMANDS: Final = 128
"""Commands that travel together, so that a large batch keeps what came in time."""

IDLE_SECONDS: Final = 30.0
"""After so long without work a connection is closed, and its thread ends."""

RETRY_SECONDS: Final = 0.25
"""Between two attempts to connect, as long as somebody wants Redis."""

WANTED_SECONDS: Final = 2.0
"""For so long after somebody wanted Redis it is tried to connect."""

_TAKEN: Final = object()


class Session(Protocol):
    """A way to one place that is open. Used by one thread at a time."""

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies in order; an error that the server answered is a `Refusal` in place.

        Raises:
            Gone: The other side has closed the connection.
            Exception: Whatever else went wrong.
        """

    def close(self) -> None:
        """Let go of it."""


class Shared:
    """What the threads of a lane share, and how they get their jobs."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        health: Health | None,
        heed: Callable[[Refusal | None], None],
    ) -> None:
        self.open = open_session
        self.health = health
        self.heed = heed
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # One entry for each thread that waits; who submits takes one out, and so counts on it.
        self.idle: dict[object, None] = {}
        self.threads: dict[object, None] = {}
        self.sessions: dict[object, None] = {}
        self.connecting: dict[object, float] = {}  # since when
        self.moved_at = 0.0
        self.wanted_at = 0.0
        self.drop_before = 0.0  # sessions opened earlier are not used again
        self.suspect_before = 0.0  # nor those that were used last before
        self.closed = False

    def next(self, seconds: float) -> Job | None:
        """Return the next job, waiting up to `seconds` for it; None: there was none."""
        if not self.jobs.empty() and (ready := self._get(0.0)) is not None:
            return ready
        token = object()
        self.idle[token] = None
        job = self._get(seconds)
        if self.idle.pop(token, _TAKEN) is _TAKEN and job is None and not self.closed:
            return self._get(1.0)  # somebody counts on this thread: the job is on its way
        return job

    def _get(self, seconds: float) -> Job | None:
        try:
            return self.jobs.get(timeout=seconds)
        except queue.Empty:
            return None

    def with_more(self, first: Job) -> list[Job]:
        """Return `first` and what else is in line, as much as should travel together."""
        batch = [first]
        while len(batch) < MOST_JOBS:
            try:
                job = self.jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:  # the end, which is some thread's to hear
                self.jobs.put(None)
                break
            batch.append(job)
        return batch

    def end_others(self) -> None:
        """Let all threads hear that the lane is closed."""
        for _ in range(len(self.threads)):
            self.jobs.put(None)

    def fail_queued(self, error: Exception) -> None:
        """End all jobs that are in line."""
        while True:
            try:
                job = self.jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.end(error)


class Line:
    """One thread of a lane, and its session."""

    def __init__(self, shared: Shared, me: object, *, together: bool) -> None:
        self._shared = shared
        self._me = me
        self._together = together
        self._session: Session | None = None
        self._opened_at = 0.0
        self._used_at = 0.0

    def run(self) -> None:
        """Take jobs until there were none for a while, or the lane is closed."""
        shared = self._shared
        try:
            self._run()
        finally:
            self._let_go()
            shared.connecting.pop(self._me, None)
            shared.threads.pop(self._me, None)
            if shared.closed or not shared.threads:
                shared.fail_queued(NotAsked())
            if shared.closed:
                shared.end_others()

    def _run(self) -> None:
        shared = self._shared
        taken: list[Job] = []  # but not sent: there was no connection
        while not shared.closed:
            if self._session is None:
                try:
                    self._connect()
                except BaseException as error:  # noqa: BLE001 - it is the jobs'
                    self._could_not_connect(as_exception(error), taken)
                    if time.monotonic() - shared.wanted_at > WANTED_SECONDS:
                        return
                    job = shared.next(RETRY_SECONDS)
                    taken = [] if job is None else [job]
                    continue
            if not taken:
                job = shared.next(IDLE_SECONDS)
                if job is None:
                    return
                taken = shared.with_more(job) if self._together else [job]
            if self._is_stale():
                self._let_go()
            else:
                self._serve(taken)
                taken = []
        for job in taken:
            job.end(NotAsked())

    def _connect(self) -> None:
        shared = self._shared
        shared.connecting.setdefault(self._me, time.monotonic())
        self._session = shared.open()
        self._opened_at = self._used_at = time.monotonic()
        shared.sessions[self._me] = None
        shared.connecting.pop(self._me, None)
        if shared.health is not None:
            shared.health.connected()

    def _could_not_connect(self, error: Exception, taken: list[Job]) -> None:
        shared = self._shared
        now = time.monotonic()
        began = shared.connecting.pop(self._me, now)
        if not isinstance(error, NotAsked):
            if shared.health is not None:
                shared.health.failed_to_connect(error, began, now - began)
            shared.heed(error if isinstance(error, Refusal) else None)
        for job in taken:
            job.end(error)
        if not shared.sessions:
            shared.fail_queued(error)

    def _let_go(self) -> None:
        session, self._session = self._session, None
        self._shared.sessions.pop(self._me, None)
        if session is not None:
            with contextlib.suppress(Exception):  # nobody needs it any more
                session.close()

    def _is_stale(self) -> bool:
        shared = self._shared
        return self._opened_at < shared.drop_before or self._used_at < shared.suspect_before

    def _serve(self, batch: list[Job]) -> None:
        """Send what is still wanted, as much as should travel together at a time."""
        together: list[tuple[Job, Sequence[Command]]] = []
        count = 0  # of commands
        for job in batch:
            if job.left:
                continue
            try:
                commands = job.commands()
            except Exception as error:  # noqa: BLE001 - it is this job's alone
                job.end(error)
                continue
            if together and count + len(commands) > MOST_COMMANDS:
                self._exchange(together)
                together, count = [], 0
            together.append((job, commands))
            count += len(commands)
        if together:
            self._exchange(together)

    def _exchange(self, together: list[tuple[Job, Sequence[Command]]]) -> None:
        shared = self._shared
        commands = together[0][1]
        if len(together) > 1:
            commands = [command for _, some in together for command in some]
        began = time.monotonic()
        for job, _ in together:
            job.sent = began
        try:
            replies = counted(self._replies(commands), commands)
        except BaseException as caught:  # noqa: BLE001 - it is the jobs'
            self._let_go()
            error = as_exception(caught)
            if not isinstance(error, NotAsked):
                if shared.health is not None:
                    shared.health.failed(error, began, time.monotonic() - began)
                shared.heed(None)
            for job, _ in together:
                job.end(error)
            return
        self._used_at = shared.moved_at = time.monotonic()
        judge(replies, shared.health, began, self._used_at - began, shared.heed)
        if len(together) == 1:
            together[0][0].end(replies)
            return
        start = 0
        for job, some in together:
            job.end(replies[start : start + len(some)])
            start += len(some)

    def _replies(self, commands: Sequence[Command]) -> list[Any]:
        if self._session is not None:
            try:
                return self._session.execute(commands)
            except Gone:  # while it was idle, most likely; a new connection tells
                self._let_go()
        self._connect()
        assert self._session is not None  # noqa: S101 - it is connected
        return self._session.execute(commands)
