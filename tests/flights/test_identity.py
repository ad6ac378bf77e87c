"""A flight changes only the map entry that is itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import Call, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]
Removal = Callable[[PrefetchingEmbeddings], object]

removals = pytest.mark.parametrize(
    "remove",
    [lambda embeddings: embeddings.forget("q"), lambda embeddings: embeddings.clear()],
    ids=["forget", "clear"],
)


@removals
def test_an_old_failure_does_not_remove_a_newer_flight(
    wrap: Wrap, model: ScriptedEmbeddings, remove: Removal
) -> None:
    embeddings = wrap(model, attempts=1)
    old, new = model.hold("q"), model.hold("q")
    model.fail("q", ValueError("old"))
    embeddings.prefetch("q")
    old.wait_until_entered()
    remove(embeddings)
    assert embeddings.prefetch("q") is PrefetchOutcome.STARTED
    new.wait_until_entered()
    old.open()
    until(lambda: embeddings.stats().prefetch_failed == 1)
    assert embeddings.prefetch("q") is PrefetchOutcome.IN_FLIGHT, "the newer flight is gone"
    new.open()
    assert embeddings.wait_for_prefetch("q", timeout=30)


@removals
def test_an_old_value_does_not_come_back(
    wrap: Wrap, model: ScriptedEmbeddings, remove: Removal
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    embeddings.prefetch("q")
    gate.wait_until_entered()
    remove(embeddings)
    gate.open()
    until(lambda: embeddings.stats().prefetch_succeeded == 1)
    assert not embeddings.is_ready("q")
    assert embeddings.stats().prefetch_wasted == 1


@removals
def test_those_who_wait_for_a_removed_flight_get_its_vector(
    wrap: Wrap, model: ScriptedEmbeddings, remove: Removal
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    embeddings.prefetch("q")
    gate.wait_until_entered()
    query = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.stats().query_joined == 1)
    remove(embeddings)
    gate.open()
    assert query.result() == model.vector("q")
    assert model.calls_for("q") == 1
    stats = embeddings.stats()
    assert (stats.prefetch_used, stats.prefetch_wasted) == (1, 0)


@removals
def test_who_recovers_from_an_old_flight_leaves_the_newer_one_its_place(
    wrap: Wrap, model: ScriptedEmbeddings, remove: Removal
) -> None:
    embeddings = wrap(model)
    old, newer, own = model.hold("q"), model.hold("q"), model.hold("q")
    model.fail("q", ValueError())
    embeddings.prefetch("q")
    old.wait_until_entered()
    query = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.stats().query_joined == 1)
    remove(embeddings)
    assert embeddings.prefetch("q") is PrefetchOutcome.STARTED
    newer.wait_until_entered()
    old.open()
    own.wait_until_entered()
    assert embeddings.prefetch("q") is PrefetchOutcome.IN_FLIGHT
    own.open()
    assert query.result() == model.vector("q")
    assert embeddings.is_ready("q"), "the first value is the flight's"
    newer.open()
    assert embeddings.embed_query("q") == model.vector("q")
    stats = embeddings.stats()
    assert (stats.query_recovered, stats.prefetch_used, stats.prefetch_wasted) == (1, 1, 0)
    assert model.calls_for("q") == 3


@removals
async def test_coroutines_that_wait_for_a_removed_flight_get_its_vector(
    wrap: Wrap, model: ScriptedEmbeddings, remove: Removal
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await gate.await_until_entered()
    remove(embeddings)
    gate.open()
    assert await query == model.vector("q")
    assert not embeddings.is_ready("q")


def test_an_old_expiry_does_not_remove_a_newer_flight(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, ttl=10.0)
    embeddings.embed_query("q")
    embeddings.time.advance(9.0)
    assert embeddings.forget("q")
    embeddings.embed_query("q")
    embeddings.time.advance(9.0)
    assert embeddings.is_ready("q"), "the older flight's time removed the newer one"
    embeddings.time.advance(1.0)
    assert not embeddings.is_ready("q")


def test_a_newer_flight_survives_the_expired_one_it_follows(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, ttl=10.0)
    embeddings.embed_query("q")
    embeddings.time.advance(11.0)
    assert embeddings.prefetch("q") is PrefetchOutcome.STARTED
    embeddings.embed_query("other")  # storing it sweeps what has expired
    assert embeddings.prefetch("q") is PrefetchOutcome.IN_FLIGHT
    embeddings.executor.run_all()
    assert embeddings.is_ready("q")


@removals
def test_a_removed_flight_that_is_queued_does_not_run(
    manual: Manual, model: ScriptedEmbeddings, remove: Removal
) -> None:
    embeddings = manual(model)
    embeddings.prefetch("q")
    remove(embeddings)
    assert embeddings.executor.run_all() == 0
    assert model.calls == []
    assert embeddings.stats().prefetch_withdrawn == 1


def test_forget_tells_whether_there_was_anything(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, ttl=10.0)
    assert embeddings.forget("q") is False
    embeddings.prefetch("q")
    assert embeddings.forget("q") is True
    embeddings.embed_query("q")
    assert embeddings.forget("q") is True
    embeddings.embed_query("q")
    embeddings.time.advance(11.0)
    assert embeddings.forget("q") is False


def test_forgetting_a_queued_flight_leaves_it_to_those_who_wait_for_it(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model, max_workers=1)
    gate = model.hold("first")
    embeddings.prefetch("first")
    gate.wait_until_entered()
    embeddings.prefetch("q")
    waiting = Call(embeddings.wait_for_prefetch, "q", 60.0)
    until(lambda: embeddings.prefetcher.waiters("q") == 1)
    assert embeddings.forget("q")
    gate.open()
    assert waiting.result() is True
