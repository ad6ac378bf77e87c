"""What has ended leaves nothing behind: no frame, no context, no timer, and no work for the collector."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import Hedge, PrefetchingEmbeddings
from prefetch_embeddings.testing import Gate, ManualPrefetchingEmbeddings, assert_no_leaks
from tests.flights.outside import OnItsLoop, alet_pass, auntil_joined, let_pass, until_joined
from tests.helpers import Call, auntil, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """What goes only by the collector does not go here."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Request:
    """What a call holds while it is under way, and a frame of it keeps."""


class Model(Embeddings):
    """Fails, or answers, with a request at hand that nobody else has."""

    def __init__(self) -> None:
        self.requests: list[weakref.ref[Request]] = []
        self.failing = 0
        """How many of the next calls fail."""
        self.gates: list[Gate] = []

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    def embed_query(self, text: str) -> list[float]:
        request = Request()
        self.requests.append(weakref.ref(request))
        fails = self._fails()
        if self.gates:
            self.gates.pop(0).hold()
        if fails:
            raise ValueError(text)
        del request
        return [1.0]

    async def aembed_query(self, text: str) -> list[float]:
        request = Request()
        self.requests.append(weakref.ref(request))
        fails = self._fails()
        if self.gates:
            await self.gates.pop(0).ahold()
        else:
            await asyncio.sleep(0)
        if fails:
            raise ValueError(text)
        del request
        return [1.0]

    def _fails(self) -> bool:
        self.failing -= 1
        return self.failing >= 0

    def left(self) -> int:
        return sum(request() is not None for request in self.requests)


def fail(function: Callable[[str], object], text: str = "q") -> None:
    """Make a call that fails, and let go of its exception."""
    try:
        function(text)
    except ValueError:
        pass
    else:
        raise AssertionError("it did not fail")


async def afail(function: Callable[[str], Any], text: str = "q") -> None:
    try:
        await function(text)
    except ValueError:
        pass
    else:
        raise AssertionError("it did not fail")


# The model of all these: without the library nothing is left.


def test_the_bare_model_leaves_nothing() -> None:
    model = Model()
    model.failing = 1
    fail(model.embed_query)
    assert model.left() == 0


async def test_the_bare_model_leaves_nothing_on_a_loop() -> None:
    model = Model()
    model.failing = 1
    await afail(model.aembed_query)
    await asyncio.sleep(0)
    assert model.left() == 0


# Frames.


def test_a_query_that_failed(wrap: Wrap) -> None:
    model = Model()
    embeddings = wrap(model)
    model.failing = 3
    for _ in range(3):
        fail(embeddings.embed_query)
    assert model.left() == 0


def test_a_query_that_failed_with_a_hedge(wrap: Wrap) -> None:
    model = Model()
    embeddings = wrap(model, hedge=Hedge(after=60.0))
    model.failing = 3
    for _ in range(3):
        fail(embeddings.embed_query)
    until(lambda: model.left() == 0)


def test_a_claimed_query_that_failed(manual: Manual) -> None:
    model = Model()
    embeddings = manual(model)
    embeddings.prefetch("q")
    model.failing = 1
    fail(embeddings.embed_query)
    embeddings.executor.run_all()
    assert model.left() == 0


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_prefetch_that_failed(manual: Manual, attempts: int) -> None:
    model = Model()
    embeddings = manual(model, attempts=attempts)
    model.failing = attempts
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    assert model.left() == 0, "before it was tried again"
    embeddings.time.advance(10.0)
    embeddings.executor.run_all()
    assert len(model.requests) == attempts
    assert model.left() == 0


def test_a_prefetch_that_failed_in_a_worker(wrap: Wrap) -> None:
    model = Model()
    embeddings = wrap(model, attempts=1, max_workers=1)
    model.failing = 3
    for number in range(3):
        embeddings.prefetch(f"q {number}")
        embeddings.wait_for_prefetch(f"q {number}", 30.0)
    until(lambda: len(model.requests) == 3)
    until(lambda: model.left() == 0)  # the idle worker holds nothing either


