"""The counters: one consistent snapshot, two of which subtract."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchStats, RedisCacheStats
from prefetch_embeddings._flights.ledger import UNKNOWN_DURATION, Counters, Durations
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import Call, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]


def _run_for(embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings, s: float) -> None:
    """Run the next job, and let it take `s` seconds."""
    gate = model.hold("q")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    embeddings.time.advance(s)
    gate.open()
    run.result()


def test_a_ready_flight_hides_its_whole_duration_once(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    embeddings.prefetch("q")
    _run_for(embeddings, model, 0.5)
    embeddings.embed_query("q")
    embeddings.embed_query("q")
    stats = embeddings.stats()
    assert stats.hidden_seconds == pytest.approx(0.5)
    assert stats.exposed_seconds == 0.0
    assert (stats.query_ready, stats.prefetch_used) == (2, 1)


def test_a_joined_flight_hides_what_ran_before(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    gate = model.hold("q")
    embeddings.prefetch("q")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    embeddings.time.advance(0.25)
    query = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.stats().query_joined == 1)
    embeddings.time.advance(0.5)
    gate.open()
    query.result()
    run.result()
    stats = embeddings.stats()
    assert stats.hidden_seconds == pytest.approx(0.25)
    assert stats.exposed_seconds == pytest.approx(0.5)


@pytest.mark.parametrize("prefetched", [True, False])
def test_what_a_query_runs_itself_is_exposed(
    manual: Manual, model: ScriptedEmbeddings, prefetched: bool
) -> None:
    embeddings = manual(model)
    if prefetched:
        embeddings.prefetch("q")
        embeddings.time.advance(2.0)  # in the queue: neither hidden nor exposed
    gate = model.hold("q")
    query = Call(embeddings.embed_query, "q")
    gate.wait_until_entered()
    embeddings.time.advance(0.5)
    gate.open()
    query.result()
    stats = embeddings.stats()
    assert stats.hidden_seconds == 0.0
    assert stats.exposed_seconds == pytest.approx(0.5)
    assert (stats.query_claimed, stats.query_missed) == ((1, 0) if prefetched else (0, 1))


def test_a_recovered_query_is_exposed_to_its_whole_wait(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    first, second = model.hold("q"), model.hold("q")
    model.fail("q", ValueError())
    embeddings.prefetch("q")
    run = Call(embeddings.executor.run_next)
    first.wait_until_entered()
    query = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.stats().query_joined == 1)
    embeddings.time.advance(0.5)
    first.open()
    second.wait_until_entered()
    embeddings.time.advance(0.25)
    second.open()
    query.result()
    run.result()
    stats = embeddings.stats()
    assert stats.exposed_seconds == pytest.approx(0.75)
    assert (stats.query_joined, stats.query_recovered, stats.query_missed) == (1, 1, 0)


def test_looking_changes_nothing(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, max_entries=2)
    embeddings.embed_query("a")
    embeddings.embed_query("b")
    before = embeddings.stats()
    embeddings.is_ready("a")
    embeddings.expected_wait("a")
    assert embeddings.stats() == before
    embeddings.embed_query("c")
    assert not embeddings.is_ready("a"), "looking counted as use"


def test_snapshots_of_two_kinds_do_not_subtract() -> None:
    for other in (1, RedisCacheStats()):
        with pytest.raises(TypeError):
            PrefetchStats() - other  # type: ignore[operator]


def test_snapshots_subtract(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    embeddings.embed_query("a")
    before = embeddings.stats()
    embeddings.embed_query("a")
    embeddings.prefetch("b")
    assert embeddings.stats() - before == PrefetchStats(query_ready=1, prefetch_started=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.query_ready = 7  # type: ignore[misc]


def test_the_running_counts_have_the_fields_of_the_snapshot() -> None:
    fields = {field.name for field in dataclasses.fields(PrefetchStats)}
    assert set(Counters.__annotations__) == fields
    assert Counters().snapshot() == PrefetchStats()


def test_expected_wait(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    assert embeddings.expected_wait("q") == UNKNOWN_DURATION
    for seconds in (0.25, 0.5, 1.0):
        embeddings.prefetch("q")
        _run_for(embeddings, model, seconds)
        embeddings.forget("q")
    assert embeddings.expected_wait("q") == 0.5
    embeddings.prefetch("q")
    assert embeddings.expected_wait("q") == 0.5, "queued: a query would run it from the start"
    gate = model.hold("q")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    embeddings.time.advance(0.125)
    assert embeddings.expected_wait("q") == 0.375
    gate.open()
    run.result()
    assert embeddings.expected_wait("q") == 0.0


def test_what_remains_of_a_straggler() -> None:
    durations = Durations()
    assert durations.remaining(10.0) == 0.0
    durations.add(0.5)
    assert durations.remaining(2.0) == 2.0


def test_a_person_can_read_them(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    embeddings.prefetch("a")
    embeddings.executor.run_all()
    embeddings.embed_query("a")
    embeddings.embed_query("b")
    assert str(embeddings.stats()) == (
        "2 queries: 1 ready, 0 joined, 0 claimed, 1 missed; 0 failed\n"
        "0.00 s waited for, 0.00 s hidden\n"
        "1 prefetches: 1 used, 0 in vain, 0 failed; 0 more dropped"
    )
    assert "query_recovered=0" in repr(embeddings.stats())
