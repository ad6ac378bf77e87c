"""One call in the fleet: processes that ask for one text at once make one upstream call."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefetch_embeddings._redis import lease
from prefetch_embeddings._redis.connections import ConnectionSession
from prefetch_embeddings.embeddings import PrefetchingEmbeddings
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.helpers import until
from tests.redis_tier.fleet import PROCESSES, Fleet
from tests.redis_tier.insides import key, set_longest_block, with_gate
from tests.redis_tier.models import CountingModel, ModelError, vector_of
from tests.redis_tier.server import HANG, RedisServer

ROUNDS = 100


class GatedModel(CountingModel):
    """Waits, inside a query, until the test opens the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)

    def embed_query(self, text: str, **kwargs: object) -> list[float]:
        self.entered.release()
        assert self.gate.wait(HANG)
        return super().embed_query(text)

    async def aembed_query(self, text: str, **kwargs: object) -> list[float]:
        return await asyncio.to_thread(self.embed_query, text)


def only_woken(tier: RedisCachedEmbeddings) -> RedisCachedEmbeddings:
    """Have nothing but being woken end a wait: looking after a while would hide a lost wake-up."""
    set_longest_block(tier, 10 * HANG)
    return tier


@pytest.fixture
def fleet(server: RedisServer) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(**options: Any) -> Fleet:
        made.append(Fleet(server.url, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
    until(lambda: server.connections() == 0)


def test_eight_processes_one_text_one_call(fleet: Callable[..., Fleet]) -> None:
    # A lease that never runs out here: on a busy machine one would, and rightly be called again.
    one = fleet(lease=HANG)
    for number in range(ROUNDS):
        one.ask(text := f"text {number}")
        for pipe in one.pipes:
            assert pipe.poll(HANG)
            assert pipe.recv()[1] == vector_of(text)
        assert one.calls.value == number + 1


def test_an_owner_that_is_killed_costs_the_others_the_lease(fleet: Callable[..., Fleet]) -> None:
    one = fleet(lease=1.0)
    one.ask("gated text")
    assert one.owner_entered.wait(HANG)
    [owner] = [process for process in one.processes if process.pid == one.owner.value]
    os.kill(one.owner.value, signal.SIGKILL)
    answered = 0
    for pipe, process in zip(one.pipes, one.processes, strict=True):
        if process is not owner:
            assert pipe.poll(HANG)
            assert pipe.recv()[1] == vector_of("gated text")
            answered += 1
    assert answered == PROCESSES - 1


def test_waiters_are_woken_by_the_vector(cached: Any, server: RedisServer) -> None:
    model = GatedModel()
    owner = cached(model, single_flight=True, lease=HANG)
    waiting = CountingModel()
    waiter = only_woken(cached(waiting, single_flight=True, lease=HANG))
    results: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda tier=tier: results.append(tier.embed_query("text")))
        for tier in (owner, waiter, waiter)
    ]
    threads[0].start()
    assert model.entered.acquire(timeout=HANG)
    for thread in threads[1:]:
        thread.start()
    until(lambda: waiter.stats().waited == 2)
    model.gate.set()
    for thread in threads:
        thread.join(HANG)
    assert results == [vector_of("text")] * 3
    assert waiting.queries == []
    assert (waiter.stats().hits, waiter.stats().misses) == (2, 0)
    assert waiter.stats().waited_seconds > 0


def test_coroutines_and_threads_wait_for_each_other(cached: Any) -> None:
    model = GatedModel()
    owner = cached(model, single_flight=True, lease=HANG)
    waiter = cached(CountingModel(), single_flight=True, lease=HANG)

    async def main() -> None:
        first = asyncio.create_task(owner.aembed_query("text"))
        assert await asyncio.to_thread(model.entered.acquire, timeout=HANG)
        second = asyncio.create_task(waiter.aembed_query("text"))
        third = asyncio.create_task(asyncio.to_thread(waiter.embed_query, "text"))
        await asyncio.to_thread(until, lambda: waiter.stats().waited == 2)
        model.gate.set()
        assert list(await asyncio.gather(first, second, third)) == [vector_of("text")] * 3

    asyncio.run(main())
    assert waiter.underlying_embeddings.queries == []


def test_an_owner_whose_model_fails_releases_the_waiters_at_once(cached: Any) -> None:
    model = GatedModel()
    model.failing = {"text"}
    owner = cached(model, single_flight=True, lease=10 * HANG)
    waiter = only_woken(cached(CountingModel(), single_flight=True, lease=10 * HANG))
    outcomes: list[Any] = []

    def fail() -> None:
        with pytest.raises(ModelError):
            owner.embed_query("text")

    def wait() -> None:
        outcomes.append(waiter.embed_query("text"))

    threads = [threading.Thread(target=fail), *(threading.Thread(target=wait) for _ in range(3))]
    threads[0].start()
    assert model.entered.acquire(timeout=HANG)
    for thread in threads[1:]:
        thread.start()
    until(lambda: waiter.stats().waited == 3)
    model.gate.set()
    for thread in threads:
        thread.join(HANG)
        assert not thread.is_alive()
    assert outcomes == [vector_of("text")] * 3
    assert waiter.stats().errors == 0


class FailsAtFirst(CountingModel):
    """Its first two calls fail, the first once its gate is open; the others wait for theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first_gate, self.gate = threading.Event(), threading.Event()
        self.entered = threading.Semaphore(0)
        self.number = itertools.count()

    def embed_query(self, text: str, **kwargs: object) -> list[float]:
        number = next(self.number)
        self.entered.release()
        if number < 2:
            assert self.first_gate.wait(HANG)
            raise ModelError
        assert self.gate.wait(HANG)
        return vector_of(text)


def test_nobody_waits_for_a_third(cached: Any) -> None:
    """One more call for an owner that fails; where calls keep failing, all call for themselves."""
    model = FailsAtFirst()
    tiers = [cached(model, single_flight=True, lease=10 * HANG) for _ in range(4)]
    answers: list[list[float]] = []

    def ask(tier: RedisCachedEmbeddings) -> None:
        with contextlib.suppress(ModelError):
            answers.append(tier.embed_query("text"))

    threads = [threading.Thread(target=ask, args=(tier,)) for tier in tiers]
    threads[0].start()
    assert model.entered.acquire(timeout=HANG)
    for thread in threads[1:]:
        thread.start()
    until(lambda: sum(tier.stats().waited for tier in tiers) == 3)
    model.first_gate.set()
    for _ in range(3):
        assert model.entered.acquire(timeout=HANG), "it waits for the other"
    model.gate.set()
    for thread in threads:
        thread.join(HANG)
    assert answers == [vector_of("text")] * 2


def test_an_owner_that_died_costs_one_more_call(cached: Any, server: RedisServer) -> None:
    """Its lease runs out; one of those that waited takes it, and the others wait for that one."""
    model = CountingModel()
    tiers = [cached(model, single_flight=True, lease=0.5) for _ in range(6)]
    wanted = key(tiers[0], "text")
    with server.client() as client:
        client.set(f"{{{wanted}}}:lease", b"somebody who died", px=500)
    answers: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda tier=tier: answers.append(tier.embed_query("text")))
        for tier in tiers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert answers == [vector_of("text")] * 6
    assert model.queries == ["text"]


def test_waiting_that_is_answered_costs_no_timeout_and_no_breaker(
    cached: Any, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait comes back late by more than the timeout; the waiter still waits."""
    execute = ConnectionSession.execute

    def late(session: ConnectionSession, commands: Any) -> list[Any]:
        replies = execute(session, commands)
        if commands[0][0] == "BLMOVE":
            threading.Event().wait(0.2)
        return replies

    monkeypatch.setattr(ConnectionSession, "execute", late)
    model = GatedModel()
    owner = cached(model, single_flight=True, lease=HANG)
    waiting = CountingModel()
    waiter = cached(waiting, single_flight=True, lease=HANG, timeout=0.15)
    waiter.warm_up()
    waiting.queries.clear()
    results: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda tier=tier: results.append(tier.embed_query("text")))
        for tier in (owner, waiter)
    ]
    threads[0].start()
    assert model.entered.acquire(timeout=HANG)
    threads[1].start()
    until(lambda: waiter.stats().waited_seconds > 1.0)
    model.gate.set()
    for thread in threads:
        thread.join(HANG)
    assert results == [vector_of("text")] * 2
    assert waiting.queries == []
    assert waiter.stats().errors == 0


