"""What the writer sends and in which order, what it drops, and what it says of both."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redis.exceptions import MaxConnectionsError, ResponseError

from prefetch_embeddings._redis import codec
from prefetch_embeddings._redis import writer as module
from prefetch_embeddings._redis.breaker import CircuitBreaker
from prefetch_embeddings._redis.lease import Lease
from prefetch_embeddings._redis.recorder import RedisCacheEvent, RedisRecorder
from prefetch_embeddings._redis.recorder import RedisCacheEventKind as Kind
from prefetch_embeddings._redis.transports import NotAsked
from prefetch_embeddings._redis.writer import SECONDS, Write, Writer, flush_all
from prefetch_embeddings.testing import ManualExecutor, ManualTime
from tests.helpers import PATIENCE, Call, auntil, until
from tests.redis_tier.fakes import answer

DIGEST = "0" * 32
LEASE = Lease("key", "token")
CONNECTION_ERROR = RedisCacheEvent(Kind.ERROR, error="ConnectionError")


def write(key: str, *vector: float, lease: Lease | None = None) -> Write:
    """Return a write of `vector`, or of none at all."""
    return Write(key, DIGEST, array("d", vector) if vector else None, lease)


def stored(key: str, *vector: float) -> tuple[Any, ...]:
    """Return the command that is to come of it."""
    return ("SET", key, codec.encode(array("d", vector), DIGEST))


class Executor(ManualExecutor):
    """Runs what is queued also after it was closed, as the pool does."""

    def close(self) -> None:
        self.refusing = True


class Scene:
    """A writer, the requests that it makes, and what it says; replies as told, or "OK" to all."""

    def __init__(
        self, *, sync: bool, ttl_milliseconds: int | None, listener: Callable[..., None] | None
    ) -> None:
        self.requests: list[list[Any]] = []
        self.foreign: asyncio.AbstractEventLoop | None = None  # a loop that Redis is not reached on
        self.replies: list[Any] = []
        self.events: list[RedisCacheEvent] = []
        self.breaker = CircuitBreaker(failures=2, clock=ManualTime())
        self.executor = Executor()
        self.opened = asyncio.Event()
        transport: Any = SimpleNamespace(execute=self._execute)
        async_client: Any = SimpleNamespace(
            execute=self._aexecute, is_of=lambda loop: loop is not self.foreign
        )
        self.writer = Writer(
            transport if sync else None,
            None if sync else async_client,
            ttl_milliseconds=ttl_milliseconds,
            breaker=self.breaker,
            recorder=RedisRecorder(listener or self.events.append),
        )
        self.writer._thread = self.executor  # type: ignore[assignment]

    def _execute(self, commands: Sequence[Any], seconds: float) -> list[Any]:
        assert seconds == SECONDS
        self.requests.append(list(commands))
        if not self.replies:
            return [b"OK"] * len(commands)
        replies: list[Any] = answer(self.replies.pop(0))
        return replies

    async def _aexecute(self, commands: Sequence[Any], seconds: float) -> list[Any]:
        replies = self._execute(commands, seconds)
        async with asyncio.timeout(PATIENCE):
            await self.opened.wait()
        return replies

    def put(self, *writes: Write) -> None:
        for one in writes:
            self.writer.put(one)

    def told(self) -> list[RedisCacheEvent]:
        """Return what was told since the last time."""
        told = self.events.copy()
        self.events.clear()
        return told

    async def ended(self) -> None:
        """Wait until the task has ended."""
        assert self.writer._task is not None
        await asyncio.wait([self.writer._task], timeout=PATIENCE)
        assert self.writer._task.done()


@pytest.fixture
def make() -> Iterator[Callable[..., Scene]]:
    """Makes scenes; checks after the test that nothing is left of what was on its way."""
    made: list[Scene] = []

    def scene(
        *,
        sync: bool = True,
        ttl_milliseconds: int | None = None,
        listener: Callable[..., None] | None = None,
    ) -> Scene:
        made.append(Scene(sync=sync, ttl_milliseconds=ttl_milliseconds, listener=listener))
        return made[-1]

    yield scene
    for one in made:
        one.executor.run_all()
        one.writer.close()
        assert one.writer.flush(0.0)
        assert not one.writer._under_way
        assert not one.writer._draining


@pytest.fixture
def scene(make: Callable[..., Scene]) -> Scene:
    return make()


@pytest.fixture
def on_loop(make: Callable[..., Scene]) -> Scene:
    return make(sync=False)


# -- one write


def test_a_write_is_a_command() -> None:
    value = codec.encode(array("d", [1.0]), DIGEST)
    assert write("k", 1.0).command(None) == ("SET", "k", value)
    assert write("k", 1.0).command(5) == ("SET", "k", value, "PX", 5)
    assert write("k", 1.0, lease=LEASE).command(5) == LEASE.leave(value, 5)
    assert write("k", lease=LEASE).command(None) == LEASE.leave(b"", None)


def test_a_write_counts_with_what_it_holds() -> None:
    assert write("k").size == 64
    assert write("k", 1.0, 2.0).size == 80


# -- by a thread


def test_a_vector_can_be_read_until_it_is_written(scene: Scene) -> None:
    def under_way() -> list[bytes]:
        assert scene.writer.find("key") == [1.0, 2.0]
        return [b"OK"]

    assert scene.writer.find("key") is None
    assert scene.writer.flush(0.0)
    scene.put(write("key", 1.0, 2.0))
    assert scene.writer.find("key") == [1.0, 2.0]
    assert scene.writer.find("other") is None
    assert scene.writer.find("key") is not scene.writer.find("key")
    assert not scene.writer.flush(0.0)
    scene.replies = [under_way]
    assert scene.executor.run_all() == 1
    assert scene.writer.find("key") is None
    assert scene.writer.flush(0.0)
    assert scene.requests == [[stored("key", 1.0, 2.0)]]
    assert scene.told() == [RedisCacheEvent(Kind.WRITTEN, 1)]


def test_who_waits_until_all_is_written_is_woken(scene: Scene) -> None:
    scene.put(write("key", 1.0))
    waiting = Call(scene.writer.flush, 3600.0)
    until(lambda: bool(scene.writer._changed._waiters))  # type: ignore[attr-defined]
    scene.executor.run_all()
    assert waiting.result()


def test_writes_go_out_in_order_and_in_batches(
    make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    scene = make(ttl_milliseconds=7)
    scene.put(write("1", 1.0), write("2", 2.0), write("3", 3.0))
    assert len(scene.executor) == 1
    assert scene.executor.run_all() == 1, "one thread does it all"
    assert scene.requests == [
        [(*stored("1", 1.0), "PX", 7), (*stored("2", 2.0), "PX", 7)],
        [(*stored("3", 3.0), "PX", 7)],
    ]
    assert scene.told() == [RedisCacheEvent(Kind.WRITTEN, 2), RedisCacheEvent(Kind.WRITTEN, 1)]


def test_what_comes_while_it_writes_is_written_next(scene: Scene) -> None:
    def more() -> list[bytes]:
        scene.put(write("2", 2.0))
        return [b"OK"]

    scene.replies = [more]
    scene.put(write("1", 1.0))
    assert scene.executor.run_all() == 1, "the thread that writes already"
    scene.put(write("3", 3.0))
    scene.executor.run_all()
    assert scene.requests == [[stored("1", 1.0)], [stored("2", 2.0)], [stored("3", 3.0)]]


def test_two_writes_of_one_key_become_one(scene: Scene) -> None:
    scene.put(write("key", 1.0, lease=LEASE), write("other", 3.0), write("key", 2.0, 2.0))
    assert scene.writer.find("key") == [2.0, 2.0]
    assert scene.writer._bytes == 2 * 64 + 3 * 8
    scene.executor.run_all()
    value = codec.encode(array("d", [2.0, 2.0]), DIGEST)
    assert scene.requests == [[stored("other", 3.0), LEASE.leave(value, None)]]
    assert scene.told() == [RedisCacheEvent(Kind.WRITTEN, 2)]


def test_a_lease_given_up_keeps_the_vector_that_is_on_its_way(scene: Scene) -> None:
    another = Lease("key", "another")
    scene.put(write("key", 1.0, lease=LEASE), write("key", lease=another))
    assert scene.writer.find("key") == [1.0]
    scene.executor.run_all()
    value = codec.encode(array("d", [1.0]), DIGEST)
    assert scene.requests == [[another.leave(value, None)]]


def test_a_lease_given_up_is_no_vector(scene: Scene) -> None:
    scene.put(write("key", lease=LEASE))
    assert scene.writer.find("key") is None
    scene.executor.run_all()
    assert scene.requests == [[LEASE.leave(b"", None)]]
    assert scene.told() == []


def test_a_newer_vector_is_found_before_one_that_is_under_way(scene: Scene) -> None:
    def meanwhile() -> list[bytes]:
        scene.put(write("key", 2.0))
        assert scene.writer.find("key") == [2.0]
        scene.writer.close()
        assert scene.writer.find("key") == [1.0], "only what waited is dropped"
        return [b"OK"]

    scene.replies = [meanwhile]
    scene.put(write("key", 1.0))
    scene.executor.run_all()
    assert scene.requests == [[stored("key", 1.0)]]
    assert scene.told() == [
        RedisCacheEvent(Kind.WRITE_DROPPED, 1),
        RedisCacheEvent(Kind.WRITTEN, 1),
    ]


def test_more_than_may_wait_is_dropped(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 2 * (64 + 8))
    scene.put(write("large", *[1.0] * 100))
    assert scene.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 1)]
    scene.put(write("1", 1.0), write("2", 2.0))
    assert scene.told() == []
    scene.put(write("3", 3.0))
    assert scene.writer.find("3") is None
    assert scene.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 1)]
    scene.executor.run_all()
    assert scene.requests == [[stored("1", 1.0), stored("2", 2.0)]]
    scene.told()
    scene.put(write("3", 3.0))
    assert scene.writer.find("3") == [3.0], "there is room again"


def test_after_closing_nothing_is_taken_and_what_waited_is_dropped(scene: Scene) -> None:
    scene.put(write("1", 1.0), write("2", 2.0), write("3", lease=LEASE))
    scene.writer.close()
    assert scene.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 2)]
    assert scene.writer.flush(0.0)
    scene.put(write("4", 4.0))
    assert scene.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 1)]
    scene.executor.run_all()
    assert scene.requests == []


@pytest.mark.parametrize("error", [NotAsked(), MaxConnectionsError()])
def test_what_says_nothing_about_redis_is_no_error(scene: Scene, error: Exception) -> None:
    scene.replies = [error] * 3
    for key in "123":
        scene.put(write(key, 1.0))
        scene.executor.run_all()
    assert scene.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 1)] * 3
    assert scene.breaker.closed


def test_without_a_thread_it_is_dropped_and_the_next_one_tries_again(scene: Scene) -> None:
    scene.executor.refusing = True
    scene.put(write("1", 1.0))
    assert scene.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 1)]
    assert scene.writer.flush(0.0)
    scene.executor.refusing = False
    scene.put(write("2", 2.0))
    scene.executor.run_all()
    assert scene.requests == [[stored("2", 2.0)]]


def test_what_comes_while_it_drops_what_waited_is_not_left_waiting(make: Any) -> None:
    def more(event: RedisCacheEvent) -> None:
        if event.kind is Kind.WRITE_DROPPED:
            dropping.executor.refusing = False
            dropping.put(write("2", 2.0))

    dropping: Scene = make(listener=more)
    dropping.executor.refusing = True
    dropping.put(write("1", 1.0))
    dropping.executor.run_all()
    assert dropping.requests == [[stored("2", 2.0)]]


def test_what_redis_refuses_is_dropped_and_the_rest_is_written(scene: Scene) -> None:
    scene.replies = [[b"OK", ResponseError("OOM"), b"OK", ValueError("last")]]
    scene.put(*(write(key, 1.0) for key in "1234"))
    scene.executor.run_all()
    assert scene.told() == [
        RedisCacheEvent(Kind.ERROR, error="ValueError"),
        RedisCacheEvent(Kind.WRITTEN, 2),
        RedisCacheEvent(Kind.WRITE_DROPPED, 2),
    ]
    assert scene.breaker.closed, "Redis is there"


def test_a_request_that_fails_is_dropped_and_counts_for_the_breaker(scene: Scene) -> None:
    for told in ([], [RedisCacheEvent(Kind.BREAKER_OPENED, error="ConnectionError")]):
        scene.replies = [redis.ConnectionError()]
        scene.put(write("1", 1.0), write("2", 2.0))
        scene.executor.run_all()
        assert scene.writer.flush(0.0)
        assert scene.told() == [CONNECTION_ERROR, *told, RedisCacheEvent(Kind.WRITE_DROPPED, 2)]
    assert not scene.breaker.closed


def test_too_few_replies_say_nothing_of_what_was_stored(scene: Scene) -> None:
    scene.replies = [[b"OK"]]
    scene.put(write("1", 1.0), write("2", 2.0))
    scene.executor.run_all()
    assert scene.told() == [
        RedisCacheEvent(Kind.ERROR, error="ValueError"),
        RedisCacheEvent(Kind.WRITE_DROPPED, 2),
    ]


def test_a_vector_that_cannot_be_sent_does_not_stop_the_others(scene: Scene) -> None:
    scene.put(Write("1", "\ud800", array("d", [1.0])))
    scene.executor.run_all()
    scene.put(write("2", 2.0))
    scene.executor.run_all()
    assert scene.requests == [[stored("2", 2.0)]]
    assert scene.writer.flush(0.0)


def test_while_the_breaker_is_open_redis_is_left_alone(scene: Scene) -> None:
    scene.breaker.failed()
    scene.breaker.failed()
    scene.put(write("1", 1.0), write("2", 2.0))
    scene.executor.run_all()
    assert scene.requests == []
    assert scene.writer.flush(0.0)
    assert scene.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 2)]


def test_one_thread_does_the_writing() -> None:
    opened = threading.Event()
    names: list[str] = []

    class Writing(Writer):
        def _take(self, count: int) -> list[Write]:
            batch = super()._take(count)
            if not batch:  # it is about to end: what comes now must not have another thread
                names.append(threading.current_thread().name)
                assert opened.wait(PATIENCE)
            return batch

    transport: Any = SimpleNamespace(execute=lambda commands, seconds: [b"OK"] * len(commands))
    writer = Writing(
        transport,
        None,
        ttl_milliseconds=None,
        breaker=CircuitBreaker(),
        recorder=RedisRecorder(None),
    )
    assert writer.in_background
    writer.put(write("1", 1.0))
    until(lambda: len(names) == 1)
    assert writer.flush(PATIENCE)
    writer.put(write("2", 2.0))
    assert len(writer._thread._threads) == 1
    opened.set()
    assert writer.flush(PATIENCE), "it is woken, once all is written"
    until(lambda: len(names) == 2)
    assert names == ["prefetch-embeddings-redis-writer"] * 2
    writer.close()
    assert writer._thread.join(PATIENCE)


# -- by a task


async def test_without_a_sync_client_a_task_writes(on_loop: Scene) -> None:
    assert not on_loop.writer.in_background
    on_loop.put(write("1", 1.0))
    task = on_loop.writer._task
    on_loop.put(write("2", 2.0))
    assert on_loop.writer._task is task
    await auntil(lambda: len(on_loop.requests) == 1)
    assert on_loop.writer.find("1") == [1.0]
    on_loop.put(write("3", 3.0))
    assert on_loop.writer._task is task
    on_loop.opened.set()
    await on_loop.ended()
    assert on_loop.requests == [[stored("1", 1.0), stored("2", 2.0)], [stored("3", 3.0)]]
    assert on_loop.told() == [RedisCacheEvent(Kind.WRITTEN, 2), RedisCacheEvent(Kind.WRITTEN, 1)]
    on_loop.put(write("4", 4.0))
    await on_loop.ended()
    assert on_loop.requests[2:] == [[stored("4", 4.0)]]


async def test_a_task_takes_no_more_at_a_time_than_a_thread(
    on_loop: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    on_loop.opened.set()
    on_loop.put(write("1", 1.0), write("2", 2.0), write("3", 3.0))
    await on_loop.ended()
    assert on_loop.requests == [[stored("1", 1.0), stored("2", 2.0)], [stored("3", 3.0)]]


async def test_a_task_survives_what_redis_does(on_loop: Scene) -> None:
    on_loop.replies = [redis.ConnectionError()]
    on_loop.put(write("1", 1.0))
    await on_loop.ended()
    assert on_loop.writer.flush(0.0)
    assert on_loop.told() == [CONNECTION_ERROR, RedisCacheEvent(Kind.WRITE_DROPPED, 1)]
    on_loop.breaker.failed()
    on_loop.put(write("2", 2.0))
    await on_loop.ended()
    assert on_loop.requests == [[stored("1", 1.0)]]
    assert on_loop.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 1)]


async def test_a_task_that_is_cancelled_has_dropped_its_batch(on_loop: Scene) -> None:
    on_loop.put(write("1", 1.0))
    await auntil(lambda: len(on_loop.requests) == 1)
    task = on_loop.writer._task
    assert task is not None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert on_loop.writer.flush(0.0)
    assert on_loop.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 1)]
    on_loop.opened.set()
    on_loop.put(write("2", 2.0))
    await on_loop.ended()
    assert on_loop.requests[1:] == [[stored("2", 2.0)]]


def test_a_loop_that_ended_leaves_the_writing_to_the_next(on_loop: Scene) -> None:
    async def begin() -> None:
        on_loop.put(write("1", 1.0))
        await auntil(lambda: len(on_loop.requests) == 1)

    async def go_on() -> None:
        on_loop.opened = asyncio.Event()
        on_loop.opened.set()
        on_loop.put(write("2", 2.0))
        await on_loop.ended()

    ended = asyncio.new_event_loop()
    ended.run_until_complete(begin())
    first = on_loop.writer._task
    asyncio.run(go_on())
    assert on_loop.requests == [[stored("1", 1.0)], [stored("2", 2.0)]]
    assert first is not None
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        ended.run_until_complete(first)
    ended.close()


async def test_a_loop_that_does_not_reach_redis_takes_nothing_from_others(on_loop: Scene) -> None:
    async def elsewhere() -> None:
        on_loop.foreign = asyncio.get_running_loop()
        on_loop.put(write("foreign", 1.0))

    on_loop.put(write("1", 1.0))
    await asyncio.to_thread(asyncio.run, elsewhere())
    assert on_loop.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 1)]
    assert on_loop.writer.find("foreign") is None
    on_loop.opened.set()
    await on_loop.ended()
    assert on_loop.requests == [[stored("1", 1.0)]]


def test_where_no_loop_runs_any_more_it_is_dropped(on_loop: Scene) -> None:
    on_loop.put(write("1", 1.0))
    assert on_loop.writer.flush(0.0)
    assert on_loop.told() == [RedisCacheEvent(Kind.WRITE_DROPPED, 1)]


# -- all of them


class Flushed:
    """Notes how long it was waited for, which takes a second."""

    def __init__(self, clock: ManualTime, *, in_background: bool = True) -> None:
        self.in_background = in_background
        self.waited: list[float] = []
        self._clock = clock

    def flush(self, seconds: float) -> None:
        self.waited.append(seconds)
        self._clock.advance(1.0)


def test_all_writers_together_are_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualTime()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    on_a_loop = Flushed(clock, in_background=False)
    writers: list[Any] = [on_a_loop, *(Flushed(clock) for _ in range(3))]
    flush_all(writers, 1.5)
    assert [writer.waited for writer in writers] == [[], [1.5], [0.5], [0.0]]
