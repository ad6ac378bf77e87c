"""Redis as fleets run it: clusters, Sentinel, TLS, users with few rights, demoted servers."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import math
import multiprocessing
import pickle
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.existing import CacheBackedEmbeddingsCache
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.helpers import until
from tests.redis_tier.insides import key, place
from tests.redis_tier.models import CountingModel, vector_of
from tests.redis_tier.server import HANG, Cluster, Proxy, RedisServer, SentinelSet, ask, binary_of
from tests.redis_tier.test_loops_and_forks import MuteTls

TEXTS = [f"text {number}" for number in range(60)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(3, 0)
    yield cluster
    cluster.close()


def fill(embeddings: RedisCachedEmbeddings) -> None:
    embeddings.warm_up()
    for text in TEXTS:
        embeddings.embed_query(text)
    assert embeddings.flush(HANG)


@pytest.mark.parametrize("single_flight", [False, True])
@pytest.mark.parametrize("how", ["url", "client"])
def test_a_dead_node_costs_only_its_own_keys(
    cached: Any, model: CountingModel, cluster: Cluster, how: str, single_flight: bool, caplog: Any
) -> None:
    caplog.set_level(logging.WARNING, logger="prefetch_embeddings.redis")
    client = None
    if how == "client":
        client = redis.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port)
        embeddings = cached(model, client=client, single_flight=single_flight, timeout=1.0)
    else:
        embeddings = cached(model, cluster.url, single_flight=single_flight, timeout=1.0)
    fill(embeddings)
    cached_texts = embeddings.stats().writes
    assert cached_texts == len(TEXTS)
    with cluster.nodes[2].client() as direct:
        lost = {name.decode() for name in direct.scan_iter(count=1000)}
    cluster.nodes[2].kill()
    living = [text for text in TEXTS if key(embeddings, text) not in lost]
    dead = [text for text in TEXTS if key(embeddings, text) in lost]
    assert len(living) > 20
    assert len(dead) > 5
    for text in dead[:5] * 2:  # whatever that does
        assert embeddings.embed_query(text) == vector_of(text)
    model.queries.clear()
    for text in living:
        assert embeddings.embed_query(text) == vector_of(text)
        assert asyncio.run(embeddings.aembed_query(text)) == vector_of(text)
    assert model.queries + model.aqueries == []
    warnings = [record for record in caplog.records if "keeps failing" in record.message]
    assert len(warnings) <= 1, "it flaps"
    embeddings.close()
    if client is not None:
        client.close()


async def test_a_client_of_a_cluster_is_warmed_up(
    cached: Any, model: CountingModel, cluster: Cluster
) -> None:
    node = cluster.nodes[0]
    async with redis.asyncio.RedisCluster(host="127.0.0.1", port=node.port) as client:
        embeddings = cached(model, async_client=client)
        ping = asyncio.create_task(embeddings.awarm_up())
        vectors = await asyncio.gather(*map(embeddings.aembed_query, TEXTS))  # beside the `PING`
        assert vectors == list(map(vector_of, TEXTS))
        await ping
        assert (embeddings.stats().skipped, embeddings.stats().errors) == (0, 0)
        await embeddings.aclose()


@pytest.mark.parametrize("face", ["sync", "async"])
def test_warming_up_connects_to_every_node(
    cached: Any, model: CountingModel, cluster: Cluster, face: str
) -> None:
    fill(cached(model, cluster.url))
    embeddings = cached(model, cluster.url)
    if face == "sync":
        embeddings.warm_up()
    else:
        asyncio.run(embeddings.awarm_up())
    for text in TEXTS:
        embeddings.embed_query(text)
    stats = embeddings.stats()
    assert (stats.hits, stats.skipped, stats.errors) == (len(TEXTS), 0, 0)


def test_keys_of_a_slot_that_moves_cost_no_more_than_a_miss(
    cached: Any, model: CountingModel, cluster: Cluster
) -> None:
    """Meanwhile nodes answer `ASK`, and `TRYAGAIN` to scripts some of whose keys have moved."""
    embeddings = cached(model, cluster.url, prefix="{moves}", single_flight=True)
    fill(embeddings)
    name = key(embeddings, TEXTS[0])
    slot = int(ask(cluster.nodes[0], "CLUSTER", "KEYSLOT", name))
    source = cluster.masters[slot * 3 // 16384]
    target = cluster.masters[(slot * 3 // 16384 + 1) % 3]
    ids = [ask(node, "CLUSTER", "MYID").decode() for node in (source, target)]
    ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
    ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
    with source.client() as client:
        client.set(name, b"damaged")  # so its script meets it, and no lease: `TRYAGAIN`
        with pytest.raises(redis.ResponseError):
            client.eval("return 1", 2, name, f"{name}:lease")
    before = embeddings.stats()
    for text in (TEXTS[0], "new", "another"):
        assert embeddings.embed_query(text) == vector_of(text)
        assert asyncio.run(embeddings.aembed_query(text)) == vector_of(text)
    assert embeddings.embed_query(TEXTS[1]) == vector_of(TEXTS[1])
    assert embeddings.flush(HANG)
    during = embeddings.stats() - before
    assert during.hits >= 1, "what has not moved yet is not found"
    assert during.misses >= 3
    assert (during.skipped, during.errors, during.waited) == (0, 0, 0)
    with source.client() as client:
        names = client.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000)
        client.execute_command(
            "MIGRATE", "127.0.0.1", target.port, "", 0, 60_000, "REPLACE", "KEYS", *names
        )
    for node in (target, source, *cluster.masters):
        ask(node, "CLUSTER", "SETSLOT", slot, "NODE", ids[1])

    def hit() -> bool:
        before = embeddings.stats()
        assert embeddings.embed_query(TEXTS[2]) == vector_of(TEXTS[2])
        return bool((embeddings.stats() - before).hits)

    until(hit)


def test_hits_come_back_after_sentinels_failover(cached: Any, model: CountingModel) -> None:
    fleet = SentinelSet(replicas=1, sentinels=3)
    try:
        embeddings = cached(model, fleet.url, timeout=1.0)
        fill(embeddings)
        with fleet.replicas[0].client() as replica:
            until(lambda: replica.dbsize() == len(TEXTS))
        fleet.primary.kill()

        def hit() -> bool:
            before = embeddings.stats()
            assert embeddings.embed_query(TEXTS[0]) == vector_of(TEXTS[0])
            return bool((embeddings.stats() - before).hits)

        until(lambda: not hit())
        until(hit)

        def written() -> bool:
            before = embeddings.stats()
            embeddings.embed_query(f"new {before.misses} {before.skipped}")
            assert embeddings.flush(HANG)
            return bool((embeddings.stats() - before).writes)

        until(written)
        embeddings.close()
    finally:
        fleet.close()


def test_a_server_that_was_demoted_behind_its_name_is_let_go(
    cached: Any, model: CountingModel, server: RedisServer, fragile_server: RedisServer, caplog: Any
) -> None:
    """A proxy stands for the name; the old primary keeps its connections."""
    proxy = Proxy(server.port)
    try:
        embeddings = cached(model, proxy.url)
        embeddings.embed_query("before")
        assert embeddings.flush(HANG)
        proxy.target(fragile_server.port)
        with server.client() as old:
            old.replicaof("127.0.0.1", str(fragile_server.port))
            try:

                def written() -> bool:
                    before = embeddings.stats()
                    embeddings.embed_query(f"after {before.misses}")
                    assert embeddings.flush(HANG)
                    return bool((embeddings.stats() - before).writes)

                until(written)
            finally:
                old.replicaof("NO", "ONE")
        embeddings.close()
    finally:
        proxy.close()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "Redis refuses to store vectors (ReadOnlyError): going on without"
    ]


async def test_a_burst_of_coroutines_is_served(cached: Any, model: CountingModel) -> None:
    """With the default timeout: that a thousand at once take longer than it is our own doing."""
    embeddings = cached(model, timeout=0.1)
    await embeddings.awarm_up()
    await embeddings.aembed_query("text")
    assert await asyncio.to_thread(embeddings.flush, HANG)
    vectors = await asyncio.gather(*(embeddings.aembed_query("text") for _ in range(1000)))
    assert vectors == [vector_of("text")] * 1000
    assert embeddings.stats().skipped == 0, "the breaker opened"
    assert place(embeddings).health.breaker.closed
    await embeddings.aclose()


def test_the_urls_max_connections_are_kept_by_threads_and_coroutines(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    before = server.connections()
    embeddings = cached(model, f"{server.url}?max_connections=2", single_flight=True)

    async def together() -> None:
        await asyncio.gather(*(embeddings.aembed_query(f"{n} async") for n in range(50)))

    threads = [threading.Thread(target=embeddings.embed_query, args=(str(n),)) for n in range(30)]
    threads.append(threading.Thread(target=asyncio.run, args=(together(),)))
    most = 0
    for thread in threads:
        thread.start()
    for thread in threads:
        most = max(most, server.connections() - before)
        thread.join(HANG)
    assert embeddings.flush(HANG)
    assert max(most, server.connections() - before) <= 2
    assert embeddings.stats().errors == 0


@pytest.fixture(params=["Redis 6.2", "Redis 7.0", "Redis 7.2", "Redis 8.2", "Valkey 9"])
def server_of_a_version(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    program = binary_of(request.param)
    if program is None:
        pytest.skip(f"there is no {request.param} here")
    server = RedisServer(program=program)
    yield server
    server.close()


def test_the_acl_of_the_docs_is_enough(
    cached: Any, model: CountingModel, server_of_a_version: RedisServer
) -> None:
    page = (Path(__file__).parents[2] / "docs/redis.md").read_text("utf-8")
    words = page.partition("ACL SETUSER")[2].partition("```")[0].split()
    with server_of_a_version.client() as client:
        client.execute_command("ACL SETUSER", *words)
        url = server_of_a_version.url.replace("//", f"//{words[0]}:secret@")
        for single_flight in (False, True):
            embeddings = cached(
                model, url, single_flight=single_flight, model_id=str(single_flight)
            )
            other = cached(model, url, single_flight=single_flight, model_id=str(single_flight))
            fill(embeddings)
            assert other.embed_query(TEXTS[0]) == vector_of(TEXTS[0])
            assert embeddings.forget(TEXTS[0])
            assert (embeddings.stats().errors, other.stats().hits) == (0, 1)
        assert client.acl_log() == []


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nonsense://x", "starts with redis://"),
        ("redis://x?sokcet_timeout=3", "unknown option 'sokcet_timeout'"),
        ("redis://:hunter2@x?db=many", "Invalid value for .db"),
        ("redis+cluster://x:1/3", "database 0"),
        ("redis+cluster://:hunter2@?a=b", "expected redis"),
        ("redis+sentinel://x:1", "service"),
        ("redis+sentinel://x:1/main/two", "service"),
        ("redis+sentinel://x:1/main?unheard=of", "unknown option 'unheard'"),
        ("redis://:hunter2@x:port", "not a valid URL"),
    ],
)
def test_a_url_that_is_wrong_is_refused_without_its_password(
    model: CountingModel, url: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        RedisCachedEmbeddings(model, url, model_id="m")
    assert "hunter2" not in str(caught.value)


def test_a_certificate_that_is_not_trusted_is_called_that(
    cached: Any, model: CountingModel, tmp_path: Path, caplog: Any
) -> None:
    server = RedisServer()
    tls = MuteTls(server.port, tmp_path)
    try:
        embeddings = cached(model, f"rediss://:hunter2@localhost:{tls.port}/0")
        until(lambda: embeddings.embed_query("text") and "keeps failing" in caplog.text)
        embeddings.close()
    finally:
        tls.close()
        server.close()
    assert "certificate verify failed" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"client": redis.asyncio.Redis()}, TypeError, "async_client="),
        ({"client": "redis://x"}, TypeError, "client"),
        ({"async_client": redis.Redis()}, TypeError, "async_client"),
        ({"url": 3}, TypeError, "url"),
        ({"url": "redis://x", "secret": ""}, ValueError, "secret"),
        ({"url": "redis://x", "secret": 3}, TypeError, "secret"),
        ({"url": "redis://x", "on_event": 3}, TypeError, "on_event"),
        ({"url": "redis://x", "timeout": "3"}, TypeError, "timeout"),
        ({"url": "redis://x", "timeout": None}, TypeError, "timeout"),
        ({"url": "redis://x", "prefix": b"p"}, TypeError, "prefix"),
    ],
)
def test_wrong_set_ups_fail_when_they_are_made(
    model: CountingModel, arguments: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        RedisCachedEmbeddings(model, **{"model_id": "m", **arguments})


@pytest.mark.parametrize("wrong", [None, "a name", print, redis.Redis])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="underlying_embeddings"):
        RedisCachedEmbeddings(wrong, "redis://x", model_id="m")


def test_tiers_nested_the_wrong_way_round_are_refused(model: CountingModel) -> None:
    with (
        PrefetchingEmbeddings(model) as inner,
        pytest.raises(ValueError, match="PrefetchingEmbeddings"),
    ):
        RedisCachedEmbeddings(inner, "redis://x", model_id="m")


# -- what is kept, for whom, and for how long


@pytest.mark.parametrize("face", ["query", "document"])
@pytest.mark.parametrize(
    "bad", [[math.nan] * 8, [math.inf] * 8, [], [0.0, -0.0] * 4, [0.5] * 5], ids=repr
)
def test_an_unsound_vector_is_returned_and_not_kept(
    cached: Any, server: RedisServer, bad: list[float], face: str
) -> None:
    class Ailing(CountingModel):
        def _embed(self, text: str, role: str) -> list[float]:
            return bad if text == "bad" else vector_of(text, role)

    embeddings = cached(Ailing(), single_flight=True)
    ask = (
        embeddings.embed_query if face == "query" else lambda t: embeddings.embed_documents([t])[0]
    )
    ask("good")
    for _ in range(2):  # one of another length could be the right one if it comes again and again
        assert repr(ask("bad")) == repr(bad)
        assert embeddings.flush(HANG)
    with server.client() as client:
        until(lambda: client.keys() == [key(embeddings, "good", face).encode()])
    assert ask("good") == vector_of("good", face)
    assert embeddings.stats().writes == 1


@pytest.mark.parametrize("face", ["sync", "async"])
def test_forgetting(cached: Any, model: CountingModel, server: RedisServer, face: str) -> None:
    older = CacheBackedEmbeddingsCache(roles=["query"], namespace="old")
    embeddings = cached(model, read_through=[older])

    def forget(text: str) -> bool:
        if face == "sync":
            return bool(embeddings.forget(text))
        return bool(asyncio.run(embeddings.aforget(text)))

    embeddings.embed_query("text")
    embeddings.embed_documents(["text", "other"])
    assert embeddings.flush(HANG)
    with server.client() as client:
        client.set(older.command("text")[1], b"[1.0]")
        assert forget("text")
        assert client.keys() == [key(embeddings, "other", "document").encode()]
    assert not forget("text")
    embeddings.embed_query("text")
    assert model.queries == ["text", "text"]
    with pytest.raises(TypeError):
        embeddings.forget(3)


def test_a_call_that_is_under_way_does_not_bring_back_what_was_forgotten(
    cached: Any, server: RedisServer
) -> None:
    class Slow(CountingModel):
        def embed_query(self, text: str, **kwargs: object) -> list[float]:
            embeddings.forget(text)
            return super().embed_query(text)

    embeddings = cached(Slow())
    assert embeddings.embed_query("text") == vector_of("text")
    assert embeddings.flush(HANG)
    with server.client() as client:
        assert client.keys() == []


def test_what_may_not_be_forgotten_is_warned_of(
    cached: Any, model: CountingModel, refusing_port: int, caplog: Any
) -> None:
    embeddings = cached(model, f"redis://127.0.0.1:{refusing_port}/0")
    assert not embeddings.forget("my account number")
    assert "could not be asked to forget" in caplog.text
    assert "account" not in caplog.text


def test_without_the_secret_nothing_is_found_and_nothing_forged(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    ours, same = cached(model, secret="s3cret"), cached(model, secret=b"s3cret")
    ours.embed_query("text")
    assert ours.flush(HANG)
    assert same.embed_query("text") == vector_of("text")
    assert model.queries == ["text"]
    for other in (cached(model), cached(model, secret="another")):
        assert key(other, "text") != key(ours, "text")
        with server.client() as client:  # who knows the key, but not the secret, forges a value
            forged = other._tier.shelf.codec.encode(
                array("d", [0.5] * 8), key(ours, "text").rpartition(":")[2]
            )
            genuine = client.getset(key(ours, "text"), forged)
            assert ours.embed_query("text") == vector_of("text")
            assert ours.flush(HANG)
            assert client.get(key(ours, "text")) == genuine
    assert ours.stats().corrupt == 2


def _work(embeddings: RedisCachedEmbeddings, results: Any) -> None:
    results.put(embeddings.embed_query("text"))
    embeddings.close()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "client", "spawn"])
def test_copies_work_like_the_original(
    cached: Any, model: CountingModel, server: RedisServer, how: str
) -> None:
    with server.client() as client:
        original = RedisCachedEmbeddings(
            Copyable(), **({"client": client} if how == "client" else {"url": server.url}),
            model_id="m", timeout=20.0,
        )  # fmt: skip
        original.embed_query("text")
        assert original.flush(HANG)
        if how == "spawn":
            context = multiprocessing.get_context("spawn")
            results = context.Queue()
            process = context.Process(target=_work, args=(original, results))
            process.start()
            assert results.get(timeout=HANG) == vector_of("text")
            process.join(HANG)
        else:
            copied = (
                pickle.loads(pickle.dumps(original)) if how == "pickle" else copy.deepcopy(original)
            )
            assert copied.embed_query("text") == vector_of("text")
            assert (copied.stats().hits, copied.stats().misses) == (1, 0)
            assert copied._tier is not original._tier
            assert copied.underlying_embeddings is not original.underlying_embeddings
            copied.close()
        original.close()


class Copyable(CountingModel):
    """Has no lock, so that it can be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = contextlib.nullcontext()  # type: ignore[assignment]


def test_only_an_async_client_asked_from_a_thread_is_warned_of_once(
    cached: Any, model: CountingModel, server: RedisServer, caplog: Any
) -> None:
    embeddings = cached(model, async_client=redis.asyncio.Redis(port=server.port))
    for _ in range(3):
        assert embeddings.embed_query("text") == vector_of("text")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "async_client=" in caplog.text


def test_the_import_loads_no_redis() -> None:
    program = (
        "import sys, prefetch_embeddings, prefetch_embeddings.instrumentation\n"
        "import prefetch_embeddings.instrumentation.prometheus\n"
        "import prefetch_embeddings.instrumentation.opentelemetry\n"
        "prefetch_embeddings.RedisCachedEmbeddings\n"
        "assert 'redis' not in sys.modules, 'it is loaded'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=HANG)


def test_a_client_that_caches_on_its_side_is_refused(
    model: CountingModel, server: RedisServer
) -> None:
    cache = pytest.importorskip("redis.cache")
    with (
        server.client(protocol=3, cache_config=cache.CacheConfig()) as client,
        pytest.raises(ValueError, match="client-side caching"),
    ):
        RedisCachedEmbeddings(model, client=client, model_id="m")
