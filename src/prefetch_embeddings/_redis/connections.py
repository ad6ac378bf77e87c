"""What redis-py is asked for: the one module that knows it, and only its public interface."""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.exceptions import (
    ConnectionError,  # noqa: A004
    MaxConnectionsError,
    ResponseError,
    TimeoutError,  # noqa: A004
)
from redis.retry import Retry

from prefetch_embeddings._background import pool as workers
from prefetch_embeddings._redis.jobs import Gone, NotAsked, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from prefetch_embeddings._redis.jobs import Command
    from prefetch_embeddings._redis.transports import Session

CONNECT_SECONDS: Final = 5.0
"""When an attempt to connect is given up. No query waits for it as long as that."""

READ_SECONDS: Final = 2.0
"""When a connection that brings nothing is given up. No query waits for it as long as that."""

REFRESH_SECONDS: Final = 0.3
"""Between two looks at which node of a cluster has what."""

NOWHERE: Final = "(cluster not reached yet)"
"""The place of all keys as long as nobody knows the cluster's nodes."""

_RAW: Final = {"NEVER_DECODE": True}  # vectors are bytes, whatever a client does with strings


class Driver(Protocol):
    """Knows which places there are, and opens sessions to them.

    Attributes:
        most: Connections to one place at a time; None: nobody has said.
        patience: After how many seconds without an answer a session gives up by itself.
    """

    most: int | None
    patience: float

    def place(self, key: str | bytes) -> str | None:
        """Return where `key` is; "" where there is only one place, None if nobody has it."""

    def open(self, place: str) -> Session:
        """Connect, and see that there is an answer. May take long, and raise anything."""

    def let_go(self) -> None:
        """Close connections that are idle: the server is not what it was."""

    def look_again(self) -> None:
        """Find out, in the background, where keys are by now."""


class ServerDriver:
    """One server, reached by connections of our own.

    They are used without `redis.Redis` around them, whose pool, retries and metrics cost as much as
    reading a vector does.

    Args:
        options: For the connection class, which is among them.
        locate: Finds host and port, each time anew; None: they are among the options.
    """

    def __init__(
        self, options: Mapping[str, Any], locate: Callable[[], tuple[str, int]] | None = None
    ) -> None:
        own = dict(options)
        self.most: int | None = own.pop("max_connections", None)
        self._class = own.pop("connection_class", redis.Connection)
        self._options: dict[str, Any] = {
            "socket_timeout": READ_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_keepalive": True,
            **without_library_name(),
            **own,
            "protocol": 2,  # one round trip less to connect; a vector is the same in both
            "retry": Retry(NoBackoff(), 0),
        }
        if self._class is redis.UnixDomainSocketConnection:
            self._options.pop("socket_keepalive")
            self._options.pop("socket_connect_timeout", None)
        self._locate = locate
        self.patience = patience_of(self._options)

    def place(self, key: str | bytes) -> str:  # noqa: ARG002 - there is one
        """Return the only place."""
        return ""

    def open(self, place: str) -> Session:  # noqa: ARG002 - there is one
        """Connect, and see that there is an answer."""
        options = self._options
        if self._locate is not None:
            host, port = self._locate()
            options = {**options, "host": host, "port": port}
        session = ConnectionSession(self._class(**options))
        session.connect()
        return session

    def let_go(self) -> None:
        """Do nothing: all connections are lanes'."""

    def look_again(self) -> None:
        """Do nothing: a place that is lost is located when it is opened again."""


class ConnectionSession:
    """One connection."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def connect(self) -> None:
        """Connect, and see that there is an answer: a server that hangs still takes connections."""
        try:
            self._connection.connect()
            [reply] = self.execute([("PING",)])
        except BaseException:
            self.close()
            raise
        if isinstance(reply, Refusal) and reply.code in {"NOAUTH", "WRONGPASS", "LOADING"}:
            self.close()
            raise reply

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies in order."""
        connection = self._connection
        try:
            if len(commands) == 1:
                packed = connection.pack_command(*commands[0])
            else:
                packed = connection.pack_commands(commands)
            connection.send_packed_command(packed, check_health=False)
            return [self._read() for _ in commands]
        except TimeoutError:
            raise
        except ConnectionError as error:
            raise Gone from error

    def _read(self) -> Any:
        try:
            return self._connection.read_response(disable_decoding=True)
        except ResponseError as error:
            return refusal(error)

    def close(self) -> None:
        """Disconnect."""
        self._connection.disconnect()


