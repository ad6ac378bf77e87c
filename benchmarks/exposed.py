"""What a query waits beyond the part of the embedding that nothing could hide."""

from __future__ import annotations

import asyncio
import random
import threading
import time

from benchmarks.models import PausingEmbeddings
from benchmarks.table import Row, quantile
from prefetch_embeddings import PrefetchingEmbeddings

TURNS_UNDER_WAY = 100
ROUNDS = 8
APART = 0.002
"""Seconds between one turn's start and the next: calls come one by one."""


def measure() -> list[Row]:
    """Run turns of 0.1-0.3 s embeddings and 0.05-0.35 s head starts, 100 at a time."""
    dice = random.Random(11)
    draws = [
        (f"turn {i}", dice.uniform(0.1, 0.3), dice.uniform(0.05, 0.35))
        for i in range(TURNS_UNDER_WAY * ROUNDS)
    ]
    rows = []
    for name, turns in (("coroutines", _in_coroutines), ("threads", _in_threads)):
        beyond = turns(draws)
        for label, q, bar in (("p50", 0.5, 1.0), ("p99", 0.99, 5.0)):
            rows.append(
                Row(f"exposed beyond max(0, embed - head start), {label}, 100 turns in {name}",
                    quantile(beyond, q) * 1e3, "ms", bar, f"{len(beyond)} turns")
            )  # fmt: skip
    return rows


def _in_coroutines(draws: list[tuple[str, float, float]]) -> list[float]:
    pauses = {text: pause for text, pause, _ in draws}
    model = PausingEmbeddings(pauses.__getitem__)
    beyond = []

    async def turn(
        embeddings: PrefetchingEmbeddings, text: str, head_start: float, comes_at: float
    ) -> None:
        await asyncio.sleep(comes_at)
        began = time.perf_counter()
        await embeddings.aprefetch(text)
        await asyncio.sleep(head_start)
        asked = time.perf_counter()
        await embeddings.aembed_query(text)
        answered = time.perf_counter()
        beyond.append(answered - max(asked, began + model.took[text]))

    async def rounds() -> None:
        async with PrefetchingEmbeddings(model) as embeddings:
            for start in range(0, len(draws), TURNS_UNDER_WAY):
                await asyncio.gather(
                    *(
                        turn(embeddings, text, head, i * APART)
                        for i, (text, _, head) in enumerate(draws[start : start + TURNS_UNDER_WAY])
                    )
                )

    asyncio.run(rounds())
    return beyond


def _in_threads(draws: list[tuple[str, float, float]]) -> list[float]:
    pauses = {text: pause for text, pause, _ in draws}
    model = PausingEmbeddings(pauses.__getitem__)
    beyond = []

    def turn(embeddings: PrefetchingEmbeddings, text: str, head_start: float) -> None:
        began = time.perf_counter()
        embeddings.prefetch(text)
        time.sleep(head_start)
        asked = time.perf_counter()
        embeddings.embed_query(text)
        answered = time.perf_counter()
        beyond.append(answered - max(asked, began + model.took[text]))

    with PrefetchingEmbeddings(model, max_workers=TURNS_UNDER_WAY) as embeddings:
        for start in range(0, len(draws), TURNS_UNDER_WAY):
            threads = [
                threading.Thread(target=turn, args=(embeddings, text, head))
                for text, _, head in draws[start : start + TURNS_UNDER_WAY]
            ]
            for thread in threads:
                thread.start()
                time.sleep(APART)
            for thread in threads:
                thread.join()
    return beyond


def measure_one_call() -> list[Row]:
    """Count the model's calls when 64 threads ask for one new text at once, 20 times."""
    model = PausingEmbeddings(lambda _: 0.05)
    rounds = 20
    with PrefetchingEmbeddings(model) as embeddings:
        for i in range(rounds):
            barrier = threading.Barrier(64)

            def ask(text: str = f"text {i}", barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                embeddings.embed_query(text)

            threads = [threading.Thread(target=ask) for _ in range(64)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    return [
        Row("upstream calls per text, 64 threads ask for it at once", model.calls / rounds, "calls",
            1.0, f"{model.calls} calls in {rounds} rounds")
    ]  # fmt: skip
