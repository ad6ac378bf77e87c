"""The embeddings endpoint itself: one event loop that answers, delays, fails and counts."""

import asyncio
import dataclasses
import json
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from examples.local_openai.delays import Delays
from examples.local_openai.faults import Fault, FaultPlan, FaultRule
from examples.local_openai.vectors import DEFAULT_DIMENSIONS, packed, vector
from examples.local_openai.wire import Connection, Request, Response, json_response

_LOOPBACK = "127.0.0.1"
# A server that is done with a connection does not wait for the client's part of the goodbye.
_TLS_GOODBYE = 0.05


@dataclass(frozen=True)
class ServerStats:
    """What has reached the endpoint so far; one consistent snapshot.

    Attributes:
        requests: Embedding requests received, failed ones included.
        inputs: Texts in them.
        faults: Requests that a fault was applied to.
        in_flight: Requests received and not yet answered.
        peak_in_flight: The most requests that were in flight at once.
        hanging: Requests that hang now.
        connections: TCP connections accepted.
        connections_open: TCP connections open now.
    """

    requests: int = 0
    inputs: int = 0
    faults: int = 0
    in_flight: int = 0
    peak_in_flight: int = 0
    hanging: int = 0
    connections: int = 0
    connections_open: int = 0


@dataclass
class EmbeddingsServer:
    """The endpoint's state and its answers. All of it is touched on its event loop only.

    Args:
        tls: Server side of TLS; None for plain HTTP.
    """

    tls: ssl.SSLContext | None = None
    delays: Delays = field(default_factory=Delays)
    idle_close: float | None = None
    handshake_delay: float = 0.0
    plan: FaultPlan = field(default_factory=FaultPlan)
    asked: Counter[str] = field(default_factory=Counter)
    stats: ServerStats = field(default_factory=ServerStats)

    def __post_init__(self) -> None:
        self._changed = asyncio.Event()
        self._released = asyncio.Event()
        self._connections: set[Connection] = set()

    async def serve(
        self,
        control: Callable[[Request], Any],
        on_ready: Callable[[int, int], None],
        stop: asyncio.Event,
    ) -> None:
        """Serve until `stop` is set, then drop every connection at once.

        Args:
            control: Answers the requests on the control port.
            on_ready: Called with the endpoint's port and the control port.
            stop: Ends the service.
        """
        loop = asyncio.get_running_loop()
        with socket.create_server((_LOOPBACK, 0), backlog=1024) as listener:
            listener.settimeout(0)
            control_server = await loop.create_server(lambda: Connection(control), _LOOPBACK, 0)
            accepting = asyncio.create_task(self._accept(listener))
            on_ready(listener.getsockname()[1], control_server.sockets[0].getsockname()[1])
            try:
                await stop.wait()
            finally:
                control_server.close()
                accepting.cancel()
                for connection in tuple(self._connections):
                    connection.abort()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as opening:
            while True:
                client, _ = await loop.sock_accept(listener)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._count(connections=1, connections_open=1)
                opening.create_task(self._open(client))

    async def _open(self, client: socket.socket) -> None:
        """Hand an accepted socket over to a `Connection`, after the handshake."""
        connection = Connection(
            self.answer, idle_close=lambda: self.idle_close, on_lost=self._on_lost
        )
        try:
            await asyncio.sleep(self.handshake_delay)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                client,
                ssl=self.tls,
                ssl_shutdown_timeout=_TLS_GOODBYE if self.tls else None,
            )
        except (OSError, asyncio.CancelledError) as error:
            client.close()
            self._count(connections_open=-1)
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            self._connections.add(connection)

    def _on_lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._count(connections_open=-1)

    async def answer(self, request: Request) -> Response | None:
        """Answer one request on the endpoint's port; None resets the connection."""
        if request.path.partition("?")[0] != "/v1/embeddings":
            return _error(404, f"unknown path {request.path}; only /v1/embeddings is here")
        if request.method != "POST":
            return _error(405, "only POST is understood")
        try:
            query = _EmbeddingsQuery.parse(request.body)
        except ValueError as error:
            return _error(400, str(error))
        arrived = asyncio.get_running_loop().time()
        delay = max(
            self.delays.seconds_for(text, asked_before=self.asked[text]) for text in query.texts
        )
        self.asked.update(query.texts)
        self._count(requests=1, inputs=len(query.texts), in_flight=1)
        try:
            rule = self.plan.take(query.texts)
            if rule is not None:
                self._count(faults=1)
                if rule.fault is not Fault.HANG:
                    return _failure(rule)
                await self._hang()
            response = query.response()
            await asyncio.sleep(arrived + delay - asyncio.get_running_loop().time())
            return response
        finally:
            self._count(in_flight=-1)

    async def _hang(self) -> None:
        self._count(hanging=1)
        try:
            await self._released.wait()
        finally:
            self._count(hanging=-1)

    def release(self) -> None:
        """Let every request that hangs now go on to its answer."""
        self._released.set()
        self._released = asyncio.Event()

    def reset_counts(self) -> None:
        """Forget what was counted, except what is still open or under way."""
        now = self.stats
        self.asked.clear()
        self.stats = ServerStats(
            in_flight=now.in_flight,
            peak_in_flight=now.in_flight,
            hanging=now.hanging,
            connections_open=now.connections_open,
        )

    async def wait_until(self, name: str, at_least: int | None, at_most: int | None) -> None:
        """Return once the count called `name` lies within the bounds."""
        while True:
            value: int = getattr(self.stats, name)
            if (at_least is None or value >= at_least) and (at_most is None or value <= at_most):
                return
            await self._changed.wait()

    def _count(self, **steps: int) -> None:
        counts = {name: getattr(self.stats, name) + step for name, step in steps.items()}
        if "in_flight" in counts:
            counts["peak_in_flight"] = max(self.stats.peak_in_flight, counts["in_flight"])
        self.stats = dataclasses.replace(self.stats, **counts)
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(frozen=True)
class _EmbeddingsQuery:
    """The body of one embeddings request, checked."""

    texts: tuple[str, ...]
    model: str
    base64: bool
    dimensions: int

    @classmethod
    def parse(cls, body: bytes) -> "_EmbeddingsQuery":
        """Read a request body; `ValueError` says what is wrong with it."""
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError("the body must be a JSON object")  # noqa: TRY004
        encoding = fields.get("encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise ValueError(f"unknown encoding_format {encoding!r}")
        dimensions = fields.get("dimensions", DEFAULT_DIMENSIONS)
        if not isinstance(dimensions, int) or dimensions < 1:
            raise ValueError("dimensions must be a positive integer")
        return cls(
            texts=_texts(fields.get("input")),
            model=str(fields.get("model", "")),
            base64=encoding == "base64",
            dimensions=dimensions,
        )

    def response(self) -> Response:
        """The successful answer."""
        tokens = sum(len(text.split()) for text in self.texts)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": packed(text, self.dimensions)
                if self.base64
                else vector(text, self.dimensions).tolist(),
            }
            for index, text in enumerate(self.texts)
        ]
        return json_response(
            200,
            {
                "object": "list",
                "data": data,
                "model": f"local-stand-in-for-{self.model}",
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
        )


def _texts(given: object) -> tuple[str, ...]:
    """The texts of an ``input`` field: a string, a list of them, token ids, or a list of these."""
    if isinstance(given, list) and given and all(isinstance(item, int) for item in given):
        given = [given]
    texts = []
    for item in given if isinstance(given, list) else [given]:
        # The stand-in has no tokenizer: a list of token ids is a text of numbers to it.
        text = " ".join(map(str, item)) if isinstance(item, list) else item
        if not isinstance(text, str) or not text:
            raise ValueError("input must be a text, or a list of texts, none of them empty")
        texts.append(text)
    if not texts:
        raise ValueError("input must hold at least one text")
    return tuple(texts)


def _error(status: int, message: str, *, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    kind = "rate_limit_exceeded" if status == 429 else f"stand_in_{status}"
    error = {"message": message, "type": kind, "param": None, "code": kind}
    return json_response(status, {"error": error}, headers=headers)


def _failure(rule: FaultRule) -> Response | None:
    """What a client gets to see of a fault; None for a reset connection."""
    if rule.fault is Fault.DISCONNECT:
        return None
    status = 429 if rule.fault is Fault.RATE_LIMIT else 500
    retry = () if rule.retry_after is None else (("retry-after-ms", f"{rule.retry_after * 1e3}"),)
    return _error(status, f"{rule.fault} ordered from the local stand-in", headers=retry)