@pytest.mark.parametrize("recovers", [True, False])
def test_queries_whose_prefetch_failed(manual: Manual, recovers: bool) -> None:
    model = Model()
    embeddings = manual(model)
    gate = Gate()
    model.gates = [gate]
    model.failing = 1 if recovers else 20
    embeddings.prefetch("q")
    worker = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    queries = [
        Call(embeddings.embed_query if recovers else lambda: fail(embeddings.embed_query), *args)
        for args in ([("q",)] * 3 if recovers else [()] * 3)
    ]
    until_joined(embeddings, 3)
    gate.open()
    worker.result()
    for query in queries:
        query.result()
    assert len(model.requests) >= 2
    until(lambda: model.left() == 0)


async def test_coroutines_that_failed(wrap: Wrap) -> None:
    model = Model()
    embeddings = wrap(model)
    model.failing = 3
    for _ in range(3):
        await afail(embeddings.aembed_query)
    await auntil(lambda: model.left() == 0)


@pytest.mark.parametrize("attempts", [1, 2])
async def test_an_async_prefetch_that_failed(wrap: Wrap, attempts: int) -> None:
    model = Model()
    embeddings = wrap(model, attempts=attempts)
    model.failing = attempts
    await embeddings.aprefetch("q")
    await auntil(lambda: len(model.requests) == attempts)
    await auntil(lambda: len(asyncio.all_tasks()) == 1)
    await auntil(lambda: model.left() == 0)


@pytest.mark.parametrize("recovers", [True, False])
async def test_coroutines_whose_prefetch_failed(wrap: Wrap, recovers: bool) -> None:
    model = Model()
    embeddings = wrap(model)
    gate = Gate()
    model.gates = [gate]
    model.failing = 1 if recovers else 20
    await embeddings.aprefetch("q")
    ask = embeddings.aembed_query if recovers else lambda text: afail(embeddings.aembed_query, text)
    queries = [asyncio.create_task(ask("q")) for _ in range(3)]  # type: ignore[arg-type]
    await auntil_joined(embeddings, 3)
    gate.open()
    await asyncio.wait(queries)
    for query in queries:
        query.result()
    del queries, query
    assert len(model.requests) == 2
    await auntil(lambda: model.left() == 0)


async def test_a_coroutine_that_was_cancelled(wrap: Wrap) -> None:
    model = Model()
    embeddings = wrap(model)
    model.gates = [Gate()]
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil(lambda: len(model.requests) == 1)
    query.cancel()
    await asyncio.wait([query])
    del query
    await auntil(lambda: model.left() == 0)


def test_an_overdue_call_that_lost(manual: Manual) -> None:
    """It failed long after nobody waited for it."""
    model = Model()
    embeddings = manual(model)
    gate = Gate()
    model.gates = [gate]
    model.failing = 1
    embeddings.prefetch("q")
    worker = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    query = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    let_pass(embeddings, 3.05, lambda: len(model.requests) == 2)
    assert query.result() == [1.0]
    gate.open()
    worker.result()
    until(lambda: model.left() == 0)


async def test_an_overdue_call_that_was_cancelled(manual: Manual) -> None:
    model = Model()
    embeddings = manual(model)
    model.gates = [Gate()]
    await embeddings.aprefetch("q")
    query = asyncio.create_task(embeddings.aembed_query("q"))
    await auntil_joined(embeddings)
    await alet_pass(embeddings, 3.05, lambda: len(model.requests) == 2)
    assert await query == [1.0]
    del query
    await auntil(lambda: model.left() == 0)


def test_a_thread_and_a_loop_that_failed_together(wrap: Wrap) -> None:
    model = Model()
    embeddings = wrap(model)
    on = OnItsLoop()
    gate = Gate()
    model.gates = [gate]
    model.failing = 20
    leader = on.start(afail(embeddings.aembed_query))
    gate.wait_until_entered()
    follower = Call(lambda: fail(embeddings.embed_query))
    until_joined(embeddings)
    gate.open()
    leader.result(30.0)
    follower.result()
    del leader
    on.run(asyncio.sleep(0))
    until(lambda: model.left() == 0)
    on.close()


# Contexts.

speaker: contextvars.ContextVar[Request | None] = contextvars.ContextVar("speaker", default=None)


def within(call: Callable[[], Any]) -> tuple[Any, weakref.ref[Request]]:
    """Make a call in a context that holds something; return both."""
    context = contextvars.copy_context()
    request = Request()
    context.run(speaker.set, request)
    return context.run(call), weakref.ref(request)


