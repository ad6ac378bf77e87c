"""A text embedded once is a hit for all, sync and async, each role and model for itself."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import numpy as np
import pytest
import redis
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.helpers import until
from tests.redis_tier.insides import key, slot
from tests.redis_tier.models import CountingModel, ModelError, vector_of
from tests.redis_tier.server import HANG, RedisServer, free_port


def test_the_second_process_asks_redis_only(cached: Any, model: CountingModel) -> None:
    first, second = cached(model), cached(model)
    vector = first.embed_query("text")
    assert first.flush(HANG)
    assert second.embed_query("text") == vector == vector_of("text")
    assert model.queries == ["text"]
    assert (second.stats().hits, second.stats().misses) == (1, 0)


async def test_the_second_process_asks_redis_only_async(cached: Any, model: CountingModel) -> None:
    first, second = cached(model), cached(model)
    vector = await first.aembed_query(text="text")
    assert first.flush(HANG)
    assert await second.aembed_query("text") == vector
    assert second.embed_query("text") == vector  # both faces share the entries
    assert (model.queries, model.aqueries) == ([], ["text"])
    await asyncio.gather(first.aclose(), second.aclose())


def test_own_vectors_are_hits_before_they_are_written(
    cached: Any, model: CountingModel, fragile_server: RedisServer
) -> None:
    embeddings = cached(model, fragile_server.url, timeout=0.2)
    embeddings.embed_query("first")  # connects
    assert embeddings.flush(HANG)
    fragile_server.pause()
    vector = embeddings.embed_query("text")  # this query's GET takes the whole timeout
    assert embeddings.embed_query("text") == vector
    assert embeddings.embed_documents(["text"]) == [vector_of("text", "document")]
    assert model.queries == ["first", "text"]


def test_each_caller_gets_a_list_of_its_own(cached: Any, model: CountingModel) -> None:
    embeddings = cached(model)
    embeddings.embed_query("text").clear()
    embeddings.embed_query("text").clear()  # on its way
    assert embeddings.flush(HANG)
    embeddings.embed_query("text").clear()
    assert embeddings.embed_query("text") == vector_of("text")
    first, second = embeddings.embed_documents(["a", "a"])
    assert first == second
    assert first is not second


def test_the_numbers_are_floats_also_on_a_miss(cached: Any) -> None:
    """Some models return numpy's; callers should not have to tell a hit by the type."""

    class NumpyModel(CountingModel):
        def _embed(self, text: str, role: str) -> list[float]:
            return list(np.array(super()._embed(text, role), dtype=np.float32))

    embeddings = cached(NumpyModel())
    for _ in range(2):
        [number, *_] = embeddings.embed_query("text")
        assert type(number) is float
    [[number, *_]] = embeddings.embed_documents(["text"])
    assert type(number) is float


def test_a_list_that_the_model_keeps_is_not_handed_out(cached: Any, model: CountingModel) -> None:
    kept = [0.5]
    model.embed_query = lambda text: kept  # type: ignore[method-assign, assignment, misc]
    cached(model).embed_query("text").clear()
    assert kept == [0.5]


