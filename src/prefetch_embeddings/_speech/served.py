"""`ServedQueries`: tells prefetchers of speech which of their texts a query was served with."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from prefetch_embeddings.events import PrefetchEvent, QueryServed

if TYPE_CHECKING:
    from prefetch_embeddings._flights.prefetcher import Prefetcher


class Interested(Protocol):
    """Who wants to know."""

    def on_served(self, mark: int | str) -> None:
        """Take in that a query was served by the flight, or for the text, with this mark."""


class Place:
    """Those who asked for one flight or text. Lives as long as one of them keeps it."""

    def __init__(self) -> None:
        self.interested: Final[list[weakref.ref[Interested]]] = []


class ServedQueries:
    """The one listener that all prefetchers of speech of one `Prefetcher` share.

    A mark is the number of a flight, or the digest of a text. Nothing here needs a lock: each step
    is one operation of a dictionary or a list. Two that ask for one mark at the same moment may
    miss each other, and then one of them counts a query too few.
    """

    def __init__(self) -> None:
        self._places: Final[weakref.WeakValueDictionary[int | str, Place]] = (
            weakref.WeakValueDictionary()
        )

    @classmethod
    def of(cls, prefetcher: Prefetcher[Any]) -> Self:
        """Return that of `prefetcher`, which is made when first asked for."""
        known = _known.get(prefetcher)
        if isinstance(known, cls):
            return known
        found = cls()
        _known[prefetcher] = found
        prefetcher.add_listener(found)
        return found

    def tell(self, who: Interested, mark: int | str) -> Place:
        """Have `who` told of queries with this mark, as long as it keeps what this returns."""
        place = self._places.get(mark)
        if place is None:
            place = self._places[mark] = Place()
        place.interested.append(weakref.ref(who))
        return place

    def __call__(self, event: PrefetchEvent) -> None:
        """Listen."""
        if not isinstance(event, QueryServed) or event.recovered:
            return
        if event.how not in ("ready", "joined"):
            return
        for mark in (event.flight, event.text_digest):
            place = self._places.get(mark)
            for ref in () if place is None else tuple(place.interested):
                interested = ref()
                if interested is not None:
                    interested.on_served(mark)


_known: Final[weakref.WeakKeyDictionary[Prefetcher[Any], ServedQueries]] = (
    weakref.WeakKeyDictionary()
)
