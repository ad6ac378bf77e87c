"""What one ready vector costs in memory, and what a compact one would cost in time."""

from __future__ import annotations

import random
import tracemalloc
from array import array

from benchmarks.models import DIMENSIONS, PausingEmbeddings
from benchmarks.table import Row, best_of_interleaved
from prefetch_embeddings import PrefetchingEmbeddings

ENTRIES = 200
READS = 500


class FreshEmbeddings(PausingEmbeddings):
    """Makes new floats each time, as a decoder of network replies does."""

    def embed_query(self, text: str) -> list[float]:
        dice = random.Random(text)
        return [dice.random() for _ in range(DIMENSIONS)]


def measure() -> list[Row]:
    """Measure the memory of one ready 1536-d vector, and the read of a packed one."""
    with PrefetchingEmbeddings(FreshEmbeddings()) as embeddings:
        embeddings.embed_query("the first one makes what all share")
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for i in range(ENTRIES):
            embeddings.embed_query(f"question {i}")
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    each = (after - before) / ENTRIES / 1024
    listed = [random.random() for _ in range(DIMENSIONS)]
    packed = array("d", listed)

    def copy() -> None:
        for _ in range(READS):
            listed.copy()

    def unpack() -> None:
        for _ in range(READS):
            packed.tolist()

    copying, unpacking = (
        best / READS * 1e6 for best in best_of_interleaved([copy, unpack], rounds=20)
    )
    packed_kib = DIMENSIONS * packed.itemsize / 1024
    return [
        Row("memory of a ready 1536-d vector, kept as a list", each, "KiB", None,
            f"as an array: {packed_kib:.0f} KiB"),
        Row("reading it out of an array instead / `list.copy`", unpacking / copying, "x", None,
            f"{unpacking:.1f} µs / {copying:.1f} µs"),
    ]  # fmt: skip
