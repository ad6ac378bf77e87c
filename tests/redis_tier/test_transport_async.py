"""How coroutines' commands reach a client, and how event loops come by clients of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest
import redis.asyncio
from redis.exceptions import ResponseError

from prefetch_embeddings._redis import async_connections
from prefetch_embeddings._redis import transports as transport
from prefetch_embeddings._redis.transports import (
    AsyncOverThreads,
    GivenAsyncClient,
    GivenClient,
    NotAsked,
    OwnAsyncClients,
)
from tests.helpers import PATIENCE, Call, auntil, until
from tests.redis_tier.fakes import BLOCK, GET, FakeAsyncClient, FakeClient, Gate, resp_server


async def echo(*command: str) -> str:
    return command[-1]


class AsyncGate:
    """Replies to a command once it is opened; notes which commands began."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.began: list[str] = []

    async def __call__(self, *command: str) -> str:
        self.began.append(command[-1])
        try:
            async with asyncio.timeout(PATIENCE):
                await self.opened.wait()
        except TimeoutError:
            raise AssertionError("nobody opened it, and nobody gave up") from None
        return command[-1]


# -- a sync client of the user's


@pytest.fixture
def over_threads() -> Iterator[Callable[..., AsyncOverThreads]]:
    """Makes transports over clients that reply by a function; lets their threads end."""
    made: list[GivenClient] = []

    def make(reply: Callable[..., Any]) -> AsyncOverThreads:
        made.append(GivenClient(FakeClient(reply)))
        return AsyncOverThreads(made[-1])

    yield make
    for threads in made:
        threads.close()
        assert threads._helpers.join(PATIENCE)


async def test_coroutines_use_the_threads_of_a_sync_client(over_threads: Any) -> None:
    over = over_threads(lambda *command: command[-1])
    assert await over.execute([GET], PATIENCE) == ["key"]
    over.close()
    assert await over.execute([GET], PATIENCE) == ["key"], "the threads are not its own"


def test_it_is_what_the_sync_client_is() -> None:
    threads = GivenClient(object())
    threads.patience = 7.0
    over = AsyncOverThreads(threads)
    assert over.patience == 7.0


async def test_a_coroutine_leaves_a_slow_thread_behind(over_threads: Any) -> None:
    gate = Gate()
    over = over_threads(gate)
    replies = over._threads.submit([GET])
    gate.has_begun(1)
    over._threads.submit = lambda commands: replies
    with pytest.raises(TimeoutError):
        await over.execute([GET], 0.0)
    gate.opened.set()
    assert replies.result(PATIENCE) == [b"key"]


@pytest.mark.parametrize("error", [redis.ConnectionError(), OSError()])
async def test_what_a_thread_raises_is_the_coroutines(over_threads: Any, error: Exception) -> None:
    def fail(*command: str) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await over_threads(fail).execute([GET], PATIENCE)
    assert caught.value is error


