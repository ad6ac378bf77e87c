"""A failed prefetch costs nothing: no exception of its reaches a query."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from prefetch_embeddings import (
    PrefetchEvent,
    PrefetchFailed,
    PrefetchingEmbeddings,
    PrefetchOutcome,
)
from prefetch_embeddings._flights.joins import ThreadVisit
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import PATIENCE, Call, auntil, until, waiters

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]


class PrefetchError(Exception):
    pass


class QueryError(Exception):
    pass


def test_joined_queries_recover_by_one_call_for_all(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    first, second = model.hold("q"), model.hold("q")
    model.fail("q", PrefetchError())
    embeddings.prefetch("q")
    first.wait_until_entered()
    queries = [Call(embeddings.embed_query, "q") for _ in range(8)]
    until(lambda: embeddings.stats().query_joined == 8)
    first.open()
    second.wait_until_entered()
    second.open()
    assert [query.result() for query in queries] == [model.vector("q")] * 8
    assert model.calls_for("q") == 2, "eight waiters made more than one call between them"
    stats = embeddings.stats()
    assert (stats.query_joined, stats.query_recovered, stats.query_failed) == (8, 8, 0)
    assert (stats.prefetch_failed, stats.prefetch_retried) == (1, 0)


async def test_joined_coroutines_recover_by_one_call_for_all(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    first = model.hold("q")
    model.fail("q", PrefetchError())
    embeddings.prefetch("q")
    await first.await_until_entered()
    queries = [asyncio.create_task(embeddings.aembed_query("q")) for _ in range(8)]
    await auntil(lambda: embeddings.stats().query_joined == 8)
    first.open()
    assert await asyncio.gather(*queries) == [model.vector("q")] * 8
    assert model.calls == [("embed_query", ("q",)), ("aembed_query", ("q",))]


def test_the_exception_raised_is_the_querys_own(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    first, second = model.hold("q"), model.hold("q")
    model.fail("q", PrefetchError(), QueryError())
    embeddings.prefetch("q")
    first.wait_until_entered()
    queries = [Call(embeddings.embed_query, "q") for _ in range(4)]
    until(lambda: embeddings.stats().query_joined == 4)
    first.open()
    second.wait_until_entered()
    # All four wait for the second call now: one runs it, three joined it.
    until(lambda: waiters(embeddings, "q") == 4)
    second.open()
    assert {type(query.error()) for query in queries} == {QueryError}
    assert model.calls_for("q") == 2
    stats = embeddings.stats()
    assert (stats.query_recovered, stats.query_failed) == (0, 4)


def test_flight_has_left_the_map_when_those_who_wait_for_it_are_told(
    manual: Manual, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = manual(model, attempts=1)
    seen: list[PrefetchOutcome] = []
    wake = ThreadVisit.wake

    def telling(waiter: ThreadVisit) -> None:
        seen.append(embeddings.prefetch("q"))  # finds what is in the map then
        wake(waiter)

    monkeypatch.setattr(ThreadVisit, "wake", telling)
    gate = model.hold("q")
    model.fail("q", PrefetchError())
    embeddings.prefetch("q")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    wait = Call(embeddings.wait_for_prefetch, "q", PATIENCE)
    until(lambda: waiters(embeddings, "q") == 1)
    gate.open()
    assert run.result()
    assert wait.result() is False
    assert seen == [PrefetchOutcome.STARTED]


def test_background_flight_tries_again_after_a_pause(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, attempts=3)
    model.fail("q", PrefetchError(), PrefetchError())
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    assert model.calls_for("q") == 1, "the second attempt came without a pause"
    embeddings.time.advance(60.0)
    embeddings.executor.run_all()
    embeddings.time.advance(60.0)
    embeddings.executor.run_all()
    assert embeddings.is_ready("q")
    stats = embeddings.stats()
    assert (stats.prefetch_retried, stats.prefetch_succeeded, stats.prefetch_failed) == (2, 1, 0)


def test_attempts_end(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, attempts=2)
    model.fail("q", *(PrefetchError() for _ in range(5)))
    embeddings.prefetch("q")
    for _ in range(5):
        embeddings.executor.run_all()
        embeddings.time.advance(60.0)
    assert model.calls_for("q") == 2
    assert embeddings.stats().prefetch_failed == 1


def test_waited_for_flight_does_not_try_again(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model, attempts=5)
    gate = model.hold("q")
    model.fail("q", PrefetchError())
    embeddings.prefetch("q")
    gate.wait_until_entered()
    waiting = Call(embeddings.wait_for_prefetch, "q")
    until(lambda: waiters(embeddings, "q") == 1)
    gate.open()
    assert waiting.result() is False
    assert model.calls_for("q") == 1
    assert embeddings.stats().prefetch_retried == 0


async def test_async_flight_tries_again(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    model.fail("q", PrefetchError())
    await embeddings.aprefetch("q")
    await auntil(lambda: embeddings.is_ready("q"))
    assert model.calls == [("aembed_query", ("q",))] * 2
    assert embeddings.stats().prefetch_retried == 1


def test_waiting_for_a_failed_prefetch_tells_so(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    model.fail("q", PrefetchError())
    embeddings.prefetch("q")
    assert embeddings.wait_for_prefetch("q") is False
    assert embeddings.embed_query("q") == model.vector("q")


@pytest.mark.parametrize("when", ["never prefetched", "after the failure"])
def test_nothing_to_wait_for(manual: Manual, model: ScriptedEmbeddings, when: str) -> None:
    embeddings = manual(model, attempts=1)
    if when == "after the failure":
        model.fail("q", PrefetchError())
        embeddings.prefetch("q")
        embeddings.executor.run_all()
    assert embeddings.wait_for_prefetch("q") is False
    assert asyncio.run(embeddings.await_for_prefetch("q")) is False


@pytest.mark.parametrize("then", ["fails", "is closed"])
def test_waiters_share_one_call_however_late_they_wake(
    wrap: Wrap, model: ScriptedEmbeddings, then: str
) -> None:
    # The call that all of them share may be over before the last of them has woken up.
    embeddings = wrap(model)
    gate = model.hold("q")
    if then == "fails":
        model.fail("q", PrefetchError(), *(QueryError() for _ in range(64)))
    embeddings.prefetch("q")
    gate.wait_until_entered()
    queries = [Call(embeddings.embed_query, "q") for _ in range(64)]
    until(lambda: embeddings.stats().query_joined == 64)
    if then == "fails":
        gate.open()
        assert {type(query.error()) for query in queries} == {QueryError}
    else:
        embeddings.close()
        assert all(query.result() == model.vector("q") for query in queries)
    assert model.calls_for("q") == 2
    gate.open()


def test_a_query_ends_even_if_its_text_is_prefetched_over_and_over(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    def again(event: PrefetchEvent) -> None:
        if isinstance(event, PrefetchFailed):
            embeddings.prefetch("q")

    embeddings = wrap(model, attempts=1, on_event=again)
    gate = model.hold("q")
    model.fail("q", *(PrefetchError() for _ in range(200)))
    embeddings.prefetch("q")
    gate.wait_until_entered()
    query = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.stats().query_joined == 1)
    gate.open()
    query.error()
    assert embeddings.stats().query_failed == 1
    embeddings.close()
