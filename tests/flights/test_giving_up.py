"""No join lasts for ever: what may be waiting for its own waiters is given up, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import anyio.to_thread
import pytest
from langchain_core.runnables import RunnableLambda, RunnableParallel

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings._flights import runner
from prefetch_embeddings._flights.loops import LoopWatch, Sign
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import PATIENCE, Call, auntil, until

Wrap = Callable[..., PrefetchingEmbeddings]


class NeedingThreads(ScriptedEmbeddings):
    """A model whose async client needs a thread when its answer has come."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.answered = threading.Event()

    async def thread(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, str)

    async def aembed_query(self, text: str) -> list[float]:
        vector = await super().aembed_query(text)
        self.entered.release()
        await auntil(self.answered.is_set)
        await self.thread()
        return vector


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everybody give up what is not there within a moment."""
    monkeypatch.setattr(runner, "GIVE_UP_SECONDS", 0.3)


def waiting(embeddings: PrefetchingEmbeddings, text: str) -> int:
    flight = embeddings._flights.get(text)
    return 0 if flight is None else flight.waiters


@contextlib.contextmanager
def answers_when(model: NeedingThreads, condition: Callable[[], bool]) -> Iterator[None]:
    """Have the model's answer come once `condition` holds."""

    def answer() -> None:
        until(condition)
        model.answered.set()

    answering = Call(answer)
    yield
    answering.result()


# What waits in ways that nobody can see.


async def test_an_executor_that_waits_for_a_thread_which_waits_for_it(
    wrap: Wrap, short_patience: None
) -> None:
    class CallingBack(NeedingThreads):
        def embed_query(self, text: str) -> list[float]:
            if text == "whole":
                embeddings.embed_query("part")
            return super().embed_query(text)

    model = CallingBack()
    embeddings = wrap(model)
    with ThreadPoolExecutor(2) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        with answers_when(model, lambda: waiting(embeddings, "whole") == 2):
            await embeddings.aprefetch("part")
            embeddings.prefetch("whole")
            queries = [asyncio.to_thread(embeddings.embed_query, "whole") for _ in range(2)]
            async with asyncio.timeout(PATIENCE):
                vectors = await asyncio.gather(*queries)
    assert vectors == [model.vector("whole")] * 2


async def test_an_executor_whose_threads_wait_for_threads_of_others(wrap: Wrap) -> None:
    model = NeedingThreads()
    embeddings = wrap(model)
    ask = RunnableParallel(
        vector=RunnableLambda(embeddings.embed_query), length=RunnableLambda(len)
    )
    chain = RunnableLambda(lambda text: ask.invoke(text)["vector"])
    with ThreadPoolExecutor(2) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        with answers_when(model, lambda: waiting(embeddings, "q") == 2):
            await embeddings.aprefetch("q")
            async with asyncio.timeout(PATIENCE):
                vectors = await asyncio.gather(*(chain.ainvoke("q") for _ in range(2)))
    assert vectors == [model.vector("q")] * 2


async def test_a_pool_of_another_kind(wrap: Wrap, short_patience: None) -> None:
    class NeedingWorkerThreads(NeedingThreads):
        async def thread(self) -> None:
            await anyio.to_thread.run_sync(str)

    model = NeedingWorkerThreads()
    embeddings = wrap(model)
    anyio.to_thread.current_default_thread_limiter().total_tokens = 2
    with answers_when(model, lambda: waiting(embeddings, "q") == 2):
        await embeddings.aprefetch("q")
        queries = [anyio.to_thread.run_sync(embeddings.embed_query, "q") for _ in range(2)]
        async with asyncio.timeout(PATIENCE):
            vectors = await asyncio.gather(*queries)
    assert vectors == [model.vector("q")] * 2


# Giving up is the waiter's own affair.


