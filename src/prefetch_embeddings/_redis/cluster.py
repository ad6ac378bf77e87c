"""A cluster, through redis-py's client for it: each node a place of its own."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final

import redis
from redis.cluster import ClusterNode
from redis.exceptions import ConnectionError  # noqa: A004

from prefetch_embeddings._background import pool as workers
from prefetch_embeddings._redis.connections import ClientSession, patience_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from prefetch_embeddings._redis.jobs import Command
    from prefetch_embeddings._redis.sessions import Session

REFRESH_SECONDS: Final = 0.3
"""Between two looks at which node of a cluster has what."""

NOWHERE: Final = "(cluster not reached yet)"
"""The place of all keys as long as nobody knows the cluster's nodes."""


class ClusterDriver:
    """A cluster: each node is a place, asked through the cluster client's own client for it.

    So a node that is dead, and what the cluster client does about it, holds up no other node. Where
    keys are is looked up again in the background; until that is known, a key that has moved is a
    miss.

    Args:
        make: Makes the client, which connects; or returns the one that the user made.
        ready: The client, if it is there already.
        options: What is known of it.
    """

    def __init__(
        self, make: Callable[[], Any], *, ready: Any = None, options: Mapping[str, Any]
    ) -> None:
        self._make = make
        self._client = ready
        self.most: int | None = options.get("max_connections")
        self.patience = patience_of(options)
        self._turn = [None]  # whoever takes it looks again
        self._looked_at = -float("inf")

    def place(self, key: str | bytes) -> str | None:
        """Return the name of the node that has `key`."""
        if self._client is None:
            return NOWHERE
        try:
            return str(self._client.get_node_from_key(key).name)
        except Exception:  # noqa: BLE001 - whatever is the matter, nobody is known to have it
            return None

    def open(self, place: str) -> Session:
        """Have the node's client connect."""
        if self._client is None:
            self._client = self._make()
        if place == NOWHERE:
            return ClusterSession(self._client)
        node = self._client.get_node(node_name=place)
        if node is None:
            raise ConnectionError("the node has left the cluster")
        session = ClientSession(self._client.get_redis_connection(node))
        session.execute([("PING",)])
        return session

    def let_go(self) -> None:
        """Do nothing: a node that is demoted says where the key has moved."""

    def look_again(self) -> None:
        """Find out, in the background, where keys are by now."""
        if self._client is None or time.monotonic() - self._looked_at < REFRESH_SECONDS:
            return
        try:
            self._turn.pop()
        except IndexError:
            return
        self._looked_at = time.monotonic()
        try:
            workers.start(
                threading.Thread(
                    target=self._look, name="prefetch-embeddings-redis-topology", daemon=True
                )
            )
        except BaseException as error:
            self._turn.append(None)
            if not isinstance(error, RuntimeError):
                raise

    def _look(self) -> None:
        try:
            self._client.nodes_manager.initialize()
        except Exception:  # noqa: BLE001, S110 - nobody can be asked; the next look may tell
            pass
        finally:
            self._looked_at = time.monotonic()
            self._turn.append(None)


class ClusterSession(ClientSession):
    """A cluster as a whole, for the first moments, while nobody knows its nodes."""

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies in order."""
        replies: list[Any] = []
        for command in commands:
            if command == ("PING",):
                # The client has just asked the nodes; by a PING of its own it would ask all again.
                replies.append(b"PONG")
            else:
                replies += super().execute([command])
        return replies


_node: Any = ClusterNode


def cluster_client(nodes: Sequence[tuple[str, int]], options: Mapping[str, Any]) -> Any:
    """Make a client of a cluster, which asks its nodes where keys are.

    Raises:
        Exception: None of them answers.
    """
    return redis.RedisCluster(startup_nodes=[_node(host, port) for host, port in nodes], **options)
