"""Servers that are far, and networks that swallow everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.helpers import until
from tests.redis_tier.models import CountingModel, vector_of
from tests.redis_tier.server import HANG, Proxy, RedisServer
from tests.redis_tier.test_loops_and_forks import MuteTls

FAR = 0.0125
"""Each way, so 25 ms there and back."""

TIMEOUT = 0.1
"""The default; with TLS and a handshake connecting takes longer."""


@pytest.fixture
def far(server: RedisServer, tmp_path: Path) -> Iterator[tuple[Proxy, str]]:
    """A proxy that delays, in front of TLS; and the URL that leads there."""
    tls = MuteTls(server.port, tmp_path)
    proxy = Proxy(tls.port)
    proxy.delay = FAR
    yield proxy, f"rediss://localhost:{proxy.port}/0?ssl_ca_certs={tls.authority}"
    proxy.close()
    tls.close()


def asks(face: str) -> Callable[[RedisCachedEmbeddings, str], list[float]]:
    if face == "sync":
        return lambda embeddings, text: embeddings.embed_query(text)
    return lambda embeddings, text: asyncio.run(embeddings.aembed_query(text))


@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_connection_that_takes_longer_than_a_query_waits_is_kept(
    cached: Any, model: CountingModel, far: tuple[Proxy, str], face: str
) -> None:
    proxy, url = far
    proxy.delay = 4 * FAR  # no handshake is over within the timeout
    embeddings = cached(model, url, timeout=TIMEOUT)
    ask = asks(face)
    assert ask(embeddings, "first") == vector_of("first")
    assert (embeddings.stats().hits, embeddings.stats().writes) == (0, 0)
    proxy.delay = FAR

    def stored() -> bool:
        assert ask(embeddings, "text") == vector_of("text")
        assert embeddings.flush(HANG)
        return bool(embeddings.stats().writes)

    until(stored)
    before = embeddings.stats()
    for _ in range(5):
        assert ask(embeddings, "text") == vector_of("text")
    assert (embeddings.stats() - before).hits == 5
    assert embeddings.stats().errors == 0, "connecting that takes long was taken for a failure"
    assert proxy.accepted <= 4, "connections were thrown away"  # reading and writing


@pytest.mark.parametrize("face", ["sync", "async"])
def test_warming_up_waits_for_a_server_that_is_far(
    cached: Any, model: CountingModel, far: tuple[Proxy, str], face: str
) -> None:
    _, url = far
    embeddings = cached(model, url, timeout=TIMEOUT)
    if face == "sync":
        embeddings.warm_up()
    else:
        asyncio.run(embeddings.awarm_up())
    assert asks(face)(embeddings, "text") == vector_of("text")
    assert (embeddings.stats().misses, embeddings.stats().skipped) == (1, 0)


@pytest.mark.parametrize("face", ["sync", "async"])
@pytest.mark.parametrize("single_flight", [False, True])
def test_a_network_that_swallows_everything_is_left_alone_until_it_works(
    cached: Any,
    model: CountingModel,
    server: RedisServer,
    proxy: Proxy,
    face: str,
    single_flight: bool,
) -> None:
    embeddings = cached(model, proxy.url, timeout=TIMEOUT, single_flight=single_flight)
    ask = asks(face)
    embeddings.warm_up()
    ask(embeddings, "known")
    assert embeddings.flush(HANG)
    proxy.swallow()
    before = embeddings.stats()
    number = 0
    while (embeddings.stats() - before).skipped < 10:
        number += 1
        assert ask(embeddings, f"text {number}") == vector_of(f"text {number}")
    asked = embeddings.stats() - before
    assert asked.hits == 0
    assert asked.errors >= 3, "the breaker opened without failures"
    # Each that was asked waited for the timeout, as good as nobody else did.
    assert asked.redis_seconds < (asked.errors + 1) * TIMEOUT * 3
    proxy.blackhole = False  # the connections that were there, and those begun since, stay dead

    def hit() -> bool:
        before = embeddings.stats()
        assert ask(embeddings, "known") == vector_of("known")
        return bool((embeddings.stats() - before).hits)

    until(hit)
