"""Older caches are read, checked against entries that their own libraries wrote."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from typing import Any, Literal

import pytest
from langchain_classic.embeddings import CacheBackedEmbeddings
from redisvl.extensions.cache.embeddings import EmbeddingsCache  # type: ignore[import-untyped]

from prefetch_embeddings.existing import CacheBackedEmbeddingsCache, RedisVLEmbeddingsCache
from tests.redis_tier.models import CountingModel, vector_of
from tests.redis_tier.server import HANG, RedisServer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it announces its own end
    from langchain_community.storage import RedisStore

TEXTS = ["first", "second", "dritter Text: ö"]
AWKWARD = [0.1, -0.0, 5e-324, 1e300, -2.0e-308, 1.0]
Algorithm = Literal["sha1", "blake2b", "sha256", "sha512"]


class Awkward(CountingModel):
    def _embed(self, text: str, role: str) -> list[float]:
        return [*AWKWARD, float(len(text))]


@pytest.mark.filterwarnings("ignore:Using default key encoder:UserWarning")
@pytest.mark.parametrize("algorithm", ["sha1", "blake2b", "sha256", "sha512"])
@pytest.mark.parametrize("store_namespace", [None, "store"])
def test_cache_backed_embeddings(
    cached: Any, server: RedisServer, algorithm: Algorithm, store_namespace: str | None
) -> None:
    with server.client() as client:
        old = CacheBackedEmbeddings.from_bytes_store(
            Awkward(),
            RedisStore(client=client, namespace=store_namespace),
            namespace="model-1",
            key_encoder=algorithm,
            query_embedding_cache=True,
        )
        vectors = old.embed_documents(TEXTS)
        old.embed_query("asked")
    cache = CacheBackedEmbeddingsCache(
        roles=("query", "document"),
        namespace="model-1",
        key_encoder=algorithm,
        store_namespace=store_namespace,
    )
    model = Awkward()
    embeddings = cached(model, read_through=[cache])
    assert repr(embeddings.embed_documents(TEXTS)) == repr(vectors)
    assert repr(embeddings.embed_query("asked")) == repr([*AWKWARD, 5.0])
    assert (model.queries, model.documents) == ([], [])
    assert (embeddings.stats().hits, embeddings.stats().carried_over) == (4, 4)
    # Copied forward: a tier that knows nothing of the old cache finds them.
    assert embeddings.flush(HANG)
    assert repr(cached(model).embed_documents(TEXTS)) == repr(vectors)
    assert model.documents == []


def test_a_key_encoder_of_ones_own(cached: Any, server: RedisServer) -> None:
    encoder: Callable[[str], str] = "mine-{}".format
    with server.client() as client:
        CacheBackedEmbeddings.from_bytes_store(
            CountingModel(), RedisStore(client=client), key_encoder=encoder
        ).embed_documents(TEXTS)
    cache = CacheBackedEmbeddingsCache(roles=["document"], key_encoder=encoder)
    model = CountingModel()
    cached(model, read_through=[cache]).embed_documents(TEXTS)
    assert model.documents == []


def test_redisvl(cached: Any, server: RedisServer) -> None:
    with server.client() as client:
        old = EmbeddingsCache(name="old", redis_client=client)
        for text in TEXTS:
            old.set(text, "model-1", [*AWKWARD, float(len(text))])
    cache = RedisVLEmbeddingsCache(roles=["query"], model_name="model-1", name="old")
    model = Awkward()
    embeddings = cached(model, read_through=[cache])
    for text in TEXTS:
        assert repr(embeddings.embed_query(text)) == repr([*AWKWARD, float(len(text))])
    assert asyncio.run(embeddings.aembed_query("unknown")) == [*AWKWARD, 7.0]
    assert (model.queries, model.aqueries) == ([], ["unknown"])
    embeddings.embed_documents(["first"])  # not the role that the old cache holds
    assert model.documents == [["first"]]


def test_redisvl_keys_that_run_together_are_told_apart(cached: Any, server: RedisServer) -> None:
    with server.client() as client:
        EmbeddingsCache(redis_client=client).set("a:b", "c", [1.0])
    cache = RedisVLEmbeddingsCache(roles=["query"], model_name="b:c")
    embeddings = cached(CountingModel(), read_through=[cache])
    assert embeddings.embed_query("a") == vector_of("a")
    assert embeddings.stats().corrupt == 1


@pytest.mark.parametrize(
    "entry",
    [
        b"garbage",
        b"[1.0, ",
        b"{}",
        b"[]",
        b'["1"]',
        b"[true]",
        b"[[1.0]]",
        b"[1" + b"0" * 400 + b"]",
    ],
)
def test_entries_that_are_no_vectors(cached: Any, server: RedisServer, entry: bytes) -> None:
    cache = CacheBackedEmbeddingsCache(roles=["query"], key_encoder="key-{}".format)
    with server.client() as client:
        client.set("key-text", entry)
    embeddings = cached(CountingModel(), read_through=[cache])
    assert embeddings.embed_query("text") == vector_of("text")
    assert (embeddings.stats().corrupt, embeddings.stats().carried_over) == (1, 0)


def test_entries_of_another_type_or_dimension(cached: Any, server: RedisServer) -> None:
    options: dict[str, Any] = {"roles": ["document"], "key_encoder": "key-{}".format}
    with server.client() as client:
        client.set("key-short", b"[1.0]")
        client.set("key-good", b"[1, 2.0]")
        client.hset("key-hash", "a", "b")
    embeddings = cached(
        CountingModel(), read_through=[CacheBackedEmbeddingsCache(**options, dimensions=2)]
    )
    vectors = embeddings.embed_documents(["short", "good", "hash"])
    assert vectors[0] == vector_of("short", "document")
    assert vectors[1] == [1.0, 2.0]
    assert vectors[2] == vector_of("hash", "document")
    assert (embeddings.stats().corrupt, embeddings.stats().errors) == (2, 0)


def test_several_caches_are_asked_in_turn(cached: Any, server: RedisServer) -> None:
    caches = [
        CacheBackedEmbeddingsCache(roles=["document"], key_encoder=f"{name}-{{}}".format)
        for name in "ab"
    ]
    with server.client() as client:
        client.set("a-1", b"[1.0]")
        client.set("b-1", b"[9.0]")
        client.set("b-2", b"[2.0]")
    model = CountingModel()
    embeddings = cached(model, read_through=caches)
    assert embeddings.embed_documents(["1", "2"]) == [[1.0], [2.0]]
    assert model.documents == []


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="roles"):
        CacheBackedEmbeddingsCache(roles="query")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="roles"):
        RedisVLEmbeddingsCache(roles=["queries"], model_name="m")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="key_encoder"):
        CacheBackedEmbeddingsCache(roles=["query"], key_encoder="md5")  # type: ignore[arg-type]


@pytest.mark.parametrize("encode", [lambda text: text, lambda text: text.encode().hex()])
def test_a_text_that_a_key_encoder_cannot_take_is_a_miss(cached: Any, encode: Any) -> None:
    older = CacheBackedEmbeddingsCache(roles=["query"], key_encoder=encode)
    tier = cached(CountingModel(), read_through=[older])
    assert tier.embed_query("\ud800") == vector_of("\ud800")
    assert tier.embed_query("text") == vector_of("text")
    assert (tier.stats().misses, tier.stats().errors) == (2, 0)
