"""No text, and no password, in a log record, an event, a key, a value or a repr."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from prefetch_embeddings._redis.recorder import RedisCacheEvent
from prefetch_embeddings._redis.recorder import RedisCacheEventKind as Kind
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.helpers import until
from tests.redis_tier.models import CountingModel, ModelError, vector_of
from tests.redis_tier.server import HANG, RedisServer

TEXT = "my account number is 4711"


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def assert_private(caplog: pytest.LogCaptureFixture, *others: object) -> None:
    for said in (*caplog.messages, caplog.text, *map(repr, others)):
        assert "4711" not in said
        assert "hunter2" not in said


def test_no_text_is_told_while_all_goes_well(
    cached: Any, model: CountingModel, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[RedisCacheEvent] = []
    embeddings = cached(model, on_event=events.append, single_flight=True)
    embeddings.embed_query(TEXT)
    embeddings.embed_documents([TEXT])
    assert embeddings.flush(HANG)
    asyncio.run(embeddings.aembed_query(TEXT))
    assert_private(caplog, events, embeddings, embeddings.stats())
    kinds = [event.kind for event in events]
    assert sorted(kinds) == sorted([Kind.MISS, Kind.WRITTEN, Kind.MISS, Kind.WRITTEN, Kind.HIT])
    with server.client() as client:
        for key in client.scan_iter():
            assert b"4711" not in key
            assert b"4711" not in (client.get(key) if client.type(key) == b"string" else b"")


def test_no_text_is_told_while_all_goes_wrong(
    cached: Any, model: CountingModel, refusing_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[RedisCacheEvent] = []
    url = f"redis://user:hunter2@127.0.0.1:{refusing_port}/0"
    embeddings = cached(model, url, on_event=events.append)
    model.failing = {TEXT}
    for _ in range(5):
        with pytest.raises(ModelError):
            embeddings.embed_query(TEXT)
        with pytest.raises(ModelError):
            embeddings.embed_documents([TEXT])
    assert_private(caplog, events, embeddings, embeddings._tier)
    assert {event.error for event in events if event.kind is Kind.ERROR} == {"ConnectionError"}
    assert [event.kind for event in events].count(Kind.BREAKER_OPENED) == 1
    assert "going on without it" in caplog.text


def test_a_listener_that_raises_is_logged_by_class_and_harms_nothing(
    cached: Any, model: CountingModel, caplog: pytest.LogCaptureFixture
) -> None:
    def listener(event: RedisCacheEvent) -> None:
        raise LookupError(TEXT)

    embeddings = cached(model, on_event=listener)
    assert embeddings.embed_query(TEXT) == vector_of(TEXT)
    assert embeddings.flush(HANG)
    assert "on_event raised LookupError on miss" in caplog.text
    assert_private(caplog)


def test_a_listener_may_call_back(cached: Any, model: CountingModel) -> None:
    """No lock is held while it is told something."""
    seen: list[int] = []

    def listener(event: RedisCacheEvent) -> None:
        seen.append(embeddings.stats().misses)
        embeddings.flush(0)
        if len(seen) < 5:
            embeddings.embed_query("from the listener")

    embeddings: RedisCachedEmbeddings = cached(model, on_event=listener)
    embeddings.embed_query("text")
    assert embeddings.flush(HANG)
    assert seen


def test_the_breaker_tells_when_it_closes(
    cached: Any, model: CountingModel, fragile_server: RedisServer
) -> None:
    events: list[RedisCacheEvent] = []
    embeddings = cached(model, fragile_server.url, on_event=events.append)
    fragile_server.kill()
    for number in range(3):
        embeddings.embed_query(str(number))
    fragile_server.start()

    def closed() -> bool:
        embeddings.embed_query("text")
        return Kind.BREAKER_CLOSED in [event.kind for event in events]

    until(closed)


def test_snapshots_subtract_and_do_not_change(cached: Any, model: CountingModel) -> None:
    embeddings = cached(model)
    embeddings.embed_query("text")
    before = embeddings.stats()
    embeddings.embed_documents(["a", "b", "a"])
    difference = embeddings.stats() - before
    assert (before.misses, difference.misses) == (1, 2)
    with pytest.raises(AttributeError):
        before.misses = 3
