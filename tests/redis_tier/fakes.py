"""What stands in for Redis where a test needs none: connections, clients, a few bytes of RESP."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from tests.helpers import PATIENCE, until

GET = ("GET", "key")
BLOCK = ("BLMOVE", "list", "list", "LEFT", "RIGHT", "0.250")

RAW = {"NEVER_DECODE": True}
"""How every command is to be sent by a client, or vectors might come back as text."""


def answer(reply: Any) -> Any:
    """Return a scripted reply: what a function returns, what an exception raises, or itself."""
    if isinstance(reply, Exception):
        raise reply
    return reply() if callable(reply) else reply


class FakeConnection:
    """What is used of a redis-py connection. A script that is an exception refuses to connect."""

    def __init__(self, script: list[Any] | Exception, options: dict[str, Any]) -> None:
        self.options = options
        self.connected = False
        self.disconnected = 0
        self.sent: list[Any] = []
        self._script = script

    def connect(self) -> None:
        if isinstance(self._script, Exception):
            raise self._script
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False
        self.disconnected += 1

    def pack_command(self, *command: Any) -> Any:
        return command

    def pack_commands(self, commands: Sequence[Any]) -> Any:
        return list(commands)

    def send_packed_command(self, packed: Any, *, check_health: bool) -> None:
        assert self.connected
        assert check_health is False, "a round trip more"
        self.sent.append(packed)

    def read_response(self, *, disable_decoding: bool) -> Any:
        assert disable_decoding is True, "vectors are bytes"
        assert isinstance(self._script, list)
        return answer(self._script.pop(0))


class FakeConnections:
    """Stands in for a connection class: makes a connection for each script, in their order."""

    def __init__(self, *scripts: list[Any] | Exception) -> None:
        self.made: list[FakeConnection] = []
        self._scripts = list(scripts)

    def __call__(self, **options: Any) -> FakeConnection:
        self.made.append(FakeConnection(self._scripts.pop(0), options))
        return self.made[-1]


class FakeClient:
    """What is used of a redis-py client: replies by a function, and has pipelines."""

    def __init__(self, reply: Callable[..., Any]) -> None:
        self.reply = reply
        self.threads: list[str] = []
        self.pipelines: list[FakePipeline] = []

    def execute_command(self, *command: Any, **options: Any) -> Any:
        assert options == RAW
        self.threads.append(threading.current_thread().name)
        return self.reply(*command)

    def pipeline(self, **options: Any) -> FakePipeline:
        assert options == {"transaction": False}
        self.pipelines.append(FakePipeline(self.reply))
        return self.pipelines[-1]


class FakePipeline:
    """Keeps commands until it is executed, and notes whether it was left in order."""

    def __init__(self, reply: Callable[..., Any]) -> None:
        self.open = False
        self._reply = reply
        self._commands: list[tuple[Any, ...]] = []

    def __enter__(self) -> Self:
        self.open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.open = False

    def execute_command(self, *command: Any, **options: Any) -> None:
        assert self.open
        assert options == RAW
        self._commands.append(command)

    def execute(self, **options: Any) -> list[Any]:
        assert self.open
        assert options == {"raise_on_error": False}
        return [self._reply(*command) for command in self._commands]


class FakeAsyncClient:
    """The same with coroutines."""

    def __init__(self, reply: Callable[..., Any]) -> None:
        self.reply = reply
        self.closed = 0
        self.pipelines: list[FakeAsyncPipeline] = []

    async def execute_command(self, *command: Any, **options: Any) -> Any:
        assert options == RAW
        return await self.reply(*command)

    def pipeline(self, **options: Any) -> FakeAsyncPipeline:
        assert options == {"transaction": False}
        self.pipelines.append(FakeAsyncPipeline(self.reply))
        return self.pipelines[-1]

    async def aclose(self) -> None:
        self.closed += 1


class FakeAsyncPipeline:
    def __init__(self, reply: Callable[..., Any]) -> None:
        self.open = False
        self._reply = reply
        self._commands: list[tuple[Any, ...]] = []

    async def __aenter__(self) -> Self:
        self.open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.open = False

    def execute_command(self, *command: Any, **options: Any) -> None:
        assert self.open
        assert options == RAW
        self._commands.append(command)

    async def execute(self, **options: Any) -> list[Any]:
        assert self.open
        assert options == {"raise_on_error": False}
        return [await self._reply(*command) for command in self._commands]


class Gate:
    """Replies to a command once it is opened; notes which commands began."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.began: list[str] = []

    def __call__(self, *command: str) -> bytes:
        self.began.append(command[-1])
        assert self.opened.wait(PATIENCE)
        return command[-1].encode()

    def has_begun(self, count: int) -> None:
        until(lambda: len(self.began) == count)


@contextlib.contextmanager
def resp_server(**replies: bytes) -> Iterator[tuple[int, list[list[bytes]]]]:
    """Answer one connection: by `replies` to commands of that name, "OK" to the others.

    Yields the port, and the commands that came. The connection must be closed by the end.
    """
    came: list[list[bytes]] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(PATIENCE)

    def serve() -> None:
        with contextlib.suppress(OSError):  # nobody came
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as stream:
                connection.settimeout(PATIENCE)
                while header := stream.readline():
                    parts = []
                    for _ in range(int(header[1:])):
                        length = int(stream.readline()[1:])
                        parts.append(stream.read(length + 2)[:-2])
                    came.append(parts)
                    connection.sendall(replies.get(parts[0].decode(), b"+OK\r\n"))
                came.append([])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        yield listener.getsockname()[1], came
        thread.join(PATIENCE)
        assert came.pop() == [], "the connection was left open"
