"""Stores vectors behind the reply: bounded, in the background, dropped when it can't keep up."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._background.pool import JobPool
from prefetch_embeddings._redis import codec
from prefetch_embeddings._redis.recorder import RedisCacheEventKind as Kind
from prefetch_embeddings._redis.transports import NOT_ASKED

if TYPE_CHECKING:
    from array import array
    from collections.abc import Sequence

    from prefetch_embeddings._redis.breaker import CircuitBreaker
    from prefetch_embeddings._redis.lease import Lease
    from prefetch_embeddings._redis.recorder import RedisRecorder
    from prefetch_embeddings._redis.transports import Command, GivenAsyncClient, SyncTransport

MAX_BYTES: Final = 64 * 2**20
"""What may wait to be written, counted at 8 bytes a float: some 5,000 vectors of 1536."""

BATCH: Final = 64
"""Vectors that go out in one pipeline."""

SECONDS: Final = 1.0
"""How long one pipeline may take. Nobody waits for it."""


@dataclasses.dataclass(slots=True)
class Write:
    """A vector on its way to Redis; or, without one, the news that a lease is given up."""

    key: str
    digest: str
    vector: array[float] | None
    lease: Lease | None = None

    @property
    def size(self) -> int:
        """Bytes that it holds while it waits."""
        return 64 + (0 if self.vector is None else 8 * len(self.vector))

    def command(self, ttl_milliseconds: int | None) -> Command:
        """Return what brings it to Redis."""
        value = b"" if self.vector is None else codec.encode(self.vector, self.digest)
        if self.lease is not None:
            return self.lease.leave(value, ttl_milliseconds)
        if ttl_milliseconds is None:
            return ("SET", self.key, value)
        return ("SET", self.key, value, "PX", ttl_milliseconds)


class Writer:
    """One thread (or, with an async client only, one task) that empties a bounded queue.

    What waits can be read, so that a process meets its own vectors at once.
    """

    def __init__(
        self,
        transport: SyncTransport | None,
        async_client: GivenAsyncClient | None,
        *,
        ttl_milliseconds: int | None,
        breaker: CircuitBreaker,
        recorder: RedisRecorder,
    ) -> None:
        self._transport = transport
        self._async_client = async_client
        self._ttl_milliseconds = ttl_milliseconds
        self._breaker = breaker
        self._recorder = recorder
        self._thread = JobPool(1, name="prefetch-embeddings-redis-writer")
        self._task: asyncio.Task[None] | None = None  # only touched on its event loop
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._waiting: OrderedDict[str, Write] = OrderedDict()
        self._under_way: dict[str, Write] = {}
        self._bytes = 0  # of both
        self._draining = False  # by the thread
        self._closed = False

    def put(self, write: Write) -> None:
        """Have `write` brought to Redis soon. Never waits; counts it as dropped if it can't be."""
        reachable = self._reaches_redis()
        with self._changed:
            accepted = reachable and not self._closed and self._bytes + write.size <= MAX_BYTES
            start = accepted and not self._draining and self._transport is not None
            if accepted:
                self._enqueue(write)
            if start:
                self._draining = True
        if not accepted:
            self._count_dropped([write])
        elif self._transport is None:
            self._start_task()
        elif start and not self._thread.submit(self._drain):
            # No thread can be started: the interpreter is going down. First the flag, so that
            # nothing comes to wait for nobody.
            with self._changed:
                self._draining = False
            self._drop_waiting()

    def _enqueue(self, write: Write) -> None:
        older = self._waiting.pop(write.key, None)
        if older is not None:
            self._bytes -= older.size
            write.lease = write.lease or older.lease
            write.vector = older.vector if write.vector is None else write.vector
        self._waiting[write.key] = write
        self._bytes += write.size

    def find(self, key: str) -> list[float] | None:
        """Return the vector under `key` if it is on its way, as a new list."""
        if not self._bytes:  # read without the lock: usually nothing is on its way
            return None
        with self._changed:
            write = self._waiting.get(key) or self._under_way.get(key)
        return None if write is None or write.vector is None else write.vector.tolist()

    def flush(self, seconds: float) -> bool:
        """Wait up to `seconds` until nothing is on its way; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._bytes, seconds)

    @property
    def in_background(self) -> bool:
        """Whether a thread does the writing, so that any other thread may wait for it."""
        return self._transport is not None

    def close(self) -> None:
        """Take nothing more and drop what still waits."""
        with self._changed:
            self._closed = True
        self._drop_waiting()
        self._thread.close()

    def _drain(self) -> None:
        assert self._transport is not None  # noqa: S101 - `put` looked
        while batch := self._take(BATCH):
            try:
                if commands := self._commands(batch):
                    self._note(batch, self._transport.execute(commands, SECONDS))
            except Exception as error:  # noqa: BLE001 - whatever Redis does, callers are not touched
                self._failed(batch, error)
            finally:
                self._finished(batch)

    def _reaches_redis(self) -> bool:
        if self._transport is not None:
            return True
        assert self._async_client is not None  # noqa: S101 - one of both is there
        try:
            return self._async_client.is_of(asyncio.get_running_loop())
        except RuntimeError:  # a coroutine was thrown away after its event loop
            return False

    def _start_task(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(self._adrain())

    async def _adrain(self) -> None:
        assert self._async_client is not None  # noqa: S101 - `put` looked
        while batch := self._take(BATCH):
            try:
                if commands := self._commands(batch):
                    self._note(batch, await self._async_client.execute(commands, SECONDS))
            except asyncio.CancelledError:
                self._count_dropped(batch)
                raise
            except Exception as error:  # noqa: BLE001 - whatever Redis does, callers are not touched
                self._failed(batch, error)
            finally:
                self._finished(batch)

    def _take(self, count: int) -> list[Write]:
        """Move up to `count` writes from waiting to under way; none left ends the draining."""
        with self._changed:
            batch: list[Write] = []
            while self._waiting and len(batch) < count:
                key, write = self._waiting.popitem(last=False)
                self._under_way[key] = write
                batch.append(write)
            if not batch:
                self._draining = False
            return batch

    def _commands(self, batch: Sequence[Write]) -> list[Command]:
        if not self._breaker.closed:
            self._count_dropped(batch)
            return []
        return [write.command(self._ttl_milliseconds) for write in batch]

    def _note(self, batch: Sequence[Write], replies: Sequence[Any]) -> None:
        stored, refused = [], []
        for write, reply in zip(batch, replies, strict=True):
            if isinstance(reply, Exception):
                refused.append(write)
                error = reply
            else:
                stored.append(write)
        if refused:
            self._recorder.failed(error, 0.0)  # one request, one error
        self._recorder.count(Kind.WRITTEN, _vectors(stored))
        self._count_dropped(refused)

    def _failed(self, batch: Sequence[Write], error: Exception) -> None:
        if not isinstance(error, NOT_ASKED):
            self._recorder.failed(error, 0.0)
            if self._breaker.failed():
                self._recorder.breaker_opened(error)
        self._count_dropped(batch)

    def _drop_waiting(self) -> None:
        with self._changed:
            waiting = list(self._waiting.values())
            self._waiting.clear()
        self._count_dropped(waiting)
        self._finished(waiting)

    def _count_dropped(self, batch: Sequence[Write]) -> None:
        self._recorder.count(Kind.WRITE_DROPPED, _vectors(batch))

    def _finished(self, batch: Sequence[Write]) -> None:
        with self._changed:
            for write in batch:
                if self._under_way.get(write.key) is write:
                    del self._under_way[write.key]
                self._bytes -= write.size
            if not self._bytes:
                self._changed.notify_all()


def _vectors(batch: Sequence[Write]) -> int:
    return sum(write.vector is not None for write in batch)


def flush_all(writers: Sequence[Writer], seconds: float) -> None:
    """Wait up to `seconds` in all until nothing of `writers` is on its way."""
    end = time.monotonic() + seconds
    for writer in writers:
        if writer.in_background:
            writer.flush(max(0.0, end - time.monotonic()))
