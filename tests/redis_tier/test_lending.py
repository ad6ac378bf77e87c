"""Callers that ask on their own threads, by a session that its line lends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from prefetch_embeddings._redis import transports
from prefetch_embeddings._redis.breaker import FAILURES, CircuitBreaker, Health
from prefetch_embeddings._redis.jobs import LATE, NOT_AT_HAND, Gone, Job
from prefetch_embeddings._redis.recorder import RedisRecorder
from prefetch_embeddings._redis.transports import ThreadLane
from tests.helpers import until
from tests.redis_tier import lanes
from tests.redis_tier.lanes import HANG, Asked, Server, Session, submit

health, lane, server = lanes.health, lanes.lane, lanes.server

SHORT = 0.05


def lending(lane: Callable[..., ThreadLane], **options: Any) -> ThreadLane:
    """A lane of one thread whose session is at hand."""
    one = lane(lends=True, **{"most": 1, **options})
    assert submit(one, "first").replies() == [("first",)]
    until(lambda: ask(one, "again") == ("again",))
    return one


def ask(one: ThreadLane, command: str, seconds: float = HANG) -> Any:
    return one.ask((command,), seconds)


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run it in another thread; return what waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()

    def result() -> Any:
        thread.join(HANG)
        assert not thread.is_alive()
        return results[0]

    return result


class Late:
    """The first asker gets nothing in time; the reply is there when it is read."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, session: Session, seconds: float) -> Any:
        if self.asked:
            return session.read()
        self.asked = True
        return LATE


def test_a_caller_asks_on_its_own_thread(lane: Any, server: Server) -> None:
    one = lending(lane)
    assert ask(one, "b") == ("b",)
    assert set(server.askers) == {threading.current_thread()}
    assert server.opened == 1


def test_a_lane_that_does_not_lend_is_asked_by_jobs(lane: Any, server: Server) -> None:
    one = lane()
    assert submit(one, "a").replies() == [("a",)]
    assert ask(one, "b") is NOT_AT_HAND
    assert not server.askers


def test_where_nothing_is_connected_nothing_is_at_hand(lane: Any) -> None:
    assert ask(lane(lends=True), "a") is NOT_AT_HAND


def test_one_session_is_lent_to_one_caller(lane: Any, server: Server) -> None:
    one = lending(lane)
    entered, gate = threading.Event(), threading.Event()

    def hold(session: Session, seconds: float) -> Any:
        entered.set()
        assert gate.wait(HANG)
        return session.read()

    server.ask = hold
    first = in_thread(lambda: ask(one, "first"))
    assert entered.wait(HANG)
    assert ask(one, "second") is NOT_AT_HAND
    job = submit(one, "third")  # its line waits until the session is back
    gate.set()
    assert first() == ("first",)
    assert job.replies() == [("third",)]
    assert server.opened == 1


def test_a_late_reply_is_read_by_the_line_and_is_nobody_elses(
    lane: Any, server: Server, health: Health
) -> None:
    one = lending(lane)
    server.ask = Late()
    assert ask(one, "late", SHORT) is LATE
    until(lambda: (reply := ask(one, "next")) is not NOT_AT_HAND and reply == ("next",))
    assert server.opened == 1, "the connection was thrown away"
    assert ("late",) in [command for request in server.requests for command in request]
    assert health.breaker.closed


def test_late_replies_open_the_breaker(lane: Any, server: Server) -> None:
    # No reply is quick enough for this one: what is read late is no success.
    health = Health(RedisRecorder(None), 0.0, breaker=CircuitBreaker())
    one = lending(lane, health=health)
    for _ in range(FAILURES):
        assert health.breaker.closed
        server.ask = Late()
        until(lambda: ask(one, "late", 0.001) is LATE)
    assert not health.breaker.closed


def test_a_reply_that_stalls_midway_is_cut_off(lane: Any, server: Server) -> None:
    one = lending(lane)

    def stall(session: Session, seconds: float) -> Any:
        assert session.closed.wait(HANG), "nobody cuts it"
        raise Gone

    server.ask = stall
    reply = ask(one, "stalls", SHORT)
    assert isinstance(reply, TimeoutError)
    assert submit(one, "next").replies() == [("next",)]
    assert server.opened == 2


def test_a_session_that_closed_while_it_was_idle_is_replaced(lane: Any, server: Server) -> None:
    one = lending(lane)

    def gone(session: Session, seconds: float) -> Any:
        raise Gone

    server.ask = gone
    assert ask(one, "a") is NOT_AT_HAND
    assert submit(one, "a").replies() == [("a",)]
    assert server.opened == 2


def test_what_a_session_raises_is_counted_and_told(
    lane: Any, server: Server, health: Health
) -> None:
    heeded: list[Any] = []
    one = lending(lane, heed=heeded.append)
    error = OSError("broken")

    def fail(session: Session, seconds: float) -> Any:
        raise error

    server.ask = fail
    assert ask(one, "a") is error
    assert heeded == [None]
    assert submit(one, "b").replies() == [("b",)]
    assert server.opened == 2


def test_a_caller_that_is_interrupted_leaves_no_reply_to_others(lane: Any, server: Server) -> None:
    one = lending(lane)

    def interrupt(session: Session, seconds: float) -> Any:
        raise KeyboardInterrupt

    server.ask = interrupt
    with pytest.raises(KeyboardInterrupt):
        ask(one, "a")
    assert submit(one, "b").replies() == [("b",)]
    assert server.opened == 2


def test_a_caller_that_never_gives_back_holds_up_nobody(lane: Any, server: Server) -> None:
    one = lending(lane)
    shared = one._shared
    until(lambda: shared.borrow(SHORT) is not None)  # and its thread dies
    assert submit(one, "next").replies() == [("next",)]
    assert server.opened == 2


def test_after_a_server_has_become_another_none_is_borrowed(lane: Any, server: Server) -> None:
    one = lending(lane)
    one.drop_connections()
    assert ask(one, "a") is NOT_AT_HAND
    assert submit(one, "a").replies() == [("a",)]
    assert server.opened == 2


def test_a_loop_waits_only_where_replies_come_at_once(
    lane: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "AT_ONCE_SECONDS", HANG)
    one = lending(lane)
    quick = Asked("quick")
    assert one.submit(quick.job, at_once=True)
    assert quick.job.replies == [("quick",)], "it did not wait"
    assert not quick.told.is_set(), "it is told of what it has seen"
    server.ask = Late()
    late = Asked("late")
    assert one.submit(late.job, at_once=True)
    assert late.replies() == [("late",)]
    monkeypatch.setattr(transports, "AT_ONCE_SECONDS", 0.0)  # nothing comes as quickly
    asked = len(server.askers)
    assert submit_at_once(one, "slow").replies() == [("slow",)]
    assert len(server.askers) == asked


def submit_at_once(one: ThreadLane, command: str) -> Asked:
    asked = Asked(command)
    assert one.submit(asked.job, at_once=True)
    return asked


def test_a_late_reply_for_a_caller_that_has_left_is_put_to_use(
    lane: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "AT_ONCE_SECONDS", HANG)
    one = lending(lane)
    server.gate.clear()  # reading waits there
    server.ask = Late()
    put_to_use: list[Any] = []
    job = Job([("late",)], lambda: None, put_to_use.extend)
    assert one.submit(job, at_once=True)
    assert job.leave()
    server.gate.set()
    until(lambda: put_to_use == [("late",)])
