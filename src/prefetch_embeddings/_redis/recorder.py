"""What the Redis tier counts, and what it tells listeners and the log: never a text."""

from __future__ import annotations

import dataclasses
import enum
import logging
import os
import socket
import ssl
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from prefetch_embeddings.stats import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger: Final = logging.getLogger("prefetch_embeddings.redis")

MOST_ENTRIES: Final = 1024
"""Counts that may wait to be added up."""

MOST_CAUSES: Final = 8
"""How far back the causes of an error are looked at."""

QUIET_SECONDS: Final = 600.0
"""For so long after a warning the same thing is no news."""


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


Kind: TypeAlias = RedisCacheEventKind

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
        # Counting appends, which is one atomic step; whoever looks adds up. The lock only keeps two
        # from adding up at once. It is re-entrant: a finaliser that looks while this thread adds
        # up finds `_adding_up`, and gets the counts as they stand.
        self._entries: deque[tuple[str, float]] = deque()
        self._lock = threading.RLock()
        self._adding_up = False
        self._counts: dict[str, Any] = {
            field.name: field.default for field in dataclasses.fields(RedisCacheStats)
        }
        self._warned_at: dict[str, float] = {}

    def stats(self) -> RedisCacheStats:
        """Return the counts as they stand."""
        with self._lock:
            self._add_up()
            return RedisCacheStats(**self._counts)

    def _add_up(self) -> None:
        if self._adding_up:
            return
        self._adding_up = True
        try:
            while self._entries:
                name, amount = self._entries.popleft()
                self._counts[name] += amount
        finally:
            self._adding_up = False

    def _add(self, name: str, amount: float) -> None:
        self._entries.append((name, amount))
        if len(self._entries) > MOST_ENTRIES and self._lock.acquire(blocking=False):
            try:
                self._add_up()
            finally:
                self._lock.release()

    def count(self, kind: RedisCacheEventKind, count: int = 1) -> None:
        """Note what became of `count` texts or vectors."""
        if count:
            self._add(_COUNTED[kind], count)
            if self._listener is not None:
                self._tell(RedisCacheEvent(kind, count))

    def spent(self, seconds: float) -> None:
        """Note the seconds that a caller spent on Redis."""
        self._add("redis_seconds", seconds)

    def waited(self, seconds: float) -> None:
        """Note the seconds that a caller waited for another process."""
        self._add("waited_seconds", seconds)

    def failed(self, error: BaseException, seconds: float) -> None:
        """Note that a request to Redis brought nothing."""
        self._add("errors", 1)
        name = describe(error)
        logger.debug("a request to Redis failed after %.3f s: %s", seconds, name)
        if self._listener is not None:
            self._tell(RedisCacheEvent(Kind.ERROR, seconds=seconds, error=_class_name(error)))

    def refused(self, error: BaseException) -> None:
        """Note that Redis does not store what it is sent."""
        self._add("errors", 1)
        name = describe(error)
        if self._first_in_a_while(f"refused {name}"):
            logger.warning("Redis refuses to store vectors (%s): going on without", name)
        if self._listener is not None:
            self._tell(RedisCacheEvent(Kind.ERROR, error=_class_name(error)))

    def breaker_opened(self, error: BaseException, where: str = "") -> None:
        """Note that Redis, or one node of it, is left alone for a while."""
        name = describe(error)
        first = self._first_in_a_while(f"opened {where}")
        logger.log(
            logging.WARNING if first else logging.INFO,
            "Redis%s keeps failing (%s): going on without it, trying now and then",
            f" at {where}" if where else "",
            name,
        )
        if self._listener is not None:
            self._tell(RedisCacheEvent(Kind.BREAKER_OPENED, error=_class_name(error)))

    def breaker_closed(self, where: str = "") -> None:
        """Note that Redis answers again."""
        logger.info("Redis%s answers again", f" at {where}" if where else "")
        if self._listener is not None:
            self._tell(RedisCacheEvent(Kind.BREAKER_CLOSED))

    def warn(self, message: str) -> None:
        """Log a warning, once in a while."""
        if self._first_in_a_while(message):
            logger.warning("%s", message)

    def _first_in_a_while(self, what: str) -> bool:
        now = time.monotonic()
        last = self._warned_at.get(what)
        self._warned_at[what] = now
        return last is None or now - last > QUIET_SECONDS

    def _tell(self, event: RedisCacheEvent) -> None:
        assert self._listener is not None  # noqa: S101 - every caller looked
        try:
            self._listener(event)
        except Exception as error:  # noqa: BLE001 - a listener must not harm a query
            # The class alone: a chained message could quote what it should not.
            logger.error("on_event raised %s on %s", type(error).__name__, event.kind)  # noqa: TRY400


def describe(error: BaseException) -> str:
    """Return the class of an error and its technical reason, with nothing quoted from anywhere.

    The messages of clients and servers may quote keys, users or passwords; those of the operating
    system and of TLS do not.
    """
    reason = next(filter(None, map(_reason, _chain(error))), None)
    return f"{_class_name(error)}: {reason}" if reason else _class_name(error)


def _class_name(error: BaseException) -> str:
    return getattr(error, "name_of_class", None) or type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(MOST_CAUSES):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _reason(error: BaseException) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed, {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS, {error.reason}" if error.reason else "TLS"
    if isinstance(error, socket.gaierror):
        return "the name does not resolve"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return None
