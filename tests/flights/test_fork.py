"""A forked child starts empty, with threads of its own; its parent notices nothing."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import select
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome, PrefetchStats
from prefetch_embeddings.testing import Gate, ScriptedEmbeddings, assert_no_leaks
from tests.helpers import PATIENCE, Call, until

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    # Since Python 3.12; it is what these tests are about.
    pytest.mark.filterwarnings(r"ignore:This process \(pid=\d+\) is multi-threaded"),
]

Wrap = Callable[..., PrefetchingEmbeddings]

DONE = b"done"


class LockFreeEmbeddings(ScriptedEmbeddings):
    """A model with no lock that a fork could find held by a thread that is not there any more."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, Gate] = {}
        self.failures: list[str] = []

    def hold(self, text: str) -> Gate:
        self.gates[text] = Gate()
        return self.gates[text]

    def embed_query(self, text: str) -> list[float]:
        if gate := self.gates.get(text):
            gate.hold()
        self._fail_if_told(text)
        return self.vector(text)

    async def aembed_query(self, text: str) -> list[float]:
        if gate := self.gates.get(text):
            await gate.ahold()
        self._fail_if_told(text)
        return self.vector(text)

    def _fail_if_told(self, text: str) -> None:
        if text in self.failures:
            self.failures.remove(text)
            raise ConnectionError("unreachable")


@pytest.fixture
def model() -> LockFreeEmbeddings:
    return LockFreeEmbeddings()


def report_and_exit(check: Callable[[], None], pipe: int) -> None:
    """End a forked child: nothing of the test run may go on in it."""
    try:
        check()
        report = DONE
    except BaseException:
        report = traceback.format_exc().encode()
    finally:
        os.write(pipe, report)
        os._exit(0)


