"""How threads' commands reach a connection or a client, and what becomes of both when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redis.exceptions import ResponseError

from prefetch_embeddings._redis import deadline
from prefetch_embeddings._redis import transports as transport
from prefetch_embeddings._redis.transports import GivenClient, NotAsked, OwnClient
from tests.helpers import PATIENCE, Call, until
from tests.redis_tier.fakes import BLOCK, GET, FakeClient, FakeConnections, Gate, resp_server


def own(*scripts: list[Any] | Exception, url: str = "redis://localhost") -> tuple[OwnClient, Any]:
    """Return a client, and what makes its connections: one for each script."""
    client = OwnClient(url)
    connections = FakeConnections(*scripts)
    client._pool.connection_class = connections
    return client, connections


# -- connections of its own


def test_it_talks_to_redis() -> None:
    with resp_server(GET=b"$2\r\n\xff\x00\r\n") as (port, came):
        client = OwnClient(f"redis://127.0.0.1:{port}?decode_responses=true")
        assert client.execute([GET], PATIENCE) == [b"\xff\x00"]
        assert client.execute([GET, ("SET", "key", b"\xff")], PATIENCE) == [b"\xff\x00", b"OK"]
        [connection] = client._idle
        assert isinstance(connection._sock, deadline.DeadlineSocket)
        client.close()
    commands = [command for command in came if command[0] != b"CLIENT"]
    assert commands == [[b"GET", b"key"], [b"GET", b"key"], [b"SET", b"key", b"\xff"]]


def test_a_connection_is_made_once_and_kept() -> None:
    client, connections = own([b"1", b"2", b"3"])
    assert client.execute([GET], PATIENCE) == [b"1"]
    assert client.execute([GET, ("PING",)], PATIENCE) == [b"2", b"3"]
    [connection] = connections.made
    assert connection.sent == [GET, [GET, ("PING",)]]
    assert not connection.disconnected
    client.close()
    assert connection.disconnected == 1


def test_connections_speak_the_shorter_protocol_and_leave_retries_to_the_caller() -> None:
    # What the URL asks for besides must not bring retries back.
    client, connections = own([b"1"], url="redis://localhost?retry_on_timeout=true")
    client.execute([GET], PATIENCE)
    options = connections.made[0].options
    connection: Any = redis.connection.Connection(**options)  # type: ignore[no-untyped-call]
    assert connection.protocol == 2
    assert connection.retry.get_retries() == 0
    assert connection.retry.call_with_retry(lambda: "once", lambda _: None) == "once"
    # Older versions of redis-py have no timeouts of their own.
    assert options["socket_timeout"] == options["socket_connect_timeout"] == 5.0
    assert client.patience == 5.0


def test_the_urls_own_timeout_counts() -> None:
    client, connections = own([b"1"], url="redis://localhost?socket_timeout=2")
    client.execute([GET], PATIENCE)
    assert connections.made[0].options["socket_timeout"] == client.patience == 2.0
    assert connections.made[0].options["socket_connect_timeout"] == 5.0


def test_threads_side_by_side_have_connections_side_by_side() -> None:
    def beside() -> bytes:
        assert client.execute([GET], PATIENCE) == [b"2"]
        return b"1"

    client, connections = own([beside, b"3"], [b"2"])
    assert client.execute([GET], PATIENCE) == [b"1"]
    assert len(connections.made) == 2
    assert client.execute([GET], PATIENCE) == [b"3"], "the one given back last is taken first"
    client.close()
    assert [connection.disconnected for connection in connections.made] == [1, 1]


def test_all_of_it_is_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr(deadline, "time", now)
    client, _ = own([deadline._left])
    assert client.execute([GET], 0.5) == [0.5]
    assert deadline._left() is None


def test_an_error_that_the_server_answers_stands_in_its_place() -> None:
    error = ResponseError("WRONGTYPE")
    client, connections = own([error, b"2"])
    assert client.execute([GET, GET], PATIENCE) == [error, b"2"]
    [connection] = connections.made
    assert not connection.disconnected


def test_a_connection_that_closed_while_idle_is_replaced_and_so_are_the_others() -> None:
    def broken() -> None:
        raise redis.ConnectionError

    def beside() -> bytes:
        client.execute([GET], PATIENCE)
        return b"1"

    client, connections = own([beside, broken, b"?"], [b"1"], [b"new", b"again"])
    client.execute([GET], PATIENCE)
    assert client.execute([GET], PATIENCE) == [b"new"]
    assert client.execute([GET], PATIENCE) == [b"again"]
    first, second, third = connections.made
    assert (first.disconnected, second.disconnected, third.disconnected) == (1, 1, 0)


def test_a_connection_that_a_firewall_forgot_costs_one_timeout() -> None:
    def beside() -> bytes:
        client.execute([GET], PATIENCE)
        return b"1"

    client, connections = own([beside, redis.TimeoutError()], [b"1"], [b"new"])
    client.execute([GET], PATIENCE)
    with pytest.raises(redis.TimeoutError):
        client.execute([GET], PATIENCE)
    assert [connection.disconnected for connection in connections.made] == [1, 1]
    assert client.execute([GET], PATIENCE) == [b"new"]


@pytest.mark.parametrize("error", [redis.ConnectionError(), redis.TimeoutError(), OSError()])
def test_a_new_connection_that_fails_is_not_kept(error: Exception) -> None:
    client, connections = own([b"half", error], [b"new"])
    with pytest.raises(type(error)):
        client.execute([GET, GET], PATIENCE)
    assert connections.made[0].disconnected == 1
    assert client.execute([GET], PATIENCE) == [b"new"]


def test_a_connection_that_cannot_be_made_is_let_go() -> None:
    client, connections = own(redis.ConnectionError())
    with pytest.raises(redis.ConnectionError):
        client.execute([GET], PATIENCE)
    assert connections.made[0].disconnected == 1


def test_a_connection_in_use_is_disconnected_after_use() -> None:
    def close() -> bytes:
        client.close()
        assert not connections.made[0].disconnected
        return b"1"

    client, connections = own([close])
    assert client.execute([GET], PATIENCE) == [b"1"]
    assert connections.made[0].disconnected == 1


# -- a client of the user's


@pytest.fixture
def given() -> Iterator[Callable[..., tuple[GivenClient, FakeClient]]]:
    """Makes transports over clients that reply by a function; lets their threads end."""
    made: list[GivenClient] = []

    def make(reply: Callable[..., Any]) -> tuple[GivenClient, FakeClient]:
        client = FakeClient(reply)
        made.append(GivenClient(client))
        return made[-1], client

    yield make
    for threads in made:
        threads.close()
        assert threads._helpers.join(PATIENCE)


def test_commands_run_on_helper_threads(given: Any) -> None:
    threads, client = given(lambda *command: command[-1])
    assert threads.execute([GET], PATIENCE) == ["key"]
    assert client.threads == ["prefetch-embeddings-redis"]


def test_several_commands_go_through_one_pipeline(given: Any) -> None:
    threads, client = given(lambda *command: command[-1])
    assert threads.execute([GET, ("GET", "other")], PATIENCE) == ["key", "other"]
    [pipeline] = client.pipelines
    assert not pipeline.open
    assert not client.threads


def test_an_error_that_a_client_raises_for_an_answer_stands_in_its_place(given: Any) -> None:
    error = ResponseError("WRONGTYPE")

    def refuse(*command: str) -> None:
        raise error

    threads, _ = given(refuse)
    assert threads.execute([GET], PATIENCE) == [error]


@pytest.mark.parametrize("error", [redis.ConnectionError(), TimeoutError(), SystemExit()])
def test_what_else_a_client_raises_is_the_callers(given: Any, error: BaseException) -> None:
    def fail(*command: str) -> None:
        raise error

    threads, _ = given(fail)
    with pytest.raises(type(error)) as caught:
        threads.execute([GET], PATIENCE)
    assert caught.value is error


def test_a_client_that_takes_too_long_is_left_behind(given: Any) -> None:
    gate = Gate()
    threads, _ = given(gate)
    replies = threads.submit([GET])
    gate.has_begun(1)
    assert not threads.withdraw(replies)
    # The same through `execute`, which must not say that nobody was asked.
    threads.submit = lambda commands: replies
    with pytest.raises(TimeoutError):
        threads.execute([GET], 0.0)
    gate.opened.set()
    assert replies.result(PATIENCE) == [b"key"]


def test_what_waits_for_a_thread_says_that_redis_was_not_asked(
    given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_HELPERS", 1)
    gate = Gate()
    threads, _ = given(gate)
    first = threads.submit([GET])
    gate.has_begun(1)
    second, third = threads.submit([("GET", "2")]), threads.submit([("GET", "3")])
    with pytest.raises(NotAsked):
        threads.execute([("GET", "late")], 0.0)
    assert list(threads._helpers._jobs) == [second, third], "what was given up is not kept"
    gate.opened.set()
    assert [future.result(PATIENCE) for future in (first, second, third)] == [
        *([b"key"], [b"2"], [b"3"])
    ]
    assert gate.began == ["key", "2", "3"]


def test_an_interrupted_caller_is_told_of_the_interruption(
    given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_HELPERS", 1)
    gate = Gate()
    threads, _ = given(gate)
    first = threads.submit([GET])
    gate.has_begun(1)

    def interrupted(future: Future[Any], seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            threads.execute([("GET", "late")], PATIENCE)
    assert not threads._helpers._jobs
    gate.opened.set()
    assert first.result(PATIENCE) == [b"key"]
    assert gate.began == ["key"]


def test_commands_that_block_leave_threads_to_the_others(
    given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_BLOCKED", 1)
    gate = Gate()
    threads, client = given(gate)
    first = threads.submit([BLOCK])
    with pytest.raises(NotAsked):
        Call(threads.submit, [BLOCK]).result()
    second = threads.submit([GET])
    gate.has_begun(2)
    gate.opened.set()
    assert first.result(PATIENCE) == [b"0.250"]
    assert second.result(PATIENCE) == [b"key"]
    until(lambda: threads._blocked._value == 1)  # given back just after the reply
    assert threads.execute([BLOCK], PATIENCE) == [b"0.250"]
    assert client.threads == ["prefetch-embeddings-redis"] * 3


def test_a_command_that_nobody_runs_takes_no_place(
    given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_BLOCKED", 1)
    threads, _ = given(lambda *command: command[-1])
    with monkeypatch.context() as patch:
        patch.setattr(threads._helpers, "submit", lambda job, run: False)
        with pytest.raises(NotAsked):
            threads.submit([BLOCK])
    assert threads.execute([BLOCK], PATIENCE) == ["0.250"]


def test_after_closing_nobody_runs_anything(given: Any) -> None:
    threads, client = given(lambda *command: command[-1])
    threads.close()
    with pytest.raises(NotAsked):
        threads.execute([GET], PATIENCE)
    assert not client.threads


# -- what is known of a client


def test_patience_is_the_clients_socket_timeout() -> None:
    assert GivenClient(redis.Redis(socket_timeout=2)).patience == 2.0
    assert GivenClient(redis.Redis(socket_timeout=None)).patience == 5.0
    assert GivenClient(object()).patience == 5.0
