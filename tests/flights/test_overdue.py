"""Nobody trusts a call for ever: beside one that is overdue another is made, and the first wins."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefetch_embeddings import Hedge, PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import Gate, ManualPrefetchingEmbeddings
from tests.flights.outside import (
    LEAST_LIMIT,
    MEASURED,
    UNKNOWN_LIMIT,
    CallByCall,
    OnItsLoop,
    alet_pass,
    auntil_joined,
    give_it_a_chance,
    let_pass,
    measure,
    queries_counted,
    until_joined,
)
from tests.helpers import PATIENCE, AsyncSideOnly, Call, SyncSideOnly, auntil, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

MARGIN = 0.05
"""Seconds by which a test stays away from a limit."""

OVERDUE = UNKNOWN_LIMIT + MARGIN
"""After so many seconds a call is overdue, as long as few were measured."""


def hanging_prefetch(embeddings: ManualPrefetchingEmbeddings, model: CallByCall) -> Call[bool]:
    """Have call 1 of the model under way, in the background."""
    embeddings.prefetch("q")
    worker = Call(embeddings.executor.run_next)
    model.wait_until_entered(1)
    return worker


# A second call.


def test_a_thread_that_waits_gets_a_second_call(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    embeddings.time.advance(UNKNOWN_LIMIT - MARGIN)
    give_it_a_chance()
    assert model.calls == 1, "the call was not overdue yet"
    let_pass(embeddings, 2 * MARGIN, lambda: model.calls == 2)
    assert query.result() == [2.0]
    assert embeddings.is_ready("q")
    assert embeddings.embed_query("q") == [2.0]
    model.open()
    worker.result()
    assert embeddings.embed_query("q") == [2.0], "a late value took the place of the first"
    assert model.calls == 2


async def test_a_coroutine_that_waits_gets_a_second_call(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    await embeddings.aprefetch("q")
    await auntil(lambda: model.calls == 1)
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil_joined(embeddings)
    embeddings.time.advance(UNKNOWN_LIMIT - MARGIN)
    for _ in range(20):
        await asyncio.sleep(0)
    assert model.calls == 1, "the call was not overdue yet"
    await alet_pass(embeddings, 2 * MARGIN, lambda: model.calls == 2)
    assert await asyncio.wait_for(query, PATIENCE) == [2.0]
    assert embeddings.is_ready("q")
    await auntil(lambda: model.cancelled == [1])


async def test_a_coroutine_that_waits_for_a_thread(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil_joined(embeddings)
    await alet_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    assert await asyncio.wait_for(query, PATIENCE) == [2.0]
    model.open()
    await asyncio.to_thread(worker.result)


def test_a_thread_that_waits_for_a_loop(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    other = OnItsLoop()
    leading = other.start(embeddings.aembed_query("q"))
    model.wait_until_entered(1)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    assert query.result() == [2.0]
    assert leading.result(PATIENCE) == [2.0], "who asked first waits on for a call that hangs"
    until(lambda: model.cancelled == [1])
    other.close()


@pytest.mark.parametrize("first", ["a thread", "a coroutine"])
def test_what_a_query_runs_itself_is_overdue_too(manual: Manual, first: str) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    other = OnItsLoop()
    if first == "a thread":
        leader = Call(embeddings.embed_query, "q").result
    else:
        started = other.start(embeddings.aembed_query("q"))
        leader = lambda: started.result(PATIENCE)  # noqa: E731
    model.wait_until_entered(1)
    follower = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    assert follower.result() == [2.0]
    model.open()
    assert leader() in ([1.0], [2.0])
    assert embeddings.embed_query("q") == [2.0]
    other.close()


def test_one_call_for_all_who_wait(manual: Manual) -> None:
    model = CallByCall(holding=2)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    others = [OnItsLoop(), OnItsLoop()]
    threads = [Call(embeddings.embed_query, "q") for _ in range(6)]
    tasks = [on.start(embeddings.aembed_query("q")) for on in others for _ in range(3)]
    until_joined(embeddings, 12)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.wait_until_entered(2)
    give_it_a_chance()
    assert model.calls == 2, "more than one call was made beside the one that is overdue"
    late = [Call(embeddings.embed_query, "q") for _ in range(3)]
    give_it_a_chance()
    assert model.calls == 2, "who came later did not take part in the second call"
    model.open(2)
    assert [query.result() for query in (*threads, *late)] == [[2.0]] * 9
    assert [task.result(PATIENCE) for task in tasks] == [[2.0]] * 6
    model.open(1)
    worker.result()
    for on in others:
        on.close()
    stats = embeddings.stats()
    assert queries_counted(stats) == 15


def test_the_first_value_wins_whichever_call_brings_it(manual: Manual) -> None:
    model = CallByCall(holding=2)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    queries = [Call(embeddings.embed_query, "q") for _ in range(3)]
    until_joined(embeddings, 3)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.wait_until_entered(2)
    model.open(1)
    worker.result()
    assert embeddings.is_ready("q")
    assert embeddings.embed_query("q") == [1.0]
    model.open(2)  # in whosever thread it runs, a waiter's perhaps
    assert [query.result() for query in queries] == [[1.0]] * 3
    until(lambda: model.running == 0)
    assert embeddings.embed_query("q") == [1.0]


def test_who_waits_in_a_thread_is_not_held_by_the_second_call(manual: Manual) -> None:
    model = CallByCall(holding=2)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    queries = [Call(embeddings.embed_query, "q") for _ in range(2)]
    until_joined(embeddings, 2)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.wait_until_entered(2)
    model.open(1)
    worker.result()
    # The second call hangs on. "The first value wins, whichever call brings it."
    assert [query.result() for query in queries] == [[1.0]] * 2
    model.open(2)
    until(lambda: model.running == 0)


@pytest.mark.parametrize("winner", [1, 2])
async def test_the_loser_is_cancelled(manual: Manual, winner: int) -> None:
    model = CallByCall(holding=2)
    embeddings = manual(model)
    await embeddings.aprefetch("q")
    await auntil(lambda: model.calls == 1)
    queries = [asyncio.create_task(embeddings.aembed_query("q")) for _ in range(3)]
    await auntil_joined(embeddings, 3)
    await alet_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.open(winner)
    async with asyncio.timeout(PATIENCE):
        assert await asyncio.gather(*queries) == [[float(winner)]] * 3
    await auntil(lambda: model.running == 0)
    assert model.cancelled == [3 - winner]
    await auntil(lambda: len(asyncio.all_tasks()) == 1)


@pytest.mark.parametrize("failing", [1, 2])
def test_one_failure_of_two_is_nobodys(manual: Manual, failing: int) -> None:
    model = CallByCall(holding=2, failing={failing: ValueError("one of two")})
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.wait_until_entered(2)
    model.open(failing)
    until(lambda: model.ended == [failing])
    give_it_a_chance(0.05)
    model.open(3 - failing)
    assert query.result()[0] in {3.0 - failing, 3.0}
    worker.result()
    until(lambda: model.running == 0)
    assert embeddings.stats().query_failed == 0


def test_if_both_fail_the_exception_comes_from_a_querys_call(manual: Manual) -> None:
    model = CallByCall(
        holding=2, failing={1: ValueError("the prefetch's"), 2: KeyError(), 3: LookupError()}
    )
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.wait_until_entered(2)
    model.open(2)
    until(lambda: model.ended == [2])
    model.open(1)
    error = query.error()
    assert isinstance(error, LookupError), f"it was the prefetch that raised {error!r}"
    worker.result()
    assert model.calls <= 3


def test_a_failed_query_fails_with_its_own_error_though_another_was_overdue(
    manual: Manual,
) -> None:
    model = CallByCall(holding=1, failing={n: ValueError(f"call {n}") for n in range(1, 9)})
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.open()
    assert str(query.error()) != "call 1"
    worker.result()
    assert model.calls <= 3
    assert embeddings.stats().query_failed == 1


# Its age counts from its own start.


def test_overdue_is_counted_from_the_flights_own_start(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    embeddings.time.advance(UNKNOWN_LIMIT - 0.2)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    assert model.calls == 1
    let_pass(embeddings, 0.2 + MARGIN, lambda: model.calls == 2)
    assert query.result() == [2.0]
    model.open()
    worker.result()


def test_the_start_is_when_it_runs_and_not_when_it_was_asked_for(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    embeddings.prefetch("q")
    embeddings.time.advance(10 * UNKNOWN_LIMIT)  # in the queue
    worker = Call(embeddings.executor.run_next)
    model.wait_until_entered(1)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    embeddings.time.advance(UNKNOWN_LIMIT - MARGIN)
    give_it_a_chance()
    assert model.calls == 1
    model.open()
    assert query.result() == [1.0]
    worker.result()


def test_a_query_that_meets_an_overdue_flight_gets_a_call_at_once(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    embeddings.time.advance(OVERDUE)
    give_it_a_chance(0.05)
    assert model.calls == 1, "a second call was made though nobody waited"
    assert Call(embeddings.embed_query, "q").result() == [2.0]  # no time passes
    model.open()
    worker.result()
    assert model.calls == 2


async def test_a_coroutine_that_meets_an_overdue_flight_gets_a_call_at_once(
    manual: Manual,
) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    await embeddings.aprefetch("q")
    await auntil(lambda: model.calls == 1)
    embeddings.time.advance(OVERDUE)
    assert await asyncio.wait_for(embeddings.aembed_query("q"), PATIENCE) == [2.0]
    await auntil(lambda: model.cancelled == [1])


def test_a_flight_that_nobody_waits_for_gets_no_second_call(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    for _ in range(100):
        embeddings.time.advance(1.0)
    give_it_a_chance()
    assert model.calls == 1
    assert embeddings.prefetch("q") in (PrefetchOutcome.IN_FLIGHT, PrefetchOutcome.STARTED)
    model.open()
    worker.result()


async def test_who_has_left_gets_no_second_call(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    await embeddings.aprefetch("q")
    await auntil(lambda: model.calls == 1)
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil_joined(embeddings)
    query.cancel()
    await asyncio.wait([query])
    for _ in range(20):
        embeddings.time.advance(1.0)
        await asyncio.sleep(0)
    assert model.calls == 1
    model.open()
    await auntil(lambda: model.running == 0)


# The third, and no fourth.


def test_the_third_call_is_the_last(manual: Manual) -> None:
    model = CallByCall(holding=3)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.wait_until_entered(2)
    embeddings.time.advance(UNKNOWN_LIMIT - 2 * MARGIN)
    give_it_a_chance()
    assert model.calls == 2, "the second call was not overdue yet"
    let_pass(embeddings, 3 * MARGIN, lambda: model.calls == 3)
    model.wait_until_entered(3)
    embeddings.time.advance(UNKNOWN_LIMIT - 4 * MARGIN)
    give_it_a_chance()
    assert model.calls == 3, "never more than three at a time"
    # Now the third is overdue as well: the flight leaves the map, and the next query begins anew.
    embeddings.time.advance(6 * MARGIN)
    assert Call(embeddings.embed_query, "q").result()[0] >= 4.0
    assert embeddings.is_ready("q")
    newer = embeddings.embed_query("q")
    model.open()
    assert query.result()[0] >= 1.0
    worker.result()
    until(lambda: model.running == 0)
    assert embeddings.embed_query("q") == newer, "a call that was given up touched a newer one"


async def test_the_third_call_is_the_last_on_a_loop(manual: Manual) -> None:
    model = CallByCall(holding=3)
    embeddings = manual(model)
    await embeddings.aprefetch("q")
    await auntil(lambda: model.calls == 1)
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil_joined(embeddings)
    await alet_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    await alet_pass(embeddings, OVERDUE, lambda: model.calls == 3)
    embeddings.time.advance(UNKNOWN_LIMIT - 4 * MARGIN)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert model.calls == 3, "never more than three at a time"
    embeddings.time.advance(6 * MARGIN)
    newer = await asyncio.wait_for(embeddings.aembed_query("q"), PATIENCE)
    assert newer[0] >= 4.0
    model.open()
    assert await asyncio.wait_for(query, PATIENCE)
    await auntil(lambda: model.running == 0)
    assert await embeddings.aembed_query("q") == newer


def test_third_calls_that_hang_do_not_wait_for_one_another(manual: Manual) -> None:
    """Nobody waits any more: the three hang on, and the next query begins anew all the same."""
    model = CallByCall(holding=3)
    embeddings = manual(model)
    on = OnItsLoop()
    on.run(embeddings.aprefetch("q"))
    model.wait_until_entered(1)
    for number in (2, 3):
        query = on.start(embeddings.aembed_query("q"))
        until_joined(embeddings, number - 1)
        let_pass(embeddings, OVERDUE, lambda number=number: model.calls == number)  # type: ignore[misc]
        query.cancel()
        until(lambda: embeddings.prefetcher.waiters("q") == 0)  # so that nobody looks any more
    embeddings.time.advance(OVERDUE)
    assert on.run(embeddings.aembed_query("q")) == [4.0]
    model.open()
    on.close()


@pytest.mark.parametrize("winner", [1, 2, 3])
def test_any_of_three_may_win(manual: Manual, winner: int) -> None:
    model = CallByCall(holding=3)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    queries = [Call(embeddings.embed_query, "q") for _ in range(3)]
    until_joined(embeddings, 3)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.wait_until_entered(2)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 3)
    model.wait_until_entered(3)
    model.open(winner)
    assert [query.result() for query in queries] == [[float(winner)]] * 3
    model.open()
    worker.result()
    until(lambda: model.running == 0)
    assert embeddings.embed_query("q") == [float(winner)]


def test_never_more_than_three_at_a_time_for_a_crowd(manual: Manual) -> None:
    model = CallByCall(holding=3)
    embeddings = manual(model)
    worker = hanging_prefetch(embeddings, model)
    crowd = [Call(embeddings.embed_query, "q") for _ in range(8)]
    until_joined(embeddings, 8)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    model.wait_until_entered(2)
    crowd += [Call(embeddings.embed_query, "q") for _ in range(4)]
    until_joined(embeddings, 12)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 3)
    model.wait_until_entered(3)
    crowd += [Call(embeddings.embed_query, "q") for _ in range(4)]
    until_joined(embeddings, 16)
    give_it_a_chance()
    assert model.most_running == 3
    model.open()
    assert all(query.result()[0] in {1.0, 2.0, 3.0} for query in crowd)
    worker.result()


# How long is too long.


class Lasting(CallByCall):
    """A model whose unnumbered calls take time by hand."""

    def __init__(self, seconds: Callable[[int], float], **options: int) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._seconds = seconds
        self._lasted = 0
        self.embeddings: ManualPrefetchingEmbeddings

    def embed_query(self, text: str) -> list[float]:
        if text != "q":
            self.embeddings.time.advance(self._seconds(self._lasted))
            self._lasted += 1
        return super().embed_query(text)


def test_three_seconds_until_twenty_were_measured(manual: Manual) -> None:
    model = Lasting(lambda _: 0.1, holding=1)
    embeddings = model.embeddings = manual(model)
    measure(embeddings, MEASURED - 2)
    worker = hanging_prefetch(embeddings, model)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    embeddings.time.advance(UNKNOWN_LIMIT - MARGIN)
    give_it_a_chance()
    assert model.calls == 1
    let_pass(embeddings, 2 * MARGIN, lambda: model.calls == 2)
    assert query.result() == [2.0]
    model.open()
    worker.result()


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        (lambda _: 0.1, LEAST_LIMIT),
        (lambda _: 0.9, 1.8),
        (lambda _: 2.5, 5.0),
        # One in fifty is slow: the 95th percentile knows nothing of it.
        (lambda number: 30.0 if number == 7 else 0.8, 1.6),
        # One in ten is: it does.
        (lambda number: 4.0 if number % 10 == 9 else 0.1, 8.0),
    ],
    ids=["at least a second", "twice the usual", "slow models", "outliers", "a slow tail"],
)
def test_twice_what_calls_usually_take(
    manual: Manual, seconds: Callable[[int], float], limit: float
) -> None:
    model = Lasting(seconds, holding=1)
    embeddings = model.embeddings = manual(model, ttl=100_000.0)
    measure(embeddings, 100)
    worker = hanging_prefetch(embeddings, model)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    embeddings.time.advance(limit - MARGIN)
    give_it_a_chance()
    assert model.calls == 1, f"the call was not overdue before {limit} s"
    let_pass(embeddings, 2 * MARGIN, lambda: model.calls == 2)
    assert query.result() == [2.0]
    model.open()
    worker.result()


# `Hedge` is the same thing, set earlier, with a budget.


def test_a_hedge_comes_earlier(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model, hedge=Hedge(after=0.5, budget=1.0))
    worker = hanging_prefetch(embeddings, model)
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    embeddings.time.advance(0.5 - MARGIN)
    give_it_a_chance(0.05)
    assert model.calls == 1
    let_pass(embeddings, 2 * MARGIN, lambda: model.calls == 2)
    assert query.result() == [2.0]
    assert embeddings.stats().hedge_started == 1
    model.open()
    worker.result()


def test_overdue_knows_no_budget(manual: Manual) -> None:
    """The budget goes on one text; another text's call hangs, and is denied a hedge."""
    gates = {"a": Gate(), "b": Gate()}

    class Model(CallByCall):
        asked: list[str]

        def embed_query(self, text: str) -> list[float]:
            self.asked.append(text)
            if self.asked.count(text) == 1 and text in gates:
                gates[text].hold()
            return [float(self.asked.count(text))]

    model = Model()
    model.asked = []
    embeddings = manual(model, hedge=Hedge(after=0.5, budget=0.001))
    queries = []
    workers = []
    for text in gates:
        embeddings.prefetch(text)
        workers.append(Call(embeddings.executor.run_next))
        gates[text].wait_until_entered()
        queries.append(Call(embeddings.embed_query, text))
    until_joined(embeddings, 2)
    let_pass(
        embeddings,
        0.5 + MARGIN,
        lambda: embeddings.stats().hedge_started + embeddings.stats().hedge_denied == 2,
    )
    assert embeddings.stats().hedge_denied == 1
    let_pass(embeddings, UNKNOWN_LIMIT - 0.5, lambda: len(model.asked) == 4)
    assert [query.result() for query in queries] == [[2.0]] * 2
    assert embeddings.stats().hedge_denied == 1
    for gate in gates.values():
        gate.open()
    for worker in workers:
        worker.result()


