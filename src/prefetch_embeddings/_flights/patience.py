"""`Hedge`: when a second call is made beside one that takes too long, and how many of them."""

from __future__ import annotations

import dataclasses
from typing import Final

MOST_SAVED: Final = 10.0
"""Extra calls that a quiet time can save up for a bad one."""

LEAST_DURATIONS: Final = 20
"""Calls that must have been measured before a quantile of them means anything."""

ROUNDING: Final = 1e-9
"""What sums of shares may be off by: twenty twentieths make a whole token."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hedge:
    """A second call for a text that takes longer than usual while somebody waits for it.

    The first vector wins. A slow tail, or a connection that is stuck, then costs a query about
    `after` plus a usual call. Give `after` or `quantile`, not both.

    Attributes:
        after: Seconds after which a flight that is waited for gets its second call.
        quantile: The same as a quantile of recent durations, between 0 and 1: with 0.95 the
            slowest twentieth is hedged. Nothing is hedged before 20 calls have been measured.
        budget: Extra calls allowed, as a share of all calls, between 0 and 1. The first one may
            come at any time; in the long run the share holds.
    """

    after: float | None = None
    quantile: float | None = None
    budget: float = 0.05

    def __post_init__(self) -> None:
        if (self.after is None) == (self.quantile is None):
            raise ValueError("give either after or quantile")
        if self.after is not None and not self.after > 0:
            raise ValueError(f"after must be more than 0 seconds, not {self.after}")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ValueError(f"quantile must lie between 0 and 1, not {self.quantile}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget must be more than 0 and at most 1, not {self.budget}")


class Budget:
    """A token bucket: each call pays in a share of a token, each extra call takes one.

    The first token is lent, so that the very first call can be hedged; what is paid in goes
    towards the loan first. So extra calls never exceed `max(1, share x calls)`.
    """

    def __init__(self, share: float) -> None:
        self._share: Final = share
        self._tokens = 1.0
        self._owed = 1.0

    def pay_in(self) -> None:
        """Note one call."""
        if self._owed > ROUNDING:
            self._owed -= self._share
        else:
            self._tokens = min(MOST_SAVED, self._tokens + self._share)

    def take(self) -> bool:
        """Take a token for an extra call; False if there is none."""
        if self._tokens < 1.0 - ROUNDING:
            return False
        self._tokens -= 1.0
        return True
