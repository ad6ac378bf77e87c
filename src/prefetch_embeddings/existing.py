"""Readers of embedding caches that other libraries have filled, so that switching starts warm."""

from __future__ import annotations

import abc
import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Any, Final, Literal

from prefetch_embeddings._redis.codec import CorruptValueError, Role

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from prefetch_embeddings._redis.jobs import Command

__all__ = ["CacheBackedEmbeddingsCache", "ExistingCache", "RedisVLEmbeddingsCache"]

_LANGCHAIN_NAMESPACE: Final = uuid.UUID(int=1985)


class ExistingCache(abc.ABC):
    """A cache in the same Redis database, asked for what this library has not stored yet.

    Args:
        roles: As what its vectors were embedded. Both only for a model that embeds queries and
            documents alike: these caches do not tell them apart.
        dimensions: Vectors of another length are left alone. None: any length is taken.
    """

    def __init__(self, *, roles: Collection[Role], dimensions: int | None = None) -> None:
        unknown = set(roles) - {"query", "document"}
        if unknown or isinstance(roles, str):
            raise ValueError('roles is a collection out of "query" and "document"')
        self.roles = frozenset(roles)
        self._dimensions = dimensions

    @abc.abstractmethod
    def command(self, text: str) -> Command:
        """Return the Redis command that fetches the entry of `text`."""

    @abc.abstractmethod
    def vector(self, text: str, reply: Any) -> list[float] | None:
        """Return the vector in `reply`, None if there is no entry.

        Raises:
            CorruptValueError: There is one, but it is not a vector of `text`.
        """

    def _parse(self, value: bytes) -> list[float]:
        try:
            numbers = json.loads(value)
        except ValueError:
            raise CorruptValueError("not JSON") from None
        if not isinstance(numbers, list) or not numbers:
            raise CorruptValueError("not a vector")
        if not all(type(number) in (float, int) for number in numbers):
            raise CorruptValueError("not a vector of numbers")
        if self._dimensions is not None and len(numbers) != self._dimensions:
            raise CorruptValueError("another dimension")
        try:
            return [float(number) for number in numbers]
        except OverflowError:
            raise CorruptValueError("a number that fits no float") from None


class CacheBackedEmbeddingsCache(ExistingCache):
    """What LangChain's `CacheBackedEmbeddings` stored through a Redis byte store.

    Args:
        roles: See `ExistingCache`. With `query_embedding_cache=True` it kept queries and documents
            under the same keys.
        namespace: As given to `CacheBackedEmbeddings.from_bytes_store`.
        key_encoder: Likewise. Its default was `"sha1"`.
        store_namespace: The `namespace` of langchain-community's `RedisStore`.
        dimensions: See `ExistingCache`.
    """

    def __init__(
        self,
        *,
        roles: Collection[Role],
        namespace: str = "",
        key_encoder: Literal["sha1", "blake2b", "sha256", "sha512"] | Callable[[str], str] = "sha1",
        store_namespace: str | None = None,
        dimensions: int | None = None,
    ) -> None:
        super().__init__(roles=roles, dimensions=dimensions)
        if not callable(key_encoder) and key_encoder not in ("sha1", "blake2b", "sha256", "sha512"):
            raise ValueError("key_encoder is sha1, blake2b, sha256, sha512 or a callable")
        self._namespace = namespace
        self._key_encoder = key_encoder
        self._store_prefix = f"{store_namespace}/" if store_namespace else ""

    def command(self, text: str) -> Command:
        """Return the Redis command that fetches the entry of `text`."""
        return ("GET", (self._store_prefix + self._key(text)).encode())

    def vector(self, text: str, reply: Any) -> list[float] | None:  # noqa: ARG002 - not in the entry
        """Return the vector in `reply`, None if there is no entry."""
        return None if reply is None else self._parse(reply)

    def _key(self, text: str) -> str:
        if callable(self._key_encoder):
            return self._key_encoder(text)
        # Lone surrogates, which the other library refused to hash, find no entry.
        encoded = text.encode("utf-8", "surrogatepass")
        hashed = hashlib.new(self._key_encoder, encoded, usedforsecurity=False).hexdigest()
        if self._key_encoder == "sha1":
            hashed = str(uuid.uuid5(_LANGCHAIN_NAMESPACE, hashed))
        return self._namespace + hashed


class RedisVLEmbeddingsCache(ExistingCache):
    """What redisvl's `EmbeddingsCache` stored.

    Its keys join text and model name by a colon, so the entry's own model name is compared before
    it is taken: with that the text is the same, too.

    Args:
        roles: See `ExistingCache`.
        model_name: Under which the vectors were stored.
        name: Of the cache.
        dimensions: See `ExistingCache`.
    """

    def __init__(
        self,
        *,
        roles: Collection[Role],
        model_name: str,
        name: str = "embedcache",
        dimensions: int | None = None,
    ) -> None:
        super().__init__(roles=roles, dimensions=dimensions)
        self._model_name = model_name
        self._name = name

    def command(self, text: str) -> Command:
        """Return the Redis command that fetches the entry of `text`."""
        joined = f"{text}:{self._model_name}".encode("utf-8", "surrogatepass")
        key = f"{self._name}:{hashlib.sha256(joined).hexdigest()}"
        return ("HMGET", key, "model_name", "embedding")

    def vector(self, text: str, reply: Any) -> list[float] | None:  # noqa: ARG002 - see above
        """Return the vector in `reply`, None if there is no entry."""
        model_name, embedding = reply
        if embedding is None:
            return None
        if model_name != self._model_name.encode():
            raise CorruptValueError("the entry of another model")
        return self._parse(embedding)
