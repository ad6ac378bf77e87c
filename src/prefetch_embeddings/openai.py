"""`voice_embeddings`: LangChain's `OpenAIEmbeddings` with settings that suit a conversation.

Needs the extra `prefetch-embeddings[openai]`.
"""

from __future__ import annotations

import asyncio
import email.utils
import importlib
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

try:
    import openai
    from langchain_openai import OpenAIEmbeddings
except ImportError as error:
    raise ImportError(
        "prefetch_embeddings.openai needs langchain-openai: "
        "pip install 'prefetch-embeddings[openai]'",
        name=error.name,
    ) from error

from prefetch_embeddings._background import forks
from prefetch_embeddings.arguments import check_count, check_seconds

if TYPE_CHECKING:
    import ssl

    import httpx2

__all__ = ["voice_embeddings"]

# HTTPX, or its successor HTTPX2: the one that the installed OpenAI client is made of.
_http: Any = importlib.import_module(type(openai.DEFAULT_CONNECTION_LIMITS).__module__)


def voice_embeddings(
    *,
    keep_alive: float = 180.0,
    connect_timeout: float = 2.0,
    read_timeout: float = 5.0,
    max_retries: int = 1,
    max_retry_after: float = 2.0,
    ssl_context: ssl.SSLContext | None = None,
    openai_proxy: str | None = None,
    **options: Any,
) -> OpenAIEmbeddings:
    """Return an `OpenAIEmbeddings` for queries that somebody waits for on the line.

    The client's own settings suit programs that call again and again, or can wait. Here both its
    clients, sync and async, keep connections between turns and give up in seconds. Each event loop
    has a connection pool of its own, so that `asyncio.run` may be called more than once, and so has
    each forked process.

    A try that hears nothing is given up after `read_timeout`, and `2 * connect_timeout` more if it
    opens a connection; there are `max_retries + 1` tries. Large batches of documents may well take
    longer than that: index with a plain `OpenAIEmbeddings` of the same model, or with a larger
    `read_timeout`.

    Example:
        ```python
        embeddings = PrefetchingEmbeddings(voice_embeddings(model="text-embedding-3-small"))
        embeddings.warm_up()  # the first caller finds tokenizer and connection in place
        ```

    Args:
        keep_alive: Seconds that an idle connection is kept. The client's default of 5 is shorter
            than most turns, and whoever asks next waits for a TCP and a TLS handshake: two round
            trips and more. 180 spans the turns of a call, and ends before others end it: gateways
            of the large clouds forget idle connections after 240 seconds (Azure) or 350 (AWS),
            Cloudflare closes them after 400. A connection that was closed all the same is
            replaced; only if that crosses with a query does this cost a retry.
        connect_timeout: Seconds that opening a connection may take, TCP and TLS each. A lost
            packet is sent again after one second, so 2 forgives one.
        read_timeout: Seconds of silence after which a request counts as lost; sending, and waiting
            for one of the 1,000 connections, are bounded by the same. `OpenAIEmbeddings` has no
            limit by default (the bare OpenAI client: 600). 5 is several times what a slow answer
            takes, so that few answers are thrown away that would still have come.
        max_retries: Further tries after a timeout, a lost connection or a status of 408, 409, 429
            or 5xx, the first after half a second. The client's default is 2. With 1, a connection
            lost at the wrong moment goes unnoticed, and a call that fails twice fails while there
            is time to say so. A prefetch that nobody waits for is tried `attempts` times on top.
        max_retry_after: Longest pause in seconds that a server may ask for (`Retry-After`) before
            a retry. The client would sleep for up to two minutes while somebody waits; asked for
            more than this, the call fails at once.
        ssl_context: How servers are verified. By default as the OpenAI client does it, which
            heeds `SSL_CERT_FILE`.
        openai_proxy: Proxy for all requests; by default `OPENAI_PROXY`, and without it the usual
            variables, such as `HTTPS_PROXY`.
        options: Whatever else `OpenAIEmbeddings` takes, such as `model`, `dimensions`, `api_key`
            and `base_url`. Worth a thought: by default every text is first split into tokens, with
            a tokenizer that the first call downloads, and that async calls run in the event loop's
            default threads. `check_embedding_ctx_length=False` sends the text as it is, which is
            faster and downloads nothing; then a text of more than 8,191 tokens is an error, where
            it would be cut, embedded in parts and averaged. Questions are never that long,
            documents may be, so the default stays as it is.

    Returns:
        The model. Few programs need to close its connections: `http_client.close()` does, and on
        each event loop `await http_async_client.aclose()`.

    Raises:
        TypeError: If `options` has the timeout or a client that this function is there to make, or
            an argument is of a wrong type.
        ValueError: If a number is out of range, or `OpenAIEmbeddings` refuses an option.
    """
    for name in ("timeout", "request_timeout", "http_client", "http_async_client"):
        if name in options:
            raise TypeError(f"voice_embeddings() makes {name} itself; see its other arguments")
    check_seconds("keep_alive", keep_alive, endless=True)
    check_seconds("connect_timeout", connect_timeout)
    check_seconds("read_timeout", read_timeout)
    check_seconds("max_retry_after", max_retry_after, or_zero=True, endless=True)
    check_count("max_retries", max_retries, least=0)

    def refuse_long_pause(response: httpx2.Response) -> None:
        if _retry_after(response) > max_retry_after:
            response.headers["x-should-retry"] = "false"  # the client asks this header first

    async def arefuse_long_pause(response: httpx2.Response) -> None:
        refuse_long_pause(response)

    defaults = openai.DEFAULT_CONNECTION_LIMITS
    timeout = openai.Timeout(read_timeout, connect=connect_timeout)
    settings = {
        "limits": _http.Limits(
            max_connections=defaults.max_connections,
            max_keepalive_connections=defaults.max_keepalive_connections,
            keepalive_expiry=keep_alive,
        ),
        "timeout": timeout,
        "proxy": openai_proxy or os.environ.get("OPENAI_PROXY"),
        # Made once: reading the authorities' certificates takes tens of milliseconds.
        "verify": ssl_context or _http.create_ssl_context(),
    }
    return OpenAIEmbeddings(
        http_client=_ClientPerProcess(**settings, event_hooks={"response": [refuse_long_pause]}),
        http_async_client=_ClientPerLoop(
            **settings, event_hooks={"response": [arefuse_long_pause]}
        ),
        timeout=timeout,  # else each request says: none
        max_retries=max_retries,
        openai_proxy=None,  # the clients have it
        **options,
    )


