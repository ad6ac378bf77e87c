"""What the Redis tier counts, and what it tells listeners and the log: never a text."""

from __future__ import annotations

import dataclasses
import enum
import logging
import threading
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings.stats import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

logger: Final = logging.getLogger("prefetch_embeddings.redis")


@dataclasses.dataclass(frozen=True, slots=True)
class RedisCacheStats(Snapshot):
    """What a Redis tier did so far; one consistent snapshot.

    Two snapshots subtract, which gives what happened between them. The number of texts looked up
    (each distinct text of a batch once) = `hits + misses + skipped`.

    Attributes:
        hits: Texts whose vector came out of Redis, or out of what waits to be written there.
        misses: Texts that the model had to embed although Redis could be asked.
        skipped: Texts that the model embedded without asking Redis: the breaker was open, this
            process had as much under way as it may, or its async client is another loop's.
        corrupt: Values that did not check (counted as misses, too), of an older cache or our own.
        errors: Requests to Redis that failed or took too long.
        writes: Vectors stored.
        writes_dropped: Vectors not stored: too many were waiting, or Redis refused or failed.
        carried_over: Hits that an older cache (`read_through`) had.
        waited: Texts for which another process' call was waited for.
        redis_seconds: What callers spent on Redis, waiting for other processes not included.
        waited_seconds: What callers spent waiting for other processes.
    """

    hits: int = 0
    misses: int = 0
    skipped: int = 0
    corrupt: int = 0
    errors: int = 0
    writes: int = 0
    writes_dropped: int = 0
    carried_over: int = 0
    waited: int = 0
    redis_seconds: float = 0.0
    waited_seconds: float = 0.0


class RedisCacheEventKind(enum.StrEnum):
    """What a `RedisCacheEvent` is about."""

    HIT = enum.auto()
    MISS = enum.auto()
    SKIPPED = enum.auto()
    CORRUPT = enum.auto()
    ERROR = enum.auto()
    WRITTEN = enum.auto()
    WRITE_DROPPED = enum.auto()
    CARRIED_OVER = enum.auto()
    WAITED = enum.auto()
    BREAKER_OPENED = enum.auto()
    BREAKER_CLOSED = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class RedisCacheEvent:
    """Something that happened in a Redis tier.

    Attributes:
        kind: What happened.
        count: To how many texts; 0 where it is not about texts.
        seconds: What it cost the caller, where that was measured.
        error: The name of the exception's class. (Its message may quote what it should not.)
    """

    kind: RedisCacheEventKind
    count: int = 0
    seconds: float = 0.0
    error: str | None = None


_COUNTED: Final = {
    RedisCacheEventKind.HIT: "hits",
    RedisCacheEventKind.MISS: "misses",
    RedisCacheEventKind.SKIPPED: "skipped",
    RedisCacheEventKind.CORRUPT: "corrupt",
    RedisCacheEventKind.WRITTEN: "writes",
    RedisCacheEventKind.WRITE_DROPPED: "writes_dropped",
    RedisCacheEventKind.CARRIED_OVER: "carried_over",
    RedisCacheEventKind.WAITED: "waited",
}


class RedisRecorder:
    """Counts, and tells the log and a listener. Call it with no lock held."""

    def __init__(self, listener: Callable[[RedisCacheEvent], None] | None) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._counts: dict[str, Any] = {
            field.name: field.default for field in dataclasses.fields(RedisCacheStats)
        }

    def stats(self) -> RedisCacheStats:
        """Return the counts as they stand."""
        with self._lock:
            return RedisCacheStats(**self._counts)

    def count(self, kind: RedisCacheEventKind, count: int = 1) -> None:
        """Note what became of `count` texts or vectors."""
        if count:
            name = _COUNTED[kind]
            with self._lock:
                self._counts[name] += count
            if self._listener is not None:
                self._tell(RedisCacheEvent(kind, count))

    def spent(self, seconds: float, waiting: float = 0.0) -> None:
        """Note the seconds that a request took, of which up to `waiting` were meant to pass."""
        waited = min(seconds, waiting)
        with self._lock:
            self._counts["redis_seconds"] += seconds - waited
            self._counts["waited_seconds"] += waited

    def failed(self, error: BaseException, seconds: float) -> None:
        """Note that a request to Redis brought nothing."""
        with self._lock:
            self._counts["errors"] += 1
        name = type(error).__name__
        logger.debug("a request to Redis failed after %.3f s: %s", seconds, name)
        if self._listener is not None:
            self._tell(RedisCacheEvent(RedisCacheEventKind.ERROR, seconds=seconds, error=name))

    def breaker_opened(self, error: BaseException) -> None:
        """Note that Redis is left alone for a while."""
        name = type(error).__name__
        logger.warning("Redis keeps failing (%s): going on without it, trying now and then", name)
        if self._listener is not None:
            self._tell(RedisCacheEvent(RedisCacheEventKind.BREAKER_OPENED, error=name))

    def breaker_closed(self) -> None:
        """Note that Redis answers again."""
        logger.info("Redis answers again")
        if self._listener is not None:
            self._tell(RedisCacheEvent(RedisCacheEventKind.BREAKER_CLOSED))

    def _tell(self, event: RedisCacheEvent) -> None:
        assert self._listener is not None  # noqa: S101 - every caller looked
        try:
            self._listener(event)
        except Exception as error:  # noqa: BLE001 - a listener must not harm a query
            # The class alone: a chained message could quote what it should not.
            logger.error("on_event raised %s on %s", type(error).__name__, event.kind)  # noqa: TRY400
