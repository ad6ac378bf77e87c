"""What the model's call sees and may do: context, call-backs, any exception at all."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import PATIENCE, Call, auntil, until

# What is raised in a worker to end it is told of by `threading.excepthook`, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")


class Tracing(Embeddings):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def embed_query(self, text: str) -> list[float]:
        self.seen.append(trace.get())
        trace.set("the model's")
        return [1.0]

    async def aembed_query(self, text: str) -> list[float]:
        return self.embed_query(text)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


async def test_worker_sees_the_context_of_the_prefetch(wrap: Wrap) -> None:
    model = Tracing()
    embeddings = wrap(model, symmetric=True)
    trace.set("a")
    embeddings.prefetch("a")
    trace.set("b")
    embeddings.prefetch_many(["b"])
    trace.set("c")
    await embeddings.aprefetch("c")
    trace.set("later")
    await auntil(lambda: len(model.seen) == 3)
    assert sorted(model.seen) == ["a", "b", "c"]
    assert trace.get() == "later", "the model's context leaked into the caller's"


class CallingBack(Embeddings):
    """Asks the wrapper for another text while it embeds one."""

    def __init__(self, *asks: tuple[str, str]) -> None:
        self.asks = dict(asks)
        self.outer: PrefetchingEmbeddings

    def embed_query(self, text: str) -> list[float]:
        return self.outer.embed_query(self.asks[text]) if text in self.asks else [1.0]

    async def aembed_query(self, text: str) -> list[float]:
        return await self.outer.aembed_query(self.asks[text]) if text in self.asks else [1.0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.mark.parametrize("asks", [[("a", "a")], [("a", "b"), ("b", "c"), ("c", "a")]], ids=str)
async def test_asking_for_the_text_that_is_being_embedded_is_an_error(
    wrap: Wrap, asks: list[tuple[str, str]]
) -> None:
    model = CallingBack(*asks)
    model.outer = embeddings = wrap(model, attempts=1)
    assert isinstance(Call(embeddings.embed_query, "a").error(), RuntimeError)
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(embeddings.aembed_query("a"), 30)
    embeddings.prefetch("a")
    assert embeddings.wait_for_prefetch("a", timeout=30) is False
    assert await embeddings.aembed_query("other") == [1.0]


def test_two_flights_that_wait_for_each_other_fail(wrap: Wrap) -> None:
    # Each runs in a thread of its own, and asks for the other's text.
    model = CallingBack(("a", "b"), ("b", "a"))
    model.outer = embeddings = wrap(model, attempts=1)
    embeddings.prefetch("a")
    embeddings.prefetch("b")
    assert embeddings.wait_for_prefetch("a", timeout=30) is False
    assert embeddings.wait_for_prefetch("b", timeout=30) is False


def test_asking_for_another_text_of_the_same_batch_fails_it(wrap: Wrap) -> None:
    model = CallingBack(("a", "b"))
    model.outer = embeddings = wrap(model, attempts=1, symmetric=True)
    embeddings.prefetch_many(["a", "b"])
    assert embeddings.wait_for_prefetch("b", timeout=30) is False
    assert embeddings.embed_query("a") == [1.0]


def test_a_wrapper_of_a_wrapper_is_no_ring(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(wrap(model))
    embeddings.prefetch("q")
    assert embeddings.embed_query("q") == model.vector("q")
    assert model.calls_for("q") == 1


@pytest.mark.parametrize(
    "error",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(),
     CancelledError(), StopIteration()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_worker_raises_completes_its_flight(
    wrap: Wrap, model: ScriptedEmbeddings, error: BaseException
) -> None:
    embeddings = wrap(model, max_workers=1, attempts=1)
    gate = model.hold("q")
    model.fail("q", error)
    embeddings.prefetch("q")
    gate.wait_until_entered()
    waiting = Call(embeddings.wait_for_prefetch, "q")
    gate.open()
    assert waiting.result() is False
    assert embeddings.embed_query("q") == model.vector("q")
    embeddings.prefetch("next")
    assert embeddings.wait_for_prefetch("next", timeout=30), "the worker died of it"


@pytest.mark.parametrize(
    "error",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_a_worker_raises_completes_every_flight_of_its_batch(
    wrap: Wrap, model: ScriptedEmbeddings, error: BaseException
) -> None:
    embeddings = wrap(model, max_workers=1, symmetric=True)
    gate = model.hold("a")
    model.fail("a", error)
    embeddings.prefetch_many(list("abcde"))
    gate.wait_until_entered()
    thread = Call(embeddings.embed_query, "a")
    coroutine = asyncio.create_task(embeddings.aembed_query("b"))
    waiting = Call(embeddings.wait_for_prefetch, "c")
    awaiting = asyncio.create_task(embeddings.await_for_prefetch("d"))
    await auntil(lambda: [embeddings.prefetcher.waiters(text) for text in "abcd"] == [1] * 4)
    gate.open()
    assert await asyncio.wait_for(coroutine, PATIENCE) == model.vector("b")
    assert await asyncio.wait_for(awaiting, PATIENCE) is False
    assert thread.result() == model.vector("a")
    assert waiting.result() is False
    await auntil(lambda: embeddings.stats().prefetch_failed == 5)  # also the one nobody awaits
    stats = embeddings.stats()
    assert (stats.query_joined, stats.query_recovered, stats.prefetch_failed) == (2, 2, 5)
    embeddings.prefetch_many(["e", "next"])
    for text in ("e", "next"):
        waited = await asyncio.to_thread(embeddings.wait_for_prefetch, text, PATIENCE)
        assert waited, "the worker died of it"


@pytest.mark.parametrize("error", [GeneratorExit(), asyncio.CancelledError()], ids=repr)
async def test_whatever_an_async_model_raises_completes_its_flight(
    wrap: Wrap, model: ScriptedEmbeddings, error: BaseException
) -> None:
    embeddings = wrap(model, attempts=1)
    gate = model.hold("q")
    model.fail("q", error)
    await embeddings.aprefetch("q")
    await gate.await_until_entered()
    query = asyncio.create_task(embeddings.aembed_query("q"))
    gate.open()
    assert await asyncio.wait_for(query, 30) == model.vector("q")


async def test_a_model_that_cancels_itself_fails_its_own_query_only(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    model.fail("q", asyncio.CancelledError())
    leader = asyncio.create_task(embeddings.aembed_query("q"))
    await gate.await_until_entered()
    follower = asyncio.create_task(embeddings.aembed_query("q"))
    await asyncio.sleep(0)
    gate.open()
    assert await asyncio.wait_for(follower, 30) == model.vector("q")
    with pytest.raises(asyncio.CancelledError):
        await leader


def test_an_interrupted_query_does_not_interrupt_those_who_joined_it(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    model.fail("q", KeyboardInterrupt())
    interrupted = Call(embeddings.embed_query, "q")
    gate.wait_until_entered()
    joined = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.stats().query_joined == 1)
    gate.open()
    assert isinstance(interrupted.error(), KeyboardInterrupt)
    assert joined.result() == model.vector("q")


def test_a_batch_with_too_few_vectors_fails(manual: Manual) -> None:
    class Lossy(ScriptedEmbeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return super().embed_documents(texts)[1:]

    embeddings = manual(Lossy(), symmetric=True, attempts=1)
    embeddings.prefetch_many(["a", "b"])
    embeddings.executor.run_all()
    assert embeddings.stats().prefetch_failed == 2
    assert not embeddings.is_ready("a")
