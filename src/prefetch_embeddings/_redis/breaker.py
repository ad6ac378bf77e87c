"""The circuit breaker: after failures in a row it spares callers the next ones."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefetch_embeddings._redis.recorder import RedisRecorder

FAILURES: Final = 3
"""So many failures in a row open it."""

PAUSE: Final = 1.0
"""Seconds that it stays open before one call may try again."""

CERTAIN_SECONDS: Final = 1.0
"""A connection that fails after so long leaves no doubt."""


class CircuitBreaker:
    """Closed: everybody passes. Open: nobody, but for one probe after each pause.

    Failures are in a row if each began after the one before was known. Those of one moment, when a
    thousand callers wait at once, are one failure.

    A probe that never reports (its task was cancelled, say) only costs another pause.

    There is no lock, so that it may be asked from a finaliser or a signal handler, too. Every step
    is one assignment; two threads in one step can at the most cost a failure that is not counted
    or let a second probe through.
    """

    def __init__(
        self,
        *,
        failures: int = FAILURES,
        pause: float = PAUSE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failures = failures
        self._pause = pause
        self._clock = clock
        self._in_a_row = 0
        self._last_failure_at = -float("inf")
        self._probe_at = 0.0

    @property
    def closed(self) -> bool:
        """Whether everybody passes."""
        return self._in_a_row < self._failures

    def allows(self) -> bool:
        """Return whether this caller may try; while open, the one that may is the probe."""
        if self.closed:
            return True
        now = self._clock()
        if now < self._probe_at:
            return False
        self._probe_at = now + self._pause
        return True

    def not_tried(self) -> None:
        """Note that whoever was allowed to try did not: if it was the probe, another may."""
        if not self.closed:
            self._probe_at = self._clock()

    def succeeded(self) -> bool:
        """Note a success. True: it has just closed the breaker."""
        was_open = not self.closed
        self._in_a_row = 0
        return was_open

    def failed(self, began: float | None = None, *, certain: bool = False) -> bool:
        """Note a failure.

        Args:
            began: When that began which has failed, by the same clock.
            certain: It alone is enough to open the breaker.

        Returns:
            Whether it has just opened it.
        """
        now = self._clock()
        if not self.closed:
            self._probe_at = now + self._pause
            return False
        if began is not None and began < self._last_failure_at:
            return False
        self._last_failure_at = now
        self._in_a_row = self._failures if certain else self._in_a_row + 1
        if self.closed:
            return False
        self._probe_at = now + self._pause
        return True


class Health:
    """What is known of one place: its breaker, and who is told when that opens or closes.

    A place is a server, or a node of a cluster: one that is dead costs only its own keys.
    """

    def __init__(
        self, recorder: RedisRecorder, timeout: float, *, name: str = "", breaker: CircuitBreaker
    ) -> None:
        self._recorder = recorder
        self._timeout = timeout
        self._name = name
        self.breaker = breaker
        self._cannot_connect = False

    def answered(self, seconds: float) -> None:
        """Note a reply that took `seconds`. One that came too late for any caller is no success."""
        if seconds <= self._timeout:
            self._cannot_connect = False
            self._succeeded()

    def connected(self) -> None:
        """Note a new connection: where only that was missing, all is well again."""
        if self._cannot_connect:
            self._cannot_connect = False
            self._succeeded()

    def failed(self, error: BaseException, began: float, seconds: float) -> None:
        """Note that what began at `began` has brought nothing after `seconds`."""
        self._recorder.failed(error, seconds)
        if self.breaker.failed(began):
            self._recorder.breaker_opened(error, self._name)

    def failed_to_connect(self, error: BaseException, began: float, seconds: float) -> None:
        """Note that there is no connection to be had. That it took long leaves no doubt."""
        self._cannot_connect = True
        self._recorder.failed(error, seconds)
        if self.breaker.failed(began, certain=seconds > max(self._timeout, CERTAIN_SECONDS)):
            self._recorder.breaker_opened(error, self._name)

    def _succeeded(self) -> None:
        if self.breaker.succeeded():
            self._recorder.breaker_closed(self._name)