@pytest.mark.parametrize("hedge", [None, Hedge(after=1.0, budget=1.0)], ids=["overdue", "hedge"])
def test_due_also_for_who_began_to_wait_while_it_was_queued(
    manual: Manual, hedge: Hedge | None
) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model, hedge=hedge)
    embeddings.prefetch("q")
    waiter = Call(embeddings.wait_for_prefetch, "q", PATIENCE)
    give_it_a_chance()  # to wait, while it is queued
    assert model.calls == 0, "the wait with a time-out ran the prefetch itself"
    worker = Call(embeddings.executor.run_next)
    model.wait_until_entered(1)
    let_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    assert waiter.result()
    assert embeddings.embed_query("q") == [2.0]
    model.open()
    worker.result()


async def test_due_also_for_a_coroutine_that_began_to_wait_while_it_was_queued(
    manual: Manual,
) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(SyncSideOnly(model))
    embeddings.prefetch("q")
    waiter = asyncio.create_task(embeddings.await_for_prefetch("q", PATIENCE))
    await asyncio.sleep(0.1)  # to wait, while it is queued
    assert model.calls == 0, "the wait with a time-out ran the prefetch itself"
    worker = Call(embeddings.executor.run_next)
    await asyncio.to_thread(model.wait_until_entered, 1)
    await alet_pass(embeddings, OVERDUE, lambda: model.calls == 2)
    assert await waiter
    model.open()
    await asyncio.to_thread(worker.result)


