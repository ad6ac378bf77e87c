"""Clients that the user made: which can be used, and what drives them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import redis

from prefetch_embeddings._redis.cluster import ClusterDriver
from prefetch_embeddings._redis.connections import ClientDriver

if TYPE_CHECKING:
    from prefetch_embeddings._redis.connections import Driver


def driver_of(client: Any) -> Driver:
    """Return what drives a sync client that the user made."""
    if isinstance(client, redis.RedisCluster):
        options = client.get_connection_kwargs()  # type: ignore[no-untyped-call]
        return ClusterDriver(lambda: client, ready=client, options=options)
    return ClientDriver(client)


def check_client(client: Any) -> None:
    """Raise unless `client` is a sync client that can be used.

    Raises:
        TypeError: It is none, or an async one.
        ValueError: It caches on the client's side, which this tier would not notice.
    """
    execute = getattr(client, "execute_command", None)
    if isinstance(client, (str, bytes, type)) or not callable(execute):
        raise TypeError("client: expected a client of redis-py, such as redis.Redis(...)")
    if inspect.iscoroutinefunction(execute):
        raise TypeError("client: expected a sync client; an async one goes to async_client=")
    node = client
    if isinstance(client, redis.RedisCluster):
        nodes = client.get_nodes()  # type: ignore[no-untyped-call]
        node = client.get_redis_connection(nodes[0]) if nodes else None
    cache = getattr(node, "get_cache", None)
    if callable(cache) and cache() is not None:
        raise ValueError(
            "client: expected one without client-side caching (cache_config=): vectors would be "
            "kept twice, and forgotten ones once more"
        )


def check_async_client(client: Any) -> None:
    """Raise unless `client` is an async client.

    Raises:
        TypeError: It is none, or a sync one.
    """
    execute = getattr(client, "execute_command", None)
    if isinstance(client, (str, bytes, type)) or not callable(execute):
        raise TypeError("async_client: expected a client such as redis.asyncio.Redis(...)")
    known_sync = isinstance(client, (redis.Redis, redis.RedisCluster))
    is_async = inspect.iscoroutinefunction(execute)
    if known_sync or (not is_async and isinstance(client, redis.client.AbstractRedis)):
        raise TypeError("async_client: expected an async client; a sync one goes to client=")
