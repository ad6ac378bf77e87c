"""Runs lookups, for threads and for coroutines: within the time, past the breaker, and counted."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from prefetch_embeddings._redis.errands import Errand, Errands
from prefetch_embeddings._redis.jobs import LATE, NOT_AT_HAND, Job, NotAsked, Refusal
from prefetch_embeddings._redis.requests import (
    FAILED,
    POLL_SECONDS,
    Ask,
    Wait,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from prefetch_embeddings._redis.jobs import Command
    from prefetch_embeddings._redis.places import LoopPlaces, Place, ThreadPlaces
    from prefetch_embeddings._redis.recorder import RedisRecorder
    from prefetch_embeddings._redis.requests import Request

SLACK_SECONDS: Final = 0.25
"""How late a server may wake what is blocked: its clock ticks ten times a second by default."""

WARM_UP_SECONDS: Final = 5.0
"""How long warming up waits for a connection."""

T = TypeVar("T")


class Exchange:
    """Runs lookups.

    Args:
        recorder: Counts.
        timeout: The most that Redis may cost one call, in seconds.
        threads: Where keys are, for threads and for all event loops but one; None: nowhere.
        loop_places: Where keys are for the event loop that it is called on; None: as for threads.
    """

    def __init__(
        self,
        recorder: RedisRecorder,
        *,
        timeout: float,
        threads: ThreadPlaces | None,
        loop_places: Callable[[], LoopPlaces | None],
    ) -> None:
        self._recorder = recorder
        self._timeout = timeout
        self._threads = threads
        self._loop_places = loop_places

    def run(self, steps: Generator[Request, Any, T], seconds: float | None = None) -> T:
        """Run a lookup on this thread, `seconds` at most (None: the timeout); return its result."""
        left = self._timeout if seconds is None else seconds
        try:
            request = next(steps)
            while True:
                answer: Any
                if isinstance(request, Wait):
                    answer = self._wait(request)
                else:
                    answer, left = self._ask(request, left)
                request = steps.send(answer)
        except StopIteration as end:
            return cast("T", end.value)

    async def arun(self, steps: Generator[Request, Any, T], seconds: float | None = None) -> T:
        """Do what `run` does without blocking the event loop."""
        left = self._timeout if seconds is None else seconds
        places = self._loop_places() or self._threads
        try:
            request = next(steps)
            while True:
                answer: Any
                if isinstance(request, Wait):
                    answer = await self._await(request, places)
                else:
                    answer, left = await self._aask(request, left, places)
                request = steps.send(answer)
        except StopIteration as end:
            return cast("T", end.value)

    # -- asking

    def _ask(self, ask: Ask, left: float) -> tuple[Any, float]:
        if len(ask.keys) == 1 and ask.late is None and 0 < left <= self._timeout:
            began = time.monotonic()
            reply = self._ask_at_once(ask, left)
            if reply is not NOT_AT_HAND:
                seconds = time.monotonic() - began
                self._recorder.spent(seconds)
                return [reply], left - seconds
        request = Errands(ask)
        try:
            bells: list[threading.Lock] = []

            def notify() -> Callable[[], None]:
                bell = threading.Lock()
                bell.acquire()
                bells.append(bell)
                return bell.release

            self._send(request, left, self._threads, notify)
            for errand, bell in zip(request.errands, bells, strict=True):
                self._listen(errand, bell)
                request.finish(errand)
        except BaseException:
            request.give_up()
            raise
        return self._settle(request, left)

    def _ask_at_once(self, ask: Ask, left: float) -> Any:
        """Ask on this thread, if a connection is at hand."""
        place = None if self._threads is None else self._threads.of(ask.keys[0])
        if place is None or not place.health.breaker.closed:
            return NOT_AT_HAND
        reply = place.read.ask(ask.commands[0], left)
        failed = isinstance(reply, Exception) and not isinstance(reply, Refusal)
        return FAILED if failed or reply is LATE else reply

    @staticmethod
    def _listen(errand: Errand, bell: threading.Lock) -> None:
        seconds = errand.deadline - time.monotonic()
        while not bell.acquire(timeout=max(0.0, seconds)):
            seconds = errand.more()
            if seconds <= 0:
                return

    async def _aask(
        self, ask: Ask, left: float, places: LoopPlaces | ThreadPlaces | None
    ) -> tuple[Any, float]:
        request = Errands(ask)
        try:
            loop = asyncio.get_running_loop()
            bells: list[asyncio.Future[None]] = []

            def notify() -> Callable[[], None]:
                bell = loop.create_future()
                bells.append(bell)
                return lambda: _ring(loop, bell)

            self._send(request, left, places, notify, at_once=len(ask.keys) == 1 and not ask.late)
            for errand, bell in zip(request.errands, bells, strict=True):
                if errand.job.finished is None:
                    await self._alisten(loop, errand, bell)
                request.finish(errand)
        except BaseException:
            request.give_up()
            raise
        return self._settle(request, left)

    @staticmethod
    async def _alisten(
        loop: asyncio.AbstractEventLoop, errand: Errand, bell: asyncio.Future[None]
    ) -> None:
        timer: asyncio.TimerHandle | None = None

        def due() -> None:
            nonlocal timer
            seconds = errand.more()
            if seconds > 0:
                timer = loop.call_later(seconds, due)
            else:
                _set(bell)

        timer = loop.call_later(max(0.0, errand.deadline - time.monotonic()), due)
        try:
            await bell
        finally:
            timer.cancel()

    def _send(
        self,
        request: Errands,
        left: float,
        places: LoopPlaces | ThreadPlaces | None,
        notify: Callable[[], Callable[[], None]],
        *,
        at_once: bool = False,
    ) -> None:
        """Hand the commands to the lanes of their places, if those may be asked."""
        ask = request.ask
        if places is None:
            return
        if ask.charged:
            seconds = left
            if left <= 0:
                request.replies = [FAILED] * len(ask.commands)
                return
        else:
            seconds = self._timeout
        for place, positions in self._sorted(ask.keys, places).items():
            if not place.health.breaker.allows():
                place.read.wanted()
                places.skipped()
                continue
            commands = ask.commands
            if len(positions) < len(commands):
                commands = [commands[position] for position in positions]
            job = Job(commands, notify(), ask.late)
            errand = Errand(job, place, place.read, positions, seconds)
            request.errands.append(errand)
            if not place.read.submit(job, patient=seconds > self._timeout, at_once=at_once):
                job.end(NotAsked())

    @staticmethod
    def _sorted(
        keys: Sequence[str | bytes], places: LoopPlaces | ThreadPlaces
    ) -> dict[Place, list[int]]:
        if len(keys) == 1:
            place = places.of(keys[0])
            return {} if place is None else {place: [0]}
        positions: dict[Place, list[int]] = {}
        for position, key in enumerate(keys):
            place = places.of(key)
            if place is not None:
                positions.setdefault(place, []).append(position)
        return positions

    def _settle(self, request: Errands, left: float) -> tuple[Any, float]:
        """Count what it took; return the replies, and the time left."""
        self._recorder.spent(time.monotonic() - request.began)
        return request.replies, left - request.charge()

    # -- waiting for another process

    def _wait(self, wait: Wait) -> float:
        bell = threading.Lock()
        bell.acquire()
        began = time.monotonic()
        job = self._block(wait, self._threads, bell.release)
        try:
            # What has not been sent by then, since a connection is still being made, wakes nobody.
            if job is not None and not bell.acquire(timeout=POLL_SECONDS) and job.sent is not None:
                bell.acquire(timeout=wait.seconds + SLACK_SECONDS)
            if self._must_poll(job, wait, began):
                # Nobody wakes it: it looks again in a while.
                threading.Event().wait(min(wait.seconds, POLL_SECONDS))
        finally:
            if job is not None:
                job.leave()
        return self._waited(began)

    async def _await(self, wait: Wait, places: LoopPlaces | ThreadPlaces | None) -> float:
        loop = asyncio.get_running_loop()
        bell: asyncio.Future[None] = loop.create_future()
        began = time.monotonic()
        job = self._block(wait, places, lambda: _ring(loop, bell))

        def not_sent() -> None:
            if job is None or job.sent is None:
                _set(bell)

        timers = [
            loop.call_later(POLL_SECONDS, not_sent),
            loop.call_later(wait.seconds + SLACK_SECONDS, _set, bell),
        ]
        try:
            if job is not None:
                await bell
            if self._must_poll(job, wait, began):
                await asyncio.sleep(min(wait.seconds, POLL_SECONDS))
        finally:
            for timer in timers:
                timer.cancel()
            if job is not None:
                job.leave()
        return self._waited(began)

    @staticmethod
    def _block(
        wait: Wait, places: LoopPlaces | ThreadPlaces | None, notify: Callable[[], None]
    ) -> Job | None:
        """Have the blocking command sent; None: there is no connection to spare for it."""
        place = None if places is None else places.of(wait.key)
        if place is None or place.wait is None:
            return None
        job = Job([wait.command], notify)
        return job if place.wait.submit(job, patient=True) else None

    @staticmethod
    def _must_poll(job: Job | None, wait: Wait, began: float) -> bool:
        """Return whether what was to block did not: it was refused, or failed at once."""
        if job is not None and isinstance(job.replies, list) and not _is_error(job.replies[0]):
            return False
        return time.monotonic() - began < min(wait.seconds, POLL_SECONDS)

    def _waited(self, began: float) -> float:
        seconds = time.monotonic() - began
        self._recorder.waited(seconds)
        return seconds


def ask(commands: Sequence[Command], keys: Sequence[str | bytes]) -> Generator[Request, Any, Any]:
    """Ask once, and return the replies."""
    return (yield Ask(commands, keys))


def _is_error(reply: Any) -> bool:
    return isinstance(reply, Exception)


def _ring(loop: asyncio.AbstractEventLoop, bell: asyncio.Future[None]) -> None:
    with suppress(RuntimeError):  # the loop has closed, and with it whoever waited
        loop.call_soon_threadsafe(_set, bell)


def _set(bell: asyncio.Future[None]) -> None:
    if not bell.done():
        bell.set_result(None)
