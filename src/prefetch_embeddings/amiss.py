"""Signs of a set-up that cannot work, which show only in use: logged once each, and remembered.

Nothing here is on the way of a query or of a prefetch that goes well: it is told of prefetches that
were dropped, and of those that succeeded, by whoever ran them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings import misses
from prefetch_embeddings.misses import Miss, MissReason
from prefetch_embeddings.reporting import digest, logger

if TYPE_CHECKING:
    from collections.abc import Hashable

    from prefetch_embeddings._flights.prefetcher import Prefetcher

DROPPED_KEPT: Final = 256
"""How many dropped prefetches are remembered, by digest."""

UNASKED: Final = 8
"""Prefetches that succeed with no query ever, after which the set-up looks wrong ..."""

UNASKED_SECONDS: Final = 60.0
"""... if the first of them was ready this long ago. A start-up may prefetch many at once."""

_OF_ONE_TEXT: Final = frozenset({MissReason.DROPPED, MissReason.PAUSED})
"""Reasons that a later prefetch of the same text makes void."""


class Amiss:
    """Notices what is amiss with the use of one wrapper."""

    def __init__(self) -> None:
        self._prefetcher: Prefetcher[Any] | None = None
        self._dropped: deque[tuple[str, MissReason]] = deque(maxlen=DROPPED_KEPT)
        self._closed_logged = False
        self._ready = 0
        self._ready_since = 0.0
        self._settled = False  # whether queries come, or a warning says that none do
        self._unasked = False

    def watch(self, prefetcher: Prefetcher[Any]) -> None:
        """Say whose prefetches these are."""
        self._prefetcher = prefetcher

    def dropped(self, text: str) -> None:
        """Note that a prefetch was dropped."""
        prefetcher = self._prefetcher
        if prefetcher is None or not text.strip():
            return
        if not prefetcher.closed:
            reason = MissReason.PAUSED if prefetcher.paused else MissReason.DROPPED
            self._dropped.append((digest(text), reason))
        elif not self._closed_logged:
            self._closed_logged = True
            logger.warning("prefetch after close: every prefetch of this wrapper is dropped")

    def succeeded(self) -> None:
        """Note that a prefetched value is there."""
        prefetcher = self._prefetcher
        if prefetcher is None or self._settled:
            return
        now = prefetcher.clock()
        if not self._ready:
            self._ready_since = now
        self._ready += 1
        if self._ready < UNASKED or now - self._ready_since < UNASKED_SECONDS:
            return
        self._settled = True
        if _was_asked(prefetcher):
            return
        self._unasked = True
        logger.warning(
            "%d texts were prefetched and no query ever came: the retriever or the store embeds "
            "with another object than this wrapper",
            self._ready,
        )

    def explain(self, text: str, variant: Hashable = None) -> Miss | None:
        """Tell why a query for `text` misses: what is amiss, else how near prefetches differ.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        prefetcher = self._prefetcher
        if prefetcher is None:
            return None
        miss = misses.explain(prefetcher.key(text, variant), text, prefetcher)
        reason = self._reason(prefetcher, text)
        if reason is None or (miss is None and reason in _OF_ONE_TEXT):
            return miss
        return Miss(digest(text), len(text), reason)

    def _reason(self, prefetcher: Prefetcher[Any], text: str) -> MissReason | None:
        if prefetcher.closed:
            return MissReason.CLOSED
        if self._unasked and not _was_asked(prefetcher):
            return MissReason.NEVER_ASKED
        name = digest(text)
        return next((why for which, why in reversed(self._dropped) if which == name), None)


def _was_asked(prefetcher: Prefetcher[Any]) -> bool:
    stats = prefetcher.stats()
    asked = stats.query_ready + stats.query_joined + stats.query_claimed + stats.query_missed
    return asked > 0
