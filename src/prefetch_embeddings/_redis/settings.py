"""The settings of a tier: checked when it is made, and told from the model where they can be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from prefetch_embeddings._redis.lease import can_share_a_slot
from prefetch_embeddings._redis.model_id import check_nesting, derive_dimensions, derive_model_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_core.embeddings import Embeddings

    from prefetch_embeddings._redis.recorder import RedisCacheEvent
    from prefetch_embeddings.existing import ExistingCache


def checked_settings(
    underlying_embeddings: Embeddings,
    *,
    url: str | None,
    client: Any,
    async_client: Any,
    model_id: str | None,
    ttl: float | None,
    prefix: str,
    timeout: float,
    single_flight: bool,
    lease: float,
    secret: str | bytes | None,
    read_through: Sequence[ExistingCache],
    on_event: Callable[[RedisCacheEvent], None] | None,
) -> dict[str, Any]:
    """Return what a `Tier` is made of. The arguments are those of the face.

    Raises:
        TypeError: One is not of the kind that is asked for; its name is told.
        ValueError: One has a value that cannot be; likewise.
    """
    check_nesting(underlying_embeddings)
    if url is None and client is None and async_client is None:
        raise ValueError("pass url=, client= or async_client=")
    if url is not None and client is not None:
        raise ValueError("pass url= or client=, not both")
    for name, seconds in (("ttl", ttl), ("timeout", timeout), ("lease", lease)):
        if seconds is None and name == "ttl":
            continue
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"{name}: expected a number of seconds")
        if not 0 < seconds < math.inf:
            raise ValueError(f"{name} must be positive and finite, in seconds")
    if not isinstance(prefix, str):
        raise TypeError("prefix: expected a str")
    if single_flight and not can_share_a_slot(prefix):
        raise ValueError("a prefix with a closing brace must have a hash tag, as in {tag}")
    if secret is not None and not isinstance(secret, (str, bytes)):
        raise TypeError("secret: expected a str or bytes")
    if secret is not None and not secret:
        raise ValueError("secret is empty: everybody would know it")
    if on_event is not None and not callable(on_event):
        raise TypeError("on_event: expected something to call with each event")
    if model_id is not None and not isinstance(model_id, str):
        raise TypeError("model_id: expected a str")
    if model_id == "":
        raise ValueError("model_id is empty: all such models would share their vectors")
    return {
        "url": url,
        "client": client,
        "async_client": async_client,
        "model_id": derive_model_id(underlying_embeddings) if model_id is None else model_id,
        "dimensions": derive_dimensions(underlying_embeddings),
        "ttl_milliseconds": None if ttl is None else max(1, round(ttl * 1000)),
        "prefix": prefix,
        "timeout": timeout,
        "lease_seconds": lease if single_flight else None,
        "secret": secret,
        "read_through": tuple(read_through),
        "on_event": on_event,
    }
