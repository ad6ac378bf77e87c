"""How commands reach Redis: within a given time, from threads and from event loops.

A command is a tuple such as `("GET", key)`. An error that the server answered stands in its reply's
place; whatever else goes wrong is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Protocol

import redis
import redis.asyncio
import redis.asyncio.connection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError,  # noqa: A004
    MaxConnectionsError,
    ResponseError,
)
from redis.retry import Retry

from prefetch_embeddings._background.pool import JobPool
from prefetch_embeddings._redis import async_connections, deadline

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    Command = tuple[str | bytes | int | float, ...]

MAX_HELPERS: Final = 32
"""Threads that may be using a ready-made client at a time."""

MAX_BLOCKED: Final = MAX_HELPERS // 2
"""Of these, those that may wait for other processes' calls."""

MAX_CONCURRENT: Final = 64
"""Commands that one event loop may have under way at a time; the others wait within their time."""

MAX_BLOCKED_COROUTINES: Final = 256
"""Likewise those that wait for other processes' calls, each on a connection of its own."""

_SOCKET_SECONDS: Final = 5.0
"""When a thread that connects for nobody any more gives up. Callers are bounded by `deadline`."""

_RAW: Final = {"NEVER_DECODE": True}  # vectors are bytes, whatever a client does with strings


class NotAsked(Exception):  # noqa: N818 - says nothing about Redis
    """Redis was not asked, since this process has as much under way as it may, or no client."""


NOT_ASKED: Final = (NotAsked, MaxConnectionsError)
"""What an exception is of that says nothing about Redis, only about this process."""


