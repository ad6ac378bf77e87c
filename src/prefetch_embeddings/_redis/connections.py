"""redis-py, used by its public interface alone: one server, its connections, its answers."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, Final, Protocol

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError,  # noqa: A004
    MaxConnectionsError,
    ResponseError,
    TimeoutError,  # noqa: A004
)
from redis.retry import Retry

from prefetch_embeddings._redis.jobs import LATE, Gone, NotAsked, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from prefetch_embeddings._redis.jobs import Command
    from prefetch_embeddings._redis.sessions import Session

CONNECT_SECONDS: Final = 5.0
"""When an attempt to connect is given up. No query waits for it as long as that."""

READ_SECONDS: Final = 2.0
"""When a connection that brings nothing is given up. No query waits for it as long as that."""

_PING: Final = ("PING",)

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

    lendable = True

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

    def ask(self, command: Command, seconds: float) -> Any:
        """Return the reply to one command, or `LATE` if it has not begun within `seconds`."""
        connection = self._connection
        try:
            connection.send_packed_command(connection.pack_command(*command), check_health=False)
            if not connection.can_read(seconds):
                return LATE
            return connection.read_response(disable_decoding=True)
        except ResponseError as error:
            return refusal(error)
        except TimeoutError:
            raise
        except ConnectionError as error:
            raise Gone from error

    def read(self) -> Any:
        """Return the reply that was late."""
        try:
            return self._read()
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
    """A client, as one thread uses it. Its connections are its own.

    Callers cannot borrow it: nothing would end its own retries in time.
    """

    lendable = False

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

    def ask(self, command: Command, seconds: float) -> Any:
        """Never called."""
        raise NotImplementedError

    def read(self) -> Any:
        """Never called."""
        raise NotImplementedError

    def close(self) -> None:
        """Do nothing: the client is not ours, and its connections are its pool's."""


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
        if _PING not in commands:
            return await self._execute(commands)
        await self._client.ping()  # so a client of a cluster asks all nodes
        others = [command for command in commands if command != _PING]
        replies = iter(await self._execute(others) if others else ())
        return [b"PONG" if command == _PING else next(replies) for command in commands]

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
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
