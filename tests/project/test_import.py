"""`import prefetch_embeddings` brings nothing heavy, and takes little time."""

from __future__ import annotations

import sys

from tests.tools.import_time import measure, run_fresh

MOST_ADDED = 0.1
"""Seconds that it may add to `from langchain_core.embeddings import Embeddings`."""

HEAVY = (
    "redis",
    "numpy",
    "openai",
    "langchain_openai",
    "tiktoken",
    "httpx",
    "opentelemetry",
    "prometheus_client",
    "prefetch_embeddings.redis_cache",
    "prefetch_embeddings.openai",
    "prefetch_embeddings.instrumentation",
    "prefetch_embeddings.testing",
)


def test_nothing_heavy_is_loaded_before_it_is_used() -> None:
    loaded = run_fresh(
        "import sys; from langchain_core.embeddings import Embeddings; before = set(sys.modules);"
        "import prefetch_embeddings; print(*sorted(set(sys.modules) - before))"
    ).split()
    assert "prefetch_embeddings.embeddings" in loaded
    assert not set(HEAVY).intersection(loaded)


def test_what_the_package_adds_is_its_own() -> None:
    loaded = run_fresh(
        "import sys; from langchain_core.embeddings import Embeddings;"
        "before = set(sys.modules); import prefetch_embeddings;"
        "print(*sorted(set(sys.modules) - before))"
    ).split()
    foreign = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert foreign == {"prefetch_embeddings"}


def test_it_takes_little_time_beside_langchain_core() -> None:
    times = measure(runs=5)
    # On a loaded machine both take longer: what counts is the share of what a bot imports anyway.
    assert times.added <= max(MOST_ADDED, times.langchain_core / 2)
