"""However many ask for one text, in whatever way: one call, and everybody has the vector."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.flights.outside import CallByCall, OnItsLoop, give_it_a_chance, queries_counted
from tests.helpers import PATIENCE, AsyncSideOnly, Call, SyncSideOnly, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

SHAPES: dict[str, Callable[[Embeddings], Embeddings]] = {
    "both sides": lambda model: model,
    "the sync side": SyncSideOnly,
}
FIRST = ["embed_query", "aembed_query", "prefetch", "aprefetch", "prefetch_many"]


class Crowd:
    """Threads, and tasks on several loops, that all ask for "q" in the ways there are."""

    def __init__(self, embeddings: PrefetchingEmbeddings, seed: int = 0) -> None:
        self._embeddings = embeddings
        self.loops = [OnItsLoop() for _ in range(3)]
        self.queries = 0
        self._draw = random.Random(seed)
        self._results: list[Callable[[], Any]] = []

    def ask(self, how: str) -> None:
        """Have one more ask, in this way."""
        embeddings, on = self._embeddings, self._draw.choice(self.loops)
        if how in ("embed_query", "prefetch", "wait_for_prefetch"):
            self._results.append(Call(getattr(embeddings, how), "q").result)
        elif how == "prefetch_many":
            self._results.append(Call(embeddings.prefetch_many, ["q", "q"]).result)
        else:
            future = on.start(getattr(embeddings, how)("q"))
            self._results.append(lambda: future.result(PATIENCE))
        self.queries += how in ("embed_query", "aembed_query")

    def all_ask(self, *, times: int) -> None:
        """Have many more ask, in all ways."""
        hows = [*FIRST, "wait_for_prefetch", "await_for_prefetch"] * times
        self._draw.shuffle(hows)
        for how in hows:
            self.ask(how)

    def answers(self) -> list[list[float]]:
        """Wait for everybody; return the vectors."""
        results = [result() for result in self._results]
        return [each for each in results if isinstance(each, list) and isinstance(each[0], float)]

    def close(self) -> None:
        for on in self.loops:
            on.close()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", FIRST)
def test_one_call(wrap: Wrap, shape: str, first: str) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(SHAPES[shape](model))
    crowd = Crowd(embeddings)
    crowd.ask(first)
    model.wait_until_entered(1)
    crowd.all_ask(times=4)
    give_it_a_chance()
    model.open()
    answers = crowd.answers()
    assert answers == [[1.0]] * crowd.queries
    assert model.calls == 1
    assert queries_counted(embeddings.stats()) == crowd.queries
    crowd.close()


@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_when_all_come_at_once(wrap: Wrap, shape: str) -> None:
    for round_ in range(30):
        model = CallByCall(holding=1)
        embeddings = wrap(SHAPES[shape](model))
        crowd = Crowd(embeddings, seed=round_)
        crowd.all_ask(times=1)
        model.wait_until_entered(1)
        model.open()
        assert crowd.answers() == [[1.0]] * crowd.queries
        assert model.calls == 1
        crowd.close()


async def test_one_call_of_a_model_with_an_async_side_only(wrap: Wrap) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(AsyncSideOnly(model))
    assert await embeddings.aprefetch("q") is PrefetchOutcome.STARTED
    tasks = [asyncio.create_task(embeddings.aembed_query("q")) for _ in range(10)]
    threads = [asyncio.create_task(asyncio.to_thread(embeddings.embed_query, "q")) for _ in "abc"]
    await asyncio.sleep(0.1)
    model.open()
    async with asyncio.timeout(PATIENCE):
        assert await asyncio.gather(*tasks, *threads) == [[1.0]] * 13
    assert model.calls == 1


@pytest.mark.parametrize("first", ["prefetch", "aprefetch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_failed_prefetch_costs_all_of_them_one_call(wrap: Wrap, shape: str, first: str) -> None:
    model = CallByCall(holding=2, failing={1: ValueError("the prefetch's")})
    embeddings = wrap(SHAPES[shape](model))
    crowd = Crowd(embeddings)
    crowd.ask(first)
    model.wait_until_entered(1)
    for how in ("embed_query", "aembed_query") * 6:
        crowd.ask(how)
    until(lambda: embeddings.stats().query_joined == 12)
    model.open(1)
    model.wait_until_entered(2)
    give_it_a_chance()
    model.open(2)
    assert crowd.answers() == [[2.0]] * 12
    assert model.calls == 2
    stats = embeddings.stats()
    assert stats.query_recovered == 12
    assert queries_counted(stats) == 12
    crowd.close()


@pytest.mark.parametrize("first", ["prefetch", "aprefetch"])
def test_a_provider_that_is_down_fails_all_of_them_by_one_call(wrap: Wrap, first: str) -> None:
    errors: dict[int, BaseException] = {n: ValueError(f"call {n}") for n in range(1, 9)}
    model = CallByCall(holding=2, failing=errors)
    embeddings = wrap(model)
    on = OnItsLoop()
    if first == "prefetch":
        embeddings.prefetch("q")
    else:
        on.run(embeddings.aprefetch("q"))
    model.wait_until_entered(1)
    threads = [Call(embeddings.embed_query, "q") for _ in range(4)]
    tasks = [on.start(embeddings.aembed_query("q")) for _ in range(4)]
    until(lambda: embeddings.stats().query_joined == 8)
    model.open(1)
    model.wait_until_entered(2)
    give_it_a_chance()
    model.open(2)
    raised = [thread.error() for thread in threads] + [task.exception(PATIENCE) for task in tasks]
    assert [str(error) for error in raised] == ["call 2"] * 8
    assert len({id(error) for error in raised}) == 8, "an exception is shared"
    assert len({id(error.__traceback__) for error in raised if error}) == 8
    assert model.calls == 2
    assert embeddings.stats().query_failed == 8
    on.close()


def test_everybody_has_a_list_of_its_own(wrap: Wrap) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    crowd = Crowd(embeddings)
    crowd.ask("prefetch")
    model.wait_until_entered(1)
    crowd.all_ask(times=3)
    give_it_a_chance()
    model.open()
    answers = [*crowd.answers(), embeddings.embed_query("q"), embeddings.embed_query("q")]
    for number, vector in enumerate(answers):
        assert vector == [1.0]
        vector[0] = number + 100.0
        vector.append(number)
    assert embeddings.embed_query("q") == [1.0]
    crowd.close()


def test_texts_that_match_are_one(manual: Manual) -> None:
    model = ScriptedEmbeddings()
    embeddings = manual(model, match=str.casefold)
    gate = model.hold("Q")
    embeddings.prefetch("Q")
    worker = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    queries = [Call(embeddings.embed_query, text) for text in ("q", "Q", "q", "Q")]
    assert embeddings.prefetch("q") is PrefetchOutcome.IN_FLIGHT
    until(lambda: embeddings.stats().query_joined == 4)
    gate.open()
    worker.result()
    assert [query.result() for query in queries] == [model.vector("Q")] * 4
    assert len(model.calls) == 1
    assert embeddings.stats().query_matched == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_turn_after_turn(wrap: Wrap, shape: str) -> None:
    """All ask for one text, forget it and go on to the next, in a race: at most a call a round."""
    calls = itertools.count(1)
    entered = 0

    class Model(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            raise NotImplementedError

        def embed_query(self, text: str) -> list[float]:
            nonlocal entered
            entered = next(calls)
            return [float(text)]

        async def aembed_query(self, text: str) -> list[float]:
            nonlocal entered
            entered = next(calls)
            await asyncio.sleep(0)
            return [float(text)]

    embeddings = wrap(SHAPES[shape](Model()))
    rounds, threads = 200, 6
    barrier = threading.Barrier(threads)

    def work(number: int) -> None:
        for round_ in range(rounds):
            barrier.wait(PATIENCE)
            text = str(round_)
            if number % 3 == 0:
                embeddings.prefetch(text)
            if number % 3 == 1:
                asyncio.run(embeddings.aprefetch(text))
            assert embeddings.embed_query(text) == [float(round_)]

    working = [Call(work, number) for number in range(threads)]
    for each in working:
        each.result()
    # A loop that closes under its flight (`asyncio.run` does) costs a call more.
    assert rounds <= entered <= rounds * 3
    stats = embeddings.stats()
    assert queries_counted(stats) == rounds * threads
