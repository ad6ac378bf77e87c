"""RedisCachedEmbeddings: one embedding for the whole fleet, and never a query that Redis spoils."""

from __future__ import annotations

import asyncio
import atexit
import math
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar, cast

from langchain_core.embeddings import Embeddings
from redis.exceptions import ResponseError

from prefetch_embeddings import warming
from prefetch_embeddings._background import forks
from prefetch_embeddings._redis import codec, lease
from prefetch_embeddings._redis.breaker import CircuitBreaker
from prefetch_embeddings._redis.codec import CorruptValueError, Role
from prefetch_embeddings._redis.lease import can_share_a_slot
from prefetch_embeddings._redis.model_id import derive_dimensions, derive_model_id
from prefetch_embeddings._redis.recorder import (
    RedisCacheEvent,
    RedisCacheStats,
    RedisRecorder,
)
from prefetch_embeddings._redis.recorder import (
    RedisCacheEventKind as Kind,
)
from prefetch_embeddings._redis.transports import (
    NOT_ASKED,
    AsyncOverThreads,
    AsyncTransport,
    GivenAsyncClient,
    GivenClient,
    OwnAsyncClients,
    OwnClient,
    SyncTransport,
)
from prefetch_embeddings._redis.writer import Write, Writer, flush_all

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Generator, Iterable, Sequence

    import redis
    import redis.asyncio

    from prefetch_embeddings._redis.lease import Lease
    from prefetch_embeddings._redis.transports import Command
    from prefetch_embeddings.existing import ExistingCache

PIPELINE: Final = 128
"""Commands of one request, so that a large batch keeps what came in time."""

UPSTREAM_TEXTS: Final = 100
"""Texts of one call to a model that does not say how many it sends at once."""

EXIT_SECONDS: Final = 0.25
"""How long `close` and the exit of the interpreter wait for vectors on their way to Redis."""


_Result = TypeVar("_Result")


class _Slot(NamedTuple):
    """Where the vector of one text belongs."""

    text: str
    role: Role
    digest: str
    key: str


class _Request(NamedTuple):
    """What a lookup asks of Redis in one round trip, `waiting` seconds of it spent blocked."""

    commands: Sequence[Command]
    waiting: float = 0.0


