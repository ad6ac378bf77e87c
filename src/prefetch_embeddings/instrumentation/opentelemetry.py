"""OpenTelemetry: metrics of prefetching and a span for each flight, by one call.

Needs the extra `prefetch-embeddings[opentelemetry]`, which brings the API; the program brings the
SDK and its exporters.
"""

from __future__ import annotations

import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Final

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import Link, Status, StatusCode
except ImportError as error:
    raise ImportError(
        "prefetch_embeddings.instrumentation.opentelemetry needs opentelemetry-api: "
        "pip install 'prefetch-embeddings[opentelemetry]'",
        name=error.name,
    ) from error

from prefetch_embeddings.events import (
    HedgeStarted,
    PrefetchFailed,
    PrefetchStarted,
    PrefetchSucceeded,
    QueryFailed,
    QueryServed,
)
from prefetch_embeddings.instrumentation._figures import (
    BUCKETS,
    FIGURES,
    PREFETCH_SECONDS,
    QUERY_SECONDS,
    Sources,
    tiers_of,
)
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import Span, SpanContext, TracerProvider
    from opentelemetry.util.types import AttributeValue

    from prefetch_embeddings.events import PrefetchEvent
    from prefetch_embeddings.instrumentation._figures import Figure, Stats, Tier

__all__ = ["instrument"]

SCOPE: Final = "prefetch_embeddings"

FLIGHTS_KEPT: Final = 4096
"""How many flights are remembered, under way or ended, for queries to be linked to."""


def instrument(
    embeddings: Tier,
    *,
    name: str = "default",
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
) -> None:
    """Export the figures of a wrapper, and of a Redis tier that it wraps, and trace its flights.

    Metrics: every counter of `stats()` as `prefetch_embeddings.<counter>`, those of a Redis tier as
    `prefetch_embeddings.redis_<counter>`, and the histograms `prefetch_embeddings.query.duration`
    by `outcome` (`ready`, `joined`, `claimed`, `missed`, `failed`) and
    `prefetch_embeddings.prefetch.duration`. All have the attributes `name` and `kind`, which is
    "embedding" or "retrieval".

    Spans: `prefetch_embeddings.flight` from a prefetch to its value or last failure, under the
    span in which `prefetch` was called; `prefetch_embeddings.query` for what a query waited, under
    the query's span and linked to its flight's. A flight taken back before it ran has none.

    A text is named by its digest and length, an error by its class.

    Example:
        ```python
        embeddings = PrefetchingEmbeddings(OpenAIEmbeddings())
        instrument(embeddings)
        ```

    Args:
        embeddings: The wrapper. It is not kept alive: when it goes, so do its counters.
        name: The attribute `name` of its metrics, and `prefetch_embeddings.name` of its spans; each
            wrapper of a provider needs its own.
        meter_provider: Takes the metrics; by default the global one, now or as it will be set.
        tracer_provider: Takes the spans; likewise. `NoOpTracerProvider()` if none are wanted.

    Raises:
        TypeError: If `embeddings` is neither of this package's wrappers.
        ValueError: If the name is in use, by a wrapper that has not been closed.
    """
    tiers = tiers_of(embeddings)
    provider = metrics.get_meter_provider() if meter_provider is None else meter_provider
    # The module stands for the global provider, which is another object before it has been set.
    key: object = metrics if provider is metrics.get_meter_provider() else provider
    exporter = _exporters.get(key)
    if exporter is None:
        exporter = _exporters[key] = _Exporter(provider.get_meter(SCOPE))
    exporter.sources.add(name, tiers)
    tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
    for tier in tiers:
        if not isinstance(tier, RedisCachedEmbeddings):
            listener = _Listener(name, exporter, tracer)
            tier.prefetcher.add_listener(listener)


