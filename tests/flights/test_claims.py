"""Never slower than no prefetch: a query runs what is queued, and joins what runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import Call, auntil, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]


def test_query_claims_a_queued_flight(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    embeddings.prefetch("q")
    assert embeddings.embed_query("q") == model.vector("q")
    assert len(embeddings.executor) == 0, "the claimed flight still queues"
    assert model.calls == [("embed_query", ("q",))]
    stats = embeddings.stats()
    assert (stats.query_claimed, stats.prefetch_succeeded, stats.prefetch_used) == (1, 1, 1)


async def test_coroutine_claims_a_queued_flight_by_the_async_method(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    embeddings.prefetch("q")
    assert await embeddings.aembed_query("q") == model.vector("q")
    assert model.calls == [("aembed_query", ("q",))]
    assert embeddings.stats().query_claimed == 1


def test_query_passes_a_full_queue_and_hanging_workers(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model, max_workers=1, max_pending=3)
    gate = model.hold("hanging")
    embeddings.prefetch("hanging")
    gate.wait_until_entered()
    for text in "abc":
        assert embeddings.prefetch(text) is PrefetchOutcome.STARTED
    assert embeddings.embed_query("c") == model.vector("c")
    assert embeddings.embed_query("new") == model.vector("new")
    gate.open()


class _NotingThreads(ScriptedEmbeddings):
    def __init__(self) -> None:
        super().__init__()
        self.threads: dict[str, threading.Thread] = {}

    def embed_query(self, text: str) -> list[float]:
        self.threads[text] = threading.current_thread()
        return super().embed_query(text)


def test_the_worker_outlives_the_claim_of_its_job(wrap: Wrap) -> None:
    model = _NotingThreads()
    embeddings = wrap(model, max_workers=1)
    gate = model.hold("first")
    embeddings.prefetch("first")
    gate.wait_until_entered()
    embeddings.prefetch("q")
    embeddings.prefetch("behind it")
    assert embeddings.embed_query("q") == model.vector("q")
    gate.open()
    until(lambda: embeddings.is_ready("behind it"))
    assert embeddings.prefetch("later") is PrefetchOutcome.STARTED
    until(lambda: embeddings.is_ready("later"))
    worker = model.threads["first"]
    assert model.threads["behind it"] is model.threads["later"] is worker
    assert model.threads["q"] is not worker
    assert model.calls_for("q") == 1
    assert embeddings.stats().query_claimed == 1


def test_query_joins_a_running_flight(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    embeddings.prefetch("q")
    gate.wait_until_entered()
    query = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.stats().query_joined == 1)
    gate.open()
    assert query.result() == model.vector("q")
    assert model.calls_for("q") == 1


def test_a_query_interrupts_the_pause_between_attempts(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    model.fail("q", OSError("once"))
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    assert not embeddings.is_ready("q")
    assert embeddings.embed_query("q") == model.vector("q")
    assert embeddings.stats().query_claimed == 1
    embeddings.time.advance(60.0)
    assert embeddings.executor.run_all() == 0, "the pause outlived its flight"
    assert model.calls_for("q") == 2


async def test_a_query_interrupts_the_pause_of_an_async_flight(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefetch_embeddings._flights.landing.RETRY_PAUSE", 1000.0)
    embeddings = wrap(model)
    model.fail("q", OSError("once"))
    await embeddings.aprefetch("q")
    await auntil(lambda: model.calls_for("q") == 1)
    # From another thread, so that this loop's task cannot come first.
    assert await asyncio.to_thread(embeddings.embed_query, "q") == model.vector("q")
    assert embeddings.stats().query_claimed == 1
    assert model.calls == [("aembed_query", ("q",)), ("embed_query", ("q",))]


class _Composed(Embeddings):
    """A model that asks the wrapper for parts of its text while it embeds it."""

    def __init__(self) -> None:
        self.outer: PrefetchingEmbeddings
        self.barrier: threading.Barrier | None = None

    def embed_query(self, text: str) -> list[float]:
        head, _, rest = text.partition(" ")
        if self.barrier is not None and rest:
            self.barrier.wait(30)
        return [float(len(head)), self.outer.embed_query(rest)[0] if rest else 0.0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


def test_the_whole_pool_joins_flights_that_are_queued_behind_it(wrap: Wrap) -> None:
    # Each of the pool's threads waits for a text that stands in the queue of that same pool.
    model = _Composed()
    model.barrier = threading.Barrier(2)
    model.outer = embeddings = wrap(model, max_workers=2)
    embeddings.prefetch("a xx")
    embeddings.prefetch("b yyy")
    embeddings.prefetch("xx")
    embeddings.prefetch("yyy")
    assert embeddings.wait_for_prefetch("a xx", timeout=30)
    assert embeddings.wait_for_prefetch("b yyy", timeout=30)
    assert embeddings.embed_query("a xx") == [1.0, 2.0]
    assert embeddings.embed_query("b yyy") == [1.0, 3.0]


def test_waiting_without_limit_inside_the_pool_runs_the_queued_flight(wrap: Wrap) -> None:
    class Waiting(Embeddings):
        outer: PrefetchingEmbeddings

        def embed_query(self, text: str) -> list[float]:
            if text == "first":
                self.outer.prefetch("second")
                return [1.0 if self.outer.wait_for_prefetch("second") else 0.0]
            return [2.0]

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [self.embed_query(text) for text in texts]

    model = Waiting()
    model.outer = embeddings = wrap(model, max_workers=1)
    embeddings.prefetch("first")
    assert embeddings.wait_for_prefetch("first", timeout=30)
    assert embeddings.embed_query("first") == [1.0]


def test_claimed_flight_embeds_the_text_of_the_query(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, match=str.casefold)
    embeddings.prefetch("How much")
    assert embeddings.embed_query("how much") == model.vector("how much")


@pytest.mark.parametrize("timeout", [None, 30.0])
async def test_awaiting_runs_a_queued_flight(
    manual: Manual, model: ScriptedEmbeddings, timeout: float | None
) -> None:
    embeddings = manual(model)
    embeddings.prefetch("q")
    assert await embeddings.await_for_prefetch("q", timeout)
    assert embeddings.is_ready("q")
    assert model.calls == [("aembed_query", ("q",))]
