"""What the writer sends, what it drops, and what it says of both."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from prefetch_embeddings._redis import writer as module
from prefetch_embeddings._redis.codec import Codec
from prefetch_embeddings._redis.jobs import Job, NotAsked, Refusal
from prefetch_embeddings._redis.lease import Lease
from prefetch_embeddings._redis.recorder import RedisRecorder
from prefetch_embeddings._redis.writer import Write, Writer
from tests.helpers import PATIENCE, Call, until

DIGEST = "0" * 32
PLAIN = Codec()
LEASE = Lease("key", "token")


def write(key: str, *vector: float, lease: Lease | None = None) -> Write:
    """Return a write of `vector`, or of none at all."""
    return Write(key, DIGEST, array("d", vector) if vector else None, lease)


class Scene:
    """A writer, and the jobs that it has sent; the test ends them."""

    def __init__(self, **options: Any) -> None:
        self.jobs: list[tuple[str, Job]] = []
        self.takes = True
        self.recorder = RedisRecorder(None)
        options = {"ttl_milliseconds": None, **options}
        self.writer = Writer(self._send, codec=PLAIN, recorder=self.recorder, **options)

    def _send(self, key: str, job: Job) -> bool:
        if self.takes:
            self.jobs.append((key, job))
        return self.takes

    def end(self, replies: Any) -> None:
        self.jobs.pop(0)[1].end(replies)

    def counts(self) -> tuple[int, int, int]:
        stats = self.recorder.stats()
        return stats.writes, stats.writes_dropped, stats.errors


@pytest.mark.parametrize(
    ("ttl", "expected"),
    [(None, ("SET", "key", PLAIN.encode(array("d", [1.0]), DIGEST))), (5, None)],
)
def test_a_write_is_a_command(ttl: int | None, expected: Any) -> None:
    value = PLAIN.encode(array("d", [1.0]), DIGEST)
    command = write("key", 1.0).command(PLAIN, ttl)
    assert command == (expected or ("SET", "key", value, "PX", 5))
    assert write("key", 1.0, lease=LEASE).command(PLAIN, ttl) == LEASE.leave(value, ttl)
    assert write("key", lease=LEASE).command(PLAIN, ttl) == LEASE.leave(b"", ttl)


def test_a_vector_can_be_read_until_it_is_written() -> None:
    scene = Scene()
    scene.writer.put(write("key", 1.0, 2.0))
    found = scene.writer.find("key")
    assert found == [1.0, 2.0]
    assert scene.writer.find("key") is not found, "each gets a list of its own"
    assert scene.writer.find("other") is None
    scene.end(["OK"])
    assert scene.writer.find("key") is None
    assert scene.counts() == (1, 0, 0)


def test_a_newer_vector_is_found_before_one_that_is_under_way() -> None:
    scene = Scene()
    scene.writer.put(write("key", 1.0))
    scene.writer.put(write("key", 2.0))
    assert scene.writer.find("key") == [2.0]
    scene.end(["OK"])
    assert scene.writer.find("key") == [2.0]
    scene.end(["OK"])
    assert scene.writer.find("key") is None


def test_what_was_forgotten_is_not_found_any_more() -> None:
    scene = Scene()
    scene.writer.put(write("key", 1.0))
    scene.writer.drop("key")
    assert scene.writer.find("key") is None
    scene.end(["OK"])


def test_a_vector_is_encoded_only_when_it_is_sent() -> None:
    scene = Scene()
    scene.writer.put(write("key", 1.0))
    [(key, job)] = scene.jobs
    assert (key, job.commands()) == ("key", [write("key", 1.0).command(PLAIN, None)])
    scene.end(["OK"])


def test_a_lease_given_up_is_no_vector() -> None:
    scene = Scene()
    scene.writer.put(write("key", lease=LEASE))
    assert scene.writer.find("key") is None
    scene.end(["OK"])
    assert scene.counts() == (0, 0, 0)


def test_more_than_may_wait_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 2 * write("a", 1.0).size)
    scene = Scene()
    for key in "abc":
        scene.writer.put(write(key, 1.0))
    assert [key for key, _ in scene.jobs] == ["a", "b"]
    assert scene.counts() == (0, 1, 0)
    scene.end(["OK"])
    scene.writer.put(write("d", 1.0))
    assert [key for key, _ in scene.jobs] == ["b", "d"]


def test_what_cannot_be_sent_is_dropped() -> None:
    scene = Scene()
    scene.takes = False
    scene.writer.put(write("key", 1.0))
    assert scene.writer.find("key") is None
    assert scene.writer.flush(0)
    assert scene.counts() == (0, 1, 0)


def test_what_redis_refuses_is_dropped_and_warned_of_once(caplog: Any) -> None:
    scene = Scene()
    for _ in range(3):
        scene.writer.put(write("key", 1.0))
        scene.end([Refusal("OutOfMemoryError", "OOM")])
    assert scene.counts() == (0, 3, 3)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "refuses to store vectors (OutOfMemoryError)" in caplog.text


def test_a_key_that_moves_is_dropped_without_a_word(caplog: Any) -> None:
    scene = Scene()
    scene.writer.put(write("key", 1.0))
    scene.end([Refusal("TryAgainError", "TRYAGAIN")])
    assert scene.counts() == (0, 1, 0)
    assert caplog.records == []


@pytest.mark.parametrize("error", [NotAsked(), ConnectionError()])
def test_a_request_that_fails_is_dropped(error: Exception) -> None:
    scene = Scene()
    scene.writer.put(write("key", 1.0))
    scene.end(error)
    assert scene.counts() == (0, 1, 0)  # the lane has told of the error
    assert scene.writer.flush(0)


def test_after_closing_nothing_is_taken() -> None:
    scene = Scene()
    scene.writer.close()
    scene.writer.put(write("key", 1.0))
    assert scene.jobs == []
    assert scene.counts() == (0, 1, 0)


def test_who_waits_until_all_is_written_is_woken() -> None:
    scene = Scene()
    scene.writer.put(write("a", 1.0))
    scene.writer.put(write("b", 1.0))
    waiting = Call(scene.writer.flush, PATIENCE)
    until(lambda: bool(scene.writer._waiting))
    assert not scene.writer.flush(0.001)
    scene.end(["OK"])
    scene.end(["OK"])
    assert waiting.result() is True
    assert not scene.writer._waiting


def test_what_comes_out_of_a_finaliser_is_written_as_well() -> None:
    """No lock is held: what is put in the middle of a put is taken."""
    scene = Scene()
    send: Callable[[str, Job], bool] = scene._send
    nested = threading.Event()

    def meddling(key: str, job: Job) -> bool:
        if not nested.is_set():
            nested.set()
            scene.writer.put(write("inner", 2.0))
            scene.writer.flush(0)
        return send(key, job)

    scene.writer._send = meddling
    scene.writer.put(write("outer", 1.0))
    assert [key for key, _ in scene.jobs] == ["inner", "outer"]
    scene.end(["OK"])
    scene.end(["OK"])
    assert scene.counts() == (2, 0, 0)
