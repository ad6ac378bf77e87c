"""A lane of threads that leads to a server by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from prefetch_embeddings._redis.breaker import CircuitBreaker, Health
from prefetch_embeddings._redis.jobs import Job
from prefetch_embeddings._redis.recorder import RedisRecorder
from prefetch_embeddings._redis.transports import ThreadLane

HANG = 30.0


class Server:
    """What sessions lead to: answers each command with itself, as told."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0
        self.requests: list[list[Any]] = []
        self.connecting = threading.Event()
        self.may_connect = threading.Event()
        self.may_connect.set()
        self.refuses: Exception | None = None
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.answer: Callable[[Sequence[Any]], list[Any]] = list
        self.askers: list[threading.Thread] = []
        self.ask: Callable[[Session, float], Any] = lambda session, seconds: session.read()

    def open(self) -> Session:
        self.connecting.set()
        assert self.may_connect.wait(HANG)
        if self.refuses is not None:
            raise self.refuses
        self.opened += 1
        return Session(self)


class Session:
    """One that callers may borrow where the lane lends."""

    lendable = True

    def __init__(self, server: Server) -> None:
        self._server = server
        self.owed: Any = None
        self.closed = threading.Event()

    def ask(self, command: Any, seconds: float) -> Any:
        self._server.askers.append(threading.current_thread())
        self.owed = command
        return self._server.ask(self, seconds)

    def read(self) -> Any:
        owed, self.owed = self.owed, None
        [reply] = self.execute([owed])
        return reply

    def execute(self, commands: Sequence[Any]) -> list[Any]:
        self._server.requests.append(list(commands))
        self._server.entered.release()
        assert self._server.gate.wait(HANG)
        return self._server.answer(commands)

    def close(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self._server.closed += 1


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def health() -> Health:
    return Health(RedisRecorder(None), HANG, breaker=CircuitBreaker())


@pytest.fixture
def lane(server: Server, health: Health) -> Iterator[Callable[..., ThreadLane]]:
    made: list[ThreadLane] = []
    before = set(threading.enumerate())

    def make(**options: Any) -> ThreadLane:
        options = {
            "most": 2,
            "health": health,
            "heed": lambda refusal: None,
            "timeout": HANG,
            **options,
        }
        made.append(ThreadLane(server.open, **options))
        return made[-1]

    yield make
    server.gate.set()
    server.may_connect.set()
    for one in made:
        one.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG)
        assert not thread.is_alive()
    assert server.opened == server.closed


class Asked:
    """A job, and whether its caller was told."""

    def __init__(self, *commands: Any, late: Callable[[list[Any]], None] | None = None) -> None:
        self.told = threading.Event()
        self.job = Job([(command,) for command in commands], self.told.set, late)

    def replies(self) -> Any:
        assert self.told.wait(HANG)
        return self.job.replies


def submit(lane: ThreadLane, *commands: Any, **options: Any) -> Asked:
    asked = Asked(*commands, **options)
    assert lane.submit(asked.job)
    return asked
