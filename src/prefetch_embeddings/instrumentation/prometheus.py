"""Prometheus: counters and histograms of prefetching, by one call.

Needs the extra `prefetch-embeddings[prometheus]`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

try:
    from prometheus_client import REGISTRY, Histogram
    from prometheus_client.core import CounterMetricFamily
except ImportError as error:
    raise ImportError(
        "prefetch_embeddings.instrumentation.prometheus needs prometheus-client: "
        "pip install 'prefetch-embeddings[prometheus]'",
        name=error.name,
    ) from error

from prefetch_embeddings.events import PrefetchSucceeded, QueryFailed, QueryServed
from prefetch_embeddings.instrumentation._figures import (
    BUCKETS,
    FIGURES,
    OUTCOMES,
    PREFETCH_SECONDS,
    QUERY_SECONDS,
    Sources,
    kind_of,
    tiers_of,
)
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.registry import CollectorRegistry

    from prefetch_embeddings.events import Kind, PrefetchEvent
    from prefetch_embeddings.instrumentation._figures import Tier

__all__ = ["instrument"]

PREFIX: Final = "prefetch_embeddings_"


def instrument(
    embeddings: Tier, *, name: str = "default", registry: CollectorRegistry = REGISTRY
) -> None:
    """Export the figures of a wrapper, and of a Redis tier that it wraps.

    Every counter of `stats()` becomes `prefetch_embeddings_<counter>_total`, those of a Redis tier
    `prefetch_embeddings_redis_<counter>_total`; they are read when Prometheus asks. There are two
    histograms besides: `prefetch_embeddings_query_duration_seconds` by `outcome` (`ready`,
    `joined`, `claimed`, `missed`, `failed`) and `prefetch_embeddings_prefetch_duration_seconds`.

    The label `kind` of all of them is "embedding" or "retrieval".

    The client's multi-process mode merges histograms only: there, the counters are not exported.

    Example:
        ```python
        embeddings = PrefetchingEmbeddings(OpenAIEmbeddings())
        instrument(embeddings)
        start_http_server(9000)  # of prometheus_client
        ```

    Args:
        embeddings: The wrapper. It is not kept alive: when it goes, so do its counters.
        name: The label `name` of all its series; each wrapper of a registry needs its own.
        registry: Where the figures are registered.

    Raises:
        TypeError: If `embeddings` is neither of this package's wrappers.
        ValueError: If the name is in use, by a wrapper that has not been closed.
    """
    tiers = tiers_of(embeddings)
    exporter = _exporters.get(registry)
    if exporter is None:
        exporter = _exporters[registry] = _Exporter(registry)
    exporter.sources.add(name, tiers)
    for tier in tiers:
        if not isinstance(tier, RedisCachedEmbeddings):
            tier.prefetcher.add_listener(_Listener(exporter, name, kind_of(tier)))


class _Exporter:
    """What a registry has of this package: one set of metrics for all wrappers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sources = Sources()
        registry.register(self)
        self.query_seconds = Histogram(
            PREFIX + "query_duration_seconds",
            QUERY_SECONDS,
            ["name", "kind", "outcome"],
            buckets=BUCKETS,
            registry=registry,
        )
        self.prefetch_seconds = Histogram(
            PREFIX + "prefetch_duration_seconds",
            PREFETCH_SECONDS,
            ["name", "kind"],
            buckets=BUCKETS,
            registry=registry,
        )

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Name the counters, for the registry to tell clashes."""
        yield from self._families().values()

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Read the counters."""
        families = self._families()
        for name, kind, stats in self.sources.read():
            for figure in FIGURES[type(stats)]:
                families[figure.name].add_metric([name, kind], getattr(stats, figure.field))
        yield from (family for family in families.values() if family.samples)

    def _families(self) -> dict[str, CounterMetricFamily]:
        return {
            figure.name: CounterMetricFamily(
                PREFIX + figure.name, figure.description, labels=["name", "kind"]
            )
            for figures in FIGURES.values()
            for figure in figures
        }


class _Listener:
    """Puts the durations that a wrapper's events tell into the histograms."""

    def __init__(self, exporter: _Exporter, name: str, kind: Kind) -> None:
        # Made here, so that every series is there from the start:
        self._query_seconds = {
            outcome: exporter.query_seconds.labels(name, kind, outcome) for outcome in OUTCOMES
        }
        self._prefetch_seconds = exporter.prefetch_seconds.labels(name, kind)

    def __call__(self, event: PrefetchEvent) -> None:
        """Take in one event."""
        match event:
            case QueryServed():
                self._query_seconds[event.how].observe(event.seconds)
            case QueryFailed():
                self._query_seconds["failed"].observe(event.seconds)
            case PrefetchSucceeded():
                self._prefetch_seconds.observe(event.seconds)


_exporters: Final[weakref.WeakKeyDictionary[CollectorRegistry, _Exporter]] = (
    weakref.WeakKeyDictionary()
)
