"""Time to live runs from completion; what is under way is never evicted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefetch_embeddings import PrefetchOutcome
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import Call

Manual = Callable[..., ManualPrefetchingEmbeddings]


def test_time_to_live_runs_from_completion(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, ttl=10.0)
    gate = model.hold("q")
    embeddings.prefetch("q")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    embeddings.time.advance(1000.0)
    assert embeddings.prefetch("q") is PrefetchOutcome.IN_FLIGHT, "evicted for age under way"
    gate.open()
    run.result()
    embeddings.time.advance(9.9)
    assert embeddings.is_ready("q")
    embeddings.time.advance(0.1)
    assert not embeddings.is_ready("q")
    assert embeddings.embed_query("q") == model.vector("q")
    assert model.calls_for("q") == 2


def test_use_does_not_prolong_it(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, ttl=10.0)
    embeddings.embed_query("q")
    embeddings.time.advance(6.0)
    embeddings.embed_query("q")
    embeddings.prefetch("q")
    embeddings.time.advance(6.0)
    assert not embeddings.is_ready("q")


def test_the_least_recently_used_leave_first(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, max_entries=2)
    for text in ("a", "b"):
        embeddings.embed_query(text)
    embeddings.embed_query("a")
    embeddings.embed_query("c")
    assert [embeddings.is_ready(text) for text in "abc"] == [True, False, True]


def test_flights_under_way_are_not_evicted_for_size(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, max_entries=1)
    embeddings.prefetch("slow")
    for text in "abc":
        embeddings.embed_query(text)
    assert embeddings.prefetch("slow") is PrefetchOutcome.IN_FLIGHT
    embeddings.executor.run_all()
    assert embeddings.is_ready("slow")


@pytest.mark.parametrize("how", ["age", "size"])
def test_leaving_unused_is_waste(manual: Manual, model: ScriptedEmbeddings, how: str) -> None:
    embeddings = manual(model, ttl=10.0, max_entries=2)
    for text in ("used", "unused"):
        embeddings.prefetch(text)
        embeddings.executor.run_all()
    embeddings.embed_query("used")
    if how == "age":
        embeddings.time.advance(11.0)
    else:
        for text in ("more", "and more"):
            embeddings.prefetch(text)
            embeddings.executor.run_all()
    stats = embeddings.stats()
    assert (stats.prefetch_used, stats.prefetch_wasted) == (1, 1)


@pytest.mark.parametrize(
    "options",
    [{"ttl": 0}, {"ttl": -1}, {"max_entries": 0}, {"max_workers": 0}, {"max_pending": 0},
     {"attempts": 0}],
    ids=str,
)  # fmt: skip
def test_senseless_numbers_are_refused(
    model: ScriptedEmbeddings, options: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ManualPrefetchingEmbeddings(model, **options)