def assert_done(child: int, pipe: int) -> None:
    """Wait for a forked child, and fail as it failed."""
    try:
        if not select.select([pipe], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the forked child hangs")
        report = os.read(pipe, 65536)
    finally:
        os.close(pipe)
        os.waitpid(child, 0)
    assert report == DONE, report.decode()


def in_child(check: Callable[[], None]) -> None:
    """Run `check` in a forked child, and fail if it fails there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        report_and_exit(check, writing)
    os.close(writing)
    assert_done(child, reading)


def assert_starts_anew(embeddings: PrefetchingEmbeddings, texts: list[str]) -> None:
    """In a child: nothing is there, and everything works, with threads and loops of its own."""
    model = embeddings.underlying_embeddings
    assert isinstance(model, LockFreeEmbeddings)
    model.gates.clear()
    assert embeddings.stats() == PrefetchStats()
    assert not any(embeddings.is_ready(text) for text in texts)

    for text in texts:
        assert embeddings.prefetch(text) is PrefetchOutcome.STARTED
    for text in texts:  # with a timeout, the child's workers have to do it
        assert embeddings.wait_for_prefetch(text, PATIENCE)
        assert embeddings.embed_query(text) == model.vector(text)
    assert embeddings.embed_query("a child's own") == model.vector("a child's own")

    async def on_a_loop() -> None:
        assert await embeddings.aprefetch("on a loop") is PrefetchOutcome.STARTED
        assert await embeddings.aembed_query("on a loop") == model.vector("on a loop")

    asyncio.run(on_a_loop())
    stats = embeddings.stats()
    assert stats.prefetch_used == stats.prefetch_started == len(texts) + 1
    assert stats.query_missed == 1
    embeddings.close()
    assert_no_leaks(embeddings)


def test_a_child_starts_empty_and_its_parents_flights_complete(
    wrap: Wrap, model: LockFreeEmbeddings
) -> None:
    embeddings = wrap(model, max_workers=1)
    texts = ["ready", "running", "queued", "queued, too", "on a loop"]
    embeddings.prefetch("ready")
    assert embeddings.wait_for_prefetch("ready")
    running = model.hold("running")
    for text in texts[1:4]:
        embeddings.prefetch(text)
    running.wait_until_entered()
    on_loop = model.hold("on a loop")
    with ThreadPoolExecutor(2) as threads:
        query = threads.submit(asyncio.run, embeddings.aembed_query("on a loop"))
        wait = threads.submit(embeddings.wait_for_prefetch, "running")
        on_loop.wait_until_entered()
        before = embeddings.stats()

        in_child(lambda: assert_starts_anew(embeddings, texts[:4]))

        assert embeddings.stats() == before
        running.open()
        on_loop.open()
        assert query.result(PATIENCE) == model.vector("on a loop")
        assert wait.result(PATIENCE) is True
    for text in texts[:4]:
        assert embeddings.wait_for_prefetch(text, PATIENCE)
        assert embeddings.embed_query(text) == model.vector(text)
    stats = embeddings.stats()
    assert stats.prefetch_used == stats.prefetch_started == 4
    assert stats.query_missed == 1


def test_a_child_retries_by_a_timer_of_its_own(wrap: Wrap, model: LockFreeEmbeddings) -> None:
    embeddings = wrap(model, attempts=2)
    model.failures.append("in the parent")
    embeddings.prefetch("in the parent")  # so that the parent's timer has a thread

    def check() -> None:
        model.failures[:] = ["in the child"]
        assert embeddings.prefetch("in the child") is PrefetchOutcome.STARTED
        # The wait ends where it meets an attempt that fails; then there is no flight to retry.
        until(lambda: embeddings.stats().prefetch_succeeded + embeddings.stats().prefetch_failed)
        stats = embeddings.stats()
        assert stats.prefetch_retried == stats.prefetch_succeeded == 1

    in_child(check)
    assert embeddings.embed_query("in the parent") == model.vector("in the parent")


@pytest.mark.parametrize("which", ["map", "timer"])
def test_a_lock_that_is_held_at_the_fork_is_free_in_the_child(
    wrap: Wrap, model: LockFreeEmbeddings, which: str
) -> None:
    embeddings = wrap(model)
    timer: Any = embeddings.prefetcher._scheduler
    lock = {
        "map": embeddings.prefetcher.steps.lock,
        "timer": timer._running,
    }[which]
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait()

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    assert held.wait(PATIENCE)
    try:
        in_child(lambda: assert_starts_anew(embeddings, ["one", "two"]))
    finally:
        release.set()
        holder.join(PATIENCE)


def test_forks_amid_traffic(wrap: Wrap, model: LockFreeEmbeddings) -> None:
    embeddings = wrap(model, max_workers=4)
    stop = threading.Event()
    under_way = threading.Barrier(5, timeout=PATIENCE)

    def hammer(name: str) -> int:
        for number in itertools.count():
            text = f"{name} {number % 50}"
            embeddings.prefetch(text)
            if number % 3:
                assert embeddings.embed_query(text) == model.vector(text)
            if number % 7 == 0:
                embeddings.forget(text)
            if number == 10:
                under_way.wait()
            if stop.is_set() and number > 10:
                return number
        raise AssertionError

    with ThreadPoolExecutor(4) as threads:
        hammers = [threads.submit(hammer, name) for name in "abcd"]
        try:
            under_way.wait()
            for _ in range(10):
                in_child(lambda: assert_starts_anew(embeddings, ["a 1", "b 1", "new"]))
        finally:
            stop.set()
        for each in hammers:
            assert each.result(PATIENCE) > 10
    assert embeddings.stats().query_failed == 0


def test_multiprocessing_forks(wrap: Wrap, model: LockFreeEmbeddings) -> None:
    embeddings = wrap(model)
    embeddings.prefetch("ready")
    assert embeddings.wait_for_prefetch("ready")
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def check() -> None:
        assert_starts_anew(embeddings, ["ready", "new"])
        sending.send(DONE)

    child = context.Process(target=check)
    child.start()
    try:
        assert receiving.poll(PATIENCE), "the child failed or hangs"
        assert receiving.recv() == DONE
    finally:
        child.join(PATIENCE)
        child.kill()
    assert child.exitcode == 0
    assert embeddings.embed_query("ready") == model.vector("ready")
    assert embeddings.stats().query_ready == 1


class ForkingEmbeddings(LockFreeEmbeddings):
    """A model that forks, once, in the midst of a call."""

    def __init__(self, fork: Callable[[], None]) -> None:
        super().__init__()
        self._fork: Callable[[], None] | None = fork

    def embed_query(self, text: str) -> list[float]:
        if (fork := self._fork) is not None:
            self._fork = None
            fork()
        return super().embed_query(text)


@pytest.mark.parametrize("how", ["embed_query", "prefetch"])
def test_a_model_may_fork_in_the_midst_of_a_call(wrap: Wrap, how: str) -> None:
    failures: list[BaseException] = []

    def fork() -> None:
        try:
            in_child(lambda: assert_starts_anew(embeddings, ["the forking one", "another"]))
        except BaseException as error:  # for the test, not for the retry
            failures.append(error)

    model = ForkingEmbeddings(fork)
    embeddings = wrap(model)

    if how == "prefetch":
        embeddings.prefetch("the forking one")
        assert embeddings.wait_for_prefetch("the forking one", PATIENCE)
    vector = embeddings.embed_query("the forking one")

    if failures:
        raise failures[0]
    assert vector == model.vector("the forking one")
    assert embeddings.is_ready("the forking one")


def test_a_call_that_returns_in_the_child_as_well_leaves_no_trace_there(wrap: Wrap) -> None:
    pids: list[int] = []
    model = ForkingEmbeddings(lambda: pids.append(os.fork()))
    embeddings = wrap(model)
    reading, writing = os.pipe()

    vector = embeddings.embed_query("the forking one")

    def check() -> None:
        assert vector == model.vector("the forking one")
        assert_starts_anew(embeddings, ["the forking one", "another"])

    if pids == [0]:
        report_and_exit(check, writing)
    os.close(writing)
    assert_done(pids[0], reading)
    assert vector == model.vector("the forking one")
    assert embeddings.is_ready("the forking one")


def test_a_closed_wrapper_stays_closed_in_the_child(wrap: Wrap, model: LockFreeEmbeddings) -> None:
    embeddings = wrap(model)
    embeddings.close()

    def check() -> None:
        assert embeddings.prefetch("one") is PrefetchOutcome.DROPPED
        assert embeddings.embed_query("one") == model.vector("one")

    in_child(check)


@pytest.mark.parametrize("how", ["prefetch", "wait_for_prefetch"])
def test_a_worker_whose_model_forks_ends_with_its_call_in_the_child(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("prefetch_embeddings._background.pool.IDLE_SECONDS", 1000.0)
    pids: list[int] = []

    class Forking(ScriptedEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            if text == "forking":
                pids.append(os.fork())
            return super().embed_query(text)

    model = Forking()
    with PrefetchingEmbeddings(model, max_workers=1) as embeddings:
        gate = model.hold("first")
        if how == "wait_for_prefetch":  # which runs it beside the busy worker
            embeddings.prefetch("first")
            gate.wait_until_entered()
        embeddings.prefetch("forking")
        assert embeddings.wait_for_prefetch("forking", None if "wait" in how else PATIENCE)
        gate.open()
    [pid] = pids
    try:
        _, status = Call(os.waitpid, pid, 0).result()
        assert os.waitstatus_to_exitcode(status) == 0
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise
    assert_no_leaks(embeddings)
