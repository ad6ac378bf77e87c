"""A second call beside one that takes too long: the first vector wins."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from prefetch_embeddings import Hedge, PrefetchingEmbeddings
from prefetch_embeddings._flights.patience import LEAST_DURATIONS, UNMEASURED_LIMIT, Budget
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.helpers import Call, auntil, until, waiters

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

SOON = Hedge(after=0.01, budget=1.0)


def calls_under_way(embeddings: PrefetchingEmbeddings, text: str) -> int:
    flight = embeddings.prefetcher._flights.get(text)
    assert flight is not None
    return len(flight.runs)


def hedges_due(embeddings: PrefetchingEmbeddings) -> int:
    stats = embeddings.stats()
    return stats.hedge_started + stats.hedge_denied


def measure(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings, seconds: float
) -> None:
    """Have a call take so many seconds."""
    gate = model.hold("measured")
    embeddings.prefetch("measured")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    embeddings.time.advance(seconds)
    gate.open()
    run.result()
    embeddings.forget("measured")


@pytest.mark.parametrize("prefetched", [True, False])
def test_a_stuck_call_does_not_hold_a_query(
    wrap: Wrap, model: ScriptedEmbeddings, prefetched: bool
) -> None:
    embeddings = wrap(model, hedge=SOON)
    stuck = model.hold("q")
    if prefetched:
        embeddings.prefetch("q")
        stuck.wait_until_entered()
    assert Call(embeddings.embed_query, "q").result() == model.vector("q")
    stats = embeddings.stats()
    assert (stats.hedge_started, stats.hedge_won, stats.hedge_denied) == (1, 1, 0)
    assert model.calls_for("q") == 2
    assert embeddings.is_ready("q")
    stuck.open()


@pytest.mark.parametrize("prefetched", [True, False])
async def test_a_stuck_call_does_not_hold_a_coroutine(
    wrap: Wrap, model: ScriptedEmbeddings, prefetched: bool
) -> None:
    embeddings = wrap(model, hedge=SOON)
    stuck = model.hold("q")
    if prefetched:
        await embeddings.aprefetch("q")
    assert await asyncio.wait_for(embeddings.aembed_query("q"), 30) == model.vector("q")
    assert model.calls == [("aembed_query", ("q",))] * 2
    assert embeddings.stats().hedge_won == 1
    await auntil(lambda: len(asyncio.all_tasks()) == 1)  # the slower one was cancelled
    stuck.open()


@pytest.mark.parametrize("claimed", [False, True])
def test_the_second_call_runs_in_the_context_of_the_query_that_waits(
    manual: Manual, claimed: bool
) -> None:
    variable = contextvars.ContextVar("variable", default="nobody's")
    seen = []

    class Model(ScriptedEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            seen.append(variable.get())
            return super().embed_query(text)

    def call(function: Callable[[str], object], whose: str) -> None:
        variable.set(whose)
        function("q")

    model = Model()
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=1.0))
    first, second = model.hold("q"), model.hold("q")
    contextvars.copy_context().run(call, embeddings.prefetch, "prefetch")
    calls: list[Call[Any]] = [] if claimed else [Call(embeddings.executor.run_next)]
    if not claimed:
        first.wait_until_entered()
    calls.append(Call(call, embeddings.embed_query, "query"))
    if claimed:
        first.wait_until_entered()
    until(lambda: embeddings.time.calls_to_come == 1)
    embeddings.time.advance(1.0)
    second.wait_until_entered()
    assert seen == ["query" if claimed else "prefetch", "query"]
    first.open()
    second.open()
    for each in calls:
        each.result()


def test_the_first_call_may_win(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=1.0))
    first, second = model.hold("q"), model.hold("q")
    query = Call(embeddings.embed_query, "q")
    first.wait_until_entered()
    until(lambda: embeddings.time.calls_to_come == 1)
    embeddings.time.advance(0.9)
    assert embeddings.stats().hedge_started == 0
    embeddings.time.advance(0.1)
    second.wait_until_entered()
    first.open()
    assert query.result() == model.vector("q")
    stats = embeddings.stats()
    assert (stats.hedge_started, stats.hedge_won, stats.query_missed) == (1, 0, 1)
    second.open()


def test_if_both_fail_the_query_fails(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=1.0))
    first, second = model.hold("q"), model.hold("q")
    model.fail("q", ValueError("first"), ValueError("second"))
    query = Call(embeddings.embed_query, "q")
    first.wait_until_entered()
    until(lambda: embeddings.time.calls_to_come == 1)
    embeddings.time.advance(1.0)
    second.wait_until_entered()
    first.open()
    until(lambda: calls_under_way(embeddings, "q") == 1)
    second.open()
    assert str(query.error()) == "second"
    assert embeddings.stats().query_failed == 1


@pytest.mark.parametrize("failing", ["first", "second"])
def test_one_failure_is_survived(manual: Manual, model: ScriptedEmbeddings, failing: str) -> None:
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=1.0))
    first, second = model.hold("q"), model.hold("q")
    if failing == "first":
        model.fail("q", ValueError())
    query = Call(embeddings.embed_query, "q")
    first.wait_until_entered()
    until(lambda: embeddings.time.calls_to_come == 1)
    if failing == "second":
        model.fail("q", ValueError())
    embeddings.time.advance(1.0)
    second.wait_until_entered()
    fails, succeeds = (first, second) if failing == "first" else (second, first)
    fails.open()
    until(lambda: calls_under_way(embeddings, "q") == 1)
    succeeds.open()
    assert query.result() == model.vector("q")
    stats = embeddings.stats()
    assert (stats.query_failed, stats.hedge_won) == (0, 1 if failing == "first" else 0)


def test_nobody_waits_nothing_is_hedged(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=1.0))
    gate = model.hold("q")
    embeddings.prefetch("q")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    assert embeddings.wait_for_prefetch("q", timeout=0.01) is False
    embeddings.time.advance(60.0)
    assert model.calls_for("q") == 1, "hedged for a waiter that had gone"
    gate.open()
    run.result()


def test_a_query_that_comes_late_is_hedged_at_once(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=1.0))
    stuck = model.hold("q")
    embeddings.prefetch("q")
    run = Call(embeddings.executor.run_next)
    stuck.wait_until_entered()
    embeddings.time.advance(5.0)
    query = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.time.calls_to_come == 1)
    embeddings.time.advance(0.0)
    assert query.result() == model.vector("q")
    stuck.open()
    run.result()


def test_a_quantile_of_recent_durations(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, hedge=Hedge(quantile=0.5, budget=1.0))
    for tenth in range(1, 21):
        measure(embeddings, model, tenth / 10)
    stuck = model.hold("r")
    query = Call(embeddings.embed_query, "r")
    stuck.wait_until_entered()
    until(lambda: embeddings.time.calls_to_come == 1)
    embeddings.time.advance(0.9)
    assert embeddings.stats().hedge_started == 0
    embeddings.time.advance(0.2)
    assert query.result() == model.vector("r")
    stuck.open()


async def test_a_quantile_of_too_few_durations_hedges_nothing(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, hedge=Hedge(quantile=0.5, budget=1.0))
    for _ in range(LEAST_DURATIONS - 1):
        measure(embeddings, model, 0.5)
    gate = model.hold("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await gate.await_until_entered()  # a coroutine already waits for the call that its loop begins
    embeddings.time.advance(UNMEASURED_LIMIT - 0.1)  # then it would be overdue
    assert model.calls_for("q") == 1
    gate.open()
    await query


def test_the_budget_bounds_extra_calls(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, hedge=Hedge(after=1.0, budget=0.1))
    for i in range(60):
        gate = model.hold(f"q{i}")
        query = Call(embeddings.embed_query, f"q{i}")
        gate.wait_until_entered()
        until(lambda text=f"q{i}": waiters(embeddings, text) == 1)
        embeddings.time.advance(1.0)
        until(lambda number=i + 1: hedges_due(embeddings) == number)
        gate.open()
        query.result()
    stats = embeddings.stats()
    assert stats.hedge_started == 6
    assert stats.hedge_denied == 54


def test_the_budget_never_exceeds_its_share() -> None:
    for share in (0.01, 0.05, 0.3, 1.0):
        budget = Budget(share)
        taken = 0
        for calls in range(1, 2001):
            budget.pay_in()
            taken += budget.take()
            assert taken <= max(1.0, share * calls + 1e-6)
        assert taken >= share * 2000 - 1


async def test_without_it_there_is_no_second_call_before_the_first_is_overdue(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    gate = model.hold("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await gate.await_until_entered()  # a coroutine already waits for the call that its loop begins
    embeddings.time.advance(UNMEASURED_LIMIT - 0.1)
    assert model.calls_for("q") == 1
    gate.open()
    await query


@pytest.mark.parametrize(
    "options",
    [{}, {"after": 1.0, "quantile": 0.5}, {"after": 0}, {"after": -1.0}, {"quantile": 0.0},
     {"quantile": 1.0}, {"after": 1.0, "budget": 0.0}, {"after": 1.0, "budget": 1.1}],
    ids=str,
)  # fmt: skip
def test_senseless_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"after|quantile|budget"):
        Hedge(**options)


def test_it_is_frozen_and_keyword_only() -> None:
    with pytest.raises(TypeError):
        Hedge(1.0)  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        SOON.after = 2.0  # type: ignore[misc]


def test_closing_with_a_stuck_call(model: ScriptedEmbeddings) -> None:
    stuck = model.hold("q")
    with PrefetchingEmbeddings(model, hedge=SOON) as embeddings:
        assert embeddings.embed_query("q") == model.vector("q")
    stuck.open()
    assert_no_leaks(embeddings)