class SyncTransport(Protocol):
    """Reaches Redis from any thread.

    Attributes:
        patience: After how many seconds without an answer a connection gives up by itself.
    """

    patience: float

    def execute(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Return the replies in order, or raise, within `seconds`."""

    def close(self) -> None:
        """Let go of connections and threads."""


class AsyncTransport(Protocol):
    """Reaches Redis from any event loop."""

    @property
    def patience(self) -> float:
        """As for `SyncTransport`."""

    async def execute(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Return the replies in order, or raise, within `seconds`."""

    def close(self) -> None:
        """Let go of connections, also of those on other loops. May be called from any thread."""

    async def aclose(self) -> None:
        """Do so, and have let go of the running loop's when it returns."""


class OwnClient:
    """Connections made from a URL, used on the calling thread, which is the fastest way.

    They are used without `redis.Redis` around them, whose pool, retries and metrics cost as much as
    reading a vector does.
    """

    def __init__(self, url: str) -> None:
        pool = redis.ConnectionPool.from_url(
            url,
            protocol=2,  # one round trip less to connect; a vector is the same in both
            retry=Retry(NoBackoff(), 0),
            socket_timeout=_SOCKET_SECONDS,
            socket_connect_timeout=_SOCKET_SECONDS,
        )
        self.patience = _patience(pool.connection_kwargs)
        self._pool = deadline.bound(pool)
        self._idle: list[Any] = []  # only popped and appended, which is atomic
        self._closed = False

    def execute(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Return the replies in order, or raise, within `seconds`."""
        with deadline.within(seconds):
            connection = self._pop_idle()
            if connection is not None:
                # The server may have closed it while it was idle, or a firewall forgotten it, and
                # the others likewise. To look beforehand would cost every hit a system call.
                try:
                    replies = _exchange(connection, commands)
                except ConnectionError:
                    self._disconnect_idle()
                    connection = None
                except redis.TimeoutError:
                    self._disconnect_idle()
                    raise
            if connection is None:
                connection = self._connect()
                replies = _exchange(connection, commands)
            self._idle.append(connection)
        if self._closed:
            self._disconnect_idle()
        return replies

    def _connect(self) -> Any:
        connection = self._pool.connection_class(**self._pool.connection_kwargs)
        try:
            connection.connect()
        except BaseException:
            connection.disconnect()
            raise
        return connection

    def _pop_idle(self) -> Any | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _disconnect_idle(self) -> None:
        while (connection := self._pop_idle()) is not None:
            connection.disconnect()

    def close(self) -> None:
        """Disconnect what is idle now, and the others after use."""
        self._closed = True
        self._disconnect_idle()


def _exchange(connection: Any, commands: Sequence[Command]) -> list[Any]:
    try:
        if len(commands) == 1:
            packed = connection.pack_command(*commands[0])
        else:
            packed = connection.pack_commands(commands)
        connection.send_packed_command(packed, check_health=False)
        return [_read(connection) for _ in commands]
    except BaseException:
        connection.disconnect()  # what is still to be read must not be the next one's
        raise


def _read(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


class GivenClient:
    """A client that the user made, with timeouts and retries of its own.

    Those may be long, so commands run on helper threads, which waiters leave behind in time.
    """

    def __init__(self, client: Any) -> None:
        self.patience = _patience_of(client)
        self._client = client
        self._helpers = JobPool(MAX_HELPERS, name="prefetch-embeddings-redis")
        self._blocked = threading.Semaphore(MAX_BLOCKED)

    def submit(self, commands: Sequence[Command]) -> Future[list[Any]]:
        """Start `commands`; cancelling the future keeps what has not begun from beginning.

        Raises:
            NotAsked: Nobody will run them.
        """
        replies: Future[list[Any]] = Future()
        if _blocks(commands):
            if not self._blocked.acquire(blocking=False):
                raise NotAsked
            replies.add_done_callback(lambda _: self._blocked.release())

        def run() -> None:
            if replies.set_running_or_notify_cancel():
                try:
                    replies.set_result(_execute(self._client, commands))
                except BaseException as error:  # noqa: BLE001 - it belongs to the waiter
                    replies.set_exception(error)

        if not self._helpers.submit(run):
            replies.cancel()
            raise NotAsked
        return replies

    def execute(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Return the replies in order, or raise, within `seconds`."""
        replies = self.submit(commands)
        try:
            return replies.result(seconds)
        except BaseException as error:
            if self.withdraw(replies) and isinstance(error, TimeoutError):
                raise NotAsked from None
            raise

    def withdraw(self, replies: Future[list[Any]]) -> bool:
        """Keep `replies` from beginning; return whether they had not."""
        return replies.cancel()

    def close(self) -> None:
        """Let the helper threads end. The client stays open: it is the user's."""
        self._helpers.close()


class AsyncOverThreads:
    """A sync client, for coroutines: nobody gave an async one."""

    def __init__(self, threads: GivenClient) -> None:
        self.patience = threads.patience
        self._threads = threads

    async def execute(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Return the replies in order, or raise, within `seconds`."""
        replies = self._threads.submit(commands)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(replies)
        except BaseException as error:
            if self._threads.withdraw(replies) and isinstance(error, TimeoutError):
                raise NotAsked from None
            raise

    def close(self) -> None:
        """Do nothing: the threads are closed with their owner."""

    async def aclose(self) -> None:
        """Do nothing either."""


class GivenAsyncClient:
    """An async client that the user made, for one event loop; `elsewhere` serves the others.

    Its connections belong to the loop that uses it first, as long as that runs. On another they
    raise, and in a forked child each process would read the other's replies. So it stays what it
    is across forks, and only gets another `elsewhere`.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        # Only written while nobody else can see it: at the start, and in a forked child.
        self.elsewhere: AsyncTransport | None = None
        self.reset_after_fork()
        # Guarded by _lock:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process: int | None = None

    @property
    def patience(self) -> float:
        """After how many seconds without an answer a connection gives up by itself."""
        own = _patience_of(self._client)
        return own if self.elsewhere is None else min(own, self.elsewhere.patience)

    async def execute(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Return the replies in order, or raise, within `seconds`."""
        if self.is_of(asyncio.get_running_loop()):
            async with asyncio.timeout(seconds):
                return await _aexecute(self._client, commands)
        if self.elsewhere is None:
            raise NotAsked
        return await self.elsewhere.execute(commands, seconds)

    def is_of(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return whether the client is `loop`'s to use; from now on it is, if it is nobody's."""
        with self._lock:
            if self._process is None:
                self._process = os.getpid()
            if self._loop is None or not self._loop.is_running():
                self._loop = loop
            return self._loop is loop and self._process == os.getpid()

    def reset_after_fork(self) -> None:
        """Start anew: in a forked child nobody will release the lock."""
        # Reentrant, since the collector may destroy a coroutine at any moment, also in `is_of`, and
        # what that one gives up asks here again, in the same thread.
        self._lock = threading.RLock()

    def close(self) -> None:
        """Leave the client open: it is the user's."""
        if self.elsewhere is not None:
            self.elsewhere.close()

    async def aclose(self) -> None:
        """Leave the client open: it is the user's."""
        if self.elsewhere is not None:
            await self.elsewhere.aclose()


class OwnAsyncClients:
    """Clients made from a URL, one for each event loop, closed with their loop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.patience = _patience(redis.asyncio.connection.parse_url(url))
        self._lock = threading.Lock()
        # Written under _lock; a loop reads only what its own thread wrote.
        self._of_loop: dict[asyncio.AbstractEventLoop, _LoopClient] = {}

    async def execute(self, commands: Sequence[Command], seconds: float) -> list[Any]:
        """Return the replies in order, or raise, within `seconds`."""
        loop = asyncio.get_running_loop()
        mine = self._of_loop.get(loop) or await self._open(loop)
        slots = mine.slots
        if _blocks(commands):
            slots = mine.blocked
            if slots.locked():
                raise NotAsked
        waiting = True
        try:
            async with asyncio.timeout(seconds), slots:
                waiting = False
                return await _aexecute(mine.client, commands)
        except TimeoutError:
            if waiting:
                raise NotAsked from None
            # A firewall may have forgotten the connection while it was idle, and the others too.
            await mine.client.connection_pool.disconnect(inuse_connections=False)
            raise

    async def _open(self, loop: asyncio.AbstractEventLoop) -> _LoopClient:
        mine = _LoopClient(self._url)
        with self._lock:
            for closed in [known for known in self._of_loop if known.is_closed()]:
                del self._of_loop[closed]
            self._of_loop[loop] = mine
        # An event loop that shuts down (`asyncio.run` does) closes the asynchronous generators that
        # were started on it: the one hook to close connections while the loop still runs.
        mine.keeper = self._keep(loop, mine)
        await anext(mine.keeper)
        return mine

    async def _keep(
        self, loop: asyncio.AbstractEventLoop, mine: _LoopClient
    ) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            with self._lock:
                if self._of_loop.get(loop) is mine:
                    del self._of_loop[loop]
            await mine.close()

    def close(self) -> None:
        """Have every loop close its own client."""
        with self._lock:
            of_loop, self._of_loop = self._of_loop, {}
        for loop, mine in of_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has closed, and its client with it
                loop.call_soon_threadsafe(mine.close_on, loop)

    async def aclose(self) -> None:
        """Close the running loop's client now, and have the other loops close theirs."""
        with self._lock:
            mine = self._of_loop.pop(asyncio.get_running_loop(), None)
        if mine is not None:
            await mine.close()
        self.close()


class _LoopClient:
    def __init__(self, url: str) -> None:
        self.client = redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            max_connections=2**16,  # `slots` bounds them, and waits where a pool would raise
            retry=AsyncRetry(NoBackoff(), 0),
            socket_timeout=None,  # `asyncio.timeout` bounds the whole call
            socket_connect_timeout=_SOCKET_SECONDS,
        )
        pool = self.client.connection_pool
        async_connections.adapt(pool)
        self.slots = asyncio.Semaphore(min(MAX_CONCURRENT, pool.max_connections))
        self.blocked = asyncio.Semaphore(MAX_BLOCKED_COROUTINES)
        self.keeper: AsyncGenerator[None, None] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Disconnect; once more does no harm."""
        await self.client.aclose()

    def close_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the event loop that this runs on disconnect."""
        self._closing = loop.create_task(self.close())


def _patience_of(client: Any) -> float:
    try:
        return _patience(client.get_connection_kwargs())
    except AttributeError:  # a client of another make
        return _SOCKET_SECONDS


def _patience(options: Mapping[str, Any]) -> float:
    seconds = options.get("socket_timeout")
    return _SOCKET_SECONDS if seconds is None else float(seconds)


def _blocks(commands: Sequence[Command]) -> bool:
    return commands[0][0] == "BLMOVE"


def _execute(client: Any, commands: Sequence[Command]) -> list[Any]:
    if len(commands) == 1:
        try:
            return [client.execute_command(*commands[0], **_RAW)]
        except ResponseError as error:
            return [error]
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command, **_RAW)
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        return replies


async def _aexecute(client: Any, commands: Sequence[Command]) -> list[Any]:
    if len(commands) == 1:
        try:
            return [await client.execute_command(*commands[0], **_RAW)]
        except ResponseError as error:
            return [error]
    async with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command, **_RAW)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies
