"""How lanes take jobs to Redis: who waits, who leaves, what is connected, what is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from prefetch_embeddings._background import pool as workers
from prefetch_embeddings._redis import jobs as job_module
from prefetch_embeddings._redis import lines, sessions, transports
from prefetch_embeddings._redis.breaker import Health
from prefetch_embeddings._redis.jobs import Gone, Job, NotAsked, Refusal, judge, more_time
from prefetch_embeddings._redis.tasks import TaskLane
from tests.helpers import auntil, until
from tests.redis_tier import lanes
from tests.redis_tier.lanes import HANG, Asked, Server, submit

health, lane, server = lanes.health, lanes.lane, lanes.server


def test_each_job_gets_its_own_replies(lane: Any, server: Server) -> None:
    one = lane()
    assert submit(one, "a", "b").replies() == [("a",), ("b",)]
    assert submit(one, "c").replies() == [("c",)]
    assert server.opened == 1, "a connection is made once and kept"


def test_jobs_that_come_together_travel_together(lane: Any, server: Server) -> None:
    one = lane(most=1)
    server.gate.clear()
    first = submit(one, "first")
    assert server.entered.acquire(timeout=HANG)
    others = [submit(one, number) for number in range(sessions.MOST_JOBS)]
    server.gate.set()
    assert [other.replies() for other in others] == [[(number,)] for number in range(64)]
    assert first.replies() == [("first",)]
    assert [len(request) for request in server.requests] == [1, 64]


def test_no_request_is_longer_than_may_be(lane: Any, server: Server) -> None:
    one = lane(most=1)
    server.gate.clear()
    submit(one, "first")
    assert server.entered.acquire(timeout=HANG)
    large = [submit(one, *range(100)) for _ in range(2)]
    server.gate.set()
    assert [asked.replies() for asked in large] == [[(number,) for number in range(100)]] * 2
    assert [len(request) for request in server.requests] == [1, 100, 100]


def test_one_that_hangs_holds_up_no_other(lane: Any, server: Server) -> None:
    one = lane(most=2)
    server.answer = lambda commands: server.gate.wait(HANG) and list(commands)  # type: ignore[return-value,assignment]
    server.gate.clear()
    submit(one, "hangs")
    assert server.entered.acquire(timeout=HANG)
    submit(one, "next")
    assert server.entered.acquire(timeout=HANG), "it waits for the one that hangs"
    assert server.opened == 2


def test_what_is_left_in_line_is_not_sent(lane: Any, server: Server) -> None:
    one = lane(most=1)
    server.gate.clear()
    submit(one, "first")
    assert server.entered.acquire(timeout=HANG)
    left, kept = submit(one, "left"), submit(one, "kept")
    assert left.job.leave()
    server.gate.set()
    assert kept.replies() == [("kept",)]
    assert server.requests == [[("first",)], [("kept",)]]
    assert left.job.sent is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_reply_for_a_caller_that_was_interrupted_is_put_to_use(
    lane: Any, server: Server, when: str
) -> None:
    came_late: list[Any] = []
    heard = threading.Event()

    def late(replies: list[Any]) -> None:
        came_late.append(replies)
        heard.set()

    one = lane()
    server.gate.clear()
    asked = submit(one, "a", late=late)
    assert server.entered.acquire(timeout=HANG)
    if when == "before":
        asked.job.give_up()
        server.gate.set()
    else:
        server.gate.set()
        asked.replies()
        asked.job.give_up()
    assert heard.wait(HANG)
    assert came_late == [[("a",)]]
    assert asked.told.is_set() is (when == "after")


def test_connecting_that_takes_long_holds_up_nobody_and_is_kept(lane: Any, server: Server) -> None:
    one = lane(timeout=0.05)
    server.may_connect.clear()
    first = submit(one, "first")
    assert one.more(first.job, 0.0) == 0.0
    assert server.connecting.wait(HANG)
    until(lambda: not one.submit(Asked("second").job))  # no time is left for it: no more waiting
    patient = Asked("patient")
    assert one.submit(patient.job, patient=True)
    assert first.job.leave()
    assert not one.connected
    server.may_connect.set()
    assert patient.replies() == [("patient",)]
    assert submit(one, "third").replies() == [("third",)]
    assert server.opened == 1
    assert one.connected


def test_where_there_is_no_connection_to_be_had_all_are_told(
    lane: Any, server: Server, health: Health
) -> None:
    one = lane()
    server.refuses = ConnectionRefusedError()
    server.may_connect.clear()
    asked = [submit(one, "a"), submit(one, "b")]
    server.may_connect.set()
    assert [each.replies() for each in asked] == [server.refuses] * 2
    assert health.breaker.closed
    for _ in range(2):
        assert submit(one, "more").replies() is server.refuses
    assert not health.breaker.closed


def test_while_somebody_wants_it_it_goes_on_trying_and_closes_the_breaker(
    lane: Any, server: Server, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "RETRY_SECONDS", 0.01)
    one = lane()
    server.refuses = ConnectionRefusedError()
    submit(one, "a").replies()
    until(lambda: not health.breaker.closed)
    one.wanted()
    server.refuses = None
    until(lambda: health.breaker.closed)
    assert server.requests == [], "nobody had to pay for a probe"


def test_a_lane_that_nobody_wants_lets_go(
    lane: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "IDLE_SECONDS", 0.01)
    one = lane()
    submit(one, "a").replies()
    until(lambda: server.closed == 1 and not one.connected)
    assert submit(one, "b").replies() == [("b",)]
    assert server.opened == 2


def test_a_connection_that_closed_while_it_was_idle_is_replaced(
    lane: Any, server: Server, health: Health
) -> None:
    one = lane()
    submit(one, "a").replies()

    def gone(commands: Sequence[Any]) -> list[Any]:
        server.answer = list
        raise Gone from ConnectionResetError()

    server.answer = gone
    assert submit(one, "b").replies() == [("b",)]
    assert (server.opened, server.closed) == (2, 1)


def test_a_new_connection_that_closes_at_once_is_an_error(lane: Any, server: Server) -> None:
    def gone(commands: Sequence[Any]) -> list[Any]:
        raise Gone from ConnectionResetError()

    server.answer = gone
    error = submit(lane(), "a").replies()
    assert isinstance(error, Gone)
    assert error.name_of_class == "ConnectionResetError"


@pytest.mark.parametrize("raised", [LookupError(), SystemExit(), KeyboardInterrupt()])
def test_whatever_a_client_raises_ends_the_job_and_not_the_lane(
    lane: Any, server: Server, raised: BaseException
) -> None:
    def fails(commands: Sequence[Any]) -> list[Any]:
        raise raised

    one = lane(most=1)
    server.answer = fails
    error = submit(one, "a").replies()
    assert isinstance(error, Exception)
    assert raised in (error, error.__cause__)
    server.answer = list
    assert submit(one, "b").replies() == [("b",)]


def test_another_number_of_replies_than_of_commands_is_nobodys(lane: Any, server: Server) -> None:
    server.answer = lambda commands: [None]
    assert isinstance(submit(lane(), "a", "b").replies(), ValueError)


def test_after_a_server_has_become_another_no_connection_is_used_again(
    lane: Any, server: Server
) -> None:
    one = lane(most=1)
    submit(one, "a").replies()
    one.drop_connections()
    assert submit(one, "b").replies() == [("b",)]
    assert (server.opened, server.closed) == (2, 1)


def test_a_time_out_makes_suspect_what_was_idle_for_long(
    lane: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall may have forgotten it. What was used of late is not thrown away."""
    one = lane(most=1)
    asked = submit(one, "a")
    asked.replies()
    assert one.more(asked.job, 0.0) == 0.0
    submit(one, "b").replies()
    assert server.opened == 1
    monkeypatch.setattr(transports, "RESTED_SECONDS", 0.0)
    assert one.more(asked.job, 0.0) == 0.0
    submit(one, "c").replies()
    assert server.opened == 2


def test_a_lane_that_does_not_queue_says_so(lane: Any, server: Server) -> None:
    one = lane(most=2, queues=False)
    server.gate.clear()
    waiting = [submit(one, "a"), submit(one, "b")]
    for _ in waiting:
        assert server.entered.acquire(timeout=HANG)
    assert not one.submit(Asked("c").job)
    server.gate.set()
    assert [asked.replies() for asked in waiting] == [[("a",)], [("b",)]]


def test_after_closing_nothing_is_taken_and_nobody_is_left_waiting(
    lane: Any, server: Server
) -> None:
    one = lane(most=1)
    server.gate.clear()
    first = submit(one, "first")
    assert server.entered.acquire(timeout=HANG)
    second = submit(one, "second")
    one.close()
    assert not one.submit(Asked("third").job)
    server.gate.set()
    assert first.replies() == [("first",)]
    assert isinstance(second.replies(), NotAsked)


def test_where_no_thread_can_be_started_nothing_is_taken(
    lane: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("no more threads")

    monkeypatch.setattr(workers, "start", refuse)
    assert not lane().submit(Asked("a").job)


def test_a_finaliser_may_submit_while_the_same_thread_does(lane: Any) -> None:
    """There is no lock: what is submitted in the middle of submitting is taken as well."""
    one = lane()
    inner: list[Asked] = []
    meddled = threading.Event()

    class Meddling(dict[object, None]):
        def popitem(self) -> tuple[object, None]:
            if not meddled.is_set():
                meddled.set()
                inner.append(submit(one, "inner"))
            return super().popitem()

    submit(one, "before").replies()
    one._shared.idle = Meddling(one._shared.idle)
    assert submit(one, "outer").replies() == [("outer",)]
    assert inner[0].replies() == [("inner",)]


# -- whose lateness it is


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(job_module, "time", clock)
    return clock


def test_the_time_that_redis_has_counts_from_when_it_was_asked(clock: Clock) -> None:
    job = Job([("GET", "a")], lambda: None)
    clock.now = 100.25
    job.sent = 100.125
    assert more_time(job, 0.25, 0.0) == pytest.approx(0.125)
    clock.now = 100.5
    assert more_time(job, 0.25, clock.now) == 0.0


def test_in_a_line_that_moves_one_may_wait_but_not_for_ever(clock: Clock) -> None:
    job = Job([("GET", "a")], lambda: None)
    clock.now = 100.25
    assert more_time(job, 0.25, moved_at=100.2) == pytest.approx(0.2)
    assert more_time(job, 0.25, moved_at=99.0) == 0.0
    clock.now = 100.0 + job_module.MOST_TIMEOUTS * 0.25 + 0.01
    assert more_time(job, 0.25, moved_at=clock.now) == 0.0


def judged(*replies: Any) -> tuple[list[str], list[Any]]:
    """Return what is told of replies, and which refusals are heeded."""
    heeded: list[Any] = []

    said: list[str] = []

    class Told:
        def answered(self, seconds: float) -> None:
            said.append("answered")

        def failed(self, error: BaseException, began: float, seconds: float) -> None:
            said.append("failed")

    told: Any = Told()
    judge(replies, told, 0.0, 0.0, heeded.append)
    return said, heeded


def test_what_replies_say_of_a_place() -> None:
    assert judged(None, b"value") == (["answered"], [])
    wrong_type = Refusal("ResponseError", "WRONGTYPE")
    assert judged(wrong_type) == (["answered"], [])
    password = Refusal("AuthenticationError", "NOAUTH")
    assert judged(password, password) == (["failed"], [password] * 2)
    assert judged(password, None) == (["answered"], [password])
    for code in ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "READONLY", "OOM", "MISCONF"):
        refusal = Refusal("ResponseError", code)
        assert judged(refusal) == (["answered"], [refusal])


