"""Why a query found no flight: the nearest prefetch that no query used, and how it differs.

Nothing is done for this until somebody asks (`PrefetchingEmbeddings.explain_miss`), or a query
misses while the log takes DEBUG records.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings.matching import match_spoken
from prefetch_embeddings.reporting import digest, logger

if TYPE_CHECKING:
    from collections.abc import Hashable

    from prefetch_embeddings._flights.prefetcher import Prefetcher

LEAST_SIMILARITY: Final = 0.2
"""Below it, two texts have no more in common than any two questions about one subject."""


class MissReason(enum.StrEnum):
    """How the query differs from the nearest prefetch that no query used.

    The later ones are nearer.
    """

    NEVER_PREFETCHED = enum.auto()
    """Nothing like it was prefetched, or the prefetch was dropped."""
    REWRITTEN = enum.auto()
    """Other words: a chain rewrote the question (see `prefetch_tap`), or the recogniser did."""
    PREFIX = enum.auto()
    """The prefetched text is how the query begins: the speaker went on."""
    PUNCTUATION = enum.auto()
    """Punctuation, apostrophes or white space, and perhaps case, too: see `match_spoken`."""
    CASE = enum.auto()
    """Case alone: see `match_spoken`."""
    CONFIG = enum.auto()
    """The same text was prefetched with another `configurable` in its config (retrievers)."""
    GONE = enum.auto()
    """The same text was prefetched, but failed, was withdrawn or had outlived its time."""
    DROPPED = enum.auto()
    """The same text was to be prefetched, and the queue was full."""
    PAUSED = enum.auto()
    """The same text was to be prefetched, and prefetching paused: calls kept failing."""
    NEVER_ASKED = enum.auto()
    """Prefetches go on and no query ever came: the store embeds with another object."""
    CLOSED = enum.auto()
    """The wrapper is closed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Miss:
    """Why a query found no flight. Holds no text.

    Attributes:
        text_digest: Eight hexadecimal digits that stand for the query, as in the log.
        text_length: The query's length in characters.
        reason: How it differs from the nearest unused prefetch.
        nearest_digest: Stands for that prefetch's text; empty if there is none.
        nearest_length: That text's length in characters.
        similarity: The share of what both texts are made of, from 0 to 1.
        seconds: How long ago that prefetch was started.
    """

    text_digest: str
    text_length: int
    reason: MissReason
    nearest_digest: str = ""
    nearest_length: int = 0
    similarity: float = 0.0
    seconds: float = 0.0


def explain(key: Hashable, text: str, prefetches: Prefetcher[Any]) -> Miss | None:
    """Tell why a query for `text` found no flight.

    Returns:
        The reason, with the nearest prefetch, the latest of several equally near ones. None if a
        prefetch is there for the query to use.
    """
    unused = prefetches.unused(key)
    if unused is None:
        return None
    now = prefetches.clock()
    query = _Looks(text)
    miss = Miss(digest(text), len(text), MissReason.NEVER_PREFETCHED)
    nearness = (_NEARNESS[miss.reason], 0.0)
    for candidate in unused:
        if candidate.key == key:
            reason, similarity = MissReason.GONE, 1.0
        elif candidate.text == text:
            reason, similarity = MissReason.CONFIG, 1.0
        else:
            reason, similarity = query.compare(_Looks(candidate.text))
        if (_NEARNESS[reason], similarity) < nearness or reason is MissReason.NEVER_PREFETCHED:
            continue
        nearness = (_NEARNESS[reason], similarity)
        miss = dataclasses.replace(
            miss,
            reason=reason,
            nearest_digest=digest(candidate.text),
            nearest_length=len(candidate.text),
            similarity=similarity,
            seconds=now - candidate.asked_at,
        )
    return miss


def log_at_debug(prefetches: Prefetcher[Any], key: Hashable, text: str) -> None:
    """Log why a query missed, if the log takes DEBUG records; else do nothing."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    miss = explain(key, text, prefetches)
    if miss is None:
        return
    if miss.reason is MissReason.NEVER_PREFETCHED:
        logger.debug(
            "query %s (%d characters) missed: nothing like it was prefetched",
            miss.text_digest,
            miss.text_length,
        )
        return
    logger.debug(
        "query %s (%d characters) missed: %s; nearest unused prefetch: %s (%d characters), "
        "similarity %.2f, started %.3f s before",
        miss.text_digest,
        miss.text_length,
        miss.reason,
        miss.nearest_digest,
        miss.nearest_length,
        miss.similarity,
        miss.seconds,
    )


_NEARNESS: Final = {reason: place for place, reason in enumerate(MissReason)}


class _Looks:
    """What two texts are compared by."""

    def __init__(self, text: str) -> None:
        self.folded = text.casefold()
        self.spoken = match_spoken(text)
        # Three characters at a time: words that are inflected still have most of them in common.
        padded = f" {self.spoken} "
        self.trigrams = {padded[i : i + 3] for i in range(len(padded) - 2)}

    def compare(self, prefetched: _Looks) -> tuple[MissReason, float]:
        """Return how this query's text differs from a prefetched one, and how alike they are."""
        shared = len(self.trigrams & prefetched.trigrams)
        similarity = 2 * shared / (len(self.trigrams) + len(prefetched.trigrams))
        if self.folded == prefetched.folded:
            return MissReason.CASE, similarity
        if self.spoken == prefetched.spoken:
            return MissReason.PUNCTUATION, similarity
        if self.spoken.startswith(prefetched.spoken):
            return MissReason.PREFIX, similarity
        if similarity >= LEAST_SIMILARITY:
            return MissReason.REWRITTEN, similarity
        return MissReason.NEVER_PREFETCHED, similarity
