"""The list is yours, and bit for bit the model's."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.helpers import Call, until

Wrap = Callable[..., PrefetchingEmbeddings]


class Fixed(Embeddings):
    """Returns one and the same object every time."""

    def __init__(self, vector: Any) -> None:
        self.vector = vector

    def embed_query(self, text: str) -> list[float]:
        return self.vector  # type: ignore[no-any-return]

    async def aembed_query(self, text: str) -> list[float]:
        return self.vector  # type: ignore[no-any-return]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.vector for _ in texts]


def _bits(vector: list[float]) -> bytes:
    return struct.pack(f"<{len(vector)}d", *vector)


@given(st.lists(st.floats(width=64, allow_nan=False, allow_infinity=False)))
def test_every_float_survives(vector: list[float]) -> None:
    special = [-0.0, 5e-324, 1e308, 0.1, *vector]
    with PrefetchingEmbeddings(Fixed(special), symmetric=True) as embeddings:
        missed = embeddings.embed_query("missed")
        ready = embeddings.embed_query("missed")
        embeddings.prefetch_many(["batch"])
        assert embeddings.wait_for_prefetch("batch")
        batch = asyncio.run(embeddings.aembed_query("batch"))
        assert {_bits(missed), _bits(ready), _bits(batch)} == {_bits(special)}
    assert_no_leaks(embeddings)


@pytest.mark.parametrize("how", ["missed", "ready", "claimed", "joined"])
def test_changing_a_result_changes_nobody_elses(
    wrap: Wrap, model: ScriptedEmbeddings, how: str
) -> None:
    embeddings = wrap(model, max_workers=1)
    if how == "ready":
        embeddings.embed_query("q")
    elif how == "claimed":
        blocker = model.hold("blocker")
        embeddings.prefetch("blocker")
        blocker.wait_until_entered()
        embeddings.prefetch("q")
    elif how == "joined":
        gate = model.hold("q")
        embeddings.prefetch("q")
        gate.wait_until_entered()
        query = Call(embeddings.embed_query, "q")
        until(lambda: embeddings.stats().query_joined == 1)
        gate.open()
        mine = query.result()
    if how != "joined":
        mine = embeddings.embed_query("q")
    assert getattr(embeddings.stats(), f"query_{how}") == 1
    mine.clear()
    theirs = embeddings.embed_query("q")
    assert theirs == model.vector("q")
    theirs.append(0.0)
    assert embeddings.embed_query("q") == model.vector("q")
    if how == "claimed":
        blocker.open()


async def test_coroutines_get_lists_of_their_own(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    vectors = await asyncio.gather(*(embeddings.aembed_query("q") for _ in range(5)))
    assert len({id(vector) for vector in vectors}) == 5
    vectors[0].clear()
    assert await embeddings.aembed_query("q") == model.vector("q")


def test_the_models_own_list_is_not_handed_out(wrap: Wrap) -> None:
    fixed = [1.0, 2.0]
    embeddings = wrap(Fixed(fixed))
    embeddings.embed_query("a").append(3.0)
    embeddings.embed_query("a").append(3.0)
    assert fixed == [1.0, 2.0]
    fixed.append(9.0)
    assert embeddings.embed_query("a") == [1.0, 2.0], "the model changed a vector that is kept"


@pytest.mark.parametrize("vector", [(1.0, 2.0), np.array([1.0, 2.0])], ids=["tuple", "array"])
def test_any_sequence_of_floats_becomes_a_list(wrap: Wrap, vector: Any) -> None:
    embeddings = wrap(Fixed(vector))
    for _ in range(2):
        result = embeddings.embed_query("q")
        assert type(result) is list
        assert result == [1.0, 2.0]


def test_keyword_arguments_bypass_the_map() -> None:
    seen: list[dict[str, Any]] = []

    class Taking(ScriptedEmbeddings):
        def embed_query(self, text: str, **kwargs: Any) -> list[float]:
            seen.append(kwargs)
            return super().embed_query(text)

        async def aembed_query(self, text: str, **kwargs: Any) -> list[float]:
            seen.append(kwargs)
            return await super().aembed_query(text)

        def embed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
            seen.append(kwargs)
            return super().embed_documents(texts)

        async def aembed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
            seen.append(kwargs)
            return await super().aembed_documents(texts)

    model = Taking()
    with ManualPrefetchingEmbeddings(model) as embeddings:
        embeddings.prefetch("q")
        expected = model.vector("q")
        assert embeddings.embed_query("q", dimensions=8) == expected
        assert asyncio.run(embeddings.aembed_query(text="q", dimensions=9)) == expected
        assert embeddings.embed_documents(texts=["q"], chunk_size=7) == [expected]
        assert asyncio.run(embeddings.aembed_documents(["q"], chunk_size=6)) == [expected]
        assert seen == [{"dimensions": 8}, {"dimensions": 9}, {"chunk_size": 7}, {"chunk_size": 6}]
        stats = embeddings.stats()
        assert stats.query_missed + stats.query_claimed + stats.query_ready == 0
        assert len(embeddings.executor) == 1, "the bypass touched the flight"


@pytest.mark.parametrize("how", ["missed", "ready", "claimed", "joined"])
@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_the_text_by_keyword_does_not_bypass_the_map(
    wrap: Wrap, model: ScriptedEmbeddings, how: str, kind: str
) -> None:
    embeddings = wrap(model, max_workers=1)
    gate = model.hold("blocker" if how == "claimed" else "q")
    if how == "claimed":
        embeddings.prefetch(text="blocker")
        gate.wait_until_entered()
    if how != "missed":
        embeddings.prefetch(text="q")
    if how == "joined":
        gate.wait_until_entered()
    elif how != "claimed":
        gate.open()
    if how == "ready":
        assert embeddings.wait_for_prefetch(text="q")

    def ask() -> list[float]:
        if kind == "thread":
            return embeddings.embed_query(text="q")
        return asyncio.run(embeddings.aembed_query(text="q"))

    query = Call(ask)
    if how == "joined":
        until(lambda: embeddings.stats().query_joined == 1)
        gate.open()
    assert query.result() == model.vector("q")
    gate.open()
    assert getattr(embeddings.stats(), f"query_{how}") == 1
    assert model.calls_for("q") == 1


def test_the_wrapper_pretends_nothing() -> None:
    # A permissive `__getattr__` makes PGVector believe in methods that are not there.
    with PrefetchingEmbeddings(ScriptedEmbeddings()) as embeddings:
        assert not hasattr(embeddings, "embed_image")
        assert not hasattr(embeddings, "model_name")
        assert isinstance(embeddings.underlying_embeddings, ScriptedEmbeddings)