@pytest.mark.parametrize("hedge", [None, Hedge(after=60.0)])
@pytest.mark.parametrize("fails", [False, True])
def test_a_queries_context(wrap: Wrap, hedge: Hedge | None, fails: bool) -> None:
    """Not even a timer keeps it that is due in a minute."""
    model = Model()
    embeddings = wrap(model, hedge=hedge)
    model.failing = int(fails)
    call = (lambda: fail(embeddings.embed_query)) if fails else lambda: embeddings.embed_query("q")
    _, held = within(call)
    until(lambda: held() is None)


@pytest.mark.parametrize("hedge", [None, Hedge(after=60.0)])
@pytest.mark.parametrize("ends", ["succeeds", "fails", "is forgotten", "is cleared", "is claimed"])
def test_a_prefetchs_context(manual: Manual, hedge: Hedge | None, ends: str) -> None:
    model = Model()
    embeddings = manual(model, hedge=hedge, attempts=1)
    model.failing = int(ends == "fails")
    _, held = within(lambda: embeddings.prefetch("q"))
    assert held() is not None, "the worker is to see it"
    if ends == "is forgotten":
        embeddings.forget("q")
    elif ends == "is cleared":
        embeddings.clear()
    elif ends == "is claimed":
        embeddings.embed_query("q")
    embeddings.executor.run_all()
    until(lambda: held() is None)


def test_a_joined_prefetchs_context(manual: Manual) -> None:
    """Somebody waited for it, so that a second call was being thought of."""
    model = Model()
    embeddings = manual(model, hedge=Hedge(after=60.0))
    gate = Gate()
    model.gates = [gate]
    _, held = within(lambda: embeddings.prefetch("q"))
    worker = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    query, waiting = within(lambda: Call(embeddings.embed_query, "q"))
    until_joined(embeddings)
    gate.open()
    worker.result()
    assert query.result() == [1.0]
    del query, worker
    until(lambda: held() is None)
    until(lambda: waiting() is None)


def test_a_prefetchs_context_that_waited_too_long(manual: Manual) -> None:
    model = Model()
    embeddings = manual(model, ttl=10.0)
    _, held = within(lambda: embeddings.prefetch("q"))
    embeddings.time.advance(10.5)
    embeddings.executor.run_all()
    until(lambda: held() is None)


def test_a_closed_wrapper_holds_no_context(wrap: Wrap) -> None:
    model = Model()
    embeddings = wrap(model, max_workers=1)
    gate = Gate()
    model.gates = [gate]
    embeddings.prefetch("hanging")
    gate.wait_until_entered()
    _, held = within(lambda: embeddings.prefetch("q"))
    embeddings.close()
    until(lambda: held() is None)
    gate.open()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_coroutines_context(wrap: Wrap, fails: bool) -> None:
    model = Model()
    embeddings = wrap(model, hedge=Hedge(after=60.0))
    model.failing = int(fails)
    call = afail(embeddings.aembed_query) if fails else embeddings.aembed_query("q")
    task, held = within(lambda: asyncio.create_task(call))
    await task
    del task, call
    await auntil(lambda: held() is None)


# Cycles.


def unreachable(call: Callable[[], None], times: int) -> int:
    """Return how many objects the collector finds after so many calls."""
    gc.collect()
    for _ in range(times):
        call()
    return gc.collect()


@pytest.mark.parametrize("what", ["fails", "misses", "prefetches", "prefetch fails"])
def test_the_collector_finds_no_more_after_more_of_it(manual: Manual, what: str) -> None:
    model = Model()
    embeddings = manual(model, attempts=1, max_entries=4)
    number = 0

    def call() -> None:
        nonlocal number
        number += 1
        text = f"q {number}"
        if what == "fails":
            model.failing = 1
            fail(embeddings.embed_query, text)
        elif what == "misses":
            embeddings.embed_query(text)
        else:
            model.failing = int(what == "prefetch fails" and number % 2)
            embeddings.prefetch(text)
            embeddings.executor.run_all()
            if model.failing != 0:
                embeddings.embed_query(text)

    unreachable(call, 20)
    few, many = unreachable(call, 10), unreachable(call, 210)
    assert many - few < 50, f"{(many - few) / 200:.1f} objects each go by the collector alone"


