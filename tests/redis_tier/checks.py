"""What must hold after every test."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable

from prefetch_embeddings._redis.writer import Writer
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.helpers import until
from tests.redis_tier.server import HANG


def _is_idle(writer: Writer) -> bool:
    """Return whether its thread has noticed that there is nothing left to do."""
    return not writer._draining


def assert_nothing_left(
    made: Iterable[RedisCachedEmbeddings], threads_before: set[threading.Thread]
) -> None:
    """Assert that closed tiers hold nothing, and that their counters add up."""
    for embeddings in made:
        assert embeddings.flush(HANG), "a write was left over"
        writer = embeddings._writer
        assert not writer._waiting
        assert not writer._under_way
        assert not writer._bytes
        until(functools.partial(_is_idle, writer))
        stats = embeddings.stats()
        assert stats.carried_over <= stats.hits
        assert stats - stats == type(stats)()
    for thread in set(threading.enumerate()) - threads_before:
        if thread.name.startswith("prefetch-embeddings-redis"):
            thread.join(HANG)
            assert not thread.is_alive(), f"{thread.name} was left running"
