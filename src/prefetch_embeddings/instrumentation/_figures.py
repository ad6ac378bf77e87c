"""What every backend tells: the counters of each tier, under the name that its user gave it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final, NamedTuple

from prefetch_embeddings._redis.recorder import RedisCacheStats
from prefetch_embeddings.embeddings import PrefetchingEmbeddings
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from prefetch_embeddings.retriever import PrefetchingRetriever
from prefetch_embeddings.stats import PrefetchStats

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from prefetch_embeddings.events import Kind

    Tier: TypeAlias = PrefetchingEmbeddings | PrefetchingRetriever | RedisCachedEmbeddings
    Stats: TypeAlias = PrefetchStats | RedisCacheStats

# fmt: off
BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0,
)
# fmt: on
"""Upper bounds in seconds: from a lookup to a hanging call, close together where models answer."""

QUERY_SECONDS: Final = "What queries waited, by what they met; `failed` if the model raised."
PREFETCH_SECONDS: Final = "From a prefetch to its value."

OUTCOMES: Final = ("ready", "joined", "claimed", "missed", "failed")
"""What a query came to; each query whose caller stayed counts once."""


class Figure(NamedTuple):
    """One counter of a tier."""

    field: str
    """Its name in the tier's stats."""
    name: str
    """Its name among all tiers' figures."""
    description: str


def _figures(prefix: str, descriptions: dict[str, str]) -> tuple[Figure, ...]:
    return tuple(
        Figure(field, f"{prefix}{field.removeprefix(prefix)}", description)
        for field, description in descriptions.items()
    )


FIGURES: Final[dict[type[Stats], tuple[Figure, ...]]] = {
    PrefetchStats: _figures(
        "",
        {
            "prefetch_started": "Flights that a prefetch started.",
            "prefetch_deduplicated": "Prefetches that found their text ready or under way.",
            "prefetch_dropped": "Prefetches refused: queue full, calls failing, closed, blank.",
            "prefetch_succeeded": "Flights started by a prefetch that brought a value.",
            "prefetch_failed": "Flights started by a prefetch that ended without a value.",
            "prefetch_withdrawn": "Flights taken back before they ran.",
            "prefetch_retried": "Second and later attempts in the background.",
            "prefetch_used": "Flights started by a prefetch that served a query.",
            "prefetch_wasted": "Flights that brought a value and left without serving a query.",
            "query_ready": "Queries answered at once from a finished flight.",
            "query_joined": "Queries that waited for a flight already running.",
            "query_claimed": "Queries that found their flight queued and ran it themselves.",
            "query_missed": "Queries that found nothing and made the call.",
            "query_recovered": "Queries answered by another call, their flight having failed.",
            "query_failed": "Queries that ended in an error of the model or retriever.",
            "query_matched": "Queries served by a flight of another text that matches theirs.",
            "hedge_started": "Second calls made beside one that took too long.",
            "hedge_won": "Second calls that brought the value.",
            "hedge_denied": "Second calls that were due, and beyond the budget.",
            "hidden_seconds": "Time of calls that no query waited for.",
            "exposed_seconds": "What queries waited, joining a flight or running it themselves.",
            "overdue_calls": "Second and third calls made beside one that was overdue.",
        },
    ),
    RedisCacheStats: _figures(
        "redis_",
        {
            "hits": "Texts whose vector Redis had.",
            "misses": "Texts that the model had to embed although Redis could be asked.",
            "skipped": "Texts that the model embedded without asking Redis.",
            "corrupt": "Values that did not check.",
            "errors": "Requests to Redis that failed or took too long.",
            "writes": "Vectors stored.",
            "writes_dropped": "Vectors not stored.",
            "carried_over": "Hits that an older cache had.",
            "waited": "Texts for which another process' call was waited for.",
            "redis_seconds": "What callers spent on Redis.",
            "waited_seconds": "What callers spent waiting for other processes.",
        },
    ),
}
"""The figures of each kind of stats; all are counters."""


class Sources:
    """The tiers that one exporter reads. It keeps none of them alive."""

    def __init__(self) -> None:
        # By name and kind. Changed and copied by single atomic steps, without a lock that a fork
        # could leave held:
        self._by_name: dict[tuple[str, Kind], tuple[weakref.ref[Tier], ...]] = {}

    def add(self, name: str, tiers: list[Tier]) -> None:
        """Read these tiers, too, the outermost first.

        Raises:
            ValueError: If the name is in use, by a wrapper that has not been closed.
        """
        key = name, kind_of(tiers[0])
        if key in self._by_name:
            holder = self._by_name[key][0]()
            if holder is not None and not _is_closed(holder):
                raise ValueError(
                    f"the name {name!r} is in use: give each wrapper its own, or close the other"
                )
        self._by_name[key] = tuple(weakref.ref(tier) for tier in tiers)

    def read(self) -> Iterator[tuple[str, Kind, Stats]]:
        """Return the names and kinds, and a snapshot of each tier under them."""
        for (name, kind), tiers in self._by_name.copy().items():
            for reference in tiers:
                tier = reference()
                if tier is not None:
                    yield name, kind, tier.stats()


def kind_of(tier: Tier) -> Kind:
    """Return what a tier's values are."""
    return "retrieval" if isinstance(tier, PrefetchingRetriever) else "embedding"


def tiers_of(wrapper: Tier) -> list[Tier]:
    """Return a wrapper and what it wraps, as far as this package knows the figures of it.

    What stands behind a retriever is not looked for: a store may have its model anywhere.

    Raises:
        TypeError: If there is nothing of the kind.
    """
    tiers: list[Tier] = []
    tier: object = wrapper
    while tier is not None:
        if isinstance(tier, PrefetchingEmbeddings | PrefetchingRetriever | RedisCachedEmbeddings):
            tiers.append(tier)
        tier = getattr(tier, "underlying_embeddings", None)
    if not tiers:
        raise TypeError(f"a {type(wrapper).__name__} has no figures to export")
    return tiers


def _is_closed(tier: Tier) -> bool:
    if isinstance(tier, PrefetchingEmbeddings | PrefetchingRetriever):
        return tier.prefetcher.closed
    return tier.closed