class ClientDriver:
    """One server, reached through a client of the user's with timeouts and retries of its own."""

    def __init__(self, client: Any) -> None:
        self._client = client
        pool = getattr(client, "connection_pool", None)
        self.most: int | None = getattr(pool, "max_connections", None)
        self.patience = patience_of_client(client)

    def place(self, key: str | bytes) -> str:  # noqa: ARG002 - there is one
        """Return the only place."""
        return ""

    def open(self, place: str) -> Session:  # noqa: ARG002 - there is one
        """Have the client connect."""
        session = ClientSession(self._client)
        session.execute([("PING",)])
        return session

    def let_go(self) -> None:
        """Have the client's pool close what is idle."""
        with contextlib.suppress(Exception):
            self._client.connection_pool.disconnect(inuse_connections=False)

    def look_again(self) -> None:
        """Do nothing: the client finds its server by itself."""


class ClientSession:
    """A client, as one thread uses it. Its connections are its own."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies in order."""
        try:
            if len(commands) == 1:
                try:
                    return [self._client.execute_command(*commands[0], **_RAW)]
                except ResponseError as error:
                    return [refusal(error)]
            with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command, **_RAW)
                return as_refusals(pipeline.execute(raise_on_error=False))
        except MaxConnectionsError as error:
            raise NotAsked from error

    def close(self) -> None:
        """Do nothing: the client is not ours, and its connections are its pool's."""


class ClusterDriver:
    """A cluster: each node is a place, asked through the cluster client's own client for it.

    So a node that is dead, and what the cluster client does about it, holds up no other node. Where
    keys are is looked up again in the background; until that is known, a key that has moved is a
    miss.

    Args:
        make: Makes the client, which connects; or returns the one that the user made.
        ready: The client, if it is there already.
        options: What is known of it.
    """

    def __init__(
        self, make: Callable[[], Any], *, ready: Any = None, options: Mapping[str, Any]
    ) -> None:
        self._make = make
        self._client = ready
        self.most: int | None = options.get("max_connections")
        self.patience = patience_of(options)
        self._turn = [None]  # whoever takes it looks again
        self._looked_at = -float("inf")

    def place(self, key: str | bytes) -> str | None:
        """Return the name of the node that has `key`."""
        if self._client is None:
            return NOWHERE
        try:
            return str(self._client.get_node_from_key(key).name)
        except Exception:  # noqa: BLE001 - whatever is the matter, nobody is known to have it
            return None

    def open(self, place: str) -> Session:
        """Have the node's client connect."""
        if self._client is None:
            self._client = self._make()
        if place == NOWHERE:
            return ClusterSession(self._client)
        node = self._client.get_node(node_name=place)
        if node is None:
            raise ConnectionError("the node has left the cluster")
        session = ClientSession(self._client.get_redis_connection(node))
        session.execute([("PING",)])
        return session

    def let_go(self) -> None:
        """Do nothing: a node that is demoted says where the key has moved."""

    def look_again(self) -> None:
        """Find out, in the background, where keys are by now."""
        if self._client is None or time.monotonic() - self._looked_at < REFRESH_SECONDS:
            return
        try:
            self._turn.pop()
        except IndexError:
            return
        self._looked_at = time.monotonic()
        try:
            workers.start(
                threading.Thread(
                    target=self._look, name="prefetch-embeddings-redis-topology", daemon=True
                )
            )
        except BaseException as error:
            self._turn.append(None)
            if not isinstance(error, RuntimeError):
                raise

    def _look(self) -> None:
        try:
            self._client.nodes_manager.initialize()
        except Exception:  # noqa: BLE001, S110 - nobody can be asked; the next look may tell
            pass
        finally:
            self._looked_at = time.monotonic()
            self._turn.append(None)


class ClusterSession(ClientSession):
    """A cluster as a whole, for the first moments, while nobody knows its nodes."""

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies in order."""
        replies = []
        for command in commands:
            replies += super().execute([command])
        return replies


class AsyncClient:
    """An async client that the user made."""

    def __init__(self, client: Any) -> None:
        self._client = client
        pool = getattr(client, "connection_pool", None)
        self.most: int | None = getattr(pool, "max_connections", None)
        self.patience = patience_of_client(client)

    def place(self, key: str | bytes) -> str | None:
        """Return where `key` is; "" where there is only one place, or nobody knows yet."""
        find = getattr(self._client, "get_node_from_key", None)
        if find is None:
            return ""
        try:
            return str(find(key).name)
        except Exception:  # noqa: BLE001 - it looks when it is first asked
            return ""

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies in order."""
        try:
            if len(commands) == 1:
                try:
                    return [await self._client.execute_command(*commands[0], **_RAW)]
                except ResponseError as error:
                    return [refusal(error)]
            async with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command, **_RAW)
                return as_refusals(await pipeline.execute(raise_on_error=False))
        except MaxConnectionsError as error:
            raise NotAsked from error

    async def let_go(self) -> None:
        """Have the client's pool close what is idle."""
        with contextlib.suppress(Exception):
            await self._client.connection_pool.disconnect(inuse_connections=False)


def driver_of(client: Any) -> Driver:
    """Return what drives a sync client that the user made."""
    if isinstance(client, redis.RedisCluster):
        options = client.get_connection_kwargs()  # type: ignore[no-untyped-call]
        return ClusterDriver(lambda: client, ready=client, options=options)
    return ClientDriver(client)


def check_client(client: Any) -> None:
    """Raise unless `client` is a sync client that can be used.

    Raises:
        TypeError: It is none, or an async one.
        ValueError: It caches on the client's side, which this tier would not notice.
    """
    execute = getattr(client, "execute_command", None)
    if isinstance(client, (str, bytes, type)) or not callable(execute):
        raise TypeError("client: expected a client of redis-py, such as redis.Redis(...)")
    if inspect.iscoroutinefunction(execute):
        raise TypeError("client: expected a sync client; an async one goes to async_client=")
    node = client
    if isinstance(client, redis.RedisCluster):
        nodes = client.get_nodes()  # type: ignore[no-untyped-call]
        node = client.get_redis_connection(nodes[0]) if nodes else None
    cache = getattr(node, "get_cache", None)
    if callable(cache) and cache() is not None:
        raise ValueError(
            "client: expected one without client-side caching (cache_config=): vectors would be "
            "kept twice, and forgotten ones once more"
        )


def check_async_client(client: Any) -> None:
    """Raise unless `client` is an async client.

    Raises:
        TypeError: It is none, or a sync one.
    """
    execute = getattr(client, "execute_command", None)
    if isinstance(client, (str, bytes, type)) or not callable(execute):
        raise TypeError("async_client: expected a client such as redis.asyncio.Redis(...)")
    known_sync = isinstance(client, (redis.Redis, redis.RedisCluster))
    is_async = inspect.iscoroutinefunction(execute)
    if known_sync or (not is_async and isinstance(client, redis.client.AbstractRedis)):
        raise TypeError("async_client: expected an async client; a sync one goes to client=")


def refusal(error: ResponseError) -> Refusal:
    """Return what stands for an error that the server answered.

    redis-py takes the code off the message where it knows it.
    """
    name = type(error).__name__
    words = str(error).split(maxsplit=1)
    first = words[0] if words else ""
    code = _CODES.get(name) or (first if first.isupper() else "ERR")
    if code == "ERR" and "READONLY" in str(error):  # out of a script
        code = "READONLY"
    return Refusal(name, code)


_CODES: Final = {
    "ReadOnlyError": "READONLY",
    "OutOfMemoryError": "OOM",
    "MovedError": "MOVED",
    "AskError": "ASK",
    "TryAgainError": "TRYAGAIN",
    "ClusterDownError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
    "NoPermissionError": "NOPERM",
    "AuthenticationError": "WRONGPASS",
    "BusyLoadingError": "LOADING",
}


def as_refusals(replies: list[Any]) -> list[Any]:
    """Return the replies of a pipeline, with the server's errors as refusals.

    Raises:
        Exception: One of them says that the connection has failed.
    """
    for reply in replies:
        if isinstance(reply, Exception) and not isinstance(reply, ResponseError):
            raise reply
    return [refusal(reply) if isinstance(reply, ResponseError) else reply for reply in replies]


def patience_of(options: Mapping[str, Any]) -> float:
    """Return after how many seconds without an answer a connection gives up by itself."""
    seconds = options.get("socket_timeout")
    return CONNECT_SECONDS if seconds is None else float(seconds)


def patience_of_client(client: Any) -> float:
    """Return the same of a client, as far as it says."""
    try:
        return patience_of(client.get_connection_kwargs())
    except AttributeError:  # a client of another make
        return CONNECT_SECONDS


def without_library_name() -> dict[str, Any]:
    """Return options that spare connections `CLIENT SETINFO`: less to permit, and to wait for."""
    parameters = inspect.signature(redis.connection.AbstractConnection.__init__).parameters
    if "driver_info" in parameters:
        return {"driver_info": None}
    return {"lib_name": None, "lib_version": None}


_node: Any = ClusterNode


def cluster_client(nodes: Sequence[tuple[str, int]], options: Mapping[str, Any]) -> Any:
    """Make a client of a cluster, which asks its nodes where keys are.

    Raises:
        Exception: None of them answers.
    """
    return redis.RedisCluster(startup_nodes=[_node(host, port) for host, port in nodes], **options)