def test_what_is_given_up_goes_on_for_the_others(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    embeddings.prefetch("q")
    gate.wait_until_entered()
    patient = Call(embeddings.wait_for_prefetch, "q", PATIENCE)
    until(lambda: waiting(embeddings, "q") == 1)
    monkeypatch.setattr(runner, "GIVE_UP_SECONDS", 0.01)
    impatient = [Call(embeddings.embed_query, "q") for _ in range(3)]
    assert [query.result() for query in impatient] == [model.vector("q")] * 3
    assert model.calls_for("q") == 2, "all who give up share one call"
    gate.open()
    assert patient.result() is True
    assert embeddings.stats().query_recovered == 3


def test_a_query_that_takes_too_long_is_given_up_by_those_who_joined_it(
    wrap: Wrap, model: ScriptedEmbeddings, short_patience: None
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    owner = Call(embeddings.embed_query, "q")
    gate.wait_until_entered()
    assert embeddings.embed_query("q") == model.vector("q")
    gate.open()
    assert owner.result() == model.vector("q")
    assert embeddings.stats().query_failed == 0


async def test_nobody_gives_up_a_call_of_his_own(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GIVE_UP_SECONDS", 0.0)
    embeddings = wrap(model)
    gate = model.hold("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await gate.await_until_entered()
    gate.open()
    assert await query == model.vector("q")
    assert model.calls_for("q") == 1


async def test_a_wait_on_a_loop_that_stands_still_ends_nobodys_flight(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefetch_embeddings._flights.loops.PATIENCE_LOOKS", 2)
    embeddings = wrap(model)
    gate = model.hold("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await gate.await_until_entered()
    wait = Call(embeddings.wait_for_prefetch, "q")
    assert wait.result() is False  # blocks the loop
    gate.open()
    assert await query == model.vector("q")
    assert model.calls_for("q") == 1


def test_who_waits_for_a_loop_does_not_end_what_a_thread_has_claimed(
    wrap: Wrap, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_PAUSE", 1000.0)
    look = LoopWatch.look
    seen = {sign: threading.Event() for sign in Sign}

    def telling(watch: LoopWatch) -> Sign:
        sign = look(watch)
        seen[sign].set()
        return sign

    monkeypatch.setattr(LoopWatch, "look", telling)
    embeddings = wrap(model)
    model.fail("q", ConnectionError())
    loop = asyncio.new_event_loop()
    loop.run_until_complete(embeddings.aprefetch("q"))
    loop.run_until_complete(asyncio.sleep(0))
    turning = threading.Thread(target=loop.run_forever)
    turning.start()
    until(loop.is_running)
    wait = Call(embeddings.wait_for_prefetch, "q", 2 * PATIENCE)
    assert seen[Sign.ALIVE].wait(PATIENCE)
    gate = model.hold("q")
    query = Call(embeddings.embed_query, "q")
    gate.wait_until_entered()
    loop.call_soon_threadsafe(loop.stop)
    turning.join()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert seen[Sign.DEAD].wait(PATIENCE)
    gate.open()
    assert query.result() == model.vector("q")
    assert wait.result() is True
    assert model.calls == [("aembed_query", ("q",)), ("embed_query", ("q",))]
    assert embeddings.stats().query_recovered == 0


# A thread that makes way.


async def test_an_executor_that_is_not_the_loops_stays_as_it_is(wrap: Wrap) -> None:
    model = NeedingThreads()
    embeddings = wrap(model)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as mine:
        threads: set[int] = set()

        def beside() -> None:
            threads.add(threading.get_ident())

        await embeddings.aprefetch("q")
        with answers_when(model, lambda: waiting(embeddings, "q") == 1):
            query = loop.run_in_executor(mine, embeddings.embed_query, "q")
            others = [loop.run_in_executor(mine, beside) for _ in range(3)]
            await query
            await asyncio.gather(*others)
        assert len(threads) == len(mine._threads) == 1


async def test_a_thread_that_made_way_keeps_nothing_of_what_it_ran(wrap: Wrap) -> None:
    class Request:
        pass

    model = NeedingThreads()
    model.answered.set()
    embeddings = wrap(model)
    request = Request()
    kept = weakref.ref(request)

    def handle(_: Request) -> list[float]:
        return embeddings.embed_query("q")

    await embeddings.aprefetch("q")
    await asyncio.get_running_loop().run_in_executor(None, handle, request)
    del request
    gc.collect()
    assert kept() is None


# Loops that are gone.


def test_a_ready_flight_keeps_no_loop(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(embeddings.aembed_query("q"))
    loop.close()
    kept = weakref.ref(loop)
    del loop
    gc.collect()
    assert kept() is None
    assert embeddings.is_ready("q")


def test_a_batch_takes_over_from_a_closed_loop(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model, symmetric=True)
    gate = model.hold("q")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(embeddings.aprefetch("q"))
    loop.close()
    gate.open()
    assert embeddings.prefetch_many(["q"]) == [PrefetchOutcome.STARTED]
    assert embeddings.wait_for_prefetch("q")


def test_the_collector_may_destroy_a_call_that_ends_in_another_error(
    wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Translating(ScriptedEmbeddings):
        async def aembed_query(self, text: str) -> list[float]:
            try:
                await asyncio.get_running_loop().create_future()
            except BaseException:
                raise ConnectionError from None
            return []

    model = Translating()
    embeddings = wrap(model)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(embeddings.aprefetch("q"))
    loop.close()
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)  # asyncio's own, about the task
    assert embeddings.embed_query("q") == model.vector("q")
    del loop

    def collect() -> None:  # as any allocation may
        with embeddings._flights._lock:
            gc.collect()

    Call(collect).result()
