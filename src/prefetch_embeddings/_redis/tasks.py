"""How jobs reach Redis through an async client that the user made: as tasks on its event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._redis.jobs import (
    NOT_AT_HAND,
    Job,
    NotAsked,
    Refusal,
    counted,
    judge,
    more_time,
)
from prefetch_embeddings._redis.lines import MOST_COMMANDS
from prefetch_embeddings._redis.sessions import MOST_JOBS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from prefetch_embeddings._redis.breaker import Health
    from prefetch_embeddings._redis.jobs import Command

ABANDONED_SECONDS: Final = 5.0
"""After so long a task that nobody waits for is cancelled: it may have been connecting until then,
and a connection is worth having."""


class TaskLane:
    """Tasks on one event loop, for an async client that the user made.

    A caller never awaits the client itself: what a client does with a cancellation, or with none,
    is its task's business.

    Args:
        execute: Asks the client.
        most: Tasks at a time.
        health: As for `ThreadLane`.
        heed: Likewise.
    """

    connected = True  # the client connects when it is asked

    def __init__(
        self,
        execute: Callable[[Sequence[Command]], Awaitable[list[Any]]],
        *,
        most: int,
        health: Health | None,
        heed: Callable[[Refusal | None], None],
    ) -> None:
        self._execute = execute
        self._most = most
        self._health = health
        self._heed = heed
        self._jobs: deque[Job] = deque()
        self._tasks: dict[asyncio.Task[None], list[Job]] = {}
        self._moved_at = 0.0
        self._closed = False

    def submit(self, job: Job, *, patient: bool = False, at_once: bool = False) -> bool:  # noqa: ARG002 - it connects, and awaits, anyway
        """Have `job` done. False: it will not be: no task can be started."""
        if self._closed:
            return False
        if len(self._tasks) >= self._most:
            self._cancel_abandoned()
        else:
            batch: list[Job] = []
            work = self._work(batch)
            try:
                task = asyncio.get_running_loop().create_task(work)
            except RuntimeError:  # no loop runs: a coroutine was thrown away after its loop
                work.close()
                return False
            self._tasks[task] = batch
            task.add_done_callback(self._ended)
        self._jobs.append(job)
        return True

    def ask(self, command: Command, seconds: float) -> Any:  # noqa: ARG002 - it would block
        """Return `NOT_AT_HAND`: the client is the event loop's."""
        return NOT_AT_HAND

    def more(self, job: Job, seconds: float) -> float:
        """Return how many seconds more `job` may have; see `more_time`."""
        return more_time(job, seconds, self._moved_at)

    def wanted(self) -> None:
        """Do nothing: the client connects when it is asked."""

    def drop_connections(self) -> None:
        """Do nothing: what is connected is the client's business."""

    def close(self) -> None:
        """Take nothing more. The client stays open: it is the user's."""
        self._closed = True

    def _cancel_abandoned(self) -> None:
        long_ago = time.monotonic() - ABANDONED_SECONDS
        for task, batch in list(self._tasks.items()):
            if batch and all(job.left and (job.sent or 0.0) < long_ago for job in batch):
                task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        for job in self._tasks.pop(task, ()):
            if job.finished is None:
                job.end(NotAsked())
        if not self._tasks:
            while self._jobs:
                self._jobs.popleft().end(NotAsked())

    async def _work(self, batch: list[Job]) -> None:
        while self._jobs:
            batch.clear()
            count = 0
            while self._jobs and len(batch) < MOST_JOBS and count < MOST_COMMANDS:
                job = self._jobs.popleft()
                if not job.left:
                    batch.append(job)
                    count += len(job.commands())
            if batch:
                await self._exchange(batch)

    async def _exchange(self, batch: list[Job]) -> None:
        asked = [job.commands() for job in batch]
        commands = [command for some in asked for command in some]
        began = time.monotonic()
        for job in batch:
            job.sent = began
        try:
            replies = counted(await self._execute(commands), commands)
        except Exception as error:  # noqa: BLE001 - it is the jobs'
            if not isinstance(error, NotAsked):
                if self._health is not None:
                    self._health.failed(error, began, time.monotonic() - began)
                self._heed(None)
            for job in batch:
                job.end(error)
            return
        self._moved_at = time.monotonic()
        judge(replies, self._health, began, self._moved_at - began, self._heed)
        start = 0
        for job, some in zip(batch, asked, strict=True):
            job.end(replies[start : start + len(some)])
            start += len(some)
