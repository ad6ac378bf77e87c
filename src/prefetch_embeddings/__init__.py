"""Start a query's embedding before the retriever asks for it."""

from prefetch_embeddings._flights.flight import PrefetchOutcome
from prefetch_embeddings._flights.patience import Hedge
from prefetch_embeddings._redis.recorder import (
    RedisCacheEvent,
    RedisCacheEventKind,
    RedisCacheStats,
)
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
    RUSSIAN_FILLERS,
    MatchSpoken,
    match_spoken,
)
from prefetch_embeddings.misses import Miss, MissReason
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from prefetch_embeddings.speech import SpeechStats, UtterancePrefetcher, UtteranceStats
from prefetch_embeddings.stats import PrefetchStats
from prefetch_embeddings.tap import prefetch_tap

__all__ = [
    "ENGLISH_FILLERS",
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