async def test_a_query_cancelled_while_it_takes_the_lease_leaves_none(
    cached: Any, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered = threading.Event(), threading.Event()
    with_gate(monkeypatch, "EVAL", gate, entered)
    tier = cached(CountingModel(), single_flight=True, lease=10 * HANG)
    asking = asyncio.create_task(tier.aembed_query("text"))
    assert await asyncio.to_thread(entered.wait, HANG)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    gate.set()
    with server.client() as client:
        name = f"{{{key(tier, 'text')}}}:lease"
        await asyncio.to_thread(until, lambda: client.keys("*wake*") and not client.exists(name))
    await tier.aclose()


async def test_a_cancelled_owner_releases_the_waiters(cached: Any) -> None:
    class NeverEnding(CountingModel):
        entered = asyncio.Event()

        async def aembed_query(self, text: str, **kwargs: object) -> list[float]:
            self.entered.set()
            await asyncio.Event().wait()
            raise AssertionError

    model = NeverEnding()
    owner = cached(model, single_flight=True, lease=10 * HANG)
    waiter = cached(CountingModel(), single_flight=True, lease=10 * HANG)
    first = asyncio.create_task(owner.aembed_query("text"))
    await asyncio.wait_for(model.entered.wait(), HANG)
    second = asyncio.create_task(waiter.aembed_query("text"))
    await asyncio.to_thread(until, lambda: waiter.stats().waited == 1)
    first.cancel()
    assert await asyncio.wait_for(second, HANG) == vector_of("text")
    await asyncio.gather(owner.aclose(), waiter.aclose())


def test_a_cancelled_waiter_disturbs_nobody(cached: Any, server: RedisServer) -> None:
    model = GatedModel()
    owner = cached(model, single_flight=True, lease=HANG)
    waiter = cached(CountingModel(), single_flight=True, lease=HANG)

    async def main() -> None:
        first = asyncio.create_task(owner.aembed_query("text"))
        assert await asyncio.to_thread(model.entered.acquire, timeout=HANG)
        second, third = (asyncio.create_task(waiter.aembed_query("text")) for _ in range(2))
        await asyncio.to_thread(until, lambda: waiter.stats().waited == 2)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        model.gate.set()
        assert list(await asyncio.gather(first, third)) == [vector_of("text")] * 2

    asyncio.run(main())


def test_redis_that_dies_while_one_waits_ends_the_wait(
    cached: Any, fragile_server: RedisServer
) -> None:
    model = GatedModel()
    owner = cached(model, fragile_server.url, single_flight=True, lease=10 * HANG)
    waiter = cached(CountingModel(), fragile_server.url, single_flight=True, lease=10 * HANG)
    results: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda tier=tier: results.append(tier.embed_query("text")))
        for tier in (owner, waiter)
    ]
    threads[0].start()
    assert model.entered.acquire(timeout=HANG)
    threads[1].start()
    until(lambda: waiter.stats().waited == 1)
    fragile_server.kill()
    threads[1].join(HANG)
    assert results == [vector_of("text")]  # the owner still is at it
    model.gate.set()
    threads[0].join(HANG)
    assert results == [vector_of("text")] * 2


def test_a_late_owner_does_not_take_the_lease_of_another(cached: Any, server: RedisServer) -> None:
    model = GatedModel()
    late = cached(model, single_flight=True, lease=HANG)
    thread = threading.Thread(target=late.embed_query, args=("text",))
    thread.start()
    assert model.entered.acquire(timeout=HANG)
    wanted = key(late, "text")
    with server.client() as client:
        assert client.get(f"{{{wanted}}}:lease")
        client.set(f"{{{wanted}}}:lease", b"another owner")  # the first lease ran out meanwhile
        model.gate.set()
        thread.join(HANG)
        assert late.flush(HANG)
        assert client.get(f"{{{wanted}}}:lease") == b"another owner"
        assert client.get(wanted)  # its vector helps all the same


