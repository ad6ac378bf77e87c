"""The timer makes its calls whatever became of earlier ones, and says when it cannot."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, UtterancePrefetcher
from prefetch_embeddings._background import timer as timers
from prefetch_embeddings._background.timer import Timer
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import PATIENCE, until

Wrap = Callable[..., PrefetchingEmbeddings]


@pytest.fixture
def timer() -> Iterator[Timer]:
    timer = Timer()
    yield timer
    timer.close()


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_call_that_raises_does_not_stop_the_others(
    timer: Timer, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def bad() -> None:
        raise error("a text")

    good = threading.Event()
    timer.call_later(0.0, bad)
    timer.call_later(0.0, good.set)
    assert good.wait(PATIENCE)
    assert error.__name__ in caplog.text
    assert "a text" not in caplog.text


def test_an_earlier_call_is_made_before_a_later_one(timer: Timer) -> None:
    made: list[str] = []
    done = threading.Event()

    def later() -> None:
        made.append("later")
        done.set()

    timer.call_later(0.05, later)
    timer.call_later(0.0, lambda: made.append("earlier"))
    assert done.wait(PATIENCE)
    assert made == ["earlier", "later"]


def test_calls_of_one_time_are_made_in_their_order(timer: Timer) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()
    made: list[int] = []

    def hold() -> None:
        begun.set()
        assert go_on.wait(PATIENCE)

    timer.call_later(0.0, hold)
    assert begun.wait(PATIENCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timers, "time", mock.Mock(monotonic=lambda: 0.0))  # all at one time
        for number in range(20):
            timer.call_later(0.0, lambda number=number: made.append(number))  # type: ignore[misc]
        timer.call_later(0.0, done.set)
    go_on.set()
    assert done.wait(PATIENCE)
    assert made == list(range(20))


def test_it_says_when_a_call_will_never_come(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert timer.call_later(0.0, made.set) is False
    assert timer._inbox.empty(), "it keeps what it will not do"
    assert timer.call_later(0.0, made.set) is True
    assert made.wait(PATIENCE)
    timer.close()
    assert timer.call_later(0.0, made.set) is False


def test_what_interrupts_the_start_of_its_thread_does_not_stop_it_for_good(timer: Timer) -> None:
    made = threading.Event()
    with (
        mock.patch.object(threading.Thread, "start", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        timer.call_later(0.0, made.set)
    assert timer.call_later(0.0, made.set) is True
    assert made.wait(PATIENCE)


def the_thread() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "prefetch-embeddings-timer"]


def test_one_thread_makes_all_calls_and_ends_when_there_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = the_thread()  # of other tests' wrappers
    monkeypatch.setattr(timers, "LINGER_SECONDS", 0.01)
    timer = Timer()
    for _ in range(3):
        threads: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
        for _ in range(2):
            timer.call_later(0.0, lambda: threads.put(threading.current_thread()))  # noqa: B023
        first, second = (threads.get(timeout=PATIENCE) for _ in range(2))
        assert first.daemon
        assert first is second or not first.is_alive()
        until(lambda: not set(the_thread()) - set(others))
    timer.close()


def test_it_lingers_for_a_next_call(timer: Timer) -> None:
    threads: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
    for _ in range(3):
        timer.call_later(0.0, lambda: threads.put(threading.current_thread()))
        threads.get(timeout=PATIENCE)
        assert timer._running.locked()
    assert timers.LINGER_SECONDS > 1.0


def test_closing_calls_off_everything(timer: Timer) -> None:
    made = threading.Event()
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go_on.wait(PATIENCE)

    timer.call_later(0.0, hold)
    assert begun.wait(PATIENCE)
    timer.call_later(0.0, made.set)
    [thread] = [each for each in the_thread() if timer._running.locked()][-1:]
    timer.close()
    go_on.set()
    until(lambda: not timer._running.locked())
    assert not made.is_set()
    assert timer.call_later(0.0, made.set) is False
    thread.join(PATIENCE)
    timer.close()  # once more does no harm


def test_closing_wakes_the_thread_that_waits_for_a_far_time(timer: Timer) -> None:
    timer.call_later(3600.0, print)
    timer.close()
    until(lambda: not timer._running.locked())


def test_nobody_is_kept_alive_by_the_thread_that_sleeps(timer: Timer) -> None:
    class Thing:
        def call(self) -> None:
            pass

    thing = Thing()
    gone = weakref.ref(thing)
    timer.call_later(0.0, thing.call)
    del thing

    def collected() -> bool:
        gc.collect()
        return gone() is None

    until(collected)


class Inbox:
    """An inbox that is empty just when the thread has waited long enough, and then not."""

    def __init__(self, timer: Timer, call: Callable[[], None]) -> None:
        self._timer = timer
        self._call = call
        self._entries: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.gave_up = 0

    def put(self, entry: Any) -> None:
        self._entries.put(entry)

    def empty(self) -> bool:
        return self._entries.empty()

    def get(self, timeout: float) -> Any:
        if self._entries.empty() and not self.gave_up:
            self.gave_up += 1
            assert timeout == timers.LINGER_SECONDS
            # Somebody comes, who finds a thread that will look, since `_running` is held:
            assert self._timer.call_later(0.0, self._call) is True
            raise queue.Empty
        return self._entries.get(timeout=timeout)


def test_a_thread_that_gives_up_leaves_the_rest_to_the_one_that_has_begun(timer: Timer) -> None:
    timer._running.acquire()  # as the thread that works below holds it
    running = mock.Mock()
    running.acquire.return_value = False  # another thread was quicker
    inbox = mock.Mock()
    inbox.get.side_effect = queue.Empty
    inbox.empty.return_value = False
    timer._inbox, timer._running = inbox, running
    timer._work()
    inbox.get.assert_called_once_with(timeout=timers.LINGER_SECONDS)
    running.release.assert_called_once_with()
    running.acquire.assert_called_once_with(blocking=False)


def test_a_forked_childs_timer_starts_anew(timer: Timer) -> None:
    made = threading.Event()
    timer._running.acquire()  # by the parent's thread
    timer._inbox.put((0.0, 0, lambda: pytest.fail("the parent's")))
    timer.close()
    timer.reset_after_fork()
    assert timer.call_later(0.0, made.set) is True
    assert made.wait(PATIENCE)


def test_a_thread_whose_call_has_forked_ends_in_the_child(timer: Timer) -> None:
    made = threading.Event()
    fork = mock.Mock(side_effect=timer.reset_after_fork)
    running = timer._running
    assert running.acquire()
    timer._inbox.put((0.0, 0, fork))
    timer._inbox.put((0.0, 1, made.set))
    timer._work()
    fork.assert_called_once_with()
    assert not made.is_set()
    assert timer.call_later(0.0, made.set) is True
    assert made.wait(PATIENCE)


def test_timers_are_known_to_the_fork_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []
    monkeypatch.setattr(timers.forks, "register", registered.append)  # type: ignore[attr-defined]
    timer = Timer()
    assert registered == [timer]


def test_speech_is_heard_again_after_a_thread_could_not_be_started(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = wrap(model)
    speech = UtterancePrefetcher(embeddings, debounce=0.001)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        speech.on_partial("one bad moment")
    speech.on_partial("the next one")
    until(lambda: embeddings.is_ready("the next one"))


def test_a_retry_that_cannot_come_ends_its_flight(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    model.fail("q", ConnectionError())
    embeddings.prefetch("q")
    gate.wait_until_entered()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        gate.open()
        until(lambda: embeddings.stats().prefetch_failed == 1)
    assert embeddings.forget("q") is False