def test_keys_name_prefix_and_role_and_nothing_readable(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    embeddings = cached(model, prefix="mine")
    embeddings.embed_query("a secret question")
    embeddings.embed_documents(["a secret document"])
    assert embeddings.flush(HANG)
    with server.client() as client:
        keys = sorted(client.keys())
        assert [re.sub(rb"[0-9a-f]{32}", b"#", key) for key in keys] == [
            b"mine:document:#",
            b"mine:query:#",
        ]
        assert not any(b"secret" in client.get(key) for key in keys)
        assert all(86_000_000 < client.pttl(key) <= 86_400_000 for key in keys)


@pytest.mark.parametrize(("ttl", "expected"), [(None, -1), (0.0001, -2), (1000.0, 1_000_000)])
def test_time_to_live(
    cached: Any, model: CountingModel, server: RedisServer, ttl: float | None, expected: int
) -> None:
    embeddings = cached(model, ttl=ttl)
    embeddings.embed_query("text")
    assert embeddings.flush(HANG)
    with server.client() as client:
        if expected == -2:
            until(lambda: not client.keys())
            return
        [key] = client.keys()
        assert expected - 60_000 <= client.pttl(key) <= expected


def test_queries_and_documents_do_not_share(cached: Any, model: CountingModel) -> None:
    embeddings = cached(model)
    assert embeddings.embed_query("text") == vector_of("text", "query")
    assert embeddings.embed_documents(["text"]) == [vector_of("text", "document")]
    slots = slot(embeddings, "query", "text"), slot(embeddings, "document", "text")
    assert slots[0].digest != slots[1].digest


def test_two_models_in_one_database_do_not_share(cached: Any) -> None:
    small, large = CountingModel(4), CountingModel(8)
    one, other = cached(small, model_id="small"), cached(large, model_id="large")
    for _ in range(2):
        assert len(one.embed_query("text")) == 4
        assert len(other.embed_query("text")) == 8
        assert one.flush(HANG)
        assert other.flush(HANG)
    assert (small.queries, large.queries) == (["text"], ["text"])


def test_dimensions_are_part_of_the_key(cached: Any) -> None:
    small, large = CountingModel(4), CountingModel(8)
    small.dimensions, large.dimensions = 4, 8  # type: ignore[attr-defined]
    one, other = cached(small), cached(large)
    one.embed_query("text")
    assert one.flush(HANG)
    assert len(other.embed_query("text")) == 8
    assert other.stats().corrupt == 0


async def test_the_text_by_keyword_does_not_go_past_redis(
    cached: Any, model: CountingModel
) -> None:
    first, second = cached(model), cached(model)
    vector = first.embed_query(text="text")
    other = await first.aembed_query(text="other")
    assert first.flush(HANG)
    assert second.embed_query(text="text") == await second.aembed_query(text="text") == vector
    assert second.embed_query(text="other") == await second.aembed_query(text="other") == other
    assert (second.stats().hits, second.stats().misses) == (4, 0)
    assert (model.queries, model.aqueries) == (["text"], ["other"])
    outer = PrefetchingEmbeddings(second)
    for query in (outer.embed_query(text="text"), await outer.aembed_query(text="text")):
        assert query == vector
    assert (outer.stats().query_missed, outer.stats().query_ready) == (1, 1)
    outer.close()
    assert second.stats().hits == 5
    await asyncio.gather(first.aclose(), second.aclose())


def test_extra_arguments_go_to_the_model_and_past_redis(cached: Any, model: CountingModel) -> None:
    embeddings = cached(model)
    for _ in range(2):
        embeddings.embed_query("text", user="u")
        embeddings.embed_documents(["text"], chunk_size=5)
    assert embeddings.flush(HANG)
    assert (len(model.queries), len(model.documents)) == (2, 2)
    assert embeddings.stats().writes == 0


def test_lone_surrogates_are_texts_like_others(cached: Any, model: CountingModel) -> None:
    embeddings = cached(model)
    assert embeddings.embed_query("\ud800") == vector_of("\ud800")
    assert embeddings.embed_query("\ud801") != vector_of("\ud800")
    assert embeddings.flush(HANG)
    assert embeddings.embed_query("\ud800") == vector_of("\ud800")
    assert len(model.queries) == 2


async def test_each_face_uses_the_models_own(cached: Any, model: CountingModel) -> None:
    embeddings = cached(model)
    embeddings.embed_query("1")
    await embeddings.aembed_query("2")
    embeddings.embed_documents(["3"])
    await embeddings.aembed_documents(["4"])
    asked = (model.queries, model.aqueries, model.documents, model.adocuments)
    assert asked == (["1"], ["2"], [["3"]], [["4"]])
    await embeddings.aclose()


@pytest.mark.parametrize("face", ["sync", "async"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    known=st.lists(st.sampled_from("abcdefgh"), max_size=8),
    corrupt=st.lists(st.sampled_from("abcdefgh"), max_size=2),
    asked=st.lists(st.sampled_from("abcdefgh"), max_size=16),
)
def test_any_mix_keeps_its_order(
    server: RedisServer, face: str, known: list[str], corrupt: list[str], asked: list[str]
) -> None:
    with (
        server.client() as client,
        RedisCachedEmbeddings(CountingModel(), server.url, model_id="test", timeout=20.0) as warm,
    ):
        client.flushall()
        warm.embed_documents(known)
        assert warm.flush(HANG)
        for text in corrupt:
            client.set(key(warm, text, "document"), b"garbage")
    model = CountingModel()
    with RedisCachedEmbeddings(model, server.url, model_id="test", timeout=20.0) as embeddings:
        if face == "sync":
            vectors = embeddings.embed_documents(asked)
        else:
            vectors = asyncio.run(embeddings.aembed_documents(asked))
        stats = embeddings.stats()
    assert vectors == [vector_of(text, "document") for text in asked]
    missing = [t for t in dict.fromkeys(asked) if t not in known or t in corrupt]
    sent = [text for batch in model.documents + model.adocuments for text in batch]
    assert sent == missing  # each once, in order
    assert (stats.hits, stats.misses) == (len(set(asked)) - len(missing), len(missing))


def test_many_documents_cross_requests_and_batches(cached: Any, model: CountingModel) -> None:
    first, second = cached(model), cached(model)
    texts = [f"text {number}" for number in range(450)]
    first.embed_documents(texts[::3])
    assert first.flush(HANG)
    assert second.embed_documents(texts) == [vector_of(text, "document") for text in texts]
    assert second.stats().hits == 150
    assert sorted(text for batch in model.documents for text in batch) == sorted(texts)


def test_batches_are_of_the_models_own_size(cached: Any, model: CountingModel) -> None:
    model.chunk_size = 3  # type: ignore[attr-defined]
    cached(model).embed_documents(list("abcdefg"))
    assert [len(batch) for batch in model.documents] == [3, 3, 1]


async def test_what_was_embedded_is_stored_when_a_later_batch_fails(
    cached: Any, model: CountingModel
) -> None:
    model.chunk_size = 2  # type: ignore[attr-defined]
    model.failing = {"d"}
    embeddings, other = cached(model), cached(model)
    with pytest.raises(ModelError):
        embeddings.embed_documents(list("abcde"))
    with pytest.raises(ModelError):
        await embeddings.aembed_documents(list("xyd"))
    assert embeddings.flush(HANG)
    model.documents.clear()
    assert len(other.embed_documents(list("abxy"))) == 4
    assert model.documents == []
    await embeddings.aclose()


def test_a_model_that_returns_too_few_is_an_error_and_stored_nowhere(
    cached: Any, model: CountingModel
) -> None:
    model.embed_documents = lambda texts: [[0.5]]  # type: ignore[method-assign, assignment, misc]
    embeddings = cached(model)
    with pytest.raises(ValueError, match="1 vectors for 2 texts"):
        embeddings.embed_documents(["a", "b"])
    assert embeddings.stats().writes == 0


def test_errors_are_not_kept(cached: Any, model: CountingModel) -> None:
    embeddings = cached(model)
    model.failing = {"text"}
    with pytest.raises(ModelError):
        embeddings.embed_query("text")
    model.failing = set()
    assert embeddings.embed_query("text") == vector_of("text")
    assert embeddings.stats().errors == 0  # a model's error is none of Redis'


async def test_a_ready_made_client_serves_both_faces(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    for options in ({}, {"decode_responses": True}, {"protocol": 3}):
        with server.client(**options) as client:
            embeddings = cached(model, client=client, model_id=repr(options))
            model.queries.clear()
            await embeddings.aembed_query("text")
            assert embeddings.flush(HANG)
            assert embeddings.embed_query("text") == vector_of("text")
            await embeddings.aembed_documents(["a", "b"])
            assert embeddings.flush(HANG)
            assert len(embeddings.embed_documents(["b", "a"])) == 2
            assert (model.queries, model.documents) == ([], [])
            embeddings.close()
            assert client.ping()  # it is the user's: still open


async def test_a_ready_made_async_client_is_used(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    async with redis.asyncio.Redis(
        port=server.port, client_name="given", decode_responses=True
    ) as client:
        embeddings, other = cached(model, async_client=client), cached(model)
        await embeddings.aembed_query("text")
        await embeddings.aembed_documents(["a", "b"])
        assert await asyncio.to_thread(embeddings.flush, HANG)
        assert [c["name"] for c in await client.client_list()] == ["given"] * len(
            await client.client_list()
        )
        assert other.embed_query("text") == vector_of("text")
        assert await embeddings.aembed_query("text") == vector_of("text")
        assert embeddings.stats().hits == 1
        embeddings.embed_query("sync")  # no sync client: straight to the model
        embeddings.embed_documents(["sync"])
        assert (model.queries, model.documents) == (["sync"], [["sync"]])
        await embeddings.aclose()
        assert await client.ping()


def test_a_unix_socket(cached: Any, model: CountingModel, server: RedisServer) -> None:
    embeddings = cached(model, f"unix://{server.socket_path}?db=1")
    embeddings.embed_query("text")
    assert embeddings.flush(HANG)
    with server.client(db=1) as client:
        assert client.dbsize() == 1
    assert cached(model, f"unix://{server.socket_path}?db=1").embed_query("text")
    assert model.queries == ["text"]


def test_a_cluster(model: CountingModel, cached: Any) -> None:
    node = RedisServer("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        with node.client() as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
            until(lambda: client.cluster("info")["cluster_state"] == "ok")
        with redis.RedisCluster(host="127.0.0.1", port=node.port) as cluster:
            for single_flight in (False, True):
                model_id = str(single_flight)
                first, second = (
                    cached(model, client=cluster, single_flight=single_flight, model_id=model_id)
                    for _ in range(2)
                )
                texts = list("abcdefgh")
                first.embed_query("text")
                first.embed_documents(texts)
                assert first.flush(HANG)
                model.queries.clear()
                model.documents.clear()
                assert second.embed_query("text") == vector_of("text")
                assert second.embed_documents(texts)[3] == vector_of("d", "document")
                assert (model.queries, model.documents) == ([], [])
                assert first.stats().errors == second.stats().errors == 0
                first.close()
                second.close()
    finally:
        node.close()


def test_after_closing_the_model_answers(cached: Any, model: CountingModel) -> None:
    with cached(model) as embeddings:
        embeddings.embed_query("text")
    assert embeddings.stats().writes == 1  # closing let it arrive
    assert embeddings.embed_query("text") == vector_of("text")
    assert embeddings.embed_documents(["a"]) == [vector_of("a", "document")]
    assert asyncio.run(embeddings.aembed_query("text")) == vector_of("text")
    assert len(model.queries) == 2
    embeddings.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "url="),
        ({"url": "redis://x", "client": object()}, "not both"),
        ({"url": "redis://x", "timeout": 0}, "timeout"),
        ({"url": "redis://x", "ttl": 0.0}, "ttl"),
        ({"url": "redis://x", "lease": -1.0}, "lease"),
        ({"url": "nonsense://x"}, "starts with redis://"),
        ({"url": "redis://x", "model_id": ""}, "model_id"),
        ({"url": "redis://x", "single_flight": True, "prefix": "a}b"}, "hash tag"),
    ],
)
def test_wrong_arguments(model: CountingModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RedisCachedEmbeddings(model, **{"model_id": "test", **arguments})


def test_a_ttl_may_be_none_but_the_others_may_not(model: CountingModel) -> None:
    assert RedisCachedEmbeddings(model, "redis://x", model_id="test", ttl=None)
    with pytest.raises(ValueError, match="model_id"):
        RedisCachedEmbeddings(model, "redis://x")


def test_attributes_that_are_not_there_are_missing(cached: Any, model: CountingModel) -> None:
    embeddings = cached(model)
    assert embeddings.underlying_embeddings is model
    assert not hasattr(embeddings, "queries")


def test_what_is_no_vector_is_passed_on_and_its_lease_given_up(
    cached: Any, server: RedisServer
) -> None:
    class Odd(CountingModel):
        def embed_query(self, text: str, **kwargs: object) -> Any:
            return None

    tier = cached(Odd(), single_flight=True)
    assert tier.embed_query("text") is None
    assert tier.flush(HANG)
    with server.client() as client:
        assert [key for key in client.scan_iter() if b"wake" not in key] == []


async def test_warming_up_after_closing_connects_to_nothing(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    tier = cached(model)
    await tier.aclose()
    before = server.connections()
    tier.warm_up()
    await tier.awarm_up()
    assert server.connections() == before


@pytest.mark.parametrize("name", ["ttl", "timeout", "lease"])
@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 0.0, -1.0])
def test_durations_are_positive_and_finite(model: CountingModel, name: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        RedisCachedEmbeddings(model, "redis://x", model_id="test", **{name: seconds})  # type: ignore[arg-type]