def test_nothing_is_left_in_redis_but_the_vector(cached: Any, server: RedisServer) -> None:
    embeddings = cached(CountingModel(), single_flight=True)
    embeddings.embed_query("text")
    assert embeddings.flush(HANG)
    with server.client() as client:
        until(lambda: client.keys() == [key(embeddings, "text").encode()])


def test_a_prefetch_here_is_joined_by_a_query_there(cached: Any) -> None:
    model = GatedModel()
    here = PrefetchingEmbeddings(cached(model, single_flight=True, lease=HANG))
    there_model = CountingModel()
    there_tier = cached(there_model, single_flight=True, lease=HANG)
    there = PrefetchingEmbeddings(there_tier)
    here.prefetch("text")
    assert model.entered.acquire(timeout=HANG)
    results: list[list[float]] = []
    thread = threading.Thread(target=lambda: results.append(there.embed_query("text")))
    thread.start()
    until(lambda: there_tier.stats().waited == 1)
    model.gate.set()
    thread.join(HANG)
    assert results == [vector_of("text")]
    assert there_model.queries == []
    here.close()
    there.close()


def test_a_ready_made_client_with_a_short_timeout_still_waits(
    cached: Any, server: RedisServer
) -> None:
    model = GatedModel()
    owner = cached(model, single_flight=True, lease=HANG)
    with server.client(socket_timeout=0.2) as client:
        waiter = cached(CountingModel(), client=client, single_flight=True, lease=HANG)
        results: list[list[float]] = []
        threads = [
            threading.Thread(target=lambda tier=tier: results.append(tier.embed_query("text")))
            for tier in (owner, waiter)
        ]
        threads[0].start()
        assert model.entered.acquire(timeout=HANG)
        threads[1].start()
        until(lambda: waiter.stats().waited_seconds > 0.5)  # several slices
        model.gate.set()
        for thread in threads:
            thread.join(HANG)
        assert results == [vector_of("text")] * 2
        assert waiter.stats().errors == 0
        waiter.close()


@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_url_with_a_short_timeout_still_waits(
    cached: Any, server: RedisServer, face: str
) -> None:
    """A command that blocks must be over before its socket gives up."""
    model = GatedModel()
    owner = cached(model, single_flight=True)
    waiter = cached(model, f"{server.url}?socket_timeout=1", single_flight=True)
    tight = cached(model, f"{server.url}?socket_timeout=0.4")
    assert tight._tier.lookups._longest_block == 0.2
    owning = threading.Thread(target=owner.embed_query, args=("text",))
    owning.start()
    assert model.entered.acquire(timeout=HANG)

    def ask() -> None:
        if face == "sync":
            waiter.embed_query("text")
        else:
            asyncio.run(waiter.aembed_query("text"))

    waiting = threading.Thread(target=ask)
    waiting.start()
    until(lambda: waiter.stats().waited)
    model.gate.set()
    for thread in (owning, waiting):
        thread.join(HANG)
    assert model.queries == ["text"]
    assert waiter.stats().errors == 0


def test_a_lease_taken_twice_is_still_ones_own() -> None:
    """A client that retries sends the script again when the first reply was lost."""
    assert lease.joined("key", "mine", [b"waiter", b"mine", 3000]) == lease.Lease("key", "mine")
    other = lease.joined("key", "mine", [b"waiter", b"other", 3000])
    assert other == lease.OtherOwner("key", "other", 3.0)


@pytest.mark.parametrize("seconds", [0.0, 5.5e-17, 0.0004, 0.0005])
def test_no_wait_lasts_for_ever(seconds: float) -> None:
    assert float(str(lease.OtherOwner("key", "other", 1.0).wait(seconds)[-1])) > 0
