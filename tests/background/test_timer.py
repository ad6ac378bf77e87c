"""The timer makes its calls whatever became of earlier ones, and says when it cannot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, UtterancePrefetcher
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


def test_it_says_when_a_call_will_never_come(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert timer.call_later(0.0, made.set) is False
    assert timer.call_later(0.0, made.set) is True
    assert made.wait(PATIENCE)
    timer.close()
    assert timer.call_later(0.0, made.set) is False


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
