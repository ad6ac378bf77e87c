"""Warming up opens the connection to Redis, and leaves nothing there."""

from __future__ import annotations

from collections.abc import Callable

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.redis_tier.models import CountingModel
from tests.redis_tier.server import RedisServer

Cached = Callable[..., RedisCachedEmbeddings]


async def test_it_connects_and_leaves_nothing(
    server: RedisServer, cached: Cached, model: CountingModel
) -> None:
    before = server.connections()
    tier = cached(model)
    with PrefetchingEmbeddings(tier) as embeddings:
        assert embeddings.warm_up() > 0
        assert server.connections() == before + 1
        assert await embeddings.awarm_up() > 0
        assert server.connections() == before + 1, "threads and event loops share connections"
        assert len(model.queries) + len(model.aqueries) == 2
        embeddings.embed_query("a question")
        assert tier.flush(10.0)
        assert server.connections() == before + 2, "one for queries, one for what is stored"
        with server.client() as client:
            assert client.dbsize() == 1, "the throw-away vector was stored"
        assert tier.stats().misses == 1, "warming up was counted as a lookup"
    await tier.aclose()


def test_without_redis_it_warms_up_the_model(
    fragile_server: RedisServer, model: CountingModel
) -> None:
    fragile_server.kill()
    with RedisCachedEmbeddings(model, fragile_server.url, model_id="m") as tier:
        assert tier.warm_up() > 0
        assert tier.stats().errors == 1
    assert len(model.queries) == 1
