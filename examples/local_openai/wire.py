"""The little of HTTP/1.1 that the endpoint needs: requests in, responses out, over asyncio."""

import asyncio
import http
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

SERVER_NAME = "local-openai-stand-in"


@dataclass(frozen=True)
class Request:
    """One request, read to its end."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def wants_close(self) -> bool:
        """Whether the client will not use the connection again."""
        return self.headers.get("connection", "").lower() == "close"


@dataclass(frozen=True)
class Response:
    """One response with a JSON body."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()

    def encode(self) -> bytes:
        """The response as it goes over the wire."""
        lines = [
            f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}",
            f"Server: {SERVER_NAME}",
            "Content-Type: application/json",
            f"Content-Length: {len(self.body)}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + self.body


def json_response(
    status: int, payload: object, *, headers: tuple[tuple[str, str], ...] = ()
) -> Response:
    """A response with `payload` as its JSON body."""
    return Response(status, json.dumps(payload).encode(), headers)


Handler = Callable[[Request], Awaitable[Response | None]]
"""Answers one request; None resets the connection instead."""


class Connection(asyncio.Protocol):
    """One keep-alive connection: its requests are answered one after the other.

    A client that goes away cancels the handler that works for it.

    Args:
        handler: Answers the requests.
        idle_close: Seconds without a request after which the server closes; None for never.
            Read each time the connection falls idle.
        on_lost: Called once, when the connection is gone.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        idle_close: Callable[[], float | None] = lambda: None,
        on_lost: Callable[["Connection"], None] = lambda _: None,
    ) -> None:
        self._handler = handler
        self._idle_close = idle_close
        self._on_lost = on_lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._answering: asyncio.Task[None] | None = None
        self._idle_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start waiting for the first request."""
        self._transport = transport  # type: ignore[assignment]  # always a stream transport here
        self._wait_idle()

    def data_received(self, data: bytes) -> None:
        """Answer, once a request is complete."""
        self._buffer += data
        if self._answering is None:
            self._answer_next()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Stop working for a client that is gone."""
        self._transport = None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._answering is not None:
            self._answering.cancel()
        self._on_lost(self)

    def abort(self) -> None:
        """Reset the connection, whatever is under way on it."""
        if self._transport is not None:
            self._transport.abort()

    def _wait_idle(self) -> None:
        seconds = self._idle_close()
        if seconds is not None and self._transport is not None:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(seconds, self._transport.close)

    def _answer_next(self) -> None:
        try:
            request = _take_request(self._buffer)
        except ValueError:
            self.abort()
            return
        if request is None:
            return
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        self._answering = asyncio.create_task(self._answer(request))

    async def _answer(self, request: Request) -> None:
        try:
            response = await self._handler(request)
        except BaseException:  # no client is left waiting, whatever went wrong
            self.abort()
            raise
        self._answering = None
        if self._transport is None:
            return
        if response is None:
            self._transport.abort()
            return
        self._transport.write(response.encode())
        if request.wants_close:
            self._transport.close()
            return
        self._wait_idle()
        self._answer_next()


def _take_request(buffer: bytearray) -> Request | None:
    """Take one complete request from the buffer's front; None while it is incomplete."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    request_line, *header_lines = buffer[:end].decode("latin-1").split("\r\n")
    method, path, _version = request_line.split(" ")
    headers: dict[str, str] = {}
    for line in header_lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if "transfer-encoding" in headers:
        raise ValueError("only bodies with a Content-Length are understood")
    start = end + 4
    stop = start + int(headers.get("content-length", "0"))
    if len(buffer) < stop:
        return None
    body = bytes(buffer[start:stop])
    del buffer[:stop]
    return Request(method, path, headers, body)