# Loops that end, or turn and seem not to.


@pytest.mark.parametrize("end", ["closed", "stopped and closed"])
@pytest.mark.parametrize("began", ["a prefetch", "a query"])
def test_a_loop_that_closes_under_a_flight_is_noticed(manual: Manual, end: str, began: str) -> None:
    """By itself: the time by hand stands still, so that the call is never overdue."""
    model = CallByCall(holding=1)
    embeddings = manual(model)
    dying, living = OnItsLoop(), OnItsLoop()
    if began == "a prefetch":
        dying.run(embeddings.aprefetch("q"))
    else:
        abandoned = dying.start(embeddings.aembed_query("q"))
    model.wait_until_entered(1)
    queries = [Call(embeddings.embed_query, "q") for _ in range(2)]
    tasks = [living.start(embeddings.aembed_query("q")) for _ in range(2)]
    until_joined(embeddings, 4)
    if end == "stopped and closed":
        dying.stop()
    dying.close()
    assert [query.result() for query in queries] == [[2.0]] * 2
    assert [task.result(PATIENCE) for task in tasks] == [[2.0]] * 2
    assert model.calls == 2, "not one call for all who were waiting"
    living.close()
    if began == "a query":
        abandoned.cancel()


@pytest.mark.filterwarnings("ignore:.*was destroyed:ResourceWarning")
def test_a_loop_that_was_closed_before_the_query_came(manual: Manual) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    dying = OnItsLoop()
    dying.run(embeddings.aprefetch("q"))
    model.wait_until_entered(1)
    dying.stop()
    dying.close()
    assert Call(embeddings.embed_query, "q").result() == [2.0]


