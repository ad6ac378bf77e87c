"""The slow tail of a query, with and without a hedge."""

from __future__ import annotations

import asyncio
import math
import random
import time

from langchain_core.embeddings import Embeddings

from benchmarks.models import VECTOR
from benchmarks.table import Row, quantile
from prefetch_embeddings import Hedge, PrefetchingEmbeddings, PrefetchStats

SCALE = 0.1
"""Delays are scaled in time by this: a second takes 100 ms."""

QUERIES = 3_000
AT_ONCE = 30
P5, P95 = 0.39, 1.16
STRAGGLERS = 0.015
STRAGGLE = (2.0, 6.0)


def _draw(text: str, nth: int) -> float:
    """Draw the delay in seconds of the `nth` call for `text`, the same in both arms."""
    dice = random.Random(f"{text} {nth}")
    spread = math.log(P95 / P5) / (2 * 1.6449)
    delay = math.exp(dice.gauss(math.log(math.sqrt(P5 * P95)), spread))
    if dice.random() < STRAGGLERS:
        delay += dice.uniform(*STRAGGLE)
    return delay


class Straggling(Embeddings):
    """A model with a slow tail; a second call for a text draws anew."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    async def aembed_query(self, text: str) -> list[float]:
        nth = self.calls.get(text, 0)
        self.calls[text] = nth + 1
        await asyncio.sleep(_draw(text, nth) * SCALE)
        return VECTOR

    def embed_query(self, text: str) -> list[float]:
        raise NotImplementedError

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError


async def _run(hedge: Hedge | None) -> tuple[list[float], int, PrefetchStats]:
    model = Straggling()
    waits: list[float] = []
    texts = iter(f"question {i}" for i in range(QUERIES))

    async def caller(embeddings: PrefetchingEmbeddings) -> None:
        for text in texts:
            began = time.perf_counter()
            await embeddings.aembed_query(text)
            waits.append((time.perf_counter() - began) / SCALE)

    async with PrefetchingEmbeddings(model, hedge=hedge) as embeddings:
        await asyncio.gather(*(caller(embeddings) for _ in range(AT_ONCE)))
        return waits, sum(model.calls.values()), embeddings.stats()


def measure() -> list[Row]:
    """Compare p99 over the same questions: lognormal delays, 1.5 % stragglers of 2-6 s more."""
    plain, _, _ = asyncio.run(_run(None))
    hedged, calls, stats = asyncio.run(_run(Hedge(quantile=0.95, budget=0.05)))
    before, after = quantile(plain, 0.99), quantile(hedged, 0.99)
    detail = f"{after:.2f} s / {before:.2f} s; {QUERIES:,} queries, time scaled by {SCALE}"
    return [
        Row("p99 of a query with `Hedge(quantile=0.95, budget=0.05)` / without", after / before,
            "x", 0.5, detail),
        Row("extra upstream calls of the hedge", (calls / QUERIES - 1) * 100, "%", 5.0,
            f"{stats.hedge_started} hedges, {stats.hedge_won} won, {stats.hedge_denied} denied"),
    ]  # fmt: skip
