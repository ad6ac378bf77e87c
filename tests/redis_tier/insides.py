"""What tests look at, or change, inside of a Redis tier: in one place."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from prefetch_embeddings._redis.breaker import CircuitBreaker
from prefetch_embeddings._redis.connections import ConnectionSession
from prefetch_embeddings._redis.places import Place
from prefetch_embeddings._redis.requests import Slot
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.redis_tier.server import HANG


class NeverOpen(CircuitBreaker):
    """Never opens, so that every call meets the trouble."""

    def allows(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        return True


def slot(embeddings: RedisCachedEmbeddings, role: str, text: str) -> Slot:
    return embeddings._tier.shelf.slot(role, text)  # type: ignore[arg-type]


def key(embeddings: RedisCachedEmbeddings, text: str, role: str = "query") -> str:
    return slot(embeddings, role, text).key


def place(embeddings: RedisCachedEmbeddings) -> Place:
    """The only place there is, for threads."""
    threads = embeddings._tier._threads
    assert threads is not None
    place = threads.of("any")
    assert place is not None
    return place


def breaker(embeddings: RedisCachedEmbeddings) -> CircuitBreaker:
    return place(embeddings).health.breaker


def never_open(embeddings: RedisCachedEmbeddings) -> RedisCachedEmbeddings:
    place(embeddings).health.breaker = NeverOpen()
    return embeddings


def set_timeout(embeddings: RedisCachedEmbeddings, seconds: float) -> None:
    embeddings._tier.exchange._timeout = seconds


def set_longest_block(embeddings: RedisCachedEmbeddings, seconds: float) -> None:
    embeddings._tier.lookups._longest_block = seconds


def with_gate(
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    gate: threading.Event,
    entered: threading.Event | threading.Semaphore,
) -> None:
    """Have connections of our own wait at the gate before they send requests that begin so."""
    execute = ConnectionSession.execute

    def gated(session: ConnectionSession, commands: Sequence[Any]) -> list[Any]:
        if commands[0][0] == word:
            entered.set() if isinstance(entered, threading.Event) else entered.release()
            assert gate.wait(HANG)
        return execute(session, commands)

    monkeypatch.setattr(ConnectionSession, "execute", gated)
