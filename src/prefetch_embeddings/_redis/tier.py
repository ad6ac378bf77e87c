"""What one Redis tier is made of, put together; once more in a forked child."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._redis import lease
from prefetch_embeddings._redis.calls import Batch, Query
from prefetch_embeddings._redis.clients import check_async_client, check_client, driver_of
from prefetch_embeddings._redis.codec import Codec
from prefetch_embeddings._redis.connections import AsyncClient
from prefetch_embeddings._redis.exchange import WARM_UP_SECONDS, Exchange, ask
from prefetch_embeddings._redis.jobs import Refusal
from prefetch_embeddings._redis.lookup import Lookups
from prefetch_embeddings._redis.places import LoopPlaces, ThreadPlaces, one_key_each
from prefetch_embeddings._redis.recorder import RedisRecorder
from prefetch_embeddings._redis.requests import NoReply
from prefetch_embeddings._redis.shelf import Shelf
from prefetch_embeddings._redis.urls import driver_for
from prefetch_embeddings._redis.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from prefetch_embeddings._redis.jobs import Job
    from prefetch_embeddings._redis.places import Place
    from prefetch_embeddings._redis.recorder import RedisCacheEvent
    from prefetch_embeddings._redis.requests import Request
    from prefetch_embeddings.existing import ExistingCache


class Tier:
    """Everything behind the face of a Redis tier. The arguments are those of the face."""

    def __init__(
        self,
        *,
        url: str | None,
        client: Any,
        async_client: Any,
        model_id: str,
        dimensions: int | None,
        ttl_milliseconds: int | None,
        prefix: str,
        timeout: float,
        lease_seconds: float | None,
        secret: str | bytes | None,
        read_through: Sequence[ExistingCache],
        on_event: Callable[[RedisCacheEvent], None] | None,
    ) -> None:
        if client is not None:
            check_client(client)
        if async_client is not None:
            check_async_client(async_client)
        self._url = url
        self._client = client
        self._async_client = None if async_client is None else AsyncClient(async_client)
        self._model_id = model_id
        self._dimensions = dimensions
        self._ttl_milliseconds = ttl_milliseconds
        self._prefix = prefix
        self._timeout = timeout
        self._lease_seconds = lease_seconds
        self._codec = Codec(secret)
        self._read_through = read_through
        self._on_event = on_event
        self.patience: Final = max(timeout, WARM_UP_SECONDS)
        # The process in which the async client's connections are, once there may be any.
        self._process: int | None = None
        self.start_anew()

    def start_anew(self) -> None:
        """Make all that holds a thread or a connection; what was there before is let alone."""
        self.recorder = RedisRecorder(self._on_event)
        driver = None
        if self._url is not None:
            driver = driver_for(self._url)
        elif self._client is not None:
            driver = driver_of(self._client)
        self._threads = (
            None if driver is None else ThreadPlaces(driver, self.recorder, self._timeout)
        )
        self._loop_places: LoopPlaces | None = None
        self._closed = False
        self.writer = Writer(
            self._send_write,
            codec=self._codec,
            ttl_milliseconds=self._ttl_milliseconds,
            recorder=self.recorder,
        )
        self.shelf = Shelf(
            self._codec,
            prefix=self._prefix,
            model_id=self._model_id,
            dimensions=self._dimensions,
            writer=self.writer,
            recorder=self.recorder,
        )
        # A command that blocks must be over before its connection gives up.
        patience = [each.patience for each in (driver, self._async_client) if each is not None]
        self.lookups = Lookups(
            self.shelf,
            self.recorder,
            read_through=self._read_through,
            lease_seconds=self._lease_seconds,
            longest_block=min(lease.SLICE, *(each / 2 for each in patience)),
        )
        self.exchange = Exchange(
            self.recorder,
            timeout=self._timeout,
            threads=self._threads,
            loop_places=self._places_of_loop,
        )

    def serves_threads(self) -> bool:
        """Return whether Redis can be asked from a thread. Warns, once, where it cannot."""
        if self._threads is None:
            self.recorder.warn(
                "asked from a thread, but only async_client= is given: going to the model. Pass "
                "url= or client= besides"
            )
            return False
        return True

    def query(self, text: str) -> Query:
        """Begin one query."""
        return Query(self.shelf, self.lookups, text)

    def batch(self, texts: Sequence[str]) -> Batch:
        """Begin one call for documents."""
        return Batch(self.shelf, self.lookups, texts)

    def ping(self, *, on_loop: bool) -> Generator[Request, Any, None]:
        """Ask all that keys are kept by whether it answers, so that there are connections.

        Args:
            on_loop: Whether a coroutine asks; else a thread.
        """
        places = (self._places_of_loop() if on_loop else None) or self._threads
        yield from ask([("PING",)], [self._prefix])
        # Only now it is known which nodes a cluster has.
        keys = [] if places is None else one_key_each(places, self._prefix)
        if len(keys) > 1:
            yield from ask([("PING",)] * len(keys), keys)

    def forget(self, text: str) -> Generator[Request, Any, Any]:
        """Keep nothing of `text` that is under way, and delete what Redis has."""
        slots = [self.shelf.slot("query", text), self.shelf.slot("document", text)]
        self.shelf.forget(slots)
        keys: list[str | bytes] = [slot.key for slot in slots]
        for slot in slots:
            keys += self.lookups.older_keys(slot)
        return ask([("DEL", key) for key in keys], keys)

    def forgot(self, replies: Sequence[Any] | None) -> bool:
        """Return whether anything was deleted, and warn if perhaps not all was."""
        if replies is None or any(isinstance(reply, (NoReply, Refusal)) for reply in replies):
            self.recorder.warn("Redis could not be asked to forget a text, or refused")
        return any(isinstance(reply, int) and reply > 0 for reply in replies or ())

    def close(self) -> None:
        """Take nothing more, and let go of connections."""
        self._closed = True
        self.writer.close()
        for places in (self._threads, self._loop_places):
            if places is not None:
                places.close()

    # -- who goes where

    def _places_of_loop(self) -> LoopPlaces | None:
        """Return what the async client leads to, if it is the running loop's.

        Its connections belong to the loop that uses it first, as long as that runs: on another they
        raise, and in a forked child each process would read the other's replies.
        """
        if self._async_client is None:
            return None
        loop = asyncio.get_running_loop()
        places = self._loop_places
        if places is not None and places.loop is loop:
            return places
        if self._process is None:
            self._process = os.getpid()
        if self._process != os.getpid() or (places is not None and places.loop.is_running()):
            return None
        self._loop_places = LoopPlaces(self._async_client, self.recorder, self._timeout, loop)
        return self._loop_places

    def _send_write(self, key: str, job: Job) -> bool:
        place = self._place_for_writing(key)
        if place is None or not place.health.breaker.closed:
            return False
        return place.write.submit(job, patient=True)

    def _place_for_writing(self, key: str) -> Place | None:
        if self._threads is not None:
            return self._threads.of(key)
        try:
            places = self._places_of_loop()
        except RuntimeError:  # a coroutine was thrown away after its event loop
            return None
        return None if places is None else places.of(key)
