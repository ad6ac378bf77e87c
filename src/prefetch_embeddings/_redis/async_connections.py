"""redis.asyncio connections that hold up neither the event loop's executor nor its end.

asyncio resolves names in the loop's default executor, where retrievers run as well and whose
threads `asyncio.run` waits for: a name server that hangs would stop them all. And to close TLS in
order takes the other side, which may never answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection

from prefetch_embeddings._background import forks
from prefetch_embeddings._background import pool as workers

if TYPE_CHECKING:
    from collections.abc import Mapping

    import redis.asyncio

MAX_RESOLVING: Final = 64
"""Threads that may be resolving names at a time, on all event loops together."""


class _AbortsOnDisconnect:
    """Nothing that is still to be sent or said goodbye to is worth waiting for."""

    _writer: asyncio.StreamWriter | None

    async def disconnect(self, nowait: bool = False, *args: Any, **options: Any) -> None:  # noqa: ARG002, FBT001, FBT002
        if self._writer is not None:
            self._writer.transport.abort()
        await super().disconnect(True, *args, **options)  # type: ignore[misc] # noqa: FBT003


class _Connection(_AbortsOnDisconnect, Connection):
    _address: str

    async def _connect(self) -> None:
        *others, last = await _resolve(self.host, self.port)
        for self._address in others:
            try:
                await super()._connect()  # type: ignore[no-untyped-call]
            except OSError:
                continue
            return
        self._address = last
        await super()._connect()  # type: ignore[no-untyped-call]

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {"host": self._address, "port": self.port}


class _SSLConnection(_Connection, SSLConnection):
    def _connection_arguments(self) -> Mapping[str, Any]:
        context = self.ssl_context.get()
        return {**super()._connection_arguments(), "ssl": context, "server_hostname": self.host}


class _UnixDomainSocketConnection(_AbortsOnDisconnect, UnixDomainSocketConnection):
    pass


_OURS: Final[dict[type, type]] = {
    Connection: _Connection,
    SSLConnection: _SSLConnection,
    UnixDomainSocketConnection: _UnixDomainSocketConnection,
}


def adapt(pool: redis.asyncio.ConnectionPool) -> None:
    """Have the connections that `pool` makes from now on be of these."""
    pool.connection_class = _OURS[pool.connection_class]


async def _resolve(host: str, port: int) -> list[str]:
    """Return the addresses of `host`, at least one."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass  # it is a name
    if not _resolving.acquire(blocking=False):
        raise TimeoutError("too many names are being resolved")
    addresses: Future[list[str]] = Future()
    addresses.set_running_or_notify_cancel()  # whoever waits may leave, the thread goes on
    try:
        workers.start(
            threading.Thread(
                target=_look_up,
                args=(host, port, addresses, _resolving),
                name="prefetch-embeddings-redis-resolver",
                daemon=True,
            )
        )
    except BaseException:
        _resolving.release()
        raise
    return await asyncio.wrap_future(addresses)


def _look_up(
    host: str, port: int, addresses: Future[list[str]], resolving: threading.Semaphore
) -> None:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except BaseException as error:  # noqa: BLE001 - it belongs to the coroutine that waits
        addresses.set_exception(error)
    else:
        addresses.set_result([str(address[0]) for *_, address in found])
    finally:
        resolving.release()


_resolving = threading.Semaphore(MAX_RESOLVING)


def reset_after_fork() -> None:
    """Start anew in a forked child, where none of the threads exist."""
    global _resolving  # noqa: PLW0603 - the parent's threads hold the old one
    _resolving = threading.Semaphore(MAX_RESOLVING)


forks.call_in_child(reset_after_fork)
