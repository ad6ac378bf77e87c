"""The threads of a lane: each has a session of its own, and all take jobs from one queue.

A thread that waits for jobs lends its session to callers, who then ask on their own thread: that
saves two changes of threads, half of what a hit takes besides. The thread sees to it that a caller
gets away in time: it cuts a session that is not back by then.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._redis.jobs import (
    Gone,
    Job,
    NotAsked,
    Refusal,
    as_exception,
    counted,
    judge,
)
from prefetch_embeddings._redis.sessions import TAKEN, Kept, Shared

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prefetch_embeddings._redis.jobs import Command

MOST_COMMANDS: Final = 128
"""Commands that travel together, so that a large batch keeps what came in time."""

IDLE_SECONDS: Final = 30.0
"""After so long without work a connection is closed, and its thread ends."""

RETRY_SECONDS: Final = 0.25
"""Between two attempts to connect, as long as somebody wants Redis."""

LENDING_SECONDS: Final = 1.0
"""For so long after its last use a session is lent; later callers come by the queue."""

LOOK_SECONDS: Final = 0.02
"""How often a line that lends its session looks whether it is overdue."""

WANTED_SECONDS: Final = 2.0
"""For so long after somebody wanted Redis it is tried to connect."""


class Line:
    """One thread of a lane, and its session."""

    def __init__(self, shared: Shared, me: object, *, together: bool, lends: bool) -> None:
        self._shared = shared
        self._me = me
        self._together = together
        self._lends = lends
        self._kept: Kept | None = None
        self._has_lent = False

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
            if self._kept is None:
                try:
                    self._connect()
                except BaseException as error:  # noqa: BLE001 - it is the jobs'
                    self._could_not_connect(as_exception(error), taken)
                    if time.monotonic() - shared.wanted_at > WANTED_SECONDS:
                        return
                    job = shared.next([RETRY_SECONDS])
                    taken = [] if job is None else [job]
                    continue
            if not taken:
                job = shared.next(self._waits())
                has_lent = self._has_lent
                if has_lent:
                    self._take_back()
                if job is not None:
                    taken = shared.with_more(job) if self._together else [job]
                elif has_lent:
                    continue
                else:
                    return
            if self._kept is None or shared.is_stale(self._kept):
                self._let_go()
            else:
                self._serve(taken)
                taken = []
        for job in taken:
            job.end(NotAsked())

    def _connect(self) -> None:
        shared = self._shared
        shared.connecting.setdefault(self._me, time.monotonic())
        self._kept = Kept(shared.open())
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
        kept, self._kept = self._kept, None
        self._shared.sessions.pop(self._me, None)
        if kept is not None:
            kept.close()

    # -- lending

    def _waits(self) -> Iterator[float]:
        """Lend the session for a while; yield how long to wait for a job at a time.

        Ends early if something is the matter with what is lent.
        """
        kept, shared = self._kept, self._shared
        if kept is not None and self._lends and kept.session.lendable:
            self._has_lent = True
            shared.at_hand[kept] = None
            missed = None  # the deadline that had passed at the last look
            while True:
                yield LOOK_SECONDS
                if not kept.in_order:
                    return
                now = time.monotonic()
                if kept in shared.at_hand:
                    if now - kept.used_at > LENDING_SECONDS:
                        break
                    missed = None
                elif now > kept.deadline:
                    # Only at the second look: at the first it may have been borrowed just now.
                    if missed == kept.deadline:
                        return
                    missed = kept.deadline
            if shared.at_hand.pop(kept, TAKEN) is TAKEN:
                return  # somebody borrowed it at the last moment
            self._has_lent = False
        yield IDLE_SECONDS

    def _take_back(self) -> None:
        """Have the session for this line alone; let go of one that does not come in time."""
        kept, shared = self._kept, self._shared
        assert kept is not None  # noqa: S101 - it was lent
        kept.wanted = True
        if shared.at_hand.pop(kept, TAKEN) is TAKEN:
            seconds = max(0.0, kept.deadline - time.monotonic()) + LOOK_SECONDS
            if not kept.came_back(seconds):
                kept.close()
        kept.wanted = self._has_lent = False
        if kept.broken:
            self._let_go()
        elif kept.owes is not None:
            self._read_late(kept, kept.owes)

    def _read_late(self, kept: Kept, job: Job) -> None:
        """Read a reply for which its caller did not wait on its own thread."""
        began = job.submitted if job.sent is None else job.sent
        try:
            reply = kept.session.read()
        except BaseException as caught:  # noqa: BLE001 - it is the job's
            error = as_exception(caught)
            self._failed(error, began)
            job.end(error)
            return
        kept.owes = None
        self._answered(kept, [reply], began)
        job.end([reply])

    # -- serving

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
        commands = together[0][1]
        if len(together) > 1:
            commands = [command for _, some in together for command in some]
        began = time.monotonic()
        for job, _ in together:
            job.sent = began
        try:
            replies = counted(self._replies(commands), commands)
        except BaseException as caught:  # noqa: BLE001 - it is the jobs'
            error = as_exception(caught)
            self._failed(error, began)
            for job, _ in together:
                job.end(error)
            return
        assert self._kept is not None  # noqa: S101 - it has just answered
        self._answered(self._kept, replies, began)
        if len(together) == 1:
            together[0][0].end(replies)
            return
        start = 0
        for job, some in together:
            job.end(replies[start : start + len(some)])
            start += len(some)

    def _replies(self, commands: Sequence[Command]) -> list[Any]:
        if self._kept is not None:
            try:
                return self._kept.session.execute(commands)
            except Gone:  # while it was idle, most likely; a new connection tells
                self._let_go()
        self._connect()
        assert self._kept is not None  # noqa: S101 - it is connected
        return self._kept.session.execute(commands)

    def _answered(self, kept: Kept, replies: Sequence[Any], began: float) -> None:
        shared = self._shared
        kept.used_at = shared.moved_at = time.monotonic()
        shared.took = kept.used_at - began
        judge(replies, shared.health, began, shared.took, shared.heed)

    def _failed(self, error: Exception, began: float) -> None:
        shared = self._shared
        self._let_go()
        if not isinstance(error, NotAsked):
            if shared.health is not None:
                shared.health.failed(error, began, time.monotonic() - began)
            shared.heed(None)
