"""The pool of prefetch threads: order, bounds, idle threads, and the end."""

from __future__ import annotations

import gc
import queue
import sys
import threading
import weakref
from collections.abc import Iterator
from unittest import mock

import pytest

from prefetch_embeddings._background import pool as workers
from prefetch_embeddings._background.pool import WorkerPool
from tests.helpers import PATIENCE, Call, until


class Held:
    """A job that says when it runs, and returns when told."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.end = threading.Event()
        self.thread: threading.Thread

    def __call__(self, job: object) -> None:
        self.thread = threading.current_thread()
        self.running.set()
        assert self.end.wait(PATIENCE)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, name="pool")
    yield pool
    pool.close()
    assert pool.join(PATIENCE)


def occupy(pool: WorkerPool, count: int) -> list[Held]:
    held = [Held() for _ in range(count)]
    for each in held:
        assert pool.submit(each, each) is True
        assert each.running.wait(PATIENCE)
    return held


def release(held: list[Held]) -> None:
    for each in held:
        each.end.set()


def test_jobs_run_with_their_name_in_order(pool: WorkerPool) -> None:
    held = occupy(pool, 2)
    ran: queue.SimpleQueue[object] = queue.SimpleQueue()
    for job in range(5):
        assert pool.submit(job, ran.put) is True
    held[0].end.set()
    assert [ran.get(timeout=PATIENCE) for _ in range(5)] == [0, 1, 2, 3, 4]
    release(held)


def test_threads_are_daemons_under_the_pools_name(pool: WorkerPool) -> None:
    [held] = occupy(pool, 1)
    assert held.thread.daemon
    assert held.thread.name == "pool"
    held.end.set()
    assert WorkerPool(1)._name == "prefetch-embeddings"


def test_no_more_threads_than_allowed(pool: WorkerPool) -> None:
    held = occupy(pool, 2)
    third = Held()
    assert pool.submit(third, third) is True
    assert len(pool._threads) == 2
    assert not third.running.is_set()
    held[0].end.set()
    assert third.running.wait(PATIENCE)
    assert third.thread is held[0].thread
    release([*held, third])


def test_two_submits_at_once_start_no_thread_too_many() -> None:
    # Both find that a thread may be started; the second of them must look again.
    pool = WorkerPool(1)
    first = Held()
    assert pool.submit(first, first) is True
    assert pool._start_thread("second") is True
    assert len(pool._threads) == 1
    first.end.set()
    pool.close()
    assert pool.join(PATIENCE)


def test_an_idle_thread_takes_the_next_job(pool: WorkerPool) -> None:
    [first] = occupy(pool, 1)
    first.end.set()
    until(lambda: pool._idle == 1)
    [second] = occupy(pool, 1)
    assert second.thread is first.thread
    assert pool._idle == 0
    second.end.set()
    until(lambda: pool._idle == 1)
    assert len(pool._threads) == 1


def test_a_withdrawn_job_does_not_run(pool: WorkerPool) -> None:
    held = occupy(pool, 2)
    ran: queue.SimpleQueue[object] = queue.SimpleQueue()
    for job in "abc":
        pool.submit(job, ran.put)
    pool.withdraw("b")
    pool.withdraw("nobody knows it")
    release(held)
    assert [ran.get(timeout=PATIENCE) for _ in range(2)] == ["a", "c"]
    until(lambda: pool._idle == 2)
    assert ran.empty()


def test_closing_refuses_what_comes_and_runs_what_is_queued(pool: WorkerPool) -> None:
    held = occupy(pool, 2)
    ran: queue.SimpleQueue[object] = queue.SimpleQueue()
    pool.submit("withdrawn", ran.put)
    pool.submit("queued", ran.put)
    pool.close()
    pool.withdraw("withdrawn")
    assert pool.submit("late", ran.put) is False
    assert pool.join(0.0) is False, "a running job counts as gone"
    release(held)
    assert pool.join(PATIENCE) is True
    assert ran.get_nowait() == "queued"
    assert ran.empty()


def test_closing_wakes_idle_threads(pool: WorkerPool) -> None:
    release(occupy(pool, 2))
    until(lambda: pool._idle == 2)
    pool.close()
    assert pool.join(PATIENCE)
    assert pool._idle == 0
    pool.close()  # once more does no harm
    assert pool._wakeups.empty()


def test_where_no_thread_can_be_started_nothing_is_taken() -> None:
    pool = WorkerPool(2)
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
        assert pool.submit("job", print) is False
    assert not pool._threads
    assert not pool._jobs, "a refused job stays in the queue"
    [held] = occupy(pool, 1)
    ran: queue.SimpleQueue[object] = queue.SimpleQueue()
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
        assert pool.submit("job", ran.put) is True, "a thread there is can run it later"
    assert len(pool._threads) == 1
    held.end.set()
    assert ran.get(timeout=PATIENCE) == "job"
    pool.close()
    assert pool.join(PATIENCE)


def test_no_thread_is_started_while_the_interpreter_shuts_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread = threading.Thread(target=int)
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^the interpreter is shutting down$"):
        workers.start(thread)
    assert thread.ident is None


def test_threads_end_after_a_while_without_work(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.01)
    release(occupy(pool, 2))
    assert pool.join(PATIENCE), "idle threads stay"
    assert pool._idle == 0
    release(occupy(pool, 1))


def test_a_thread_that_gives_up_waiting_still_runs_what_was_left_to_it() -> None:
    # Its wait ends just as a submit, which counted on it, is about to wake it.
    pool = WorkerPool(1)

    class Wakeups:
        def __init__(self) -> None:
            self.gives_up = threading.Event()
            self.tokens: queue.SimpleQueue[None] = queue.SimpleQueue()

        def get(self, timeout: float | None = None) -> None:
            if timeout is None:
                return self.tokens.get(timeout=PATIENCE)
            assert timeout == workers.IDLE_SECONDS
            assert self.gives_up.wait(PATIENCE)
            raise queue.Empty

        def put(self, token: None) -> None:
            self.tokens.put(token)

    wakeups = pool._wakeups = Wakeups()  # type: ignore[assignment]
    release(occupy(pool, 1))
    until(lambda: pool._idle == 1)
    ran: queue.SimpleQueue[object] = queue.SimpleQueue()
    assert pool.submit("job", ran.put) is True
    wakeups.gives_up.set()
    assert ran.get(timeout=PATIENCE) == "job"
    pool.close()
    assert pool.join(PATIENCE)


def test_a_parked_thread_keeps_nothing_alive(pool: WorkerPool) -> None:
    class Job:
        def run(self, job: object) -> None:
            pass

    job = Job()
    gone = weakref.ref(job)
    pool.submit(job, job.run)
    del job
    until(lambda: pool._idle == 1)

    def collected() -> bool:
        gc.collect()
        return gone() is None

    until(collected)


def test_joining_waits_for_the_last_thread(pool: WorkerPool) -> None:
    [held] = occupy(pool, 1)
    pool.close()
    joining = Call(pool.join, PATIENCE)
    held.end.set()
    assert joining.result() is True


def test_a_forked_childs_pool_starts_anew() -> None:
    pool = WorkerPool(1)
    lock = pool._lock
    pool._threads.add(threading.current_thread())  # of the parent, where they still are
    pool._jobs["the parent's"] = print
    pool._idle = 1
    pool._wakeups.put(None)
    pool.close()
    pool.reset_after_fork()
    assert pool._lock is not lock
    assert not pool._threads
    assert pool._wakeups.empty()
    [held] = occupy(pool, 1)
    assert held.thread is not threading.current_thread()
    held.end.set()
    until(lambda: pool._idle == 1)
    assert not pool._jobs
    pool.close()
    assert pool.join(PATIENCE)


def test_without_a_bound_every_job_has_a_thread_at_once() -> None:
    pool = WorkerPool(None)
    held = occupy(pool, 50)
    assert len(pool._threads) == 50
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
        assert pool.submit("job", print) is False, "taken, with nobody to run it at once"
    assert not pool._jobs
    release(held)
    pool.close()
    assert pool.join(PATIENCE)


def test_a_job_that_another_thread_took_is_not_refused() -> None:
    pool = WorkerPool(None)

    def start(thread: threading.Thread) -> None:
        pool._jobs.clear()
        raise RuntimeError

    with mock.patch.object(threading.Thread, "start", start):
        assert pool.submit("job", print) is True
