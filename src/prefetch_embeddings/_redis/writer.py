"""Stores vectors behind the reply: bounded, in the background, dropped when it can't keep up."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._redis.jobs import Job, NotAsked, Refusal
from prefetch_embeddings._redis.recorder import RedisCacheEventKind as Kind

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Sequence

    from prefetch_embeddings._redis.codec import Codec
    from prefetch_embeddings._redis.jobs import Command
    from prefetch_embeddings._redis.lease import Lease
    from prefetch_embeddings._redis.recorder import RedisRecorder

MAX_BYTES: Final = 64 * 2**20
"""What may wait to be written, counted at 8 bytes a float: some 5,000 vectors of 1536."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
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

    def command(self, codec: Codec, ttl_milliseconds: int | None) -> Command:
        """Return what brings it to Redis."""
        value = b"" if self.vector is None else codec.encode(self.vector, self.digest)
        if self.lease is not None:
            return self.lease.leave(value, ttl_milliseconds)
        if ttl_milliseconds is None:
            return ("SET", self.key, value)
        return ("SET", self.key, value, "PX", ttl_milliseconds)


class Writer:
    """Hands writes to lanes. What is on its way can be read, so a process meets its own vectors.

    No lock: what is on its way stands in a dictionary, which each step changes at once.

    Args:
        send: Hands a job to the lane for a key's place; False: it cannot, or should not now.
        codec: Encodes, on the lane's thread.
        ttl_milliseconds: How long a vector stays; None: for ever.
        recorder: Counts.
    """

    def __init__(
        self,
        send: Callable[[str, Job], bool],
        *,
        codec: Codec,
        ttl_milliseconds: int | None,
        recorder: RedisRecorder,
    ) -> None:
        self._send = send
        self._codec = codec
        self._ttl_milliseconds = ttl_milliseconds
        self._recorder = recorder
        self._on_its_way: dict[Write, None] = {}
        self._vectors: dict[str, Write] = {}  # the newest for each key
        self._waiting: deque[threading.Event] = deque()
        self._closed = False

    def put(self, write: Write) -> None:
        """Have `write` written soon; dropped and counted if that cannot be. Never blocks."""
        # As if all were as large: no need to add up.
        if self._closed or (len(self._on_its_way) + 1) * write.size > MAX_BYTES:
            self._count_dropped(write)
            return
        self._on_its_way[write] = None
        if write.vector is not None:
            self._vectors[write.key] = write

        def commands() -> Sequence[Command]:
            return [write.command(self._codec, self._ttl_milliseconds)]

        def ended() -> None:
            self._ended(write, job.replies)

        job = Job(commands, ended)
        if not self._send(write.key, job):
            self._count_dropped(write)
            self._finished(write)

    def find(self, key: str) -> list[float] | None:
        """Return the vector under `key` if it is on its way, as a new list."""
        write = self._vectors.get(key)
        return None if write is None or write.vector is None else write.vector.tolist()

    def drop(self, key: str) -> None:
        """Show nobody any more what is on its way to `key`."""
        self._vectors.pop(key, None)

    def flush(self, seconds: float) -> bool:
        """Wait up to `seconds` until nothing is on its way; return whether that is so."""
        if not self._on_its_way:
            return True
        if seconds <= 0:
            return False
        bell = threading.Event()  # this call's own: no other can be inside of it
        end = time.monotonic() + seconds
        while self._on_its_way:
            bell.clear()
            self._waiting.append(bell)
            if self._on_its_way:
                bell.wait(max(0.0, end - time.monotonic()))
            if time.monotonic() >= end:
                break
        with contextlib.suppress(ValueError):
            self._waiting.remove(bell)
        return not self._on_its_way

    def close(self) -> None:
        """Take nothing more. What is on its way is its lane's to end."""
        self._closed = True

    def _ended(self, write: Write, replies: list[Any] | Exception | None) -> None:
        reply = replies[0] if isinstance(replies, list) else replies
        if isinstance(reply, Refusal):
            if not reply.is_elsewhere:
                self._recorder.refused(reply)
            self._count_dropped(write)
        elif isinstance(reply, Exception):
            if not isinstance(reply, NotAsked) and not isinstance(replies, Exception):
                self._recorder.failed(reply, 0.0)
            self._count_dropped(write)
        elif write.vector is not None:
            self._recorder.count(Kind.WRITTEN)
        self._finished(write)

    def _count_dropped(self, write: Write) -> None:
        if write.vector is not None:
            self._recorder.count(Kind.WRITE_DROPPED)

    def _finished(self, write: Write) -> None:
        self._on_its_way.pop(write, None)
        if self._vectors.get(write.key) is write:
            self._vectors.pop(write.key, None)
        if not self._on_its_way:
            while self._waiting:
                try:
                    self._waiting.popleft().set()
                except IndexError:
                    break
