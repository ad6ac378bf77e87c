"""A prefetch is cheap, bounded, and leaves no trace when it is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome


def _fill(embeddings: PrefetchingEmbeddings, model: ScriptedEmbeddings) -> list[Any]:
    """Occupy one worker and a queue of two; return the gates to open in the end."""
    gate = model.hold("running")
    assert embeddings.prefetch("running") is STARTED
    gate.wait_until_entered()
    assert embeddings.prefetch("queued") is STARTED
    assert embeddings.prefetch("queued too") is STARTED
    return [gate]


def test_one_more_than_the_queue_holds_is_dropped(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model, max_workers=1, max_pending=2)
    gates = _fill(embeddings, model)
    before = embeddings.stats()
    assert embeddings.prefetch("one more") is DROPPED
    assert not embeddings.is_ready("one more")
    assert embeddings.wait_for_prefetch("one more", timeout=0) is False
    assert embeddings.forget("one more") is False, "a dropped prefetch left a trace"
    change = embeddings.stats() - before
    assert (change.prefetch_dropped, change.prefetch_started) == (1, 0)
    for gate in gates:
        gate.open()


def test_the_bound_does_not_depend_on_how_fast_workers_wake(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model, max_workers=2, max_pending=2)
    texts = [f"q{i}" for i in range(5)]
    gates = [model.hold(text) for text in texts]
    assert [embeddings.prefetch(text) for text in texts] == [STARTED] * 4 + [DROPPED]
    for gate in gates:
        gate.open()


def test_a_claimed_flight_takes_no_place_in_the_queue(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model, max_workers=1, max_pending=2)
    gates = _fill(embeddings, model)
    assert embeddings.prefetch("one more") is DROPPED
    embeddings.embed_query("queued")
    assert embeddings.prefetch("one more") is STARTED
    for gate in gates:
        gate.open()


async def test_async_prefetches_are_bounded_too(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model, max_pending=2)
    gates = [model.hold(text) for text in "ab"]
    outcomes = [await embeddings.aprefetch(text) for text in "abc"]
    assert outcomes == [STARTED, STARTED, DROPPED]
    assert model.calls_for("c") == 0
    for gate in gates:
        gate.open()
    assert await embeddings.await_for_prefetch("a")
    assert await embeddings.await_for_prefetch("b")
    assert await embeddings.aprefetch("c") is STARTED
    assert await embeddings.await_for_prefetch("c")


@pytest.mark.parametrize("blank", ["", " ", "\t\n", "\u00a0"], ids=ascii)
def test_blank_texts_are_dropped(manual: Manual, model: ScriptedEmbeddings, blank: str) -> None:
    embeddings = manual(model)
    assert embeddings.prefetch(blank) is DROPPED
    assert asyncio.run(embeddings.aprefetch(blank)) is DROPPED
    assert embeddings.prefetch_many([blank, "q"]) == [DROPPED, STARTED]
    assert embeddings.stats().prefetch_dropped == 3
    assert embeddings.embed_query(blank) == model.vector(blank), "a query is answered all the same"


@pytest.mark.parametrize("text", [None, 1, b"bytes", ["list"]], ids=repr)
async def test_what_is_not_a_str_is_refused(
    manual: Manual, model: ScriptedEmbeddings, text: Any
) -> None:
    embeddings = manual(model)
    for method in (
        embeddings.prefetch,
        embeddings.is_ready,
        embeddings.forget,
        embeddings.expected_wait,
        embeddings.wait_for_prefetch,
        embeddings.embed_query,
    ):
        with pytest.raises(TypeError):
            method(text)
    with pytest.raises(TypeError):
        embeddings.prefetch_many(["fine", text])
    for coroutine in (embeddings.aprefetch, embeddings.aembed_query, embeddings.await_for_prefetch):
        with pytest.raises(TypeError):
            await coroutine(text)
    assert len(embeddings.executor) == 0


def test_a_refusing_executor_drops(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, symmetric=True)
    embeddings.executor.refusing = True
    assert embeddings.prefetch("q") is DROPPED
    assert embeddings.prefetch_many(["a", "b", "a"]) == [DROPPED] * 3
    stats = embeddings.stats()
    assert (stats.prefetch_started, stats.prefetch_withdrawn, stats.prefetch_dropped) == (0, 0, 4)
    assert embeddings.forget("q") is False


def test_outcomes(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    assert embeddings.prefetch("q") is STARTED
    assert embeddings.prefetch("q") is IN_FLIGHT
    embeddings.executor.run_all()
    assert embeddings.prefetch("q") is READY
    assert embeddings.stats().prefetch_deduplicated == 2


def test_retrying_flights_keep_their_place(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, max_workers=1, max_pending=1)
    model.fail("a", ValueError())
    assert embeddings.prefetch("a") is STARTED
    assert embeddings.prefetch("b") is STARTED
    embeddings.executor.run_next()
    assert embeddings.prefetch("c") is DROPPED, "a flight that pauses lost its place"
    embeddings.executor.run_all()
    assert embeddings.prefetch("c") is STARTED
