"""A query that finds nothing, with a model that answers at once: what the way to it costs."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor

from benchmarks.models import PausingEmbeddings
from benchmarks.table import Row, best_of_interleaved
from prefetch_embeddings import PrefetchingEmbeddings

QUERIES = 200


def measure() -> list[Row]:
    """Compare with what a bot would write itself: a task that is awaited, a pool's result."""
    model = PausingEmbeddings()
    embeddings = PrefetchingEmbeddings(model)
    pool = ThreadPoolExecutor(4)
    loop = asyncio.new_event_loop()
    numbers = itertools.count()

    async def bare_tasks() -> None:
        for _ in range(QUERIES):
            await asyncio.create_task(model.aembed_query(f"{next(numbers)}"))

    async def missed_on_loop() -> None:
        for _ in range(QUERIES):
            await embeddings.aembed_query(f"{next(numbers)}")

    def tasks() -> None:
        loop.run_until_complete(bare_tasks())

    def ours_on_loop() -> None:
        loop.run_until_complete(missed_on_loop())

    def pooled() -> None:
        for _ in range(QUERIES):
            pool.submit(model.embed_query, f"{next(numbers)}").result()

    def ours() -> None:
        for _ in range(QUERIES):
            embeddings.embed_query(f"{next(numbers)}")

    best = best_of_interleaved([tasks, ours_on_loop, pooled, ours], rounds=40)
    bare, on_loop, submitted, inline = (each / QUERIES * 1e6 for each in best)
    loop.close()
    pool.shutdown()
    embeddings.close()
    return [
        Row("miss, `aembed_query` / `create_task` and `await`", on_loop / bare, "x", 5.0,
            f"{on_loop:.1f} µs / {bare:.1f} µs"),
        Row("miss, `embed_query` / `submit().result()`", inline / submitted, "x", 0.5,
            f"{inline:.1f} µs / {submitted:.1f} µs"),
    ]  # fmt: skip
