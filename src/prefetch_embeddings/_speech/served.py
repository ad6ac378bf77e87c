"""`ServedQueries`: tells prefetchers of speech which of their texts a query was served with."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings.events import PrefetchEvent, QueryServed

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefetch_embeddings._flights.prefetcher import Prefetcher


class Place:
    """Those who asked for one flight or text. Lives as long as one of them keeps it."""

    def __init__(self) -> None:
        self.interested: Final[list[weakref.WeakMethod[Callable[[int | str], None]]]] = []


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
    def of(cls, prefetcher: Prefetcher[Any]) -> ServedQueries:
        """Return that of `prefetcher`, which is made when first asked for."""
        found = _known.get(prefetcher)
        if found is None:
            found = _known[prefetcher] = cls()
            prefetcher.add_listener(found)
        return found

    def tell(self, method: Callable[[int | str], None], mark: int | str) -> Place:
        """Have a method called with `mark` at each query that has it.

        Returns:
            What the method's object must keep for as long as it wants to be told.
        """
        place = self._places.get(mark)
        if place is None:
            place = self._places[mark] = Place()
        place.interested.append(weakref.WeakMethod(method))
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
                method = ref()
                if method is not None:
                    method(mark)


_known: Final[weakref.WeakKeyDictionary[Prefetcher[Any], ServedQueries]] = (
    weakref.WeakKeyDictionary()
)
