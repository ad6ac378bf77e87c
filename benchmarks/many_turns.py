"""Thousands of turns at once on one loop: what a query waits beyond its model, at the tail."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from langchain_core.embeddings import Embeddings

from benchmarks.models import VECTOR
from benchmarks.table import Row, quantile
from prefetch_embeddings import PrefetchingEmbeddings

TURNS = 5_000
WITHIN = 3.0
"""Seconds in which the turns begin."""

Begin = Callable[[str], Awaitable[object]]


class FreshVectors(Embeddings):
    """Pauses on the loop, and answers with a new list each time, as a client does."""

    def __init__(self, pauses: dict[str, float]) -> None:
        self._pauses = pauses
        self.done_at: dict[str, float] = {}

    def embed_query(self, text: str) -> list[float]:
        raise NotImplementedError

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    async def aembed_query(self, text: str) -> list[float]:
        await asyncio.sleep(self._pauses[text])
        vector = [value + 0.0 for value in VECTOR]
        self.done_at[text] = time.perf_counter()
        return vector


def _draws() -> list[tuple[str, float, float, float]]:
    """Return text, when the turn begins, its model's pause and its head start, in seconds."""
    dice = random.Random(5)
    return [
        (f"turn {i}", i * WITHIN / TURNS, dice.uniform(0.4, 1.1), dice.uniform(0.05, 0.35))
        for i in range(TURNS)
    ]


async def _run(model: FreshVectors, begin: Begin, ask: Begin) -> list[float]:
    """Run all turns; return how long after both its model and its question each was answered."""
    late: list[float] = []

    async def turn(text: str, comes_at: float, head_start: float) -> None:
        await asyncio.sleep(comes_at)
        await begin(text)
        await asyncio.sleep(head_start)
        asked = time.perf_counter()
        await ask(text)
        late.append(time.perf_counter() - max(asked, model.done_at[text]))

    await asyncio.gather(*(turn(text, at, head) for text, at, _, head in _draws()))
    return late


def measure() -> list[Row]:
    """Compare the p99 with that of bare tasks, each kept in a dictionary, in the same run."""
    pauses = {text: pause for text, _, pause, _ in _draws()}

    async def bare() -> list[float]:
        model = FreshVectors(pauses)
        tasks: dict[str, asyncio.Task[list[float]]] = {}

        async def begin(text: str) -> None:
            tasks[text] = asyncio.create_task(model.aembed_query(text))

        async def ask(text: str) -> list[float]:
            return (await tasks.pop(text)).copy()

        return await _run(model, begin, ask)

    async def ours() -> tuple[list[float], int]:
        model = FreshVectors(pauses)
        async with PrefetchingEmbeddings(model, max_pending=TURNS) as embeddings:
            late = await _run(model, embeddings.aprefetch, embeddings.aembed_query)
            return late, embeddings.stats().prefetch_wasted

    floor = quantile(asyncio.run(bare()), 0.99) * 1e3
    late, wasted = asyncio.run(ours())
    ours_p99 = quantile(late, 0.99) * 1e3
    return [
        Row(f"late beyond the model, p99, {TURNS:,} turns in {WITHIN:.0f} s / bare tasks",
            ours_p99 / floor, "x", 10.0, f"{ours_p99:.2f} ms / {floor:.2f} ms"),
        Row(f"unserved vectors that left for served ones, {TURNS:,} turns", wasted, "vectors", 0.0,
            "default `max_entries`"),
    ]  # fmt: skip
