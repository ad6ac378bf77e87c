"""The circuit breaker: after failures in a row it spares callers the next ones."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

FAILURES: Final = 3
"""So many failures in a row open it."""

PAUSE: Final = 1.0
"""Seconds that it stays open before one call may try again."""


class CircuitBreaker:
    """Closed: everybody passes. Open: nobody, but for one probe after each pause.

    A probe that never reports (its task was cancelled, say) only costs another pause.
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
        self._lock = threading.Lock()
        # Written under _lock. Read without it: a reader that is late by a moment harms nothing.
        self._in_a_row = 0
        self._probe_at = 0.0

    @property
    def closed(self) -> bool:
        """Whether everybody passes."""
        return self._in_a_row < self._failures

    def allows(self) -> bool:
        """Return whether this caller may try; while open, the one that may is the probe."""
        if self.closed:
            return True
        with self._lock:
            now = self._clock()
            if self.closed:
                return True
            if now < self._probe_at:
                return False
            self._probe_at = now + self._pause
            return True

    def not_tried(self) -> None:
        """Note that whoever was allowed to try did not: if it was the probe, another may."""
        with self._lock:
            if not self.closed:
                self._probe_at = self._clock()

    def succeeded(self) -> bool:
        """Note a success. True: it has just closed the breaker."""
        if not self._in_a_row:
            return False
        with self._lock:
            was_open = not self.closed
            self._in_a_row = 0
            return was_open

    def failed(self) -> bool:
        """Note a failure. True: it has just opened the breaker."""
        with self._lock:
            self._in_a_row += 1
            if not self.closed:
                self._probe_at = self._clock() + self._pause
            return self._in_a_row == self._failures
