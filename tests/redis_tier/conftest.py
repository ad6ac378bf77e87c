"""A server for all tests, one of its own for those that harm it, and the check after each test."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.helpers import until
from tests.redis_tier.checks import assert_nothing_left
from tests.redis_tier.models import CountingModel
from tests.redis_tier.server import Proxy, RedisServer, closed_port


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture
def server(shared_server: RedisServer) -> Iterator[RedisServer]:
    """A healthy, empty server."""
    with shared_server.client() as client:
        client.flushall()
    before = shared_server.connections()
    yield shared_server

    def at_rest() -> bool:
        """Tell whether no connection was left open but by clients that have gone."""
        if shared_server.connections() > before:
            gc.collect()  # a lane may have used a client just when its test was closing that
        return shared_server.connections() <= before

    until(at_rest)


@pytest.fixture
def fragile_server() -> Iterator[RedisServer]:
    """A server that this test alone has, to kill or to pause."""
    server = RedisServer()
    yield server
    server.resume()
    server.close()


@pytest.fixture
def refusing_port() -> Iterator[int]:
    with closed_port() as port:
        yield port


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def model() -> CountingModel:
    return CountingModel()


@pytest.fixture
def cached(server: RedisServer) -> Iterator[Callable[..., RedisCachedEmbeddings]]:
    """Makes tiers; checks each after the test."""
    made: list[RedisCachedEmbeddings] = []

    def make(model: Embeddings, *args: Any, **options: Any) -> RedisCachedEmbeddings:
        if not args and "client" not in options and "async_client" not in options:
            args = (server.url,)
        # Ample, so that a busy machine cannot make a healthy server look slow.
        options = {"model_id": "test", "timeout": 20.0, **options}
        made.append(RedisCachedEmbeddings(model, *args, **options))
        return made[-1]

    threads = set(threading.enumerate())
    yield make
    for embeddings in made:
        embeddings.close()
    assert_nothing_left(made, threads)
