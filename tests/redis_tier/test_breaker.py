"""When the circuit breaker lets callers through, to the failure and to the moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from prefetch_embeddings._redis.breaker import FAILURES, PAUSE, CircuitBreaker
from prefetch_embeddings.testing import ManualTime


class Meanwhile:
    """A lock before which another thread gets in, once."""

    def __init__(self, other: Callable[[], object]) -> None:
        self._others = [other]
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if self._others:
            self._others.pop()()
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()


def opened(clock: ManualTime) -> CircuitBreaker:
    breaker = CircuitBreaker(failures=1, pause=4.0, clock=clock)
    assert breaker.failed()
    return breaker


def meanwhile(breaker: CircuitBreaker, other: Callable[[], object]) -> None:
    breaker._lock = Meanwhile(other)  # type: ignore[assignment]


def test_so_many_failures_in_a_row_open_it() -> None:
    breaker = CircuitBreaker()
    assert [breaker.failed() for _ in range(FAILURES - 1)] == [False] * (FAILURES - 1)
    assert breaker.failed()
    assert not breaker.failed(), "it was open already"
    assert not breaker.closed
    assert not breaker.allows()


def test_closed_it_lets_everybody_through_and_looks_at_no_clock() -> None:
    def no_clock() -> float:
        raise AssertionError("nobody needs to know the time")

    breaker = CircuitBreaker(failures=2, clock=no_clock)
    assert breaker.allows()
    assert not breaker.failed()
    assert breaker.allows()
    assert breaker.closed


def test_a_success_starts_the_count_anew() -> None:
    breaker = CircuitBreaker(failures=2, clock=ManualTime())
    assert not breaker.succeeded()
    assert not breaker.failed()
    assert not breaker.succeeded(), "it was not open"
    assert not breaker.failed()
    assert breaker.closed
    assert breaker.failed()


def test_one_probe_passes_after_each_pause() -> None:
    clock = ManualTime()
    breaker = opened(clock)
    assert not breaker.allows()
    clock.advance(3.5)
    assert not breaker.allows()
    clock.advance(0.5)
    assert [breaker.allows(), breaker.allows()] == [True, False]
    clock.advance(3.5)
    assert not breaker.allows(), "the probe may still report"
    clock.advance(0.5)
    assert breaker.allows(), "it never did"


def test_a_probe_that_fails_costs_another_pause_from_then_on() -> None:
    clock = ManualTime()
    breaker = opened(clock)
    clock.advance(4.0)
    assert breaker.allows()
    clock.advance(3.0)
    assert not breaker.failed(), "it was open already"
    clock.advance(3.5)
    assert not breaker.allows()
    clock.advance(0.5)
    assert breaker.allows()


def test_a_probe_that_does_not_try_leaves_it_to_the_next() -> None:
    clock = ManualTime()
    breaker = opened(clock)
    breaker.not_tried()
    assert breaker.allows(), "it was nobody's fault"
    clock.advance(1.0)
    assert not breaker.allows()
    breaker.not_tried()
    assert breaker.allows()
    clock.advance(1.0)
    breaker.succeeded()
    breaker.not_tried()
    breaker.failed()
    assert not breaker.allows(), "what was said while it was closed gives no probe"


def test_a_probe_that_succeeds_closes_it() -> None:
    breaker = opened(ManualTime())
    assert breaker.succeeded()
    assert breaker.closed
    assert [breaker.allows(), breaker.allows()] == [True, True]
    assert not breaker.succeeded(), "it was closed already"
    assert breaker.failed(), "it opens once more"


def test_pauses_are_of_the_seconds_that_are_promised() -> None:
    clock = ManualTime()
    breaker = CircuitBreaker(failures=1, clock=clock)
    breaker.failed()
    clock.advance(PAUSE / 2)
    assert not breaker.allows()
    clock.advance(PAUSE / 2)
    assert breaker.allows()


def test_a_caller_that_was_about_to_be_refused_passes_if_it_has_just_closed() -> None:
    breaker = opened(ManualTime())
    meanwhile(breaker, breaker.succeeded)
    assert breaker.allows()
    assert breaker.failed(), "it is closed, and the caller was not its probe"


def test_of_two_successes_at_once_one_has_closed_it() -> None:
    breaker = opened(ManualTime())
    heard = []
    meanwhile(breaker, lambda: heard.append(breaker.succeeded()))
    heard.append(breaker.succeeded())
    assert heard == [True, False]