async def test_what_waits_for_a_thread_may_be_withdrawn(
    over_threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_HELPERS", 1)
    gate = Gate()
    over = over_threads(gate)
    first = over._threads.submit([GET])
    gate.has_begun(1)
    with pytest.raises(NotAsked):
        await over.execute([("GET", "late")], 0.0)
    assert not over._threads._helpers._jobs
    task = asyncio.create_task(over.execute([("GET", "cancelled")], PATIENCE))
    await auntil(lambda: over._threads._helpers._jobs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not over._threads._helpers._jobs
    gate.opened.set()
    assert first.result(PATIENCE) == [b"key"]
    assert gate.began == ["key"]


# -- an async client of the user's


class Elsewhere:
    """What serves the loops that the client does not belong to."""

    patience = 5.0

    def __init__(self) -> None:
        self.closed: list[str] = []

    async def execute(self, commands: Sequence[Any], seconds: float) -> list[Any]:
        assert seconds == PATIENCE
        return ["elsewhere"] * len(commands)

    def close(self) -> None:
        self.closed.append("close")

    async def aclose(self) -> None:
        self.closed.append("aclose")


async def test_an_async_client_is_asked_on_its_loop() -> None:
    client = FakeAsyncClient(echo)
    given = GivenAsyncClient(client)
    assert await given.execute([GET], PATIENCE) == ["key"]
    assert not client.pipelines
    assert await given.execute([GET, ("GET", "other")], PATIENCE) == ["key", "other"]
    [pipeline] = client.pipelines
    assert not pipeline.open
    given.close()
    assert not client.closed, "it is the user's"


async def test_an_error_that_an_async_client_raises_for_an_answer_stands_in_its_place() -> None:
    error = ResponseError("WRONGTYPE")

    async def refuse(*command: str) -> None:
        raise error

    assert await GivenAsyncClient(FakeAsyncClient(refuse)).execute([GET], PATIENCE) == [error]


async def test_an_async_client_has_so_much_time_and_no_more() -> None:
    given = GivenAsyncClient(FakeAsyncClient(AsyncGate()))
    with pytest.raises(TimeoutError):
        await given.execute([GET], 0.0)


def with_elsewhere(client: Any) -> tuple[GivenAsyncClient, Elsewhere]:
    given = GivenAsyncClient(client)
    given.elsewhere = elsewhere = Elsewhere()
    return given, elsewhere


@pytest.mark.parametrize("end", ["closed", "stopped"])
def test_an_async_client_serves_the_loop_that_uses_it_first(end: str) -> None:
    given = GivenAsyncClient(FakeAsyncClient(echo))

    async def elsewhere() -> None:
        assert not given.is_of(asyncio.get_running_loop())
        with pytest.raises(NotAsked):
            await given.execute([GET], PATIENCE)
        given.elsewhere = Elsewhere()
        assert await given.execute([GET], PATIENCE) == ["elsewhere"]

    async def first() -> None:
        assert given.is_of(asyncio.get_running_loop())
        assert await given.execute([GET], PATIENCE) == ["key"]
        await asyncio.to_thread(asyncio.run, elsewhere())
        assert await given.execute([GET], PATIENCE) == ["key"]

    loop = asyncio.new_event_loop()
    loop.run_until_complete(first())
    if end == "closed":
        loop.close()
    given.elsewhere = None
    # Its loop runs no more: the next one may have it.
    assert asyncio.run(given.execute([GET], PATIENCE)) == ["key"]
    if end == "stopped":
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def test_an_async_client_stays_in_the_process_that_uses_it_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = GivenAsyncClient(FakeAsyncClient(echo))
    assert await given.execute([GET], PATIENCE) == ["key"]
    process = os.getpid()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: process + 1)
        Call(given._lock.acquire).result()  # another of the parent's threads holds it
        given.reset_after_fork()
        with pytest.raises(NotAsked):
            await given.execute([GET], PATIENCE)
    assert await given.execute([GET], PATIENCE) == ["key"]


async def test_a_coroutine_that_the_collector_destroys_may_ask_whose_the_client_is() -> None:
    """That can happen at any moment, also while this very thread asks the same."""
    given = GivenAsyncClient(FakeAsyncClient(echo))
    loop = asyncio.get_running_loop()

    def ask() -> bool:
        with given._lock:
            return given.is_of(loop)

    assert Call(ask).result() is True


async def test_closing_reaches_what_serves_the_other_loops() -> None:
    given, elsewhere = with_elsewhere(FakeAsyncClient(echo))
    given.close()
    assert elsewhere.closed == ["close"]
    await given.aclose()
    assert elsewhere.closed == ["close", "aclose"]
    await GivenAsyncClient(FakeAsyncClient(echo)).aclose()


def test_what_is_known_of_an_async_client() -> None:
    class Client:
        def get_connection_kwargs(self) -> dict[str, float]:
            return {"socket_timeout": 7}

    assert GivenAsyncClient(Client()).patience == 7.0
    assert GivenAsyncClient(object()).patience == 5.0
    assert with_elsewhere(Client())[0].patience == 5.0


# -- clients of its own, one for each loop


class FakePool:
    """Notes how it was disconnected."""

    def __init__(self) -> None:
        self.disconnected: list[dict[str, bool]] = []

    async def disconnect(self, **options: bool) -> None:
        self.disconnected.append(options)


class FakeLoopClient(FakeAsyncClient):
    def __init__(self, reply: Callable[..., Any]) -> None:
        super().__init__(reply)
        self.connection_pool = FakePool()


class Clients:
    """Makes an `OwnAsyncClients`, and the clients in it, which reply by `reply`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reply: Callable[..., Coroutine[Any, Any, Any]] = echo
        self.made: list[FakeLoopClient] = []
        clients = self

        class LoopClient(transport._LoopClient):
            def __init__(self, url: str) -> None:
                super().__init__(url)
                clients.made.append(FakeLoopClient(clients.reply))
                self.client = clients.made[-1]  # type: ignore[assignment]

        patch.setattr(transport, "_LoopClient", LoopClient)

    def own(self, url: str = "redis://localhost") -> OwnAsyncClients:
        return OwnAsyncClients(url)


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Clients:
    return Clients(monkeypatch)


async def test_coroutines_talk_to_redis() -> None:
    with resp_server(GET=b"$2\r\n\xff\x00\r\n") as (port, came):
        own = OwnAsyncClients(f"redis://127.0.0.1:{port}?decode_responses=true")
        assert await own.execute([GET], PATIENCE) == [b"\xff\x00"]
        assert await own.execute([GET, GET], PATIENCE) == [b"\xff\x00", b"\xff\x00"]
        await own.aclose()
    commands = [command for command in came if command[0] != b"CLIENT"]
    assert commands == [[b"GET", b"key"]] * 3


async def test_connections_are_like_those_of_threads_but_bounded_elsewhere() -> None:
    mine = transport._LoopClient("redis://localhost?retry_on_timeout=true")
    pool = mine.client.connection_pool
    assert pool.max_connections > transport.MAX_CONCURRENT + transport.MAX_BLOCKED_COROUTINES
    assert pool.connection_class is async_connections._Connection
    connection = pool.make_connection()  # type: ignore[no-untyped-call]
    assert connection.protocol == 2
    assert connection.retry.get_retries() == 0
    assert connection.socket_timeout is None
    assert pool.connection_kwargs["socket_connect_timeout"] == 5.0
    assert mine.slots._value == transport.MAX_CONCURRENT
    assert mine.blocked._value == transport.MAX_BLOCKED_COROUTINES


def test_what_is_known_without_a_connection() -> None:
    assert OwnAsyncClients("redis://localhost").patience == 5.0
    assert OwnAsyncClients("redis://localhost?socket_timeout=2").patience == 2.0


async def test_a_loop_has_one_client(clients: Clients) -> None:
    own = clients.own()
    assert await own.execute([GET], PATIENCE) == ["key"]
    assert await own.execute([GET], PATIENCE) == ["key"]
    [client] = clients.made
    assert not client.closed
    await own.aclose()
    assert client.closed


def test_a_client_is_closed_with_its_loop(clients: Clients) -> None:
    own = clients.own()
    for count in (1, 2):
        assert asyncio.run(own.execute([GET], PATIENCE)) == ["key"]
        assert [client.closed for client in clients.made] == [1] * count
        assert not own._of_loop


def test_loops_that_ended_without_a_word_are_forgotten(clients: Clients) -> None:
    own = clients.own()
    ended = [asyncio.new_event_loop() for _ in range(2)]
    for loop in ended:
        loop.run_until_complete(own.execute([GET], PATIENCE))
    for loop in ended:
        loop.close()

    async def another() -> None:
        await own.execute([GET], PATIENCE)
        assert list(own._of_loop) == [asyncio.get_running_loop()]

    asyncio.run(another())
    assert [client.closed for client in clients.made] == [0, 0, 1]


def test_closing_reaches_loops_that_run_and_skips_those_that_ended(clients: Clients) -> None:
    own = clients.own()
    ended = asyncio.new_event_loop()
    ended.run_until_complete(own.execute([GET], PATIENCE))

    async def closed_from_outside() -> None:
        await own.execute([GET], PATIENCE)
        ended.close()
        Call(own.close).result()
        assert not own._of_loop
        await auntil(lambda: clients.made[1].closed == 1)

    asyncio.run(closed_from_outside())


def test_a_loop_that_shuts_down_after_closing_finds_nothing_left_to_do(clients: Clients) -> None:
    own = clients.own()
    troubles: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: troubles.append(context))

    async def use_and_close() -> None:
        await own.aclose()  # nothing was opened yet
        await own.execute([GET], PATIENCE)
        await own.aclose()
        assert clients.made[0].closed == 1

    with contextlib.closing(loop):
        loop.run_until_complete(use_and_close())
        loop.run_until_complete(loop.shutdown_asyncgens())
    assert not troubles
    assert clients.made[0].closed == 2, "once more does no harm"


async def test_what_is_left_of_a_closed_client_touches_nothing_newer(clients: Clients) -> None:
    own = clients.own()
    await own.execute([GET], PATIENCE)
    [closed] = own._of_loop.values()
    await own.aclose()
    await own.execute([GET], PATIENCE)
    assert closed.keeper is not None
    await closed.keeper.aclose()  # as when it is collected
    await own.execute([GET], PATIENCE)
    assert len(clients.made) == 2
    await own.aclose()
    assert clients.made[1].closed


def test_closing_on_one_loop_has_the_others_close_theirs(clients: Clients) -> None:
    own = clients.own()

    async def wait_for_the_end() -> None:
        await own.execute([GET], PATIENCE)
        await auntil(lambda: clients.made[0].closed == 1)

    async def end() -> None:
        await own.execute([GET], PATIENCE)
        await own.aclose()
        assert clients.made[1].closed == 1

    other = Call(lambda: asyncio.run(wait_for_the_end()))
    until(lambda: len(own._of_loop) == 1)
    asyncio.run(end())
    other.result()


async def test_more_than_the_urls_connections_wait_for_their_turn(clients: Clients) -> None:
    clients.reply = gate = AsyncGate()
    own = clients.own("redis://localhost?max_connections=1")
    first = asyncio.create_task(own.execute([GET], PATIENCE))
    await auntil(lambda: len(gate.began) == 1)
    with pytest.raises(NotAsked):
        await own.execute([("GET", "late")], 0.0)
    second = asyncio.create_task(own.execute([("GET", "2")], PATIENCE))
    gate.opened.set()
    assert [await first, await second] == [["key"], ["2"]]
    assert gate.began == ["key", "2"]
    [client] = clients.made
    assert not client.connection_pool.disconnected, "nothing is known against the idle ones"
    await own.aclose()


async def test_a_reply_that_does_not_come_speaks_against_what_is_idle(clients: Clients) -> None:
    clients.reply = AsyncGate()
    own = clients.own()
    with pytest.raises(TimeoutError):
        await own.execute([GET], 0.0)
    [client] = clients.made
    assert client.connection_pool.disconnected == [{"inuse_connections": False}]
    await own.aclose()


async def test_commands_that_block_have_places_of_their_own(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_BLOCKED_COROUTINES", 1)
    clients.reply = gate = AsyncGate()
    own = clients.own("redis://localhost?max_connections=1")
    blocked = asyncio.create_task(own.execute([BLOCK], PATIENCE))
    await auntil(lambda: len(gate.began) == 1)
    with pytest.raises(NotAsked):
        await own.execute([BLOCK], PATIENCE)
    other = asyncio.create_task(own.execute([GET], PATIENCE))
    await auntil(lambda: len(gate.began) == 2)
    gate.opened.set()
    assert [await blocked, await other] == [["0.250"], ["key"]]
    assert await own.execute([BLOCK], PATIENCE) == ["0.250"]
    await own.aclose()