# -- tasks


class Client:
    """An async client that hangs when told, and does not care for being cancelled."""

    def __init__(self) -> None:
        self.requests: list[list[Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def execute(self, commands: Sequence[Any]) -> list[Any]:
        self.requests.append(list(commands))
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                continue
        return list(commands)


async def test_coroutines_share_requests_of_an_async_client(health: Health) -> None:
    client = Client()
    lane = TaskLane(client.execute, most=1, health=health, heed=lambda refusal: None)
    asked = [Asked(number) for number in range(100)]
    for each in asked:
        assert lane.submit(each.job)
    await auntil(lambda: all(each.told.is_set() for each in asked))
    assert [each.job.replies for each in asked] == [[(number,)] for number in range(100)]
    assert [len(request) for request in client.requests] == [64, 36]
    lane.close()
    assert not lane.submit(Asked("more").job)


async def test_a_client_that_swallows_a_cancellation_keeps_nobody(health: Health) -> None:
    client = Client()
    lane = TaskLane(client.execute, most=1, health=health, heed=lambda refusal: None)
    client.gate.clear()
    first = Asked("a")
    assert lane.submit(first.job)
    await auntil(lambda: bool(client.requests))
    assert first.job.leave()
    first.job.sent = time.monotonic() - 60.0
    second = Asked("b")
    assert lane.submit(second.job)  # this cancels what nobody waits for any more
    await asyncio.sleep(0)
    client.gate.set()
    await auntil(second.told.is_set)
    assert second.job.replies == [("b",)]
    assert not first.told.is_set()


async def test_what_an_async_client_raises_is_the_jobs(health: Health) -> None:
    error = LookupError()

    async def fails(commands: Sequence[Any]) -> list[Any]:
        raise error

    lane = TaskLane(fails, most=1, health=health, heed=lambda refusal: None)
    asked = Asked("a")
    assert lane.submit(asked.job)
    await auntil(asked.told.is_set)
    assert asked.job.replies is error


def test_without_a_loop_nothing_is_taken(health: Health) -> None:
    lane = TaskLane(Server().open, most=1, health=health, heed=lambda refusal: None)  # type: ignore[arg-type]
    assert not lane.submit(Asked("a").job)
