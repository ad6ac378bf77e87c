"""The shelf: at most one flight for a key, under way or ready; ready ones for a time."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._flights.flight import State

if TYPE_CHECKING:
    from collections.abc import Hashable

    from prefetch_embeddings._flights.flight import Flight


class Shelf:
    """Flights by key. Guarded by the map's lock.

    The time to live is the same for all, so that the order of arrival is the order of leaving. Of
    ready flights beyond `max_entries`, those that have served a query leave first, the least
    recently used before the others; then those that still wait for theirs, the oldest first.

    No `cachetools` here: it has no such order, and an exception out of a signal handler can leave
    its linked lists in pieces. Each step below is one of a dictionary, which is whole or not done.
    """

    def __init__(self, ttl: float, max_entries: int) -> None:
        self._ttl: Final = ttl
        self._max_entries: Final = max_entries
        self._by_key: dict[Hashable, Flight[Any]] = {}
        # The ready ones of those, by identity, since keys may be foreign objects:
        self._arrived: OrderedDict[Flight[Any], None] = OrderedDict()  # by completion
        self._served: OrderedDict[Flight[Any], None] = OrderedDict()  # by their last use

    def get(self, key: Hashable) -> Flight[Any] | None:
        """Return the flight of `key`. Changes nothing; a ready one may have outlived its time."""
        return self._by_key.get(key)

    def flights(self) -> list[Flight[Any]]:
        """Return all flights, those that came last at the end."""
        return list(self._by_key.values())

    def ready(self) -> list[Flight[Any]]:
        """Return the ready flights, those that came last at the end."""
        return list(self._arrived)

    def add(self, flight: Flight[Any]) -> None:
        """Put a new flight in the place of its key, which must be free."""
        self._by_key[flight.key] = flight

    def keep(self, flight: Flight[Any], now: float) -> list[Flight[Any]]:
        """Keep a flight that has become ready; return those that leave for it, or for age."""
        flight.expires_at = now + self._ttl
        self._arrived[flight] = None
        left = self.expire(now)
        while len(self._arrived) > self._max_entries:
            # A flight that is just arriving has served nobody: it leaves only where all wait.
            left.append(next(iter(self._served or self._arrived)))
            self.remove(left[-1])
        return left

    def use(self, flight: Flight[Any]) -> None:
        """Note that a ready flight serves a query."""
        self._served[flight] = None
        self._served.move_to_end(flight)

    def remove(self, flight: Flight[Any]) -> None:
        """Take out a flight, if it is still the one that stands for its key."""
        flight.held = False
        self._arrived.pop(flight, None)
        self._served.pop(flight, None)
        if self._by_key.get(flight.key) is flight:
            del self._by_key[flight.key]

    def expire(self, now: float) -> list[Flight[Any]]:
        """Take out what has outlived its time, and return it."""
        expired: list[Flight[Any]] = []
        while self._arrived:
            oldest = next(iter(self._arrived))
            if oldest.expires_at > now:
                break
            self.remove(oldest)
            expired.append(oldest)
        return expired

    def mend(self) -> None:
        """Have the three dictionaries say the same again, after a step that was torn."""
        ready = [flight for flight in self._by_key.values() if flight.state is State.DONE]
        served = [flight for flight in self._served if flight.held]
        for flight in [f for f in self._by_key.values() if f.state is State.FAILED]:
            self.remove(flight)
        for flight in ready:
            flight.expires_at = flight.finished_at + self._ttl
        ready.sort(key=lambda flight: flight.expires_at)
        self._arrived = OrderedDict.fromkeys(ready)
        self._served = OrderedDict.fromkeys(flight for flight in served if flight in self._arrived)
