"""RedisCachedEmbeddings: one embedding for the whole fleet, and never a query that Redis spoils."""

from __future__ import annotations

import asyncio
import atexit
import copy
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, Self

from langchain_core.embeddings import Embeddings

from prefetch_embeddings import warming
from prefetch_embeddings._background import forks
from prefetch_embeddings._redis.settings import checked_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import redis
    import redis.asyncio

    from prefetch_embeddings._redis.recorder import RedisCacheEvent, RedisCacheStats
    from prefetch_embeddings._redis.tier import Tier
    from prefetch_embeddings.existing import ExistingCache

EXIT_SECONDS: Final = 0.25
"""How long `close` and the exit of the interpreter wait for vectors on their way to Redis."""


class RedisCachedEmbeddings(Embeddings):
    """Keeps the vectors of a model in Redis, for all processes that use the same model.

    Redis only ever helps: whatever happens to it, the model answers, and after a few failures in a
    row Redis is left alone but for one probe a second. Neither keys nor values nor logs contain a
    text. A vector comes back equal to the model's own, bit for bit.

    Vectors are stored in the background, so a text may be embedded once more by another process
    that asks within the same millisecond; `single_flight` prevents that, too.

    It may be used from any number of threads and event loops, and across forks. It can be copied
    and pickled where the model can (and no client was given). A context manager, sync and async;
    closing is optional.

    Example:
        ```python
        embeddings = RedisCachedEmbeddings(OpenAIEmbeddings(), "redis://localhost:6379/0")
        ```

    Args:
        underlying_embeddings: The model to ask for what Redis does not have.
        url: For sync and async use: `redis://`, `rediss://` or `unix://`;
            `redis+sentinel://host:26379,host:26379/service/0` for Sentinel,
            `redis+cluster://host:6379,host:6379` for a cluster; `rediss+sentinel://` and
            `rediss+cluster://` with TLS. Connections are made as needed, in the background, never
            here.
        client: Instead of `url`, for the rare case, a sync client of redis-py. Its own timeouts
            and retries stay, but nobody waits for them longer than `timeout`.
        async_client: Likewise, for the coroutines of the event loop that it is first used on. What
            other loops, forked children and sync calls ask goes through `url` or `client`, and
            straight to the model where neither is given. With a `client` only, coroutines use that.
        model_id: What identifies the vector space. Needed where the model is not well known; to be
            changed whenever its vectors change.
        ttl: Seconds that a vector stays in Redis from when it was stored. None: for ever.
        prefix: What every key starts with.
        timeout: The most that Redis may ever cost one call, in seconds. Where there is no
            connection yet, one is made in the background; queries do not wait for it any longer
            than that in all. A large `embed_documents` keeps what arrived by then, and embeds the
            rest.
        single_flight: Let only one process at a time call the model for the same query; the others
            wait for its vector. That is not counted as `timeout`. An owner that fails or dies costs
            one more call.
        lease: For how many seconds the one that calls the model may do so alone; somewhat longer
            than the model usually takes. Nobody waits longer than for two such leases.
        secret: Who does not know it can neither find out from a key whether a text is in Redis, nor
            have a vector of theirs served. All processes need the same one; what was stored with
            another, or without, is not found.
        read_through: Older caches in the same database that are asked on a miss; what they have is
            copied forward.
        on_event: Called with each `RedisCacheEvent`, on whatever thread it happens. What it raises
            is logged.

    Raises:
        TypeError: Something is not of the kind that is asked for: a model that is no `Embeddings`,
            an async client as `client`.
        ValueError: Neither `url` nor a client is given, or both; a URL of another kind or with an
            unknown option; no `model_id` where it cannot be derived, or an empty one; an empty
            `secret`; a duration that is not positive; with `single_flight`, a prefix with a closing
            brace that ends no hash tag; a tier that prefetches inside of this one.
    """

    def __init__(
        self,
        underlying_embeddings: Embeddings,
        url: str | None = None,
        *,
        client: redis.Redis | redis.RedisCluster | None = None,
        async_client: redis.asyncio.Redis | redis.asyncio.RedisCluster | None = None,
        model_id: str | None = None,
        ttl: float | None = 86_400.0,
        prefix: str = "prefetch-embeddings",
        timeout: float = 0.1,
        single_flight: bool = False,
        lease: float = 3.0,
        secret: str | bytes | None = None,
        read_through: Sequence[ExistingCache] = (),
        on_event: Callable[[RedisCacheEvent], None] | None = None,
    ) -> None:
        self.underlying_embeddings = underlying_embeddings
        self._settings = checked_settings(
            underlying_embeddings,
            url=url,
            client=client,
            async_client=async_client,
            model_id=model_id,
            ttl=ttl,
            prefix=prefix,
            timeout=timeout,
            single_flight=single_flight,
            lease=lease,
            secret=secret,
            read_through=read_through,
            on_event=on_event,
        )
        self._start()

    def _start(self) -> None:
        # Not before: who only imports this package needs no redis-py loaded.
        from prefetch_embeddings._redis.tier import Tier

        self._tier: Tier = Tier(**self._settings)
        self._closed = False
        _instances.add(self)
        forks.register(self)

    def reset_after_fork(self) -> None:
        """Start anew in a forked child: the parent's connections are the parent's."""
        self._tier.start_anew()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_tier"], state["_closed"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for shared in ("client", "async_client", "on_event"):  # what the user made stays what it is
            thing = self._settings[shared]
            memo[id(thing)] = thing
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    # -- the LangChain interface

    def embed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Return the vector of `text` as a query: out of Redis, or else from the model.

        Args:
            text: What to embed.
            **kwargs: Go to the model, and past Redis.

        Returns:
            A list of the model's dimension, the caller's own.
        """
        model, tier = self.underlying_embeddings, self._tier
        if kwargs or self._bypassed(text) or not tier.serves_threads():
            return model.embed_query(text, **kwargs)
        query = tier.query(text)
        with query:
            found = tier.exchange.run(query.steps())
            return query.keep(model.embed_query(text)) if found is None else found

    async def aembed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Return the vector of `text` as a query: out of Redis, or else from the model.

        Args:
            text: What to embed.
            **kwargs: Go to the model, and past Redis.

        Returns:
            A list of the model's dimension, the caller's own.
        """
        model, tier = self.underlying_embeddings, self._tier
        if kwargs or self._bypassed(text):
            return await model.aembed_query(text, **kwargs)
        query = tier.query(text)
        with query:
            found = await tier.exchange.arun(query.steps())
            return query.keep(await model.aembed_query(text)) if found is None else found

    def embed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """Return the vectors of `texts` as documents, in their order.

        Texts that Redis does not have go to the model once each, in batches of the model's own
        size; every batch is stored even when a later one fails.

        Args:
            texts: What to embed.
            **kwargs: Go to the model, and past Redis.

        Returns:
            One list of the model's dimension for each text, the caller's own.
        """
        model, tier = self.underlying_embeddings, self._tier
        texts = list(texts)
        if kwargs or not texts or self._bypassed(*texts) or not tier.serves_threads():
            return model.embed_documents(texts, **kwargs)
        batch = tier.batch(texts)
        tier.exchange.run(batch.steps())
        for slots in batch.missing(model):
            batch.keep(slots, model.embed_documents([slot.text for slot in slots]))
        return batch.in_order()

    async def aembed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """Return the vectors of `texts` as documents, in their order.

        Texts that Redis does not have go to the model once each, in batches of the model's own
        size; every batch is stored even when a later one fails.

        Args:
            texts: What to embed.
            **kwargs: Go to the model, and past Redis.

        Returns:
            One list of the model's dimension for each text, the caller's own.
        """
        model, tier = self.underlying_embeddings, self._tier
        texts = list(texts)
        if kwargs or not texts or self._bypassed(*texts):
            return await model.aembed_documents(texts, **kwargs)
        batch = tier.batch(texts)
        await tier.exchange.arun(batch.steps())
        for slots in batch.missing(model):
            batch.keep(slots, await model.aembed_documents([slot.text for slot in slots]))
        return batch.in_order()

    # -- what surrounds it

    def forget(self, text: str) -> bool:
        """Delete what is kept of `text`, as a query and as a document, in older caches, too.

        A call that is under way here does not bring it back; one of another process may.

        Args:
            text: What to forget.

        Returns:
            Whether Redis had anything of it. False, and a warning in the log, where Redis could not
            be asked within a second or refused: then it may still be there.

        Raises:
            TypeError: `text` is not a `str`.
        """
        steps = self._tier.forget(_checked(text))
        if self._closed or not self._tier.serves_threads():
            return self._tier.forgot(None)
        return self._tier.forgot(self._tier.exchange.run(steps, self._tier.patience))

    async def aforget(self, text: str) -> bool:
        """Do what `forget` does without blocking the event loop."""
        steps = self._tier.forget(_checked(text))
        if self._closed:
            return self._tier.forgot(None)
        return self._tier.forgot(await self._tier.exchange.arun(steps, self._tier.patience))

    def warm_up(self) -> float:
        """Open connections to Redis, then warm up the model; nothing stays in Redis.

        In a cluster that is one to each node. Connections that take longer than five seconds are no
        longer waited for.

        Returns:
            Seconds it took.

        Raises:
            Exception: What the model raised. Redis raises nothing here either.
        """
        began = time.monotonic()
        if not self._closed and self._tier.serves_threads():
            self._tier.exchange.run(self._tier.ping(on_loop=False), self._tier.patience)
        warming.warm_up(self.underlying_embeddings)
        return time.monotonic() - began

    async def awarm_up(self) -> float:
        """Do what `warm_up` does for the async clients."""
        began = time.monotonic()
        if not self._closed:
            await self._tier.exchange.arun(self._tier.ping(on_loop=True), self._tier.patience)
        await warming.awarm_up(self.underlying_embeddings)
        return time.monotonic() - began

    @property
    def closed(self) -> bool:
        """Whether `close` or `aclose` was called: every call goes straight to the model."""
        return self._closed

    def stats(self) -> RedisCacheStats:
        """Return the counts so far, as one snapshot that later ones can be subtracted from."""
        return self._tier.recorder.stats()

    def flush(self, timeout: float = 1.0) -> bool:
        """Wait up to `timeout` seconds until no vector is on its way to Redis.

        Returns:
            Whether none is.
        """
        return self._tier.writer.flush(timeout)

    def close(self) -> None:
        """Let vectors reach Redis, for a quarter of a second at most, then let go of connections.

        Clients that were given stay open. Afterwards every call goes straight to the model.
        """
        if not self._closed:
            self._closed = True
            flush_all([self], EXIT_SECONDS)
            self._tier.close()

    async def aclose(self) -> None:
        """Do what `close` does without blocking the event loop."""
        if not self._closed:
            self._closed = True
            end = time.monotonic() + EXIT_SECONDS
            try:
                # Not in the loop's executor, whose threads may all be waiting for retrievers.
                while not self.flush(0) and time.monotonic() < end:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            finally:
                self._tier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _bypassed(self, *texts: str) -> bool:
        return self._closed or not all(isinstance(text, str) for text in texts)


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, not {type(text).__name__}")
    return text


def flush_all(caches: Sequence[RedisCachedEmbeddings], seconds: float) -> None:
    """Wait up to `seconds` in all until nothing of `caches` is on its way."""
    end = time.monotonic() + seconds
    for cache in caches:
        if cache._tier.serves_threads():  # noqa: SLF001 - its own class
            cache.flush(max(0.0, end - time.monotonic()))


_instances: Final[weakref.WeakSet[RedisCachedEmbeddings]] = weakref.WeakSet()


@atexit.register
def _flush_at_exit() -> None:
    flush_all(list(_instances), EXIT_SECONDS)
