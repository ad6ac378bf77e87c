"""The shelf: at most one flight for a key, under way or ready; ready ones for a time."""

from __future__ import annotations

import itertools
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
        self.by_key: dict[Hashable, Flight[Any]] = {}
        """The map. A ready flight in it may have outlived its time. Only looked at by others."""
        # The ready ones of those, by identity, since keys may be foreign objects:
        self._arrived: OrderedDict[Flight[Any], None] = OrderedDict()  # by completion
        self._served: OrderedDict[Flight[Any], None] = OrderedDict()  # by their last use

    def flights(self) -> list[Flight[Any]]:
        """Return all flights, those that came last at the end."""
        return list(self.by_key.values())

    def ready(self) -> list[Flight[Any]]:
        """Return the ready flights, those that came last at the end."""
        return list(self._arrived)

    def keep(self, flight: Flight[Any], now: float) -> list[Flight[Any]]:
        """Keep a flight that has become ready; return those that are to leave for it or for age."""
        flight.expires_at = now + self._ttl
        arrived = self._arrived
        arrived[flight] = None
        if flight.first_query_at is not None:
            self._served[flight] = None  # the query that waits for it takes its value now
        if next(iter(arrived)).expires_at <= now:
            return self.expired(now)
        surplus = len(arrived) - self._max_entries
        return list(itertools.islice(self._served or arrived, surplus)) if surplus > 0 else []

    def use(self, flight: Flight[Any]) -> None:
        """Note that a ready flight serves a query."""
        self._served[flight] = None
        self._served.move_to_end(flight)

    def remove(self, flight: Flight[Any]) -> None:
        """Take out a flight, if it is still the one that stands for its key."""
        self._arrived.pop(flight, None)
        self._served.pop(flight, None)
        if self.by_key.get(flight.key) is flight:
            del self.by_key[flight.key]

    def expired(self, now: float) -> list[Flight[Any]]:
        """Return what has outlived its time."""
        return list(itertools.takewhile(lambda flight: flight.expires_at <= now, self._arrived))

    def mend(self) -> None:
        """Have the three dictionaries say the same again, after a step that was torn."""
        for key in [k for k, f in self.by_key.items() if not f.held or f.state is State.FAILED]:
            self.by_key.pop(key).held = False
        ready = [flight for flight in self.by_key.values() if flight.state is State.DONE]
        for flight in ready:
            flight.expires_at = flight.finished_at + self._ttl
        ready.sort(key=lambda flight: flight.expires_at)
        self._arrived = OrderedDict.fromkeys(ready)
        self._served = OrderedDict.fromkeys(f for f in self._served if f in self._arrived)
