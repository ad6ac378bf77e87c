"""What a deadline bounds: every operation on a socket, and how long one waits for a connection."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from prefetch_embeddings._redis import deadline
from prefetch_embeddings._redis.deadline import DeadlineSocket, within
from prefetch_embeddings.testing import ManualTime
from tests.helpers import PATIENCE, Call, until


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualTime:
    time = ManualTime()
    monkeypatch.setattr(deadline, "time", SimpleNamespace(monotonic=time))
    return time


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Room for one connection at a time."""
    monkeypatch.setattr(deadline, "_connecting", threading.Semaphore(1))
    return deadline._connecting


class FakeSocket:
    """Notes what is done with it."""

    def __init__(self, timeout: float | None = None, error: Exception | None = None) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.closed = False
        self._timeout = timeout
        self._error = error

    def gettimeout(self) -> float | None:
        return self._timeout

    def settimeout(self, seconds: float | None) -> None:
        self.done.append(("settimeout", seconds))

    def recv(self, *arguments: Any) -> bytes:
        self.done.append(("recv", *arguments))
        return b"received"

    def recv_into(self, *arguments: Any) -> int:
        self.done.append(("recv_into", *arguments))
        return 8

    def sendall(self, *arguments: Any) -> None:
        self.done.append(("sendall", *arguments))

    def fileno(self) -> int:
        return 42

    def close(self) -> None:
        self.closed = True
        if self._error is not None:
            raise self._error


def wrapped(timeout: float | None = None) -> tuple[DeadlineSocket, list[tuple[Any, ...]]]:
    """Return a socket with a deadline, and what is done with the one inside."""
    inside: Any = FakeSocket(timeout)
    return DeadlineSocket(inside), inside.done


# -- the time left


def test_the_time_left_is_up_to_the_moment_it_is_none(clock: ManualTime) -> None:
    assert deadline._left() is None
    with within(2.0):
        assert deadline._left() == 2.0
        clock.advance(1.5)
        assert deadline._left() == 0.5
        clock.advance(0.5)
        with pytest.raises(TimeoutError, match=r"^deadline passed$"):
            deadline._left()
    assert deadline._left() is None


def test_a_deadline_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), within(PATIENCE):
        raise KeyError
    assert deadline._left() is None


def test_a_deadline_is_its_threads_own(clock: ManualTime) -> None:
    with within(2.0):
        assert Call(deadline._left).result() is None


# -- sockets


def test_every_operation_gets_what_is_left(clock: ManualTime) -> None:
    connected, done = wrapped()
    buffer = bytearray(8)
    with within(4.0):
        assert connected.recv(8, 1) == b"received"
        clock.advance(1.0)
        assert connected.recv_into(buffer, 8, 2) == 8
        clock.advance(1.0)
        connected.sendall(b"sent")
    assert done == [
        *(("settimeout", 4.0), ("recv", 8, 1)),
        *(("settimeout", 3.0), ("recv_into", buffer, 8, 2)),
        *(("settimeout", 2.0), ("sendall", b"sent")),
    ]


def test_flags_are_none_unless_they_are_given() -> None:
    connected, done = wrapped()
    connected.recv(8)
    connected.recv_into(bytearray(8))
    assert done[1::2] == [("recv", 8, 0), ("recv_into", bytearray(8), 0, 0)]


def test_after_the_deadline_nothing_is_done(clock: ManualTime) -> None:
    connected, done = wrapped()
    with within(1.0):
        clock.advance(1.0)
        for operate in (
            lambda: connected.recv(8),
            lambda: connected.recv_into(bytearray(8)),
            lambda: connected.sendall(b"sent"),
        ):
            with pytest.raises(TimeoutError):
                operate()
    assert not done


@pytest.mark.parametrize(
    ("timeout", "left", "allowed"),
    [
        *((None, None, None), (None, 2.0, 2.0)),
        *((3.0, None, 3.0), (3.0, 2.0, 2.0), (2.0, 3.0, 2.0), (1.0, 0.5, 0.5)),
        *((0.0, None, 0.0), (0.0, 2.0, 0.0)),
    ],
)
def test_the_shorter_of_timeout_and_deadline_counts(
    clock: ManualTime, timeout: float | None, left: float | None, allowed: float | None
) -> None:
    connected, done = wrapped(timeout)
    assert connected.gettimeout() == timeout
    if left is None:
        connected.sendall(b"sent")
    else:
        with within(left):
            connected.sendall(b"sent")
    assert done == [("settimeout", allowed), ("sendall", b"sent")]


