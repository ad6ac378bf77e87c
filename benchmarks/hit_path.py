"""A query whose vector is ready, beside the least that any cache must do."""

from __future__ import annotations

import asyncio
import threading

from async_lru import alru_cache
from cachetools import TTLCache
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_core.stores import InMemoryByteStore

from benchmarks.models import PausingEmbeddings
from benchmarks.table import Row, best_of_interleaved
from prefetch_embeddings import PrefetchingEmbeddings

TEXTS = [f"question {i}" for i in range(100)]
PASSES = 10


def measure() -> list[Row]:
    """Compare a hit with a bare locked `TTLCache`, and with `CacheBackedEmbeddings`."""
    embeddings = PrefetchingEmbeddings(PausingEmbeddings())
    cache: TTLCache[str, list[float]] = TTLCache(1024, 300.0)
    lock = threading.Lock()
    peer = CacheBackedEmbeddings.from_bytes_store(
        PausingEmbeddings(), InMemoryByteStore(), namespace="bench", query_embedding_cache=True,
        key_encoder="blake2b",
    )  # fmt: skip
    for text in TEXTS:
        cache[text] = embeddings.embed_query(text)
        peer.embed_query(text)

    def bare() -> None:
        for _ in range(PASSES):
            for text in TEXTS:
                with lock:
                    vector = cache[text]
                vector.copy()

    def ours() -> None:
        embed = embeddings.embed_query
        for _ in range(PASSES):
            for text in TEXTS:
                embed(text)

    async def hits() -> None:
        embed = embeddings.aembed_query
        for _ in range(PASSES):
            for text in TEXTS:
                await embed(text)

    model = PausingEmbeddings()

    @alru_cache(maxsize=1024, ttl=300.0)
    async def embed_through_async_lru(text: str) -> list[float]:
        return await model.aembed_query(text)

    async def peer_hits() -> None:
        for text in TEXTS:
            (await embed_through_async_lru(text)).copy()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(peer_hits())

    def async_lru() -> None:
        loop.run_until_complete(peer_hits())

    def ours_async() -> None:
        loop.run_until_complete(hits())

    def theirs() -> None:
        for text in TEXTS[:20]:
            peer.embed_query(text)

    best = best_of_interleaved([bare, ours, ours_async, theirs, async_lru], rounds=25)
    loop.run_until_complete(embed_through_async_lru.cache_close())
    loop.close()
    embeddings.close()
    floor, sync, in_loop = (each / (PASSES * len(TEXTS)) * 1e6 for each in best[:3])
    cached = best[3] / 20 * 1e6
    lru = best[4] / len(TEXTS) * 1e6
    return [
        Row("hit, `embed_query` / bare locked `TTLCache` + `list.copy`", sync / floor, "x", 1.5,
            f"{sync:.2f} µs / {floor:.2f} µs"),
        Row("hit, `aembed_query` / the same", in_loop / floor, "x", 1.5,
            f"{in_loop:.2f} µs / {floor:.2f} µs"),
        Row("hit, `CacheBackedEmbeddings` in memory / `embed_query`", cached / sync, "x", 100.0,
            f"{cached:.0f} µs / {sync:.2f} µs", at_least=True),
        Row("hit, `CacheBackedEmbeddings` in memory / `aembed_query`", cached / in_loop, "x", 100.0,
            f"{cached:.0f} µs / {in_loop:.2f} µs", at_least=True),
        Row("hit, async-lru (one loop only) + `list.copy` / `aembed_query`", lru / in_loop, "x",
            None, f"{lru:.2f} µs / {in_loop:.2f} µs"),
    ]  # fmt: skip
