"""What `prefetch(text)` costs its caller, beside `ThreadPoolExecutor.submit`."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.models import PausingEmbeddings
from benchmarks.table import Row, best_of_interleaved, quantile
from prefetch_embeddings import PrefetchingEmbeddings

WORKERS = 32
BLOCK = 16
BLOCKS = 400


def _block(call: Callable[[str], object], texts: list[str]) -> list[float]:
    spent = []
    for text in texts:
        began = time.perf_counter()
        call(text)
        spent.append(time.perf_counter() - began)
    return spent


def measure() -> list[Row]:
    """Compare the caller's time at p50 and p99: 32 workers, new texts, in bursts of 16."""
    model = PausingEmbeddings()
    embeddings = PrefetchingEmbeddings(model, max_workers=WORKERS)
    pool = ThreadPoolExecutor(WORKERS)
    ours: list[float] = []
    theirs: list[float] = []
    for block in range(BLOCKS + 20):
        texts = [f"{block} {i}" for i in range(BLOCK)]
        mine = _block(embeddings.prefetch, texts)
        time.sleep(0.003)  # let the workers finish and wait again
        their = _block(lambda text: pool.submit(model.embed_query, text), texts)
        time.sleep(0.003)
        if block >= 20:  # the first ones start threads
            ours += mine
            theirs += their
    embeddings.close()
    pool.shutdown()
    rows = []
    for name, q in (("p50", 0.5), ("p99", 0.99)):
        mine_q, their_q = quantile(ours, q) * 1e6, quantile(theirs, q) * 1e6
        rows.append(
            Row(f"`prefetch(text)` / `ThreadPoolExecutor.submit`, {name}", mine_q / their_q, "x",
                1.3, f"{mine_q:.1f} µs / {their_q:.1f} µs")
        )  # fmt: skip
    return rows


def measure_scaling() -> list[Row]:
    """Compare the cost of a flight with 100, 1,000 and 10,000 under way."""
    costs: dict[int, float] = {}
    sizes = (100, 1_000, 10_000)
    runs = {}
    wrappers = []
    for size in sizes:
        embeddings = PrefetchingEmbeddings(
            PausingEmbeddings(lambda text: 3600.0 if text.startswith("hanging") else 0.0),
            max_workers=1, max_pending=20_000,
        )  # fmt: skip
        embeddings.prefetch("hanging")
        for i in range(size - 1):
            embeddings.prefetch(f"waiting {i}")
        wrappers.append(embeddings)

        def run(embeddings: PrefetchingEmbeddings = embeddings) -> None:
            for i in range(50):  # begun, queued, claimed, done, removed
                embeddings.prefetch(f"new {i}")
                embeddings.embed_query(f"new {i}")
                embeddings.forget(f"new {i}")

        runs[size] = run
    for size, best in zip(sizes, best_of_interleaved(list(runs.values()), 40), strict=True):
        costs[size] = best / 50 * 1e6
    for embeddings in wrappers:
        embeddings.close()
    detail = ", ".join(f"{size:,}: {cost:.1f} µs" for size, cost in costs.items())
    return [
        Row("cost per flight, 10,000 under way / 100", max(costs.values()) / min(costs.values()),
            "x", 2.0, detail)
    ]  # fmt: skip
