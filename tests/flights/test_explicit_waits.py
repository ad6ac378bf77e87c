"""Explicit waits: who runs what is still queued, and in which context."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchEvent, PrefetchFailed, PrefetchingEmbeddings
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import PATIENCE, Call, SyncSideOnly, auntil

# What is raised in a worker to end it is told of by `threading.excepthook`, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="nobody")


class NotingCallers(ScriptedEmbeddings):
    """Notes for whom it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    def embed_query(self, text: str) -> list[float]:
        self.callers.append(caller.get())
        return super().embed_query(text)

    async def aembed_query(self, text: str) -> list[float]:
        self.callers.append(caller.get())
        return await super().aembed_query(text)


@pytest.fixture
def noting(manual: Manual) -> tuple[ManualPrefetchingEmbeddings, NotingCallers]:
    """A wrapper with one prefetch queued, made by "the prefetch's caller"."""
    model = NotingCallers()
    embeddings = manual(model)
    context = contextvars.copy_context()
    context.run(caller.set, "the prefetch's caller")
    context.run(embeddings.prefetch, "q")
    return embeddings, model


def test_a_thread_has_it_run_in_the_context_of_the_prefetch(
    noting: tuple[ManualPrefetchingEmbeddings, NotingCallers],
) -> None:
    embeddings, model = noting
    assert embeddings.wait_for_prefetch("q")
    assert model.callers == ["the prefetch's caller"]


async def test_a_coroutine_has_it_run_in_the_context_of_the_prefetch(
    noting: tuple[ManualPrefetchingEmbeddings, NotingCallers],
) -> None:
    embeddings, model = noting
    assert await embeddings.await_for_prefetch("q", 60.0)
    assert model.callers == ["the prefetch's caller"]


def test_closing_lets_go_of_a_thread_that_had_it_run(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model, max_workers=1)
    gates = [model.hold("running"), model.hold("queued")]
    embeddings.prefetch("running")
    embeddings.prefetch("queued")
    wait = Call(embeddings.wait_for_prefetch, "queued")
    for gate in gates:
        gate.wait_until_entered()
    embeddings.close()
    assert wait.result() is False
    for gate in gates:
        gate.open()


def test_a_model_that_ends_the_thread_it_runs_in_ends_no_waiter(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    model.fail("q", SystemExit())
    embeddings.prefetch("q")
    assert embeddings.wait_for_prefetch("q") is False


async def test_with_a_timeout_a_model_that_needs_a_thread_is_left_to_the_workers(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(SyncSideOnly(model))
    embeddings.prefetch("q")
    assert await embeddings.await_for_prefetch("q", 0.001) is False
    assert not model.calls, "it would hold up the end of the loop"
    embeddings.executor.run_all()
    assert await embeddings.await_for_prefetch("q", 60.0)


class Caching(SyncSideOnly):
    """A tier with an async side of its own, in front of a model that may have none."""

    def __init__(self, underlying_embeddings: Embeddings) -> None:
        self.underlying_embeddings = underlying_embeddings

    def embed_query(self, text: str) -> list[float]:
        return self.underlying_embeddings.embed_query(text)

    async def aembed_query(self, text: str) -> list[float]:
        return await self.underlying_embeddings.aembed_query(text)


@pytest.mark.parametrize(
    ("tiers", "in_a_worker"),
    [
        (lambda model: model, False),
        (Caching, False),
        (SyncSideOnly, True),
        (lambda model: Caching(SyncSideOnly(model)), True),
        (lambda model: PrefetchingEmbeddings(SyncSideOnly(model)), True),
    ],
    ids=["model", "tier", "sync", "tier over sync", "wrapper over sync"],
)
async def test_aprefetch_takes_a_worker_where_anything_below_needs_a_thread(
    wrap: Wrap, tiers: Callable[[Embeddings], Embeddings], in_a_worker: bool
) -> None:
    threads: list[threading.Thread] = []

    class NotingThreads(ScriptedEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            threads.append(threading.current_thread())
            return super().embed_query(text)

        async def aembed_query(self, text: str) -> list[float]:
            threads.append(threading.current_thread())
            return await super().aembed_query(text)

    embeddings = wrap(tiers(NotingThreads()))
    await embeddings.aprefetch("q")
    assert await embeddings.await_for_prefetch("q", 60.0)
    [thread] = threads
    assert thread.name.startswith("prefetch-embeddings") == in_a_worker


async def test_it_runs_while_its_failed_attempt_is_still_leaving(wrap: Wrap) -> None:
    model = NotingCallers()
    failing, leaving = threading.Event(), threading.Event()

    def linger(event: PrefetchEvent) -> None:  # in the worker, in the context of the prefetch
        if isinstance(event, PrefetchFailed):
            failing.set()
            leaving.wait(PATIENCE)

    embeddings = wrap(model, on_event=linger)
    model.fail("q", ConnectionError())
    embeddings.prefetch("q")
    await auntil(failing.is_set)
    assert await embeddings.await_for_prefetch("q")
    leaving.set()
