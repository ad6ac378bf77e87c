"""The places where keys are: a server or the nodes of a cluster, each with its lanes and health."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

from prefetch_embeddings._redis.breaker import CircuitBreaker, Health
from prefetch_embeddings._redis.tasks import TaskLane
from prefetch_embeddings._redis.transports import ThreadLane

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from prefetch_embeddings._redis.connections import AsyncClient, Driver
    from prefetch_embeddings._redis.jobs import Refusal
    from prefetch_embeddings._redis.recorder import RedisRecorder
    from prefetch_embeddings._redis.transports import Lane

READERS: Final = 8
"""Connections for queries to one place. Each carries the jobs of many callers at a time."""

WAITERS: Final = 32
"""Connections to one place that wait for other processes' calls, one each."""

TASKS: Final = 16
"""Requests that an async client has under way for queries to one place."""

KEYS_TRIED: Final = 512
"""Keys by which the nodes of a cluster are found: enough for some dozens."""

LET_GO_SECONDS: Final = 1.0
"""Between two times that a server which has become a replica has its connections dropped."""


class Place:
    """One server or node: who reads there, who writes, who waits, and how it is."""

    def __init__(self, health: Health, read: Lane, write: Lane, wait: Lane | None) -> None:
        self.health: Final = health
        self.read: Final = read
        self.write: Final = write
        self.wait: Final = wait
        self.let_go_at = -float("inf")

    def lanes(self) -> list[Lane]:
        """Return the different ones."""
        return list(dict.fromkeys(filter(None, (self.read, self.write, self.wait))))


class Places(Protocol):
    """Finds the place of a key."""

    def of(self, key: str | bytes) -> Place | None:
        """Return the place of `key`; None if nobody is known to have it."""


class ThreadPlaces:
    """The places that threads lead to: from any thread, any event loop."""

    def __init__(self, driver: Driver, recorder: RedisRecorder, timeout: float) -> None:
        self._driver = driver
        self._recorder = recorder
        self._timeout = timeout
        self._places: dict[str, Place] = {}
        self._closed = False

    def of(self, key: str | bytes) -> Place | None:
        """Return the place of `key`; None if nobody is known to have it."""
        name = self._driver.place(key)
        if name is None:
            self._driver.look_again()
            return None
        return self._places.get(name) or self._make(name)

    def _make(self, name: str) -> Place:
        health = Health(self._recorder, self._timeout, name=name, breaker=CircuitBreaker())
        most = self._driver.most
        readers, waiters = READERS, WAITERS
        if most is not None:
            readers = max(1, min(readers, (most - 1) // 2))
            waiters = max(0, min(waiters, most - 1 - readers))

        def lane(most: int, health: Health | None, *, lends: bool = False) -> ThreadLane:
            return ThreadLane(
                lambda: self._driver.open(name),
                most=most,
                health=health,
                heed=lambda refusal: self._heed(place, refusal),
                timeout=self._timeout,
                queues=health is not None,
                lends=lends,
            )

        read = lane(readers, health, lends=True)
        write = read if most == 1 else lane(1, health)
        # That waiting takes long, or fails, says nothing: who waits asks on the lane of readers.
        place = Place(health, read, write, lane(waiters, None) if waiters else None)
        if self._closed:
            for each in place.lanes():
                each.close()
        return self._places.setdefault(name, place)

    def _heed(self, place: Place, refusal: Refusal | None) -> None:
        if refusal is None or refusal.is_elsewhere:
            self._driver.look_again()
        elif refusal.code == "READONLY" and time.monotonic() - place.let_go_at > LET_GO_SECONDS:
            # Behind the same name there may be another primary by now.
            place.let_go_at = time.monotonic()
            self._driver.let_go()
            for lane in place.lanes():
                lane.drop_connections()

    def skipped(self) -> None:
        """Note that a place is left alone for a while: keys may have moved to another one."""
        self._driver.look_again()

    def close(self) -> None:
        """Let go of connections and threads."""
        self._closed = True
        for place in list(self._places.values()):
            for lane in place.lanes():
                lane.close()


class LoopPlaces:
    """The places that an async client leads to, from the one event loop that it is used on."""

    def __init__(
        self,
        client: AsyncClient,
        recorder: RedisRecorder,
        timeout: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._client = client
        self._recorder = recorder
        self._timeout = timeout
        self.loop: Final = loop
        self._places: dict[str, Place] = {}

    def of(self, key: str | bytes) -> Place | None:
        """Return the place of `key`."""
        name = self._client.place(key)
        if name is None:
            return None
        return self._places.get(name) or self._make(name)

    def _make(self, name: str) -> Place:
        health = Health(self._recorder, self._timeout, name=name, breaker=CircuitBreaker())
        most = self._client.most
        readers, waiters = TASKS, WAITERS * 8
        if most is not None:
            readers = max(1, min(readers, (most - 1) // 2))
            waiters = max(0, min(waiters, most - 1 - readers))

        def lane(most: int, health: Health | None, heed: Callable[[Refusal | None], None]) -> Lane:
            return TaskLane(self._client.execute, most=most, health=health, heed=heed)

        def heed(refusal: Refusal | None) -> None:
            self._heed(place, refusal)

        read = lane(readers, health, heed)
        write = read if most == 1 else lane(1, health, heed)
        place = Place(health, read, write, lane(waiters, None, heed) if waiters else None)
        return self._places.setdefault(name, place)

    def _heed(self, place: Place, refusal: Refusal | None) -> None:
        if (
            refusal is not None
            and refusal.code == "READONLY"
            and time.monotonic() - place.let_go_at > LET_GO_SECONDS
        ):
            place.let_go_at = time.monotonic()
            self._letting_go = self.loop.create_task(self._client.let_go())

    def skipped(self) -> None:
        """Do nothing: the client looks for keys by itself."""

    def close(self) -> None:
        """Take nothing more."""
        for place in list(self._places.values()):
            for lane in place.lanes():
                lane.close()


def one_key_each(places: Places, prefix: str) -> list[str | bytes]:
    """Return one key for each place that keys are found to be at, out of many keys."""
    keys: dict[Place, str | bytes] = {}
    for number in range(KEYS_TRIED):
        key = f"{prefix}{number}"
        place = places.of(key)
        if place is not None:
            keys.setdefault(place, key)
    return list(keys.values())
