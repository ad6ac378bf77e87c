"""The Redis tier beside a raw `GET`, other libraries' caches, and servers in trouble."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
import warnings
from array import array
from collections.abc import Callable

import redis
import redis.asyncio
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_core.embeddings import Embeddings

from benchmarks.models import VECTOR
from benchmarks.table import Row, best_of_interleaved, quantile, seconds
from prefetch_embeddings._redis.breaker import PAUSE
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.redis_tier.fleet import PROCESSES, Fleet
from tests.redis_tier.server import RedisServer

# As embedding APIs deliver them: 32 bits a float.
API_VECTOR = array("f", VECTOR).tolist()
TEXT = "what does the red light mean"
PASSES = 20
ROUNDS = 100
TIMEOUT = 0.1
LEASE = 1.0


class ApiEmbeddings(Embeddings):
    """Returns a vector at once, in either face."""

    def embed_query(self, text: str) -> list[float]:  # noqa: ARG002
        return API_VECTOR

    async def aembed_query(self, text: str) -> list[float]:  # noqa: ARG002
        return API_VECTOR

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [API_VECTOR for _ in texts]


def tier(url: str) -> RedisCachedEmbeddings:
    return RedisCachedEmbeddings(ApiEmbeddings(), url, model_id="bench", timeout=TIMEOUT)


def measure() -> list[Row]:
    """Compare a hit, and what it takes in Redis, with the same elsewhere."""
    server = RedisServer()
    try:
        with server.client() as client, tier(server.url) as embeddings:
            embeddings.embed_query(TEXT)
            embeddings.flush()
            [key] = client.keys()
            peers = _peers(client)
            return [
                *_hits(server, client, embeddings, key, peers),
                *_memory(client, key),
            ]
    finally:
        server.close()


def _peers(client: redis.Redis) -> dict[str, Callable[[], object]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from langchain_community.storage import RedisStore
        from redisvl.extensions.cache.embeddings import (  # type: ignore[import-untyped]
            EmbeddingsCache,
        )
    peer = CacheBackedEmbeddings.from_bytes_store(
        ApiEmbeddings(),
        RedisStore(client=client, namespace="peer"),
        namespace="bench",
        query_embedding_cache=True,
        key_encoder="blake2b",
    )
    peer.embed_query(TEXT)
    cache = EmbeddingsCache(name="redisvl", redis_client=client)
    cache.set(TEXT, "bench", API_VECTOR)
    return {
        "CacheBackedEmbeddings": lambda: peer.embed_query(TEXT),
        "redisvl `EmbeddingsCache`": lambda: cache.get(TEXT, "bench"),
    }


def _hits(
    server: RedisServer,
    client: redis.Redis,
    embeddings: RedisCachedEmbeddings,
    key: bytes,
    peers: dict[str, Callable[[], object]],
) -> list[Row]:
    loop = asyncio.new_event_loop()
    aclient = redis.asyncio.Redis(host="127.0.0.1", port=server.port)

    async def raw_in_loop() -> None:
        for _ in range(PASSES):
            await aclient.get(key)

    async def ours_in_loop() -> None:
        for _ in range(PASSES):
            await embeddings.aembed_query(TEXT)

    given = RedisCachedEmbeddings(ApiEmbeddings(), client=client, model_id="bench")
    functions: list[Callable[[], object]] = [
        _repeated(lambda: client.get(key)),
        _repeated(lambda: embeddings.embed_query(TEXT)),
        _repeated(lambda: given.embed_query(TEXT)),
        lambda: loop.run_until_complete(raw_in_loop()),
        lambda: loop.run_until_complete(ours_in_loop()),
        *(_repeated(peer) for peer in peers.values()),
    ]
    best = [each / PASSES * 1e6 for each in best_of_interleaved(functions, rounds=100)]
    loop.run_until_complete(aclient.aclose())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    given.close()
    raw, ours, over_threads, araw, aours, *theirs = best
    return [
        Row("Redis hit, `embed_query` / raw `GET` of the same bytes", ours / raw, "x", 1.6,
            f"{ours:.0f} µs / {raw:.0f} µs"),
        Row("Redis hit, `aembed_query` / raw `await get`", aours / araw, "x", 1.6,
            f"{aours:.0f} µs / {araw:.0f} µs"),
        Row("Redis hit through a ready-made `client` / raw `GET`", over_threads / raw, "x", None,
            f"{over_threads:.0f} µs / {raw:.0f} µs"),
        *(Row(f"Redis hit, {name} / `embed_query`", each / ours, "x", 5.0,
              f"{each:.0f} µs / {ours:.0f} µs", at_least=True)
          for name, each in zip(peers, theirs, strict=True)),
    ]  # fmt: skip


def _repeated(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(PASSES):
            function()

    return run


def _memory(client: redis.Redis, key: bytes) -> list[Row]:
    def size(of: bytes | str) -> int:
        taken = client.memory_usage(of, samples=0)
        assert isinstance(taken, int)
        return taken

    ours = size(key)
    rows = []
    for name, pattern in (("CacheBackedEmbeddings", "peer*"), ("redisvl", "redisvl*")):
        [other] = client.keys(pattern)
        theirs = size(other)
        rows.append(
            Row(f"memory in Redis, ours / {name}", ours / theirs, "x", 0.2,
                f"{ours:,} bytes / {theirs:,} bytes")
        )  # fmt: skip
    return rows


def measure_single_flight() -> list[Row]:
    """Count the calls that eight processes make for one text, and kill the one that makes it."""
    server = RedisServer()
    fleet = Fleet(server.url, lease=10.0)
    doomed = Fleet(server.url, lease=LEASE)
    try:
        took = [_answered(fleet, f"text {number}") for number in range(ROUNDS)]
        calls = fleet.calls.value / ROUNDS
        doomed.ask("gated text")
        doomed.owner_entered.wait(60)
        began = time.perf_counter()
        os.kill(doomed.owner.value, signal.SIGKILL)
        for pipe, process in zip(doomed.pipes, doomed.processes, strict=True):
            if process.pid != doomed.owner.value:
                pipe.recv()
        longest = time.perf_counter() - began
    finally:
        fleet.close()
        doomed.close()
        server.close()
    return [
        Row(f"calls to the model, {PROCESSES} processes x 1 new text, `single_flight`", calls,
            "calls", 1.0, f"{ROUNDS} rounds, p50 {quantile(took, 0.5) * 1e3:.1f} ms each"),
        Row("owner killed: the last process answered, beyond the lease", longest - LEASE, "s", 0.5,
            f"{longest:.2f} s, lease {LEASE:.0f} s"),
    ]  # fmt: skip


def _answered(fleet: Fleet, text: str) -> float:
    def ask() -> None:
        fleet.ask(text)
        for pipe in fleet.pipes:
            pipe.recv()

    return seconds(ask)


def measure_trouble() -> list[Row]:
    """Pause the server, and kill and restart it, under queries."""
    server = RedisServer()
    try:
        with tier(server.url) as embeddings:
            embeddings.embed_query(TEXT)
            embeddings.flush()
            server.pause()
            paused: list[float] = []
            while embeddings.stats().skipped < 100:
                embed = functools.partial(embeddings.embed_query, f"text {len(paused)}")
                paused.append(seconds(embed))
            first, open_ = max(paused[:3]), quantile(paused[3:], 0.5)
            server.resume()
        with tier(server.url) as embeddings:
            embeddings.embed_query(TEXT)
            server.kill()
            while not embeddings.stats().skipped:
                embeddings.embed_query(TEXT)
            server.start()
            with RedisCachedEmbeddings(
                ApiEmbeddings(), server.url, model_id="bench", timeout=1.0
            ) as other:
                other.embed_query(TEXT)
                other.flush()
            hits = embeddings.stats().hits
            began = time.perf_counter()
            while embeddings.stats().hits == hits:
                embeddings.embed_query(TEXT)
                time.sleep(0.001)
            back = time.perf_counter() - began
    finally:
        server.close()
    return [
        Row("Redis paused: the slowest query beyond the model, `timeout` 0.1 s", first, "s", 0.12,
            "first three queries"),
        Row("Redis paused, breaker open: a query beyond the model", open_ * 1e3, "ms", 1.0, "p50"),
        Row("Redis killed and restarted: hits again after", back, "s", PAUSE + 1.0,
            f"the breaker's pause is {PAUSE:.0f} s"),
    ]  # fmt: skip
