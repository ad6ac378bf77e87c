"""Who leaves when there are too many: those that have served a query before those that wait for theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefetch_embeddings import PrefetchOutcome
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import Call, until

Manual = Callable[..., ManualPrefetchingEmbeddings]


def prefetch(embeddings: ManualPrefetchingEmbeddings, *texts: str) -> None:
    for text in texts:
        assert embeddings.prefetch(text) is PrefetchOutcome.STARTED
        embeddings.executor.run_all()


def ready(embeddings: ManualPrefetchingEmbeddings, texts: str) -> str:
    return "".join(text for text in texts if embeddings.is_ready(text))


def test_what_has_served_leaves_before_what_waits(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, max_entries=3)
    prefetch(embeddings, "a", "b", "c")
    embeddings.embed_query("c")  # the youngest, and the one used last
    prefetch(embeddings, "d")
    assert ready(embeddings, "abcd") == "abd"
    embeddings.embed_query("b")
    embeddings.embed_query("b")
    prefetch(embeddings, "e")
    assert ready(embeddings, "abcde") == "ade"


def test_what_was_never_prefetched_has_served_when_it_arrives(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, max_entries=3)
    embeddings.embed_query("x")
    prefetch(embeddings, "a", "b")
    embeddings.embed_query("y")
    assert ready(embeddings, "abxy") == "aby"
    embeddings.embed_query("z")
    assert ready(embeddings, "abxyz") == "abz"


def test_a_missed_query_pushes_nobody_out_who_waits(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, max_entries=2)
    prefetch(embeddings, "a", "b")
    for text in "uvwxyz":
        assert embeddings.embed_query(text) == model.vector(text)
    assert ready(embeddings, "ab") == "ab"
    assert embeddings.embed_query("a") == model.vector("a")
    assert embeddings.embed_query("b") == model.vector("b")
    stats = embeddings.stats()
    assert (stats.prefetch_used, stats.prefetch_wasted) == (2, 0)


@pytest.mark.parametrize("how", ["claimed", "joined"])
def test_what_served_in_the_moment_of_its_arrival_has_served(
    manual: Manual, model: ScriptedEmbeddings, how: str
) -> None:
    embeddings = manual(model, max_entries=2)
    gate = model.hold("q")
    embeddings.prefetch("q")
    if how == "claimed":
        query = Call(embeddings.embed_query, "q")
        gate.wait_until_entered()
        gate.open()
    else:
        worker = Call(embeddings.executor.run_next)
        gate.wait_until_entered()
        query = Call(embeddings.embed_query, "q")
        until(lambda: embeddings.stats().query_joined == 1)
        gate.open()
        worker.result()
    assert query.result() == model.vector("q")
    prefetch(embeddings, "a", "b")
    assert ready(embeddings, "qab") == "ab"


def test_of_those_that_have_served_the_longest_unused_leaves_first(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, max_entries=4)
    prefetch(embeddings, "a", "b", "c", "d")
    for text in "abcd":
        embeddings.embed_query(text)
    embeddings.embed_query("a")
    prefetch(embeddings, "e")
    assert ready(embeddings, "abcde") == "acde"
    prefetch(embeddings, "f")
    assert ready(embeddings, "abcdef") == "adef"


def test_when_all_wait_the_oldest_leaves(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, max_entries=3)
    prefetch(embeddings, "a", "b", "c", "d")
    assert ready(embeddings, "abcd") == "bcd"
    assert embeddings.stats().prefetch_wasted == 1


def test_looking_keeps_nobody(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, max_entries=3)
    prefetch(embeddings, "a", "b", "c")
    for _ in range(3):
        assert embeddings.is_ready("a")
        assert embeddings.prefetch("a") is PrefetchOutcome.READY
        embeddings.explain_miss("a")
        embeddings.expected_wait("a")
        assert embeddings.wait_for_prefetch("a", 0.0)
    prefetch(embeddings, "d")
    assert len(ready(embeddings, "abcd")) == 3
    embeddings.embed_query("c")
    prefetch(embeddings, "e")
    assert not embeddings.is_ready("c")


def test_what_has_outlived_its_time_leaves_before_anybody(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, max_entries=3, ttl=10.0)
    prefetch(embeddings, "a", "b")
    embeddings.time.advance(6.0)
    prefetch(embeddings, "c")
    embeddings.embed_query("c")
    embeddings.time.advance(5.0)
    prefetch(embeddings, "d", "e")
    assert ready(embeddings, "abcde") == "cde"
    embeddings.time.advance(5.5)
    assert ready(embeddings, "cde") == "de"


def test_being_used_prolongs_no_life(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, ttl=10.0)
    prefetch(embeddings, "a")
    for _ in range(4):
        embeddings.time.advance(2.4)
        embeddings.embed_query("a")
    embeddings.time.advance(0.5)
    assert not embeddings.is_ready("a")
    embeddings.embed_query("a")
    assert model.calls_for("a") == 2


def test_what_is_under_way_is_never_evicted(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, max_entries=1)
    gate = model.hold("q")
    embeddings.prefetch("q")
    worker = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    embeddings.prefetch("queued")
    for text in "abc":
        embeddings.embed_query(text)
    assert embeddings.prefetch("q") is PrefetchOutcome.IN_FLIGHT
    assert embeddings.prefetch("queued") is PrefetchOutcome.IN_FLIGHT
    gate.open()
    worker.result()
    assert embeddings.is_ready("q")
    embeddings.executor.run_all()


@pytest.mark.parametrize("max_entries", [1, 7, 64])
def test_five_thousand_turns_lose_no_prefetch(
    manual: Manual, model: ScriptedEmbeddings, max_entries: int
) -> None:
    """Turns overlap, fewer at a time than there is room for: no vector leaves before its query."""
    embeddings = manual(model, max_entries=max_entries)
    for number in range(5000):
        prefetch(embeddings, f"q {number}")
        if number >= max_entries - 1:
            embeddings.embed_query(f"q {number - max_entries + 1}")
        if number % 3 == 0:
            embeddings.embed_query(f"asked without a prefetch {number}")
    stats = embeddings.stats()
    assert stats.prefetch_wasted == 0
    assert stats.query_ready == 5000 - max_entries + 1