class _NoReply:
    """What a lookup gets when Redis was not asked, or brought nothing."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind


_SKIPPED: Final = _NoReply(Kind.SKIPPED)
_FAILED: Final = _NoReply(Kind.MISS)

# A lookup is written once, for threads and for coroutines: it yields requests, is sent the replies,
# and returns what it found.
if TYPE_CHECKING:
    _Steps = Generator[_Request, Any, "_Found"]
    _BatchSteps = Generator[_Request, Any, dict[_Slot, list[float]]]


class _Found(NamedTuple):
    vector: list[float] | None
    lease: Lease | None = None


_NOTHING: Final = _Found(None)


class RedisCachedEmbeddings(Embeddings):
    """Keeps the vectors of a model in Redis, for all processes that use the same model.

    Redis only ever helps: whatever happens to it, the model answers, and after a few failures in a
    row Redis is left alone but for one probe a second. Neither keys nor values nor logs contain a
    text. A vector comes back equal to the model's own, bit for bit.

    Vectors are stored in the background, so a text may be embedded once more by another process
    that asks within the same millisecond; `single_flight` prevents that, too.

    It may be used from any number of threads and event loops, and across forks. A context manager,
    sync and async; closing is optional.

    Example:
        ```python
        embeddings = RedisCachedEmbeddings(OpenAIEmbeddings(), "redis://localhost:6379/0")
        ```

    Args:
        underlying_embeddings: The model to ask for what Redis does not have.
        url: `redis://`, `rediss://` or `unix://`, for sync and async use. Connections are made as
            needed, never here.
        client: Instead of `url`, a client of redis-py, Sentinel and Cluster included. Its own
            timeouts and retries stay, but nobody waits for them longer than `timeout`. To that end
            its commands run on helper threads, which costs some 0.1 ms more than `url` does.
        async_client: Likewise, for the coroutines of the event loop that it is first used on. What
            other loops, forked children and sync calls ask goes through `url` or `client`, and
            straight to the model where neither is given. With a `client` only, coroutines use that.
        model_id: What identifies the vector space. Needed where the model is not well known; to be
            changed whenever its vectors change.
        ttl: Seconds that a vector stays in Redis from when it was stored. None: for ever.
        prefix: What every key starts with.
        timeout: The most that Redis may ever cost one call, in seconds, connecting included. A
            large `embed_documents` keeps what arrived by then, and embeds the rest.
        single_flight: Let only one process at a time call the model for the same query; the others
            wait for its vector, for `lease` seconds at most (which is not counted as `timeout`). An
            owner that fails or dies costs them no more: they call for themselves.
        on_event: Called with each `RedisCacheEvent`, on whatever thread it happens. What it raises
            is logged.
        read_through: Older caches in the same database that are asked on a miss; what they have is
            copied forward.
        lease: See `single_flight`; somewhat longer than the model usually takes.

    Raises:
        ValueError: Neither `url` nor a client is given, or both; no `model_id` where it cannot be
            derived, or an empty one; a duration that is not positive; with `single_flight`, a
            prefix with a closing brace that ends no hash tag.
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
        on_event: Callable[[RedisCacheEvent], None] | None = None,
        read_through: Sequence[ExistingCache] = (),
        lease: float = 3.0,
    ) -> None:
        if url is None and client is None and async_client is None:
            raise ValueError("pass url=, client= or async_client=")
        if url is not None and client is not None:
            raise ValueError("pass url= or client=, not both")
        for name, seconds in (("ttl", ttl), ("timeout", timeout), ("lease", lease)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be positive and finite, in seconds")
        if single_flight and not can_share_a_slot(prefix):
            raise ValueError("a prefix with a closing brace must have a hash tag, as in {tag}")
        self.underlying_embeddings = underlying_embeddings
        if model_id == "":
            raise ValueError("model_id is empty: all such models would share their vectors")
        if model_id is None:
            model_id = derive_model_id(underlying_embeddings)
        dimensions = derive_dimensions(underlying_embeddings)
        self._spaces: dict[Role, bytes] = {
            "query": codec.space(model_id, dimensions, "query"),
            "document": codec.space(model_id, dimensions, "document"),
        }
        self._url = url
        self._client = client
        self._given_async = None if async_client is None else GivenAsyncClient(async_client)
        self._ttl_milliseconds = None if ttl is None else max(1, round(ttl * 1000))
        self._prefix = prefix
        self._timeout = timeout
        self._single_flight = single_flight
        self._on_event = on_event
        self._read_through = tuple(read_through)
        self._lease_seconds = lease
        self._length: int | None = None
        self._closed = False
        self._start()
        _instances.add(self)
        forks.register(self)

    def _start(self) -> None:
        """Make all that holds a lock, a thread or a connection; once more in a forked child."""
        self._recorder = RedisRecorder(self._on_event)
        self._breaker = CircuitBreaker()
        self._transport = self._make_transport()
        self._async_transport = self._make_async_transport()
        # A command that blocks must be over before its connection gives up.
        self._longest_block = min(
            lease.SLICE,
            self._async_transport.patience / 2,
            lease.SLICE if self._transport is None else self._transport.patience / 2,
        )
        self._writer = Writer(
            self._transport,
            self._given_async,
            ttl_milliseconds=self._ttl_milliseconds,
            breaker=self._breaker,
            recorder=self._recorder,
        )

    def reset_after_fork(self) -> None:
        """Start anew: the parent's connections are the parent's."""
        _left_behind.append((self._transport, self._async_transport))
        if self._given_async is not None:
            _left_behind.append(self._given_async.elsewhere)
            self._given_async.reset_after_fork()
        self._start()

    def _make_transport(self) -> SyncTransport | None:
        if self._url is not None:
            return OwnClient(self._url)
        return None if self._client is None else GivenClient(self._client)

    def _make_async_transport(self) -> AsyncTransport:
        without: AsyncTransport | None = None
        if self._url is not None:
            without = OwnAsyncClients(self._url)
        elif isinstance(self._transport, GivenClient):
            without = AsyncOverThreads(self._transport)
        if self._given_async is not None:
            self._given_async.elsewhere = without
            return self._given_async
        assert without is not None  # noqa: S101 - one of the three is there
        return without

    # -- the LangChain interface

    def embed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Return the vector of `text` as a query: out of Redis, or else from the model.

        Args:
            text: What to embed.
            **kwargs: Go to the model, and past Redis.

        Returns:
            A list of the model's dimension, the caller's own.
        """
        model = self.underlying_embeddings
        if kwargs or self._transport is None or self._bypassed(text):
            return model.embed_query(text, **kwargs)
        slot = self._slot("query", text)
        found = self._run(self._lookup(slot))
        if found.vector is not None:
            return found.vector
        try:
            vector = model.embed_query(text)
        except BaseException:
            self._give_up(slot, found.lease)
            raise
        return self._keep(slot, vector, found.lease)

    async def aembed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Return the vector of `text` as a query: out of Redis, or else from the model.

        Args:
            text: What to embed.
            **kwargs: Go to the model, and past Redis.

        Returns:
            A list of the model's dimension, the caller's own.
        """
        model = self.underlying_embeddings
        if kwargs or self._bypassed(text):
            return await model.aembed_query(text, **kwargs)
        slot = self._slot("query", text)
        found = await self._arun(self._lookup(slot))
        if found.vector is not None:
            return found.vector
        try:
            vector = await model.aembed_query(text)
        except BaseException:
            self._give_up(slot, found.lease)
            raise
        return self._keep(slot, vector, found.lease)

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
        model = self.underlying_embeddings
        texts = list(texts)
        if kwargs or self._transport is None or not texts or self._bypassed(*texts):
            return model.embed_documents(texts, **kwargs)
        slots = [self._slot("document", text) for text in texts]
        vectors = self._run(self._lookup_batch(slots))
        for batch in self._batches(slots, vectors):
            answer = model.embed_documents([slot.text for slot in batch])
            self._keep_batch(batch, answer, vectors)
        return _in_order(slots, vectors)

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
        model = self.underlying_embeddings
        texts = list(texts)
        if kwargs or not texts or self._bypassed(*texts):
            return await model.aembed_documents(texts, **kwargs)
        slots = [self._slot("document", text) for text in texts]
        vectors = await self._arun(self._lookup_batch(slots))
        for batch in self._batches(slots, vectors):
            answer = await model.aembed_documents([slot.text for slot in batch])
            self._keep_batch(batch, answer, vectors)
        return _in_order(slots, vectors)

    # -- what surrounds it

    def warm_up(self) -> float:
        """Open the connection to Redis, then warm up the model; nothing stays in Redis.

        Returns:
            Seconds it took.

        Raises:
            Exception: What the model raised. Redis raises nothing here either.
        """
        began = time.monotonic()
        if self._transport is not None and not self._closed:
            self._run(_ping())
        warming.warm_up(self.underlying_embeddings)
        return time.monotonic() - began

    async def awarm_up(self) -> float:
        """Do what `warm_up` does for the async clients."""
        began = time.monotonic()
        if not self._closed:
            await self._arun(_ping())
        await warming.awarm_up(self.underlying_embeddings)
        return time.monotonic() - began

    def stats(self) -> RedisCacheStats:
        """Return the counts so far, as one snapshot that later ones can be subtracted from."""
        return self._recorder.stats()

    def flush(self, timeout: float = 1.0) -> bool:
        """Wait up to `timeout` seconds until no vector is on its way to Redis.

        Returns:
            Whether none is.
        """
        return self._writer.flush(timeout)

    def close(self) -> None:
        """Let vectors reach Redis, for a quarter of a second at most, then let go of connections.

        Clients that were given stay open. Afterwards every call goes straight to the model.
        """
        if not self._closed:
            self._closed = True
            flush_all([self._writer], EXIT_SECONDS)
            self._let_go()

    async def aclose(self) -> None:
        """Do what `close` does without blocking the event loop."""
        if not self._closed:
            self._closed = True
            end = time.monotonic() + EXIT_SECONDS
            try:
                # Not in the loop's executor, whose threads may all be waiting for retrievers.
                while not self._writer.flush(0) and time.monotonic() < end:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                await self._async_transport.aclose()
            finally:
                self._let_go()

    def _let_go(self) -> None:
        self._writer.close()
        self._async_transport.close()
        if self._transport is not None:
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # -- lookups: what is asked of Redis, in which order

    def _lookup(self, slot: _Slot) -> _Steps:
        """Find one vector, or else the right to make the call."""
        vector = self._writer.find(slot.key)
        if vector is not None:
            self._recorder.count(Kind.HIT)
            return _Found(vector)
        reply = yield _Request([("GET", slot.key)])
        if isinstance(reply, _NoReply):
            self._recorder.count(reply.kind)
            return _NOTHING
        vector, corrupt = self._judge(slot, reply[0])
        found = _NOTHING if vector is None else _Found(vector)
        if vector is None:
            older = yield from self._lookup_existing([slot])
            if older:
                found = _Found(older[slot])
            elif self._single_flight:
                found = yield from self._join_flight(slot, ignore_value=corrupt)
        self._recorder.count(Kind.MISS if found.vector is None else Kind.HIT)
        return found

    def _lookup_batch(self, slots: Sequence[_Slot]) -> _BatchSteps:
        """Find those vectors that are there."""
        slots = list(dict.fromkeys(slots))
        vectors = {}
        for slot in slots:
            if (vector := self._writer.find(slot.key)) is not None:
                vectors[slot] = vector
        unknown = [slot for slot in slots if slot not in vectors]
        unanswered = Kind.MISS
        for start in range(0, len(unknown), PIPELINE):
            some = unknown[start : start + PIPELINE]
            # Not one MGET: in a cluster its keys must share a slot, and for a key that holds
            # something else than a string it says the same as for one that holds nothing.
            reply = yield _Request([("GET", slot.key) for slot in some])
            if isinstance(reply, _NoReply):
                if start == 0:
                    unanswered = reply.kind
                break
            for slot, value in zip(some, reply, strict=True):
                vector, _ = self._judge(slot, value)
                if vector is not None:
                    vectors[slot] = vector
        else:
            missing = [slot for slot in unknown if slot not in vectors]
            vectors.update((yield from self._lookup_existing(missing)))
        self._recorder.count(Kind.HIT, len(vectors))
        self._recorder.count(unanswered, len(slots) - len(vectors))
        return vectors

    def _lookup_existing(self, slots: Sequence[_Slot]) -> _BatchSteps:
        """Find what older caches have, and copy it forward."""
        vectors: dict[_Slot, list[float]] = {}
        for cache in self._read_through:
            asked = {s: self._command(cache, s) for s in slots if s not in vectors}
            askable = [(slot, command) for slot, command in asked.items() if command]
            for start in range(0, len(askable), PIPELINE):
                some = askable[start : start + PIPELINE]
                reply = yield _Request([command for _, command in some])
                if isinstance(reply, _NoReply):
                    return vectors
                for (slot, _), entry in zip(some, reply, strict=True):
                    vector = self._carry_over(cache, slot, entry)
                    if vector is not None:
                        vectors[slot] = vector
        self._recorder.count(Kind.CARRIED_OVER, len(vectors))
        return vectors

    def _join_flight(self, slot: _Slot, *, ignore_value: bool) -> _Steps:
        """Take the lease, or wait for whoever has it.

        One wait at most: when the owner has left and brought nothing, somebody else is already
        trying, and to wait for that one, too, could go on for ever.
        """
        token = lease.new_token()
        join = _Request(
            [lease.join(slot.key, token, self._lease_seconds, ignore_value=ignore_value)]
        )
        state = self._joined(slot, token, (yield join))
        if not isinstance(state, lease.OtherOwner):
            return state
        self._recorder.count(Kind.WAITED)
        owner, left = state, min(state.seconds, self._lease_seconds)
        while left > 0:
            blocked = min(left, self._longest_block)
            left -= blocked
            reply = yield _Request([owner.wait(blocked)], waiting=blocked)
            if isinstance(reply, _NoReply):
                return _NOTHING
            state = self._joined(slot, token, (yield join))
            if not isinstance(state, lease.OtherOwner):
                return state
            if state.token != owner.token:
                break
        return _NOTHING

    def _joined(self, slot: _Slot, token: str, reply: Any) -> _Found | lease.OtherOwner:
        if isinstance(reply, _NoReply) or isinstance(reply[0], Exception):
            return _NOTHING
        state = lease.joined(slot.key, token, reply[0])
        if isinstance(state, lease.Lease):
            return _Found(None, state)
        if isinstance(state, bytes):
            return _Found(self._judge(slot, state)[0])
        return state or _NOTHING

    # -- requests: within the time, past the breaker, and counted

    def _run(self, steps: Generator[_Request, Any, _Result]) -> _Result:
        assert self._transport is not None  # noqa: S101 - callers looked
        left = self._timeout
        try:
            request = next(steps)
            while True:
                reply: Any = self._refusal(left)
                if reply is None:
                    started = time.monotonic()
                    try:
                        reply = self._transport.execute(request.commands, left + request.waiting)
                    except Exception as error:  # noqa: BLE001 - the model answers instead
                        reply = error
                    reply, left = self._settle(request, reply, started, left)
                request = steps.send(reply)
        except StopIteration as end:
            return cast("_Result", end.value)

    async def _arun(self, steps: Generator[_Request, Any, _Result]) -> _Result:
        left = self._timeout
        try:
            request = next(steps)
            while True:
                reply: Any = self._refusal(left)
                if reply is None:
                    started = time.monotonic()
                    try:
                        reply = await self._async_transport.execute(
                            request.commands, left + request.waiting
                        )
                    except Exception as error:  # noqa: BLE001 - the model answers instead
                        reply = error
                    reply, left = self._settle(request, reply, started, left)
                request = steps.send(reply)
        except StopIteration as end:
            return cast("_Result", end.value)

    def _refusal(self, left: float) -> _NoReply | None:
        """Return why Redis is not to be asked now, if it is not."""
        if left <= 0:
            return _FAILED
        return None if self._breaker.allows() else _SKIPPED

    def _settle(
        self, request: _Request, reply: Any, started: float, left: float
    ) -> tuple[Any, float]:
        """Count a reply or error; return what the lookup gets of it, and the time left."""
        seconds = time.monotonic() - started
        self._recorder.spent(seconds, request.waiting)
        left -= max(0.0, seconds - request.waiting)
        if isinstance(reply, NOT_ASKED):
            self._breaker.not_tried()
            return _SKIPPED, left
        error, usable = _judge_replies(request.commands, reply)
        if error is None:
            if self._breaker.succeeded():
                self._recorder.breaker_closed()
        else:
            self._recorder.failed(error, seconds)
            if self._breaker.failed():
                self._recorder.breaker_opened(error)
        return (reply if usable else _FAILED), left

    # -- vectors, in and out

    def _bypassed(self, *texts: str) -> bool:
        return self._closed or not all(isinstance(text, str) for text in texts)

    def _slot(self, role: Role, text: str) -> _Slot:
        digest = codec.digest(self._spaces[role], text)
        return _Slot(text, role, digest, f"{self._prefix}:{role}:{digest}")

    def _judge(self, slot: _Slot, value: Any) -> tuple[list[float] | None, bool]:
        """Return the vector in `value`, and whether there is a value but it does not check."""
        if value is None or _is_error(value):
            return None, False
        try:
            vector = codec.decode(value, slot.digest)
            if self._length and len(vector) != self._length:
                raise CorruptValueError("another dimension than the model's")
        except CorruptValueError:
            self._recorder.count(Kind.CORRUPT)
            return None, True
        return vector, False

    def _command(self, cache: ExistingCache, slot: _Slot) -> Command | None:
        if slot.role not in cache.roles:
            return None
        try:
            return cache.command(slot.text)
        except Exception:  # noqa: BLE001 - a key encoder of the user's, and a text it can't take
            return None

    def _carry_over(self, cache: ExistingCache, slot: _Slot, entry: Any) -> list[float] | None:
        if _is_error(entry):
            return None
        try:
            if _is_wrong_type(entry):
                raise CorruptValueError("an entry of another type")
            vector = cache.vector(slot.text, entry)
            stored = None if vector is None else codec.snapshot(vector)
        except Exception:  # noqa: BLE001 - also one that its reader did not expect
            self._recorder.count(Kind.CORRUPT)
            return None
        if stored is not None:
            self._put(slot, stored)
        return vector

    def _keep(self, slot: _Slot, vector: Sequence[float], held: Lease | None = None) -> list[float]:
        """Have `vector` stored behind the reply; return a copy for the caller."""
        try:
            stored = codec.snapshot(vector)
        except (TypeError, ValueError, OverflowError):  # not a vector: none of our business
            self._give_up(slot, held)
            return cast("list[float]", vector)
        self._learn_length(stored)
        self._put(slot, stored, held)
        return stored.tolist()

    def _put(self, slot: _Slot, vector: array[float] | None, held: Lease | None = None) -> None:
        self._writer.put(Write(slot.key, slot.digest, vector, held))

    def _learn_length(self, vector: array[float]) -> None:
        """Note the length of the model's vectors: a value of another one does not check."""
        if self._length is None:
            self._length = len(vector)
        elif self._length != len(vector):
            self._length = 0  # this model's vectors have no length of their own

    def _give_up(self, slot: _Slot, held: Lease | None) -> None:
        if held is not None:
            self._put(slot, None, held)

    def _batches(
        self, slots: Iterable[_Slot], vectors: dict[_Slot, list[float]]
    ) -> Sequence[Sequence[_Slot]]:
        missing = [slot for slot in dict.fromkeys(slots) if slot not in vectors]
        size = getattr(self.underlying_embeddings, "chunk_size", None)
        if not isinstance(size, int) or size < 1:
            size = UPSTREAM_TEXTS
        return [missing[start : start + size] for start in range(0, len(missing), size)]

    def _keep_batch(
        self,
        batch: Sequence[_Slot],
        answer: Sequence[Sequence[float]],
        vectors: dict[_Slot, list[float]],
    ) -> None:
        if len(answer) != len(batch):
            raise ValueError(f"the model returned {len(answer)} vectors for {len(batch)} texts")
        for slot, vector in zip(batch, answer, strict=True):
            vectors[slot] = self._keep(slot, vector)


def _ping() -> Generator[_Request, Any, None]:
    yield _Request([("PING",)])


def _in_order(slots: Sequence[_Slot], vectors: dict[_Slot, list[float]]) -> list[list[float]]:
    given: set[_Slot] = set()
    ordered = []
    for slot in slots:
        vector = vectors[slot]
        ordered.append(vector.copy() if slot in given else vector)
        given.add(slot)
    return ordered


def _judge_replies(commands: Sequence[Command], reply: Any) -> tuple[Exception | None, bool]:
    """Return what went wrong with a request, if anything did, and whether its replies are of use.

    Both at once when one server of a cluster is down and the others have answered.
    """
    if isinstance(reply, Exception):
        return reply, False
    if len(reply) != len(commands):
        return ValueError("another number of replies than of commands"), False
    errors = [one for one in reply if _is_error(one)]
    broken = [one for one in errors if not isinstance(one, ResponseError)]
    useless = bool(errors) and len(errors) == len(reply)
    if broken or useless:
        return (broken or errors)[0], not useless
    return None, True


def _is_error(reply: Any) -> bool:
    """Return whether nothing is known of what stands under the key."""
    return isinstance(reply, Exception) and not _is_wrong_type(reply)


def _is_wrong_type(reply: Any) -> bool:
    """Return whether Redis is well, and only something else stands under the key."""
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")


_instances: Final[weakref.WeakSet[RedisCachedEmbeddings]] = weakref.WeakSet()

_left_behind: Final[list[Any]] = []
"""In a forked child: the parent's connections. To close them here would disturb it."""


@atexit.register
def _flush_at_exit() -> None:
    flush_all([cache._writer for cache in list(_instances)], EXIT_SECONDS)  # noqa: SLF001
