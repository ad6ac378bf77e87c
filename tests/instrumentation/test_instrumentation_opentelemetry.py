"""OpenTelemetry: the spans and metrics of a wrapper, as the SDK's own exporters get them."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from opentelemetry import metrics as api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    HistogramDataPoint,
    InMemoryMetricReader,
    NumberDataPoint,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from opentelemetry.util._once import Once

from prefetch_embeddings import (
    Hedge,
    PrefetchEvent,
    PrefetchFailed,
    PrefetchingEmbeddings,
    PrefetchingRetriever,
    PrefetchStarted,
    PrefetchSucceeded,
    QueryFailed,
    QueryServed,
    RedisCachedEmbeddings,
)
from prefetch_embeddings.instrumentation import opentelemetry
from prefetch_embeddings.reporting import digest
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ManualPrefetchingRetriever,
    ScriptedEmbeddings,
    ScriptedRetriever,
)
from tests.helpers import Call, auntil, until

Manual = Callable[..., ManualPrefetchingEmbeddings]
Wrap = Callable[..., PrefetchingEmbeddings]

SECRET = "my card number is 4111"

FLIGHT, QUERY = "prefetch_embeddings.flight", "prefetch_embeddings.query"


class Telemetry:
    """The SDK, with exporters in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meter_provider = MeterProvider([self._reader])
        self._tracer = self.tracer_provider.get_tracer("test")

    def instrument(
        self, wrapper: PrefetchingEmbeddings | PrefetchingRetriever, name: str = "default"
    ) -> None:
        opentelemetry.instrument(
            wrapper,
            name=name,
            meter_provider=self.meter_provider,
            tracer_provider=self.tracer_provider,
        )

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Have a span of the user's around something."""
        with self._tracer.start_as_current_span(name):
            yield

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def span(self, name: str) -> ReadableSpan:
        (span,) = self.spans(name)
        return span

    def points(self) -> dict[str, list[NumberDataPoint | HistogramDataPoint]]:
        data = self._reader.get_metrics_data()
        found: dict[str, list[NumberDataPoint | HistogramDataPoint]] = {}
        for resource in data.resource_metrics if data is not None else []:
            for scope in resource.scope_metrics:
                assert scope.scope.name == "prefetch_embeddings"
                for metric in scope.metrics:
                    assert metric.name not in found
                    points = [
                        point
                        for point in metric.data.data_points
                        if isinstance(point, NumberDataPoint | HistogramDataPoint)
                    ]
                    found[metric.name] = points
        return found

    def counts(self, name: str = "default", kind: str = "embedding") -> dict[str, float]:
        labels = {"name": name, "kind": kind}
        return {
            metric.removeprefix("prefetch_embeddings."): point.value
            for metric, points in self.points().items()
            for point in points
            if isinstance(point, NumberDataPoint) and point.attributes == labels
        }

    def durations(self, metric: str) -> dict[str, HistogramDataPoint]:
        """Return the points of a histogram by outcome."""
        return {
            str((point.attributes or {}).get("outcome", "")): point
            for point in self.points()[f"prefetch_embeddings.{metric}.duration"]
            if isinstance(point, HistogramDataPoint)
        }


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.tracer_provider.shutdown()
    telemetry.meter_provider.shutdown()


def _id(span: ReadableSpan) -> int:
    assert span.context is not None
    number: int = span.context.span_id
    return number


def _is_child(span: ReadableSpan, of: ReadableSpan) -> bool:
    return span.parent is not None and span.parent.span_id == _id(of)