def test_the_collector_finds_nothing_of_failed_coroutines() -> None:
    """Beside what asyncio itself leaves: the same loop with the bare model."""

    def left(function_of: Callable[[Model], Any]) -> int:
        model = Model()
        function = function_of(model)

        async def turns(times: int) -> int:
            for _ in range(times):
                model.failing = 1
                await afail(function)
            await asyncio.sleep(0.01)
            return gc.collect()

        async def main() -> int:
            await turns(20)
            return -await turns(10) + await turns(210)

        return asyncio.run(main())

    bare = left(lambda model: model.aembed_query)
    wrapped = left(lambda model: PrefetchingEmbeddings(model).aembed_query)
    assert wrapped - bare < 50, f"{(wrapped - bare) / 200:.1f} objects each"


def test_a_wrapper_that_is_dropped_lets_go_of_its_model() -> None:
    """Also unclosed, and with a timer due in a minute, and idle workers."""
    model = Model()
    embeddings = PrefetchingEmbeddings(model, hedge=Hedge(after=60.0), attempts=1)
    held = weakref.ref(model)
    embeddings.embed_query("q")
    model.failing = 1
    embeddings.prefetch("fails")
    embeddings.prefetch("r")
    embeddings.wait_for_prefetch("r", 30.0)
    embeddings.wait_for_prefetch("fails", 30.0)
    del model, embeddings

    def collected() -> bool:
        gc.collect()
        return held() is None

    until(collected)


# Weight.


def kept_lists(length: int) -> int:
    """Return how many sequences of that length the collector has to walk over."""
    gc.collect()
    gc.collect()  # a tuple is taken off its books when it has been looked at
    return sum(isinstance(each, list | tuple) and len(each) == length for each in gc.get_objects())


@pytest.mark.parametrize("how", ["prefetched", "missed", "in a worker", "on a loop", "batch"])
def test_kept_vectors_weigh_nothing_on_the_collector(how: str) -> None:
    length = 1531

    class Long(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [self.embed_query(text) for text in texts]

        def embed_query(self, text: str) -> list[float]:
            return [float(number) for number in range(length)]

        async def aembed_query(self, text: str) -> list[float]:
            return self.embed_query(text)

    kept = 100
    texts = [f"q {number}" for number in range(kept)]
    if how == "prefetched":
        embeddings: PrefetchingEmbeddings = ManualPrefetchingEmbeddings(Long())
        for text in texts:
            embeddings.prefetch(text)
        assert isinstance(embeddings, ManualPrefetchingEmbeddings)
        embeddings.executor.run_all()
    else:
        embeddings = PrefetchingEmbeddings(Long(), symmetric=True)
        if how == "missed":
            for text in texts:
                embeddings.embed_query(text)
        elif how == "in a worker":
            for text in texts:
                embeddings.prefetch(text)
        elif how == "batch":
            embeddings.prefetch_many(texts)
        else:

            async def prefetch_all() -> None:
                for text in texts:
                    await embeddings.aprefetch(text)
                for text in texts:
                    await embeddings.aembed_query(text)

            asyncio.run(prefetch_all())
    until(lambda: all(embeddings.is_ready(text) for text in texts))
    threading.Event().wait(0.05)
    assert kept_lists(length) == 0
    assert embeddings.embed_query("q 1") == [float(number) for number in range(length)]
    embeddings.close()
    assert_no_leaks(embeddings)


def test_a_kept_vector_costs_the_collector_a_few_objects_at_the_most() -> None:
    class Long(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            raise NotImplementedError

        def embed_query(self, text: str) -> list[float]:
            return [0.5] * 1531

    embeddings = PrefetchingEmbeddings(Long(), max_entries=5000)
    for number in range(500):
        embeddings.embed_query(f"q {number}")
    gc.collect()
    before = len(gc.get_objects())
    for number in range(2000):
        embeddings.embed_query(f"r {number}")
    gc.collect()
    each = (len(gc.get_objects()) - before) / 2000
    assert each < 6, f"{each:.1f} objects are walked over for each kept vector"
    embeddings.close()
