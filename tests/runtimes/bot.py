"""A bot as servers import it: one wrapper, made when the module is, and a handful of routes."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings


class SlowModel(Embeddings):
    """Takes a while, as a provider does; in a way that gevent can switch away from."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.seconds = 0.05

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        self.calls[text] += 1
        time.sleep(self.seconds)
        return [float(len(text)), 1.0]


model = SlowModel()
embeddings = PrefetchingEmbeddings(model)


def answered(text: str, vector: list[float]) -> bytes:
    """Return the body of an answer: the vector, and what it took."""
    answer = {"vector": vector, "calls": model.calls[text], "process": os.getpid()}
    return json.dumps(answer).encode()


def text_of(query: str) -> str:
    """Return the text that a request asks for."""
    return parse_qs(query)["text"][0]


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer with a query that was prefetched a moment before."""
    text = text_of(environ["QUERY_STRING"])
    embeddings.prefetch(text)
    body = answered(text, embeddings.embed_query(text))
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


async def asgi(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]
) -> None:
    """Do the same on an event loop."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    text = text_of(scope["query_string"].decode())
    await embeddings.aprefetch(text)
    body = answered(text, await embeddings.aembed_query(text))
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