async def test_a_busy_executor_makes_no_loop_silent(manual: Manual) -> None:
    """The loop turns, and the call comes; only the default executor is busy with other things."""
    model = CallByCall(holding=1)
    embeddings = manual(AsyncSideOnly(model))
    busy = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(threads)
        jobs = [loop.run_in_executor(None, busy.wait, PATIENCE) for _ in range(8)]
        await embeddings.aprefetch("q")
        await auntil(lambda: model.calls == 1)
        query = Call(embeddings.embed_query, "q")
        await auntil_joined(embeddings)
        await asyncio.sleep(4.0)  # longer than the first edition trusted such a loop
        assert query.thread.is_alive(), "the query gave up a call that is on its way"
        assert model.calls == 1
        model.open()
        await auntil(lambda: not query.thread.is_alive())
        assert query.result() == [1.0]
        busy.set()
        await asyncio.gather(*jobs)


# As it looks from outside, with real time.


@pytest.mark.parametrize("began", ["aprefetch", "prefetch", "query"])
async def test_callers_with_short_patience_are_answered(wrap: Wrap, began: str) -> None:
    """One call hangs for ever; each caller leaves after a while, and asks again."""
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    measure(embeddings)  # so that a second is the limit
    if began == "aprefetch":
        await embeddings.aprefetch("q")
    elif began == "prefetch":
        embeddings.prefetch("q")
        await asyncio.to_thread(model.wait_until_entered, 1)
    answer: list[float] = []

    async def ask() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.4):
                answer.extend(await embeddings.aembed_query("q"))

    async with asyncio.timeout(PATIENCE):
        while not answer:
            await ask()
    assert answer == [2.0]
    assert await embeddings.aembed_query("q") == [2.0]
    assert model.calls == 2
    model.open()
    await auntil(lambda: model.running == 0)


