"""redis-py connections that keep to one deadline, whatever a call does on them.

A socket timeout bounds each single operation, so connecting, authenticating and a reply that drips
in add up. Here every operation gets what is left of the calling thread's deadline instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import redis
from redis.connection import SSLConnection, UnixDomainSocketConnection

from prefetch_embeddings._background import forks
from prefetch_embeddings._background import pool as workers

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import TracebackType

MAX_CONNECTING: Final = 16
"""Threads that may be connecting at a time; names that never resolve must not gather them."""


class _ThreadDeadline(threading.local):
    at: float | None = None


_deadline = _ThreadDeadline()


class within:  # noqa: N801 - reads as a word: `with within(0.1):`
    """Let what this thread does on bounded connections take `seconds` in all."""

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        _deadline.at = time.monotonic() + self._seconds

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _deadline.at = None


def _left() -> float | None:
    """Return the seconds left to this thread, None for no deadline.

    Raises:
        TimeoutError: None are left.
    """
    if _deadline.at is None:
        return None
    seconds = _deadline.at - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("deadline passed")
    return seconds


class DeadlineSocket:
    """A connected socket whose reads and writes end with the deadline of the calling thread."""

    __slots__ = ("_limit", "_socket")

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._limit = connected.gettimeout()

    def settimeout(self, seconds: float | None) -> None:
        """Bound each operation besides; 0 makes them not block at all."""
        self._limit = seconds

    def gettimeout(self) -> float | None:
        """Return what `settimeout` was given."""
        return self._limit

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive up to `size` bytes."""
        self._allow()
        return self._socket.recv(size, flags)

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        """Receive into `buffer`."""
        self._allow()
        return self._socket.recv_into(buffer, size, flags)

    def sendall(self, data: Any) -> None:
        """Send all of `data`."""
        self._allow()
        self._socket.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def _allow(self) -> None:
        seconds = self._limit
        if seconds != 0:
            left = _left()
            if left is not None and (seconds is None or left < seconds):
                seconds = left
        self._socket.settimeout(seconds)


def _connect_in_time(connect: Callable[[], socket.socket]) -> DeadlineSocket:
    """Return what `connect` returns, but wait for it no longer than the deadline.

    A thread of its own, since resolving a name knows no timeout, and several addresses and a TLS
    handshake would each take one.
    """
    if not _connecting.acquire(timeout=_left()):
        raise TimeoutError("too many connections are being opened")
    connected: Future[socket.socket] = Future()
    try:
        workers.start(
            threading.Thread(
                target=_connect,
                args=(connect, connected, _connecting),
                name="prefetch-embeddings-redis-connect",
                daemon=True,
            )
        )
    except BaseException:
        _connecting.release()
        raise
    try:
        return DeadlineSocket(connected.result(_left()))
    except BaseException:
        connected.add_done_callback(_close_unwanted)
        raise


def _connect(
    connect: Callable[[], socket.socket],
    connected: Future[socket.socket],
    connecting: threading.Semaphore,
) -> None:
    try:
        result = connect()
    except BaseException as error:  # noqa: BLE001 - it belongs to the thread that waits
        connecting.release()
        connected.set_exception(error)
    else:
        connecting.release()
        connected.set_result(result)


def _close_unwanted(connected: Future[socket.socket]) -> None:
    if connected.exception() is None:
        with contextlib.suppress(OSError):
            connected.result().close()


class _Connection(redis.Connection):
    def _connect(self) -> DeadlineSocket:
        return _connect_in_time(super()._connect)


class _SSLConnection(SSLConnection):
    def _connect(self) -> DeadlineSocket:
        return _connect_in_time(super()._connect)


class _UnixDomainSocketConnection(UnixDomainSocketConnection):
    def _connect(self) -> DeadlineSocket:
        return _connect_in_time(super()._connect)


_BOUNDED: Final[dict[type, type]] = {
    redis.Connection: _Connection,
    SSLConnection: _SSLConnection,
    UnixDomainSocketConnection: _UnixDomainSocketConnection,
}


def bound(pool: redis.ConnectionPool) -> redis.ConnectionPool:
    """Have the connections that `pool` makes from now on keep to `within`."""
    pool.connection_class = _BOUNDED[pool.connection_class]
    return pool


_connecting = threading.Semaphore(MAX_CONNECTING)


def reset_after_fork() -> None:
    """Start anew in a forked child, where none of the connecting threads exist."""
    global _connecting  # noqa: PLW0603 - the parent's threads hold the old one
    _connecting = threading.Semaphore(MAX_CONNECTING)


forks.call_in_child(reset_after_fork)
