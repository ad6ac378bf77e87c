"""A model whose sync method is the more specific one is not gone around."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from unittest.mock import MagicMock

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import RedisCachedEmbeddings
from prefetch_embeddings.model_sides import (
    aembed_documents,
    aembed_query,
    embeds_on_loops,
    tiers,
)


class SyncOnly(Embeddings):
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return [1.0]


class Native(SyncOnly):
    async def aembed_query(self, text: str, **kwargs: Any) -> list[float]:
        return [2.0, *kwargs.values()]

    async def aembed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        return [[2.0, *kwargs.values()] for _ in texts]


class Cached(Native):
    def embed_query(self, text: str, **kwargs: Any) -> list[float]:
        return [3.0, *kwargs.values()]


class CachedDocuments(Native):
    def embed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        return [[3.0, *kwargs.values()] for _ in texts]


class Both(Cached):
    async def aembed_query(self, text: str, **kwargs: Any) -> list[float]:
        return [4.0, *kwargs.values()]


class Inherits(Both):
    pass


class Mixin:
    def embed_query(self, text: str, **kwargs: Any) -> list[float]:
        return [5.0, *kwargs.values()]


class Mixed(Mixin, Native):
    pass


def patched() -> Native:
    """A model of which somebody has replaced the sync method of one object."""
    model = Native()
    model.embed_query = lambda text, **kwargs: [6.0, *kwargs.values()]  # type: ignore[method-assign]
    return model


def redis_tier(model: Embeddings) -> Embeddings:
    return RedisCachedEmbeddings(model, "redis://127.0.0.1:1/0", model_id="m")


@pytest.mark.parametrize(
    ("model", "on_loops"),
    [
        (SyncOnly(), False),
        (Native(), True),
        (Cached(), False),
        (CachedDocuments(), True),
        (Both(), True),
        (Inherits(), True),
        (Mixed(), False),
        (patched(), False),
        (redis_tier(Native()), True),
        (redis_tier(Cached()), False),
        (redis_tier(SyncOnly()), False),
        (MagicMock(spec=Native), True),
    ],
)
def test_who_embeds_queries_on_loops(model: Embeddings, on_loops: bool) -> None:
    assert embeds_on_loops(model) is on_loops


@pytest.mark.parametrize(
    ("model", "answer"),
    [
        (Native(), [2.0]),
        (Cached(), [3.0]),
        (Both(), [4.0]),
        (Mixed(), [5.0]),
        (patched(), [6.0]),
    ],
)
async def test_a_query_is_answered_by_the_most_specific_method(
    model: Embeddings, answer: list[float]
) -> None:
    assert await aembed_query(model, "q") == answer
    assert await aembed_query(model, "q", more=7.0) == [*answer, 7.0]


@pytest.mark.parametrize(("model", "answer"), [(Native(), [2.0]), (CachedDocuments(), [3.0])])
async def test_documents_are_embedded_by_the_most_specific_method(
    model: Embeddings, answer: list[float]
) -> None:
    assert await aembed_documents(model, ["q", "r"]) == [answer, answer]
    assert await aembed_documents(model, ["q"], more=7.0) == [[*answer, 7.0]]


async def test_a_sync_method_blocks_no_loop() -> None:
    class Held(Native):
        def embed_query(self, text: str) -> list[float]:
            assert threading.current_thread() is not threading.main_thread()
            assert gate.wait(30)
            return [1.0]

    gate = threading.Event()
    asking = asyncio.create_task(aembed_query(Held(), "q"))
    await asyncio.sleep(0)
    gate.set()
    assert await asking == [1.0]


def test_tiers_are_walked_down() -> None:
    model = Native()
    outer = redis_tier(model)
    assert list(tiers(outer)) == [outer, model]