def _links(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def _facts(span: ReadableSpan) -> dict[str, object]:
    """Return what is particular to a span."""
    return {
        name.removeprefix("prefetch_embeddings."): value
        for name, value in (span.attributes or {}).items()
        if name.rpartition(".")[2] not in ("name", "kind", "text_digest", "text_length")
    }


def _seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def _assert_related(telemetry: Telemetry) -> tuple[ReadableSpan, ReadableSpan]:
    """Assert what holds whenever a prefetch under `asked` met a query under `answered`."""
    flight, query = telemetry.span(FLIGHT), telemetry.span(QUERY)
    assert _is_child(flight, of=telemetry.span("asked"))
    assert _is_child(query, of=telemetry.span("answered"))
    assert _links(query) == [_id(flight)]
    return flight, query


# --- A flight and its queries --------------------------------------------------------------------


def test_a_ready_query_is_linked_to_its_flight(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings, "bot")
    with telemetry.turn("asked"):
        embeddings.prefetch("q")
    embeddings.executor.run_all()
    with telemetry.turn("answered"):
        embeddings.embed_query("q")
    flight, query = _assert_related(telemetry)
    assert flight.attributes == {
        "prefetch_embeddings.name": "bot",
        "prefetch_embeddings.kind": "embedding",
        "prefetch_embeddings.text_digest": digest("q"),
        "prefetch_embeddings.text_length": 1,
        "prefetch_embeddings.attempts": 1,
    }
    assert _facts(query) == {"outcome": "ready"}
    assert (flight.status.status_code, query.status.status_code) == (StatusCode.UNSET,) * 2
    assert _seconds(query) == 0.0


def test_every_query_of_a_flight_is_linked_to_it(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    embeddings.embed_query("q")
    asyncio.run(embeddings.aembed_query("q"))
    flight = telemetry.span(FLIGHT)
    assert [_links(query) for query in telemetry.spans(QUERY)] == [[_id(flight)]] * 2
    assert flight.parent is None


def test_a_joined_query_is_linked_to_its_flight(
    wrap: Wrap, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = wrap(model)
    telemetry.instrument(embeddings)
    gate = model.hold("q")
    with telemetry.turn("asked"):
        embeddings.prefetch("q")
    gate.wait_until_entered()

    def answer() -> None:
        with telemetry.turn("answered"):
            embeddings.embed_query("q")

    query = Call(answer)
    until(lambda: embeddings.stats().query_joined == 1)
    gate.open()
    query.result()
    until(lambda: bool(telemetry.spans(FLIGHT)))  # the worker tells after it has woken the query
    flight, span = _assert_related(telemetry)
    assert _facts(span) == {"outcome": "joined"}
    assert flight.start_time is not None
    assert span.start_time is not None
    assert span.start_time > flight.start_time
    assert span.end_time is not None
    assert span.end_time >= span.start_time
    assert _seconds(span) == pytest.approx(telemetry.durations("query")["joined"].sum, abs=1e-6)


def test_a_claimed_flight_keeps_its_place_under_the_prefetch(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    with telemetry.turn("asked"):
        embeddings.prefetch("q")
    with telemetry.turn("answered"):
        embeddings.embed_query("q")
    flight, query = _assert_related(telemetry)
    assert _facts(flight) == {"attempts": 1}
    assert _facts(query) == {"outcome": "claimed"}


def test_a_claimed_flight_that_fails_ends_with_its_query(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    model.fail("q", ConnectionError(SECRET))
    with telemetry.turn("asked"):
        embeddings.prefetch("q")
    with telemetry.turn("answered"), pytest.raises(ConnectionError):
        embeddings.embed_query("q")
    flight, query = _assert_related(telemetry)
    for span in flight, query:
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "ConnectionError"
        assert not span.events
    assert _facts(query) == {"outcome": "failed", "error.type": "ConnectionError"}


def test_a_missed_query_has_a_span_of_its_own(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    with telemetry.turn("answered"):
        embeddings.embed_query("q")
    query = telemetry.span(QUERY)
    assert _is_child(query, of=telemetry.span("answered"))
    assert _facts(query) == {"outcome": "missed"}
    assert not query.links
    assert not telemetry.spans(FLIGHT)


def test_a_query_that_misses_and_fails_blames_no_flight_that_was_fine(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    embeddings.forget("q")
    model.fail("q", ValueError())
    with pytest.raises(ValueError):  # noqa: PT011 - the model's
        embeddings.embed_query("q")
    assert telemetry.span(FLIGHT).status.status_code is StatusCode.UNSET
    assert not telemetry.span(QUERY).links


def test_a_recovered_query_is_linked_to_the_flight_that_failed_it(
    wrap: Wrap, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = wrap(model)
    telemetry.instrument(embeddings)
    gate = model.hold("q")
    model.fail("q", TimeoutError(SECRET))
    with telemetry.turn("asked"):
        embeddings.prefetch("q")
    gate.wait_until_entered()

    def answer() -> None:
        with telemetry.turn("answered"):
            embeddings.embed_query("q")

    query = Call(answer)
    until(lambda: embeddings.stats().query_joined == 1)
    gate.open()
    query.result()
    until(lambda: bool(telemetry.spans(FLIGHT)))
    flight, span = _assert_related(telemetry)
    assert flight.status.status_code is StatusCode.ERROR
    assert flight.status.description == "TimeoutError"
    assert _facts(flight) == {"attempts": 1, "error.type": "TimeoutError"}
    assert span.status.status_code is StatusCode.UNSET
    assert _facts(span) == {"outcome": "joined", "recovered": True}


def test_a_flight_notes_its_failed_attempts(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    model.fail("q", ValueError(SECRET))
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    embeddings.time.advance(60.0)
    embeddings.executor.run_all()
    flight = telemetry.span(FLIGHT)
    assert flight.status.status_code is StatusCode.UNSET
    assert _facts(flight) == {"attempts": 2}
    (event,) = flight.events
    assert (event.name, event.attributes) == ("retry", {"error.type": "ValueError"})


def test_a_flight_whose_every_attempt_fails_ends_in_an_error(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    model.fail("q", ValueError(), TimeoutError())
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    embeddings.time.advance(60.0)
    embeddings.executor.run_all()
    flight = telemetry.span(FLIGHT)
    assert flight.status.description == "TimeoutError"
    assert _facts(flight) == {"attempts": 2, "error.type": "TimeoutError"}


def test_a_flight_notes_its_hedge(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model, hedge=Hedge(after=0.5))
    telemetry.instrument(embeddings)
    gate = model.hold("q")
    with telemetry.turn("asked"):
        embeddings.prefetch("q")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()

    def answer() -> None:
        with telemetry.turn("answered"):
            embeddings.embed_query("q")

    query = Call(answer)
    until(lambda: embeddings.time.calls_to_come == 1)
    embeddings.time.advance(0.5)
    query.result()
    gate.open()
    run.result()
    until(lambda: bool(telemetry.spans(FLIGHT)))
    flight, span = _assert_related(telemetry)
    assert [event.name for event in flight.events] == ["hedge"]
    assert _facts(span) == {"outcome": "joined"}
    assert telemetry.counts()["hedge_won"] == 1


def test_coroutines_are_traced_alike(
    wrap: Wrap, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = wrap(model)
    telemetry.instrument(embeddings)

    async def answer() -> None:
        with telemetry.turn("answered"):
            await embeddings.aembed_query("q")

    async def main() -> None:
        gate = model.hold("q")
        with telemetry.turn("asked"):
            await embeddings.aprefetch("q")
        query = asyncio.create_task(answer())
        await gate.await_until_entered()
        await auntil(lambda: embeddings.stats().query_joined == 1)
        gate.open()
        await query

    asyncio.run(main())
    _, query = _assert_related(telemetry)
    assert _facts(query) == {"outcome": "joined"}


def test_texts_of_one_call_have_a_flight_each(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model, symmetric=True)
    telemetry.instrument(embeddings)
    with telemetry.turn("asked"):
        embeddings.prefetch_many(["a", "b"])
    embeddings.executor.run_all()
    asked = telemetry.span("asked")
    assert all(_is_child(flight, of=asked) for flight in telemetry.spans(FLIGHT))
    assert len(telemetry.spans(FLIGHT)) == 2


def test_a_closed_wrapper_ends_its_flights(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    embeddings.prefetch("q")
    embeddings.close()
    assert telemetry.span(FLIGHT).status.status_code is StatusCode.ERROR


# --- Events in any order -------------------------------------------------------------------------

STARTED = PrefetchStarted("d", 1, 7)
SUCCEEDED = PrefetchSucceeded("d", 1, 7, 0.25, 1)
FAILED = PrefetchFailed("d", 1, 7, "ValueError", 2, will_retry=False)
SERVED = QueryServed("d", 1, 7, "claimed", 0.25)
UNSERVED = QueryFailed("d", 1, 7, "ValueError", 0.25)


@pytest.mark.parametrize(
    "events",
    [
        order
        for told in ((STARTED, SUCCEEDED, SERVED), (STARTED, FAILED, UNSERVED), (STARTED, FAILED))
        for order in itertools.permutations(told)
    ],
    ids=lambda events: "-".join(type(event).__name__ for event in events),
)
def test_whatever_is_told_first_a_flight_has_one_span(
    wrap: Wrap,
    model: ScriptedEmbeddings,
    telemetry: Telemetry,
    caplog: pytest.LogCaptureFixture,
    events: tuple[PrefetchEvent, ...],
) -> None:
    embeddings = wrap(model)
    telemetry.instrument(embeddings)
    with telemetry.turn("asked"):
        for event in events:
            embeddings.prefetcher._reporter.tell(event)
    flight = telemetry.span(FLIGHT)
    assert _is_child(flight, of=telemetry.span("asked"))
    failed = FAILED in events
    assert flight.status.status_code is (StatusCode.ERROR if failed else StatusCode.UNSET)
    if SERVED in events and events.index(STARTED) < events.index(SERVED):
        assert _links(telemetry.span(QUERY)) == [_id(flight)]
    assert len(telemetry.spans(QUERY)) == len(events) - 2
    assert not caplog.records, "a span ended twice, or the listener raised"


def test_what_is_remembered_is_bounded(
    wrap: Wrap,
    model: ScriptedEmbeddings,
    telemetry: Telemetry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(opentelemetry, "FLIGHTS_KEPT", 8)
    embeddings = wrap(model)
    telemetry.instrument(embeddings)
    (listener,) = embeddings.prefetcher._reporter._listeners
    assert isinstance(listener, opentelemetry._Listener)

    def tell(thread: int) -> None:
        for i in range(500):
            number = i * 4 + thread
            embeddings.prefetcher._reporter.tell(dataclasses.replace(STARTED, flight=number))
            if i % 3:
                embeddings.prefetcher._reporter.tell(dataclasses.replace(SUCCEEDED, flight=number))
            else:
                embeddings.prefetcher._reporter.tell(dataclasses.replace(FAILED, flight=number))
            embeddings.prefetcher._reporter.tell(dataclasses.replace(SERVED, flight=number))
            embeddings.prefetcher._reporter.tell(UNSERVED)

    threads = [threading.Thread(target=tell, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(listener._flights) <= 8
    assert len(telemetry.spans(QUERY)) == 4000
    raised = [record for record in caplog.records if record.name == "prefetch_embeddings"]
    assert not raised


def test_the_latest_flights_are_the_ones_remembered(
    manual: Manual,
    model: ScriptedEmbeddings,
    telemetry: Telemetry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opentelemetry, "FLIGHTS_KEPT", 2)
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    for text in "abc":
        embeddings.prefetch(text)
        embeddings.executor.run_all()
    for text in "abc":
        embeddings.embed_query(text)
    assert [len(query.links) for query in telemetry.spans(QUERY)] == [0, 1, 1]


# --- Metrics -------------------------------------------------------------------------------------


def test_the_counters_are_the_stats(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    embeddings.prefetch("q")
    embeddings.time.advance(0.75)
    embeddings.executor.run_all()
    embeddings.embed_query("q")
    embeddings.embed_query("new")
    model.fail("failing", ValueError())
    with pytest.raises(ValueError):  # noqa: PT011 - the model's
        embeddings.embed_query("failing")
    assert telemetry.counts() == dataclasses.asdict(embeddings.stats())
    assert telemetry.counts()["query_ready"] == 1
    counts = {outcome: point.count for outcome, point in telemetry.durations("query").items()}
    assert counts == {"ready": 1, "missed": 1, "failed": 1}
    (prefetched,) = telemetry.durations("prefetch").values()
    assert prefetched.count == 1
    assert prefetched.sum == pytest.approx(0.75)
    assert prefetched.explicit_bounds[0] == 0.001
    assert prefetched.explicit_bounds[-1] == 10.0


def test_several_wrappers_share_a_provider(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    for name in ("a", "b"):
        embeddings = manual(model)
        telemetry.instrument(embeddings, name)
        embeddings.embed_query(name)
    embeddings.embed_query("one more")
    assert telemetry.counts("a")["query_missed"] == 1
    assert telemetry.counts("b")["query_missed"] == 2


def test_a_name_belongs_to_one_open_wrapper(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    first, second = manual(model), manual(model)
    telemetry.instrument(first)
    with pytest.raises(ValueError, match="'default' is in use"):
        telemetry.instrument(second)
    second.embed_query("q")
    assert not telemetry.spans(QUERY), "it listens"
    first.close()
    telemetry.instrument(second)
    assert telemetry.counts()["query_missed"] == 1


def test_a_wrapper_is_not_kept_alive(model: ScriptedEmbeddings, telemetry: Telemetry) -> None:
    telemetry.instrument(PrefetchingEmbeddings(model))
    gc.collect()
    assert telemetry.counts() == {}


def test_a_redis_tier_underneath_is_included(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    with RedisCachedEmbeddings(model, "redis://127.0.0.1:1/0", model_id="scripted") as tier:
        embeddings = manual(tier)
        telemetry.instrument(embeddings)
        embeddings.embed_query("q")
        counts = telemetry.counts()
        assert counts["redis_misses"] + counts["redis_skipped"] == 1
        assert counts["redis_seconds"] == tier.stats().redis_seconds


@pytest.fixture
def no_global_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no global meter provider set, whatever other tests did."""
    internal = api._internal
    monkeypatch.setattr(internal, "_METER_PROVIDER", None)
    monkeypatch.setattr(internal, "_METER_PROVIDER_SET_ONCE", Once())
    monkeypatch.setattr(internal, "_PROXY_METER_PROVIDER", internal._ProxyMeterProvider())
    monkeypatch.setattr(opentelemetry, "_exporters", weakref.WeakKeyDictionary())
    monkeypatch.delenv("OTEL_PYTHON_METER_PROVIDER", raising=False)


@pytest.mark.usefixtures("no_global_provider")
def test_the_global_provider_may_be_set_later(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    before, after, explicit = manual(model), manual(model), manual(model)
    opentelemetry.instrument(before, name="before")
    api.set_meter_provider(telemetry.meter_provider)
    opentelemetry.instrument(after, name="after")
    telemetry.instrument(explicit, "explicit")
    for embeddings in (before, after, explicit):
        embeddings.embed_query("q")
    for name in ("before", "after", "explicit"):
        assert telemetry.counts(name)["query_missed"] == 1
    assert telemetry.durations("query")["missed"].count == 1
    assert len(telemetry.points()["prefetch_embeddings.query.duration"]) == 3


# --- Privacy, and being optional -----------------------------------------------------------------


def test_no_text_in_spans_or_metrics(
    manual: Manual, model: ScriptedEmbeddings, telemetry: Telemetry
) -> None:
    embeddings = manual(model)
    telemetry.instrument(embeddings)
    model.fail(SECRET, *(ValueError(SECRET) for _ in range(3)))
    embeddings.prefetch(SECRET)
    embeddings.executor.run_all()
    embeddings.time.advance(60.0)
    embeddings.executor.run_all()
    with pytest.raises(ValueError, match=SECRET):
        embeddings.embed_query(SECRET)
    embeddings.embed_query(SECRET)
    spans = [*telemetry.spans(FLIGHT), *telemetry.spans(QUERY)]
    assert len(spans) == 3
    told = [span.to_json() for span in spans] + [repr(telemetry.points())]
    for part in (SECRET, "4111", "card"):
        assert not any(part in line for line in told)
    assert digest(SECRET) not in repr(telemetry.points()), "grows without bound"


def test_without_the_api_the_import_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"'prefetch-embeddings\[opentelemetry\]'"):
        importlib.reload(opentelemetry)


def test_a_retriever_has_figures_and_spans_of_its_own_kind(telemetry: Telemetry) -> None:
    retriever = ManualPrefetchingRetriever(ScriptedRetriever())
    telemetry.instrument(retriever, "default")
    with telemetry.turn("asked"):
        retriever.prefetch("q")
    retriever.executor.run_all()
    with telemetry.turn("answered"):
        retriever.invoke("q")
    flight, query = _assert_related(telemetry)
    for span in (flight, query):
        assert (span.attributes or {})["prefetch_embeddings.kind"] == "retrieval"
    assert telemetry.counts(kind="retrieval")["query_ready"] == 1
    retriever.close()
