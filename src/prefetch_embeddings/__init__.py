"""Retrieval for nothing: starts it, or its embedding, before the chain asks for it."""

import importlib
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._flights.flight import PrefetchOutcome
from prefetch_embeddings._flights.patience import Hedge
from prefetch_embeddings.embeddings import PrefetchingEmbeddings
from prefetch_embeddings.events import (
    HedgeStarted,
    PrefetchDropped,
    PrefetchEvent,
    PrefetchFailed,
    PrefetchStarted,
    PrefetchSucceeded,
    QueryFailed,
    QueryServed,
)
from prefetch_embeddings.matching import (
    ENGLISH_FILLERS,
    FILLERS,
    RUSSIAN_FILLERS,
    MatchSpoken,
    match_spoken,
)
from prefetch_embeddings.misses import Miss, MissReason
from prefetch_embeddings.speech import SpeechStats, UtterancePrefetcher, UtteranceStats
from prefetch_embeddings.stats import PrefetchStats
from prefetch_embeddings.tap import prefetch_tap

if TYPE_CHECKING:
    from prefetch_embeddings._redis.recorder import (
        RedisCacheEvent,
        RedisCacheEventKind,
        RedisCacheStats,
    )
    from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
    from prefetch_embeddings.retriever import PrefetchingRetriever

__version__ = "0.2.0"

__all__ = [
    "ENGLISH_FILLERS",
    "FILLERS",
    "RUSSIAN_FILLERS",
    "Hedge",
    "HedgeStarted",
    "MatchSpoken",
    "Miss",
    "MissReason",
    "PrefetchDropped",
    "PrefetchEvent",
    "PrefetchFailed",
    "PrefetchOutcome",
    "PrefetchStarted",
    "PrefetchStats",
    "PrefetchSucceeded",
    "PrefetchingEmbeddings",
    "PrefetchingRetriever",
    "QueryFailed",
    "QueryServed",
    "RedisCacheEvent",
    "RedisCacheEventKind",
    "RedisCacheStats",
    "RedisCachedEmbeddings",
    "SpeechStats",
    "UtterancePrefetcher",
    "UtteranceStats",
    "match_spoken",
    "prefetch_tap",
]

# Load when first asked for: what they bring takes longer than all the rest.
_LOADED_LATER: Final = {
    "PrefetchingRetriever": "prefetch_embeddings.retriever",
    "RedisCacheEvent": "prefetch_embeddings._redis.recorder",
    "RedisCacheEventKind": "prefetch_embeddings._redis.recorder",
    "RedisCacheStats": "prefetch_embeddings._redis.recorder",
    "RedisCachedEmbeddings": "prefetch_embeddings.redis_cache",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LOADED_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
