"""What must hold after every test."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.redis_tier.server import HANG


def assert_nothing_left(
    made: Iterable[RedisCachedEmbeddings], threads_before: set[threading.Thread]
) -> None:
    """Assert that closed tiers hold nothing, and that their counters add up."""
    for embeddings in made:
        assert embeddings.flush(HANG), "a write was left over"
        writer = embeddings._tier.writer
        assert not writer._on_its_way
        assert not writer._vectors
        assert not writer._waiting
        stats = embeddings.stats()
        assert stats.carried_over <= stats.hits
        assert stats - stats == type(stats)()
    for thread in set(threading.enumerate()) - threads_before:
        if thread.name.startswith("prefetch-embeddings-redis"):
            thread.join(HANG)
            assert not thread.is_alive(), f"{thread.name} was left running"