def test_what_does_not_block_needs_no_time(clock: ManualTime) -> None:
    connected, done = wrapped(5.0)
    connected.settimeout(0.0)
    assert connected.gettimeout() == 0.0
    with within(1.0):
        clock.advance(2.0)
        assert connected.recv(8) == b"received"
    assert done == [("settimeout", 0.0), ("recv", 8, 0)]


def test_what_else_a_socket_can_it_can() -> None:
    connected, _ = wrapped()
    assert connected.fileno() == 42


# -- connecting


class Connecting:
    """Connects once it is let; notes the thread that does."""

    def __init__(self, connected: FakeSocket | Exception) -> None:
        self.let = threading.Event()
        self.threads: list[threading.Thread] = []
        self._connected = connected

    def __call__(self) -> Any:
        self.threads.append(threading.current_thread())
        assert self.let.wait(PATIENCE)
        if isinstance(self._connected, Exception):
            raise self._connected
        return self._connected

    def ended(self) -> None:
        """Wait until the thread has ended."""
        until(lambda: bool(self.threads))
        self.threads[0].join(PATIENCE)
        assert not self.threads[0].is_alive()


def test_connecting_is_done_by_a_thread_that_holds_nobody_up(places: Any) -> None:
    connect = Connecting(FakeSocket(timeout=3.0))
    connect.let.set()
    connected = deadline._connect_in_time(connect)
    assert connected.gettimeout() == 3.0
    assert places._value == 1
    [thread] = connect.threads
    assert thread.daemon
    assert thread.name == "prefetch-embeddings-redis-connect"
    connect.ended()


def test_what_connecting_raises_is_the_callers(places: Any) -> None:
    error = OSError()
    connect = Connecting(error)
    connect.let.set()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one, the next line tells
        deadline._connect_in_time(connect)
    assert caught.value is error
    assert places._value == 1
    connect.ended()


@pytest.mark.parametrize("error", [None, OSError("not connected")])
def test_a_connection_that_comes_too_late_is_closed(
    clock: ManualTime, places: Any, error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    connected = FakeSocket(error=error)
    connect = Connecting(connected)
    with within(0.001), pytest.raises(TimeoutError):
        deadline._connect_in_time(connect)
    assert places._value == 0, "its thread still connects"
    connect.let.set()
    connect.ended()
    assert connected.closed
    assert places._value == 1
    assert not caplog.records


def test_a_connection_that_fails_too_late_is_nothing_to_close(
    clock: ManualTime, places: Any, caplog: pytest.LogCaptureFixture
) -> None:
    connect = Connecting(OSError())
    with within(0.001), pytest.raises(TimeoutError):
        deadline._connect_in_time(connect)
    connect.let.set()
    connect.ended()
    assert places._value == 1
    assert not caplog.records


def test_no_more_threads_than_may_connect(clock: ManualTime, places: Any) -> None:
    first, second = Connecting(FakeSocket()), Connecting(FakeSocket())
    with within(0.001):
        with pytest.raises(TimeoutError):
            deadline._connect_in_time(first)
        with pytest.raises(TimeoutError, match=r"^too many connections are being opened$"):
            deadline._connect_in_time(second)
    assert not second.threads
    first.let.set()
    first.ended()


def test_without_a_deadline_one_waits_for_a_place(places: Any) -> None:
    places.acquire()
    connect = Connecting(FakeSocket())
    connect.let.set()
    waiting = Call(deadline._connect_in_time, connect)
    until(lambda: bool(places._cond._waiters))
    places.release()
    assert waiting.result().gettimeout() is None
    connect.ended()


def test_without_a_thread_the_place_is_given_back(
    places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError, match="can't start"):
            deadline._connect_in_time(Connecting(FakeSocket()))
    assert places._value == 1


@pytest.mark.parametrize("kind", deadline._BOUNDED)
def test_every_kind_of_connection_is_bounded(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: Any = FakeSocket()
    monkeypatch.setattr(kind, "_connect", lambda connection: inside)
    pool = redis.ConnectionPool(connection_class=kind)
    assert deadline.bound(pool) is pool
    connection = pool.connection_class()
    assert isinstance(connection, kind)
    connected = connection._connect()
    assert isinstance(connected, DeadlineSocket)
    assert connected._socket is inside


def test_a_forked_child_has_all_places(places: Any) -> None:
    places.acquire()
    deadline.reset_after_fork()
    assert deadline._connecting is not places
    assert deadline._connecting._value == deadline.MAX_CONNECTING