def _retry_after(response: httpx2.Response) -> float:
    """Return the seconds that a response asks to wait before a retry; 0.0 if it asks for none."""
    for header, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return float(response.headers[header]) / per_second
        except (KeyError, ValueError):
            continue
    try:
        date = email.utils.parsedate_to_datetime(response.headers.get("retry-after", ""))
        return date.timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


class _ClientPerProcess(openai.DefaultHttpxClient):
    """A sync client that sends on connections of the process it is in.

    Parent and child that used one connection after a fork would read each other's answers.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._settings = settings
        self.reset_after_fork()
        forks.register(self)

    def reset_after_fork(self) -> None:
        self._sender = openai.DefaultHttpxClient(**self._settings)

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        return self._sender.send(request, **options)

    def close(self) -> None:
        self._sender.close()
        super().close()

    def __del__(self) -> None:
        with suppress(Exception):  # as the OpenAI client's own do; the interpreter may be ending
            self.close()


class _ClientPerLoop(openai.DefaultAsyncHttpxClient):
    """An async client that sends on connections of the running event loop.

    A connection works on the loop that opened it and fails on any other, so one pool for all of
    them would fail queries for as long as it keeps connections of a closed loop.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._settings = settings
        # Each loop writes its own entry; what closed loops leave goes when a new loop comes.
        self._senders: dict[asyncio.AbstractEventLoop, openai.DefaultAsyncHttpxClient] = {}

    def _sender(self) -> openai.DefaultAsyncHttpxClient:
        loop = asyncio.get_running_loop()
        sender = self._senders.get(loop)
        if sender is None:
            for known in list(self._senders):
                if known.is_closed():
                    self._senders.pop(known, None)
            sender = self._senders[loop] = openai.DefaultAsyncHttpxClient(**self._settings)
        return sender

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        if self.is_closed:
            raise RuntimeError("Cannot send a request, as the client has been closed.")
        return await self._sender().send(request, **options)

    async def aclose(self) -> None:
        await super().aclose()
        mine = self._senders.pop(asyncio.get_running_loop(), None)
        if mine is not None:  # other loops' connections can be closed on those loops only
            await mine.aclose()
