"""When a call has taken too long, and its flight is due another one beside it.

The one rule of patience: a call is overdue when its age, counted from its own start, is beyond what
calls usually take. Nobody waits by any other clock.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import weakref
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefetch_embeddings._flights.flight import Flight
    from prefetch_embeddings._flights.ledger import Durations

MOST_CALLS: Final = 3
"""Calls under way for one flight at a time."""

UNMEASURED_LIMIT: Final = 3.0
"""Seconds after which a call is overdue while too few have been measured."""

LEAST_LIMIT: Final = 1.0
"""Seconds that a call always has before it is overdue."""

MOST_SAVED: Final = 10.0
"""Hedges that a quiet time can save up for a bad one."""

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


class Patience:
    """Knows when a flight is due another call. Guarded by the map's lock.

    Flights that somebody waits for stand in a heap, by the time at which they may be due. It holds
    them weakly: one that has ended keeps nothing alive until that time.

    Args:
        hedge: When a flight gets its second call early; None for never.
        durations: What calls took.
        call_for_look: Has a look planned, soon after the step, for a flight that is due before it.
    """

    def __init__(
        self, hedge: Hedge | None, durations: Durations, call_for_look: Callable[[], object]
    ) -> None:
        self._hedge: Final = hedge
        self._call_for_look: Final = call_for_look
        self._durations: Final = durations
        self._budget: Final = None if hedge is None else Budget(hedge.budget)
        self.hedges: Final = hedge is not None
        """Whether flights get a second call early."""
        self._watched: list[tuple[float, int, weakref.ref[Flight[Any]]]] = []
        self._order: Final = itertools.count()
        self.next_look_at = math.inf
        """When somebody will look for flights that are due."""

    @property
    def limit(self) -> float:
        """How old a call is, in seconds, when it is overdue."""
        if len(self._durations) < LEAST_DURATIONS:
            return UNMEASURED_LIMIT
        return max(LEAST_LIMIT, 2 * self._durations.quantile(0.95))

    def overdue_at(self, flight: Flight[Any]) -> float:
        """Return when the latest call of a running flight is overdue."""
        return flight.called_at + self.limit

    def due_at(self, flight: Flight[Any]) -> float:
        """Return when a running flight is due another call: overdue, or by its hedge before."""
        overdue_at = self.overdue_at(flight)
        hedged = self._hedge is not None and len(flight.runs) == 1 and not flight.hedge_denied
        if hedged and (after := self._hedge_after()) is not None:
            return min(overdue_at, flight.called_at + after)
        return overdue_at

    def _hedge_after(self) -> float | None:
        hedge = self._hedge
        if hedge is None or hedge.quantile is None:
            return None if hedge is None else hedge.after
        if len(self._durations) < LEAST_DURATIONS:
            return None
        return self._durations.quantile(hedge.quantile)

    def take_hedge(self) -> bool:
        """Take a hedge from the budget; False if there is none left."""
        return self._budget is not None and self._budget.take()

    def pay_in(self) -> None:
        """Note one call, which the budget of hedges grows by."""
        if self._budget is not None:
            self._budget.pay_in()

    def watch(self, flight: Flight[Any]) -> None:
        """Have `next_due` return a running flight when it may be due."""
        if not flight.watched:
            flight.watched = True
            at = self.due_at(flight)
            heapq.heappush(self._watched, (at, next(self._order), weakref.ref(flight)))
            if at < self.next_look_at:
                self._call_for_look()

    def next_due(self, now: float) -> Flight[Any] | None:
        """Take out a flight whose time has come; None if there is none any more."""
        while self._watched and self._watched[0][0] <= now:
            flight = heapq.heappop(self._watched)[2]()
            if flight is not None:
                flight.watched = False
                return flight
        return None

    def plan_look(self) -> float | None:
        """Return when the next flight may be due, which somebody will look at; None if none is."""
        self.next_look_at = self._watched[0][0] if self._watched else math.inf
        return self._watched[0][0] if self._watched else None

    def cancel_look(self) -> None:
        """Note that nobody will look at the time that was planned."""
        self.next_look_at = math.inf