class _Exporter:
    """What a meter provider has of this package: one set of instruments for all wrappers."""

    def __init__(self, meter: metrics.Meter) -> None:
        self.sources = Sources()
        for stats_class, figures in FIGURES.items():
            for figure in figures:
                meter.create_observable_counter(
                    f"{SCOPE}.{figure.name}",
                    [self._callback(stats_class, figure)],
                    unit="s" if figure.name.endswith("_seconds") else "",
                    description=figure.description,
                )
        self.query_seconds = meter.create_histogram(
            f"{SCOPE}.query.duration",
            unit="s",
            description=QUERY_SECONDS,
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self.prefetch_seconds = meter.create_histogram(
            f"{SCOPE}.prefetch.duration",
            unit="s",
            description=PREFETCH_SECONDS,
            explicit_bucket_boundaries_advisory=BUCKETS,
        )

    def _callback(
        self, stats_class: type[Stats], figure: Figure
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterator[Observation]:
            for name, kind, stats in self.sources.read():
                if isinstance(stats, stats_class):
                    attributes = {"name": name, "kind": kind}
                    yield metrics.Observation(getattr(stats, figure.field), attributes)

        return observe


class _Flight:
    """What is known of one flight."""

    __slots__ = ("attempts", "context", "digest", "ended", "error", "span")

    def __init__(self, digest: str, span: Span | None = None) -> None:
        self.digest = digest
        self.span = span  # None before its start was told, and after its end
        self.context: SpanContext | None = None if span is None else span.get_span_context()
        self.ended = False
        self.error: str | None = None  # the class of the error that ended it
        self.attempts = 0  # 0 if nobody told

    def started(self, span: Span) -> None:
        """Take in its span, which comes after its end."""
        self.context = span.get_span_context()
        self._end(span)

    def end(self, error: str | None, attempts: int = 0) -> None:
        """Take in how it ended; only the first time counts."""
        if not self.ended:
            self.ended, self.error, self.attempts = True, error, attempts
            span, self.span = self.span, None
            if span is not None:
                self._end(span)

    def _end(self, span: Span) -> None:
        if self.attempts:
            span.set_attribute(f"{SCOPE}.attempts", self.attempts)
        if self.error is not None:
            _set_error(span, self.error)
        span.end()


class _Listener:
    """Makes spans and durations of what a wrapper's events tell.

    Of two events in two threads either may be told first. Whichever is puts the flight into the
    table, and the other finds it there.
    """

    def __init__(self, name: str, exporter: _Exporter, tracer: trace.Tracer) -> None:
        self._name = name
        self._exporter = exporter
        self._tracer = tracer
        # Changed and copied by single atomic steps, without a lock that a fork could leave held:
        self._flights: dict[int, _Flight] = {}

    def __call__(self, event: PrefetchEvent) -> None:
        """Take in one event."""
        match event:
            case PrefetchStarted():
                self._started(event)
            case PrefetchSucceeded():
                self._exporter.prefetch_seconds.record(event.seconds, self._labels(event))
                self._flight(event).end(None, event.attempt)
            case PrefetchFailed(will_retry=False):
                self._flight(event).end(event.error, event.attempt)
            case PrefetchFailed():
                self._note(event, "retry", {"error.type": event.error})
            case HedgeStarted():
                self._note(event, "hedge", {})
            case QueryServed():
                self._query_served(event)
            case QueryFailed():
                self._query_failed(event)

    # --- Flights -------------------------------------------------------------------------------

    def _started(self, event: PrefetchStarted) -> None:
        span = self._tracer.start_span(f"{SCOPE}.flight", attributes=self._attributes(event))
        flight = self._flight(event, span)
        if flight.context is None:  # a query ran it, and its end was told first
            flight.started(span)

    def _flight(
        self, event: PrefetchStarted | PrefetchSucceeded | PrefetchFailed, span: Span | None = None
    ) -> _Flight:
        """Return the flight of an event, a new one if nothing was told of it yet."""
        flight = self._flights.setdefault(event.flight, _Flight(event.text_digest, span))
        while len(self._flights) > FLIGHTS_KEPT:
            with suppress(RuntimeError):  # another thread has changed the table just now
                self._flights.pop(next(iter(self._flights)), None)
        return flight

    def _note(
        self, event: PrefetchFailed | HedgeStarted, what: str, attributes: dict[str, AttributeValue]
    ) -> None:
        """Add an event to the span of a flight; that of a query which missed has none."""
        flight = self._flights.get(event.flight)
        span = None if flight is None else flight.span
        if span is not None:
            span.add_event(what, attributes)

    def _latest(self, event: PrefetchEvent) -> _Flight | None:
        """Return the latest flight of an event's text."""
        flights = self._flights.copy()
        numbers = [number for number, f in flights.items() if f.digest == event.text_digest]
        return flights[max(numbers)] if numbers else None

    # --- Queries -------------------------------------------------------------------------------

    def _query_served(self, event: QueryServed) -> None:
        # The flight of the call by which a query recovered has no span: the one that failed it has.
        flight = self._latest(event) if event.recovered else self._flights.get(event.flight)
        self._query(event, event.how, flight, recovered=event.recovered)

    def _query_failed(self, event: QueryFailed) -> None:
        flight = self._flights.get(event.flight)
        if flight is not None:
            flight.end(event.error)  # the query had claimed it
        self._query(event, "failed", flight, error=event.error)

    def _query(
        self,
        event: QueryServed | QueryFailed,
        outcome: str,
        flight: _Flight | None,
        *,
        recovered: bool = False,
        error: str | None = None,
    ) -> None:
        """Make the span of a query that ends now, and record what it waited."""
        labels = {**self._labels(event), "outcome": outcome}
        self._exporter.query_seconds.record(event.seconds, labels)
        ended_at = time.time_ns()
        context = None if flight is None else flight.context
        span = self._tracer.start_span(
            f"{SCOPE}.query",
            attributes={**self._attributes(event), f"{SCOPE}.outcome": outcome},
            links=[] if context is None else [Link(context)],
            start_time=ended_at - int(event.seconds * 1e9),
        )
        if recovered:
            span.set_attribute(f"{SCOPE}.recovered", value=True)
        if error is not None:
            _set_error(span, error)
        span.end(ended_at)

    def _labels(self, event: PrefetchEvent) -> dict[str, AttributeValue]:
        return {"name": self._name, "kind": event.kind}

    def _attributes(self, event: PrefetchEvent) -> dict[str, AttributeValue]:
        return {
            f"{SCOPE}.name": self._name,
            f"{SCOPE}.kind": event.kind,
            f"{SCOPE}.text_digest": event.text_digest,
            f"{SCOPE}.text_length": event.text_length,
        }


def _set_error(span: Span, error: str) -> None:
    span.set_status(Status(StatusCode.ERROR, error))
    span.set_attribute("error.type", error)


_exporters: Final[weakref.WeakKeyDictionary[object, _Exporter]] = weakref.WeakKeyDictionary()
