"""When the circuit breaker lets callers through, to the failure and to the moment."""

from __future__ import annotations

from typing import Any

from prefetch_embeddings._redis.breaker import FAILURES, PAUSE, CircuitBreaker, Health
from prefetch_embeddings.testing import ManualTime


def opened(clock: ManualTime) -> CircuitBreaker:
    breaker = CircuitBreaker(failures=1, pause=4.0, clock=clock)
    assert breaker.failed()
    return breaker


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

    assert CircuitBreaker(failures=2, clock=no_clock).allows()


def test_failures_of_one_moment_are_one_failure() -> None:
    """A thousand callers wait at once, and all of them time out."""
    clock = ManualTime()
    breaker = CircuitBreaker(failures=3, clock=clock)
    began = clock()
    clock.advance(0.1)
    assert not any(breaker.failed(began) for _ in range(1000))
    assert breaker.closed
    for _ in range(2):
        began = clock()
        clock.advance(0.1)
        opened = [breaker.failed(began) for _ in range(1000)]
    assert opened == [True] + [False] * 999


def test_one_certain_failure_is_enough() -> None:
    breaker = CircuitBreaker(failures=3)
    assert breaker.failed(certain=True)
    assert not breaker.allows()


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


class Told:
    """Notes what a health tells."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def failed(self, error: BaseException, seconds: float) -> None:
        self.said.append("failed")

    def breaker_opened(self, error: BaseException, where: str) -> None:
        self.said.append(f"opened {where}")

    def breaker_closed(self, where: str) -> None:
        self.said.append(f"closed {where}")


def test_a_reply_that_comes_too_late_for_any_caller_closes_nothing() -> None:
    told: Any = Told()
    health = Health(told, 0.1, name="node", breaker=CircuitBreaker(failures=1))
    health.failed(TimeoutError(), 0.0, 0.1)
    health.answered(0.2)
    assert not health.breaker.closed
    health.answered(0.05)
    assert health.breaker.closed
    assert told.said == ["failed", "opened node", "closed node"]


def test_a_connection_closes_it_where_only_that_was_missing() -> None:
    told: Any = Told()
    health = Health(told, 0.1, name="node", breaker=CircuitBreaker(failures=1))
    health.failed(TimeoutError(), 0.0, 0.1)
    health.connected()
    assert not health.breaker.closed, "it takes connections, and does not answer"
    health.answered(0.0)
    health.failed_to_connect(ConnectionRefusedError(), float("inf"), 0.0)
    assert not health.breaker.closed
    health.connected()
    assert health.breaker.closed
