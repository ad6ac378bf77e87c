"""Prometheus: what a real scrape shows of a wrapper, and what it must never show."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import subprocess
import sys
import urllib.request
from collections.abc import Callable

import pytest
from langchain_core.embeddings import Embeddings
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from prefetch_embeddings import (
    PrefetchEvent,
    PrefetchingEmbeddings,
    PrefetchStats,
    QueryFailed,
    QueryServed,
    RedisCachedEmbeddings,
    RedisCacheStats,
)
from prefetch_embeddings.instrumentation import prometheus
from prefetch_embeddings.instrumentation._figures import FIGURES
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ManualPrefetchingRetriever,
    ScriptedEmbeddings,
    ScriptedRetriever,
)
from tests.helpers import PATIENCE

Manual = Callable[..., ManualPrefetchingEmbeddings]

SECRET = "my card number is 4111"

UNREACHABLE = "redis://127.0.0.1:1/0"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def _scrape(registry: CollectorRegistry) -> str:
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as response:
            text: str = response.read().decode()
            return text
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    samples: list[Sample] = [s for f in text_string_to_metric_families(text) for s in f.samples]
    found = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
    assert len(found) == len(samples), "a series came twice"
    return found


def _value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(
        f"prefetch_embeddings_{name}", {"name": "default", "kind": "embedding", **labels}
    )


def _one_of_each(embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings) -> None:
    """Have a query that is ready, one that claims, one that misses and one that fails."""
    embeddings.prefetch("ready")
    embeddings.time.advance(0.3)
    embeddings.executor.run_all()
    embeddings.embed_query("ready")
    embeddings.prefetch("claimed")
    embeddings.embed_query("claimed")
    embeddings.embed_query("missed")
    model.fail("failing", ValueError(SECRET))
    with pytest.raises(ValueError, match=SECRET):
        embeddings.embed_query("failing")


def test_a_real_scrape_shows_the_stats(
    manual: Manual, model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    embeddings = manual(model)
    prometheus.instrument(embeddings, name="bot", registry=registry)
    _one_of_each(embeddings, model)
    samples = _samples(_scrape(registry))
    bot = {("name", "bot"), ("kind", "embedding")}
    for field, value in dataclasses.asdict(embeddings.stats()).items():
        assert samples[f"prefetch_embeddings_{field}_total", frozenset(bot)] == value
    assert samples["prefetch_embeddings_query_claimed_total", frozenset(bot)] == 1
    for outcome, count in {"ready": 1, "joined": 0, "claimed": 1, "missed": 1, "failed": 1}.items():
        labels = frozenset({*bot, ("outcome", outcome)})
        assert samples["prefetch_embeddings_query_duration_seconds_count", labels] == count
    assert samples["prefetch_embeddings_prefetch_duration_seconds_count", frozenset(bot)] == 2
    assert samples["prefetch_embeddings_prefetch_duration_seconds_sum", frozenset(bot)] == (
        pytest.approx(0.3)
    )


def test_buckets_go_from_a_millisecond_to_ten_seconds(
    manual: Manual, model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    prometheus.instrument(manual(model), registry=registry)
    bounds = {
        sample.labels["le"]
        for family in registry.collect()
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }
    assert sorted(map(float, bounds))[0] == 0.001
    assert sorted(map(float, bounds))[-2:] == [10.0, float("inf")]


def test_every_series_is_there_before_anything_happened(
    manual: Manual, model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    embeddings = manual(model)
    prometheus.instrument(embeddings, registry=registry)
    before = _samples(_scrape(registry))
    assert set(before.values()) - {v for (n, _), v in before.items() if "created" in n} == {0.0}
    _one_of_each(embeddings, model)
    assert set(_samples(_scrape(registry))) == set(before)


def test_a_listener_of_the_users_hears_as_before(
    manual: Manual, model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    events: list[PrefetchEvent] = []

    def listener(event: PrefetchEvent) -> None:
        events.append(event)
        raise ZeroDivisionError

    embeddings = manual(model, on_event=listener)
    prometheus.instrument(embeddings, registry=registry)
    embeddings.embed_query("q")
    assert [type(event) for event in events] == [QueryServed]
    assert _value(registry, "query_duration_seconds_count", outcome="missed") == 1


def test_a_failed_query_is_timed(
    manual: Manual, model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    embeddings = manual(model)
    prometheus.instrument(embeddings, registry=registry)
    embeddings.prefetcher._reporter.tell(QueryFailed("00000000", 1, 1, "TimeoutError", 7.5))
    assert _value(registry, "query_duration_seconds_sum", outcome="failed") == 7.5
    assert _value(registry, "query_duration_seconds_bucket", outcome="failed", le="5.0") == 0
    assert _value(registry, "query_duration_seconds_bucket", outcome="failed", le="10.0") == 1


def test_several_wrappers_share_a_registry(
    manual: Manual, model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    for name in ("a", "b"):
        embeddings = manual(model)
        prometheus.instrument(embeddings, name=name, registry=registry)
        embeddings.embed_query(name)
    embeddings.embed_query("one more")
    samples = _samples(_scrape(registry))
    assert (
        samples[
            "prefetch_embeddings_query_missed_total",
            frozenset({("name", "a"), ("kind", "embedding")}),
        ]
        == 1
    )
    assert (
        samples[
            "prefetch_embeddings_query_missed_total",
            frozenset({("name", "b"), ("kind", "embedding")}),
        ]
        == 2
    )


def test_a_name_belongs_to_one_open_wrapper(
    manual: Manual, model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    first, second = manual(model), manual(model)
    prometheus.instrument(first, registry=registry)
    for embeddings in (first, second):
        with pytest.raises(ValueError, match="'default' is in use"):
            prometheus.instrument(embeddings, registry=registry)
    second.embed_query("q")
    assert _value(registry, "query_duration_seconds_count", outcome="missed") == 0, "it listens"
    first.close()
    prometheus.instrument(second, registry=registry)
    assert _value(registry, "query_missed_total") == 1


def test_a_wrapper_is_not_kept_alive(
    model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    prometheus.instrument(PrefetchingEmbeddings(model), registry=registry)
    gc.collect()
    assert _value(registry, "query_missed_total") is None
    prometheus.instrument(PrefetchingEmbeddings(model), registry=registry)


def test_a_registry_is_not_kept_alive(manual: Manual, model: ScriptedEmbeddings) -> None:
    before = len(prometheus._exporters)
    embeddings = PrefetchingEmbeddings(model)
    prometheus.instrument(embeddings, registry=CollectorRegistry())
    del embeddings
    gc.collect()
    assert len(prometheus._exporters) <= before


def test_a_redis_tier_underneath_is_included(
    manual: Manual, model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    with RedisCachedEmbeddings(model, UNREACHABLE, model_id="scripted") as tier:
        embeddings = manual(tier)
        prometheus.instrument(embeddings, registry=registry)
        embeddings.embed_query("q")
        assert tier.flush(PATIENCE)  # what fails to be written is counted, too
        stats = tier.stats()
        assert stats.misses + stats.skipped == 1
        for figure in FIGURES[RedisCacheStats]:
            value = _value(registry, figure.name + "_total")
            assert value == getattr(stats, figure.field), figure.name
        assert _value(registry, "redis_misses_total") == stats.misses
        assert _value(registry, "redis_seconds_total") == stats.redis_seconds
        assert _value(registry, "query_missed_total") == 1


def test_a_redis_tier_alone_has_its_figures(
    model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    with RedisCachedEmbeddings(model, UNREACHABLE, model_id="scripted") as tier:
        prometheus.instrument(tier, registry=registry)
        assert _value(registry, "redis_hits_total") == 0
        assert _value(registry, "query_missed_total") is None
        with pytest.raises(ValueError, match="in use"):
            prometheus.instrument(tier, registry=registry)


def test_what_has_no_figures_is_refused(registry: CollectorRegistry) -> None:
    model: Embeddings = ScriptedEmbeddings()
    with pytest.raises(TypeError, match="ScriptedEmbeddings has no figures"):
        prometheus.instrument(model, registry=registry)  # type: ignore[arg-type]


def test_every_counter_of_the_stats_is_a_figure() -> None:
    for kind in (PrefetchStats, RedisCacheStats):
        fields = [field.name for field in dataclasses.fields(kind)]
        assert [figure.field for figure in FIGURES[kind]] == fields
    names = [figure.name for figures in FIGURES.values() for figure in figures]
    assert len(set(names)) == len(names)


def test_no_text_in_a_scrape(
    manual: Manual, model: ScriptedEmbeddings, registry: CollectorRegistry
) -> None:
    embeddings = manual(model, attempts=1)
    prometheus.instrument(embeddings, registry=registry)
    model.fail(SECRET, ValueError(SECRET), ValueError(SECRET))
    embeddings.prefetch(SECRET)
    embeddings.executor.run_all()
    with pytest.raises(ValueError, match=SECRET):
        embeddings.embed_query(SECRET)
    embeddings.embed_query(SECRET)
    page = _scrape(registry)
    for part in (SECRET, "4111", "card", "ValueError"):
        assert part not in page


def test_without_the_client_the_import_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"'prefetch-embeddings\[prometheus\]'"):
        importlib.reload(prometheus)


def test_the_package_imports_no_backend() -> None:
    lines = [
        "import sys, prefetch_embeddings, prefetch_embeddings.instrumentation",
        "assert 'prometheus_client' not in sys.modules",
        # LangChain's tracing may have imported the other one's package already.
        "assert 'prefetch_embeddings.instrumentation.opentelemetry' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)


def test_a_retriever_has_figures_of_its_own_kind(registry: CollectorRegistry) -> None:
    retriever = ManualPrefetchingRetriever(ScriptedRetriever())
    with ManualPrefetchingEmbeddings(ScriptedEmbeddings()) as embeddings:
        prometheus.instrument(embeddings, registry=registry)
        prometheus.instrument(retriever, registry=registry)  # of the same name
        retriever.prefetch("q")
        retriever.executor.run_all()
        retriever.invoke("q")
        assert _value(registry, "query_ready_total") == 0
        assert _value(registry, "query_ready_total", kind="retrieval") == 1
        waited = "query_duration_seconds_count"
        assert _value(registry, waited, kind="retrieval", outcome="ready") == 1
        assert _value(registry, waited, kind="embedding", outcome="ready") == 0
        with pytest.raises(ValueError, match="in use"):
            prometheus.instrument(retriever, registry=registry)
    retriever.close()