def test_a_client_that_sleeps_over_a_refusal(wrap: Wrap) -> None:
    """The provider said "in 20 s", and the prefetch's client obeys; it is well at once."""
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    measure(embeddings)
    embeddings.prefetch("q")
    model.wait_until_entered(1)
    assert Call(embeddings.embed_query, "q").result() == [2.0]
    assert model.running == 1, "the first call ended by itself: this shows nothing"
    model.open()
    until(lambda: model.running == 0)


def test_a_model_that_has_its_threads_taken_is_not_taken_for_hung(wrap: Wrap) -> None:
    """Several texts hang at once: each gets a call of its own beside it, however small the pool."""
    texts = [f"text {number}" for number in range(6)]
    gates = {text: Gate() for text in texts}
    asked: list[str] = []

    class Model(CallByCall):
        def embed_query(self, text: str) -> list[float]:
            asked.append(text)
            if asked.count(text) == 1 and text in gates:
                gates[text].hold()
            return [float(asked.count(text))]

    embeddings = wrap(Model(), max_workers=6, max_pending=6)
    measure(embeddings)
    for text in texts:
        embeddings.prefetch(text)
    for gate in gates.values():
        gate.wait_until_entered()
    queries = [Call(embeddings.embed_query, text) for text in texts]
    assert [query.result() for query in queries] == [[2.0]] * 6
    for gate in gates.values():
        gate.open()
    until(lambda: embeddings.prefetch("another") is PrefetchOutcome.READY)
