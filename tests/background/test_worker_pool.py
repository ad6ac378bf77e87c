"""The pools of threads: order, bounds, idle threads, refusals, and the end."""

from __future__ import annotations

import gc
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from prefetch_embeddings._background import forks
from prefetch_embeddings._background import pool as pools
from prefetch_embeddings._background.pool import JobPool, WorkerPool
from tests.helpers import PATIENCE, Call, until

NO_THREADS = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError)


class Held:
    """A job that says when it runs, and returns when told."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.end = threading.Event()
        self.thread: threading.Thread

    def __call__(self) -> None:
        self.thread = threading.current_thread()
        self.running.set()
        assert self.end.wait(PATIENCE)


class Ran:
    """Makes jobs that note that they ran."""

    def __init__(self) -> None:
        self._names: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, name: str) -> Callable[[], None]:
        return lambda: self._names.put(name)

    def next(self, count: int = 1) -> list[str]:
        return [self._names.get(timeout=PATIENCE) for _ in range(count)]

    def nothing_more(self) -> bool:
        return self._names.empty()


@pytest.fixture
def pool() -> Iterator[JobPool]:
    pool = JobPool(2, name="pool")
    yield pool
    pool.close()
    assert pool.join(PATIENCE)


@pytest.fixture
def ran() -> Ran:
    return Ran()


def occupy(pool: JobPool, count: int = 1) -> list[Held]:
    held = [Held() for _ in range(count)]
    for each in held:
        assert pool.submit(each) is True
        assert each.running.wait(PATIENCE)
    return held


def release(held: list[Held]) -> None:
    for each in held:
        each.end.set()


def end(pool: WorkerPool) -> None:
    pool.close()
    assert pool.join(PATIENCE)


# --- Jobs and threads ----------------------------------------------------------------------------


def test_jobs_run_in_their_order(pool: JobPool, ran: Ran) -> None:
    held = occupy(pool, 2)
    for name in "abcde":
        assert pool.submit(ran(name)) is True
    held[0].end.set()
    assert ran.next(5) == ["a", "b", "c", "d", "e"]
    release(held)


def test_threads_are_daemons_under_the_pools_name(pool: JobPool) -> None:
    [held] = occupy(pool)
    assert held.thread.daemon
    assert held.thread.name == "pool"
    held.end.set()
    for nameless in (JobPool(1), WorkerPool(deque(), 1)):  # type: ignore[arg-type]
        assert nameless._name == "prefetch-embeddings"


def test_no_more_threads_than_allowed(pool: JobPool) -> None:
    held = occupy(pool, 2)
    third = Held()
    assert pool.submit(third) is True
    assert len(pool._crew.threads) == 2
    assert not third.running.is_set()
    held[0].end.set()
    assert third.running.wait(PATIENCE)
    assert third.thread is held[0].thread
    release([*held, third])


def test_an_idle_thread_takes_the_next_job(pool: JobPool) -> None:
    [first] = occupy(pool)
    first.end.set()
    until(lambda: len(pool._crew.idle) == 1)
    [second] = occupy(pool)
    assert second.thread is first.thread
    assert not pool._crew.idle
    second.end.set()
    until(lambda: len(pool._crew.idle) == 1)
    assert len(pool._crew.threads) == 1


def test_without_a_bound_every_job_has_a_thread_at_once() -> None:
    pool = JobPool(None)
    held = occupy(pool, 50)
    assert len(pool._crew.threads) == 50
    release(held)
    end(pool)


def test_a_job_that_raises_costs_its_thread_and_nothing_else(
    pool: JobPool, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: queue.SimpleQueue[Any] = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", seen.put)

    def bad() -> None:
        raise SystemError

    held = occupy(pool, 2)
    for name in "ab":
        pool.submit(bad)
        pool.submit(ran(name))
    release(held)
    assert ran.next(2) == ["a", "b"]
    for _ in range(2):
        assert seen.get(timeout=PATIENCE).exc_type is SystemError
    release(occupy(pool, 2))


# --- Refusals ------------------------------------------------------------------------------------


def test_where_no_thread_can_be_started_nothing_is_taken(ran: Ran) -> None:
    pool = JobPool(2)
    with NO_THREADS:
        for _ in range(5):
            assert pool.submit(ran("refused")) is False
    assert not pool._crew.threads
    assert not pool._jobs, "a refused job stays in the queue"
    held = occupy(pool, 2)
    release(held)
    end(pool)
    assert ran.nothing_more()


def test_a_thread_that_there_is_runs_what_no_new_one_can(ran: Ran) -> None:
    pool = JobPool(2)
    [held] = occupy(pool)
    with NO_THREADS:
        assert pool.submit(ran("job")) is True
    assert len(pool._crew.threads) == 1
    held.end.set()
    assert ran.next() == ["job"]
    end(pool)


def test_without_a_bound_no_job_is_taken_that_would_have_to_wait(ran: Ran) -> None:
    pool = JobPool(None)
    held = occupy(pool)
    with NO_THREADS:
        assert pool.submit(ran("job")) is False, "taken, with nobody to run it at once"
    assert not pool._jobs
    release(held)
    end(pool)


def test_of_two_jobs_that_are_the_same_one_is_refused(ran: Ran) -> None:
    pool = JobPool(1)
    [held] = occupy(pool)
    job = ran("job")
    pool.submit(job)
    pool.close()
    assert pool.submit(job) is False
    held.end.set()
    assert pool.join(PATIENCE)
    assert ran.next() == ["job"]
    assert ran.nothing_more()


def test_a_job_that_another_thread_took_is_not_refused() -> None:
    pool = JobPool(None)

    def start(thread: threading.Thread) -> None:
        pool._jobs.clear()
        raise RuntimeError

    with mock.patch.object(threading.Thread, "start", start):
        assert pool.submit(print) is True


@pytest.mark.parametrize("workers", [1, None])
def test_what_interrupts_the_start_of_a_thread_leaves_its_place_free(
    workers: int | None, ran: Ran
) -> None:
    pool = JobPool(workers)
    with (
        mock.patch.object(threading.Thread, "start", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        pool.submit(ran("a"))
    assert not pool._crew.threads
    assert pool.submit(ran("b")) is True
    assert ran.next(2) == ["a", "b"], "the first was taken in before"
    end(pool)


def test_no_thread_is_started_while_the_interpreter_shuts_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread = threading.Thread(target=int)
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^the interpreter is shutting down$"):
        pools.start(thread)
    assert thread.ident is None


# --- Idle threads --------------------------------------------------------------------------------


def test_threads_end_after_a_while_without_work(
    pool: JobPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "IDLE_SECONDS", 0.01)
    for _ in range(3):
        release(occupy(pool, 2))
        assert pool.join(PATIENCE), "idle threads stay"
        assert not pool._crew.idle


class Bells:
    """Bells in the place of `SimpleQueue`: a test says when a thread has waited long enough."""

    def __init__(self) -> None:
        self.made: list[Bells.Bell] = []

    def __call__(self) -> Bells.Bell:
        self.made.append(Bells.Bell())
        return self.made[-1]

    class Bell:
        def __init__(self) -> None:
            self.waits: queue.SimpleQueue[float | None] = queue.SimpleQueue()
            self.ends: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def put(self, item: None) -> None:
            self.ends.put(True)

        def get(self, timeout: float | None = None) -> None:
            self.waits.put(timeout)
            if not self.ends.get(timeout=PATIENCE):
                raise queue.Empty

        def give_up(self) -> None:
            self.ends.put(False)


@pytest.fixture
def bells() -> Iterator[Bells]:
    bells = Bells()
    with mock.patch.object(pools, "queue", mock.Mock(SimpleQueue=bells, Empty=queue.Empty)):
        yield bells


def test_a_thread_whose_mark_is_taken_waits_for_the_ring(bells: Bells, ran: Ran) -> None:
    pool = JobPool(1)
    release(occupy(pool))
    [bell] = bells.made
    assert bell.waits.get(timeout=PATIENCE) == pools.IDLE_SECONDS
    assert pool._crew.take_mark() is True  # somebody is about to ring
    bell.give_up()
    assert bell.waits.get(timeout=PATIENCE) == pools.RINGING_SECONDS
    assert pool._crew.threads, "it has ended with a ring on its way"
    pool._jobs.append(ran("job"))
    bell.put(None)
    assert ran.next() == ["job"]
    end(pool)


def test_a_ring_that_never_comes_costs_no_job(bells: Bells, ran: Ran) -> None:
    pool = JobPool(1)
    release(occupy(pool))
    [bell] = bells.made
    bell.waits.get(timeout=PATIENCE)
    pool._crew.take_mark()
    pool._jobs.append(ran("job"))
    bell.give_up()
    bell.waits.get(timeout=PATIENCE)
    bell.give_up()
    assert ran.next() == ["job"]
    end(pool)


def test_a_thread_that_gives_up_waiting_ends(bells: Bells) -> None:
    pool = JobPool(1)
    release(occupy(pool))
    [bell] = bells.made
    bell.waits.get(timeout=PATIENCE)
    bell.give_up()
    assert pool.join(PATIENCE)
    assert not pool._crew.idle


class Late:
    """A source in which a job turns up just as the thread has found none."""

    def __init__(self, *jobs: Callable[[], None]) -> None:
        self.jobs: deque[Callable[[], None]] = deque()
        self.to_come = deque(jobs)

    def take(self) -> Callable[[], None] | None:
        if self.jobs:
            return self.jobs.popleft()
        if self.to_come:
            self.jobs.append(self.to_come.popleft())
        return None

    def __len__(self) -> int:
        return len(self.jobs)


def test_a_thread_looks_once_more_before_it_sleeps(ran: Ran) -> None:
    pool = WorkerPool(Late(ran("a"), ran("b")), 1)
    assert pool.wake() is True
    assert ran.next(2) == ["a", "b"]
    until(lambda: len(pool._crew.idle) == 1)
    end(pool)


def test_a_closed_pools_thread_runs_what_turns_up_while_it_ends(ran: Ran) -> None:
    source = Late(ran("a"), ran("b"))
    pool = WorkerPool(source, 1)
    with mock.patch.object(pools, "start"):
        pool.wake()
    [thread] = pool._crew.threads
    pool.close()
    thread.start()
    assert pool.join(PATIENCE)
    assert ran.next(2) == ["a", "b"]
    assert not pool._crew.idle


def test_whoever_counts_on_a_thread_that_ends_gets_another(
    monkeypatch: pytest.MonkeyPatch, ran: Ran
) -> None:
    monkeypatch.setattr(pools, "IDLE_SECONDS", 0.0)
    pool = JobPool(1)
    crew = pool._crew
    remove = crew.remove
    once = deque([ran("job")])

    def add_and_go(thread: threading.Thread) -> None:
        while once:  # it comes when nobody looks any more, and finds no permit
            pool._jobs.append(once.pop())
            assert pool.wake() is True
        remove(thread)

    monkeypatch.setattr(crew, "remove", add_and_go)
    release(occupy(pool))
    assert ran.next() == ["job"]
    end(pool)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_threads_of_a_forgotten_pool_end(threads: int) -> None:
    pool = JobPool(threads)
    held = occupy(pool, threads)
    release(held)
    crew = pool._crew
    until(lambda: len(crew.idle) == threads)
    assert pool.accepts is True
    del pool
    gc.collect()
    until(lambda: not any(each.thread.is_alive() for each in held))


def test_a_parked_thread_keeps_nothing_alive(pool: JobPool) -> None:
    class Job:
        def run(self) -> None:
            pass

    job = Job()
    gone = weakref.ref(job)
    pool.submit(job.run)
    del job
    until(lambda: len(pool._crew.idle) == 1)

    def collected() -> bool:
        gc.collect()
        return gone() is None

    until(collected)


# --- The end -------------------------------------------------------------------------------------


def test_closing_refuses_what_comes_and_runs_what_is_queued(pool: JobPool, ran: Ran) -> None:
    held = occupy(pool, 2)
    pool.submit(ran("queued"))
    pool.close()
    assert pool.submit(ran("late")) is False
    assert pool.wake() is False
    assert pool.join(0.0) is False, "a running job counts as gone"
    release(held)
    assert pool.join(PATIENCE) is True
    assert ran.next() == ["queued"]
    assert ran.nothing_more()


def test_closing_wakes_idle_threads(pool: JobPool) -> None:
    release(occupy(pool, 2))
    until(lambda: len(pool._crew.idle) == 2)
    pool.close()
    assert pool.join(PATIENCE)
    assert not pool._crew.idle
    assert pool.accepts is False
    pool.close()  # once more does no harm
    assert pool.wake() is False


def test_joining_waits_for_the_last_thread(pool: JobPool) -> None:
    [held] = occupy(pool)
    pool.close()
    joining = Call(pool.join, PATIENCE)
    held.end.set()
    assert joining.result() is True


def test_joining_gives_up_after_its_time(pool: JobPool, monkeypatch: pytest.MonkeyPatch) -> None:
    [held] = occupy(pool)
    now = [100.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += 1.0

    monkeypatch.setattr(pools, "time", mock.Mock(monotonic=lambda: now[0], sleep=sleep, spec=time))
    assert pool.join(3.0) is False
    assert slept == [0.001] * 4
    monkeypatch.undo()
    held.end.set()


# --- Forks ---------------------------------------------------------------------------------------


def test_a_forked_childs_pool_starts_anew(ran: Ran) -> None:
    pool = JobPool(1)
    with mock.patch.object(pools, "start"):  # of the parent, where the thread is
        pool.submit(ran("the parent's"))
    pool._crew.idle.append(None)
    pool.close()
    pool.reset_after_fork()
    assert not pool._crew.threads
    assert not pool._crew.idle
    [held] = occupy(pool)
    pool.submit(ran("the child's"))
    assert len(pool._crew.threads) == 1
    held.end.set()
    assert ran.next() == ["the child's"]
    assert ran.nothing_more()
    end(pool)


def test_a_thread_that_is_the_childs_only_one_ends_with_its_job(ran: Ran) -> None:
    pool = JobPool(1)

    def fork() -> None:
        pool.reset_after_fork()
        pool._jobs.append(ran("another's"))

    with mock.patch.object(pools, "start"):
        pool.submit(fork)
    [thread] = pool._crew.threads
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert ran.nothing_more(), "it runs on beside the child's own threads"
    assert len(pool._crew._permits or ()) == 1, "a permit too many"
    assert pool.wake() is True
    assert ran.next() == ["another's"]
    end(pool)


def test_pools_are_known_to_the_fork_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []
    monkeypatch.setattr(forks, "register", registered.append)
    pool = JobPool(1)
    assert registered == [pool]
