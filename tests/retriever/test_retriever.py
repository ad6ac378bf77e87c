"""`PrefetchingRetriever` as its users meet it: configs, copies, owners of documents, two levels."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import PrivateAttr

from prefetch_embeddings import (
    MissReason,
    PrefetchEvent,
    PrefetchingEmbeddings,
    PrefetchingRetriever,
    PrefetchOutcome,
    UtterancePrefetcher,
    prefetch_tap,
)
from prefetch_embeddings.testing import (
    ManualPrefetchingRetriever,
    ScriptedEmbeddings,
    ScriptedRetriever,
    assert_no_leaks,
)
from tests.helpers import PATIENCE, Call, auntil, until

STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome

Wrap = Callable[..., PrefetchingRetriever]
Manual = Callable[..., ManualPrefetchingRetriever]


@pytest.fixture
def scripted() -> ScriptedRetriever:
    return ScriptedRetriever()


@pytest.fixture
def wrap() -> Iterator[Wrap]:
    made: list[PrefetchingRetriever] = []

    def make(retriever: Any, **options: Any) -> PrefetchingRetriever:
        made.append(PrefetchingRetriever(retriever, **options))
        return made[-1]

    yield make
    for retriever in made:
        retriever.close()
        assert_no_leaks(retriever)


@pytest.fixture
def manual() -> Iterator[Manual]:
    made: list[ManualPrefetchingRetriever] = []

    def make(retriever: Any, **options: Any) -> ManualPrefetchingRetriever:
        made.append(ManualPrefetchingRetriever(retriever, **options))
        return made[-1]

    yield make
    for retriever in made:
        retriever.close()
        assert_no_leaks(retriever)


def configured(**configurable: Any) -> RunnableConfig:
    return RunnableConfig(configurable=configurable)


# --- Finding what was prefetched -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["sync", "async"])
async def test_a_prefetch_is_found(wrap: Wrap, scripted: ScriptedRetriever, how: str) -> None:
    retriever = wrap(scripted)
    if how == "sync":
        assert retriever.prefetch("q") is STARTED
        assert retriever.wait_for_prefetch("q")
        found = retriever.invoke("q")
    else:
        assert await retriever.aprefetch("q") is STARTED
        assert await retriever.await_for_prefetch("q")
        found = await retriever.ainvoke("q")
    assert found == scripted.documents("q")
    assert retriever.prefetch("q") is READY
    assert retriever.is_ready("q")
    assert retriever.expected_wait("q") == 0.0
    assert scripted.calls_for("q") == 1
    stats = retriever.stats()
    assert (stats.query_ready, stats.prefetch_used) == (1, 1)


async def test_a_thread_and_a_coroutine_join_one_search(
    wrap: Wrap, scripted: ScriptedRetriever
) -> None:
    retriever = wrap(scripted)
    gate = scripted.hold("q")
    retriever.prefetch("q")
    await gate.await_until_entered()
    in_thread = Call(retriever.invoke, "q")
    on_loop = asyncio.create_task(retriever.ainvoke("q"))
    await auntil(lambda: retriever.stats().query_joined == 2)
    gate.open()
    assert await on_loop == in_thread.result() == scripted.documents("q")
    assert scripted.calls_for("q") == 1


def test_several_at_once(manual: Manual, scripted: ScriptedRetriever) -> None:
    retriever = manual(scripted)
    assert retriever.prefetch_many(["a", "b", "a"]) == [STARTED, STARTED, IN_FLIGHT]
    assert retriever.executor.run_all() == 2
    assert retriever.batch(["a", "b"]) == [scripted.documents("a"), scripted.documents("b")]
    assert [len(scripted.calls_for(text) * "x") for text in "ab"] == [1, 1]
    for texts in ("ab", ["c", 1]):
        with pytest.raises(TypeError):
            retriever.prefetch_many(texts)  # type: ignore[arg-type]
    assert retriever.stats().prefetch_started == 2


def test_documents_live_for_ttl(manual: Manual, scripted: ScriptedRetriever) -> None:
    retriever = manual(scripted)
    retriever.prefetch("q")
    retriever.executor.run_all()
    retriever.time.advance(59.0)
    assert retriever.is_ready("q")
    retriever.time.advance(1.0)
    assert not retriever.is_ready("q")


def test_match_decides_what_is_the_same(manual: Manual, scripted: ScriptedRetriever) -> None:
    retriever = manual(scripted, match=str.casefold)
    retriever.prefetch("Q")
    retriever.executor.run_all()
    assert retriever.invoke("q") == scripted.documents("Q")
    assert retriever.stats().query_matched == 1


def test_forgetting_and_clearing(manual: Manual, scripted: ScriptedRetriever) -> None:
    retriever = manual(scripted)
    config = configured(tenant="a")
    retriever.prefetch("q", config)
    retriever.prefetch("q")
    assert retriever.forget("q", config)
    assert not retriever.forget("q", config)
    retriever.executor.run_all()
    assert retriever.is_ready("q")
    retriever.clear()
    assert not retriever.is_ready("q")


def test_a_failed_prefetch_never_reaches_a_query(wrap: Wrap, scripted: ScriptedRetriever) -> None:
    retriever = wrap(scripted, attempts=1)
    gate = scripted.hold("q")
    scripted.fail("q", ConnectionError("of the prefetch"))
    retriever.prefetch("q")
    gate.wait_until_entered()
    query = Call(retriever.invoke, "q")
    until(lambda: retriever.stats().query_joined == 1)
    gate.open()
    assert query.result() == scripted.documents("q")
    assert retriever.stats().query_recovered == 1


# --- Configs -------------------------------------------------------------------------------------

SAME_AND_OTHER = [
    ({"tenant": "a"}, {"tenant": "b"}),
    ({"tenant": "a"}, {}),
    ({}, {"tenant": "a"}),
    ({"search_kwargs": {"k": 4}}, {"search_kwargs": {"k": 5}}),
    ({"k": 1}, {"k": True}),
    ({"tags": ["a", "b"]}, {"tags": ["b", "a"]}),
    ({"deep": {"list": [{"x": 1}]}}, {"deep": {"list": [{"x": 2}]}}),
]


@pytest.mark.parametrize(("prefetched", "asked"), SAME_AND_OTHER)
def test_another_configurable_is_another_question(
    manual: Manual, scripted: ScriptedRetriever, prefetched: dict[str, Any], asked: dict[str, Any]
) -> None:
    retriever = manual(scripted)
    retriever.prefetch("q", configured(**prefetched))
    retriever.executor.run_all()
    retriever.invoke("q", configured(**asked))
    assert scripted.calls_for("q") == 2
    retriever.invoke("q", configured(**copy.deepcopy(prefetched)))
    assert scripted.calls_for("q") == 2
    assert retriever.stats().query_ready == 1


def test_what_parts_two_configs_may_have_no_hash(
    manual: Manual, scripted: ScriptedRetriever
) -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

    one, other = Unhashable(), Unhashable()
    retriever = manual(scripted)
    retriever.prefetch("q", configured(user=one))
    retriever.executor.run_all()
    assert retriever.is_ready("q", configured(user=one))
    assert not retriever.is_ready("q", configured(user=other))


def test_what_a_graph_writes_down_for_itself_parts_nothing(
    manual: Manual, scripted: ScriptedRetriever
) -> None:
    retriever = manual(scripted)
    retriever.prefetch("q", configured(thread_id="1", __pregel_task_id="a", checkpoint_ns="x:1"))
    retriever.executor.run_all()
    asked = configured(thread_id="1", __pregel_task_id="b", checkpoint_ns="y:2")
    assert retriever.invoke("q", asked) == scripted.documents("q")
    assert retriever.stats().query_ready == 1


def test_the_config_of_the_current_run_counts(manual: Manual, scripted: ScriptedRetriever) -> None:
    retriever = manual(scripted)

    def step(text: str) -> list[Document]:
        retriever.prefetch(text)  # within a run that has a tenant
        retriever.executor.run_all()
        return retriever.invoke(text)

    RunnableLambda(step).invoke("q", configured(tenant="a"))
    assert scripted.calls_for("q") == 1
    assert retriever.is_ready("q", configured(tenant="a"))
    assert not retriever.is_ready("q")


def test_a_miss_for_the_configs_sake_is_explained(
    manual: Manual, scripted: ScriptedRetriever
) -> None:
    retriever = manual(scripted)
    retriever.prefetch("q", configured(tenant="a"))
    retriever.executor.run_all()
    miss = retriever.explain_miss("q", configured(tenant="b"))
    assert miss is not None
    assert miss.reason is MissReason.CONFIG
    assert retriever.explain_miss("q", configured(tenant="a")) is None


class Counted(BaseRetriever):
    """Takes a number of documents besides, as old retrievers do."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int = 1
    ) -> list[Document]:
        return [Document(query)] * k


async def test_further_arguments_go_past_the_map(wrap: Wrap) -> None:
    retriever = wrap(Counted())
    retriever.prefetch("q")
    assert retriever.wait_for_prefetch("q")
    assert len(retriever.invoke("q", k=3)) == 3
    assert len(retriever.bind(k=2).invoke("q")) == 2
    assert len(retriever.invoke("q")) == 1
    assert retriever.stats().query_ready == 1


# --- Documents are their owner's -----------------------------------------------------------------


def test_every_caller_owns_its_documents(wrap: Wrap, scripted: ScriptedRetriever) -> None:
    retriever = wrap(scripted)
    right = scripted.documents("q")
    for _ in range(3):  # missed, then ready
        found = retriever.invoke("q")
        assert found == right
        found[0].metadata["score"] = 1.0
        found[0].metadata["for"].append("a reranker")
        found[0].page_content = "changed"
        found.clear()


def test_what_the_retriever_keeps_is_its_own() -> None:
    kept = [Document("d", metadata={"list": [1]})]

    def search(_: str) -> list[Document]:
        return kept

    with PrefetchingRetriever(RunnableLambda(search)) as retriever:
        retriever.invoke("q")[0].metadata["list"].append(2)
        kept[0].metadata["list"].append(3)
        assert retriever.invoke("q")[0].metadata == {"list": [1]}


def test_metadata_that_cannot_be_copied_is_shared() -> None:
    lock = threading.Lock()

    def search(_: str) -> list[Document]:
        return [Document("d", metadata={"lock": lock})]

    with PrefetchingRetriever(RunnableLambda(search)) as retriever:
        found = retriever.invoke("q")[0]
        assert found.metadata == {"lock": lock}
        found.metadata["mine"] = 1
        assert retriever.invoke("q")[0].metadata == {"lock": lock}


def test_documents_of_a_class_of_ones_own_stay_that() -> None:
    class Passage(Document):
        page: int = 0

    def search(_: str) -> list[Document]:
        return [Passage(page_content="d", page=7, id="x")]

    with PrefetchingRetriever(RunnableLambda(search)) as retriever:
        (found,) = retriever.invoke("q")
        assert isinstance(found, Passage)
        assert (found.page, found.id) == (7, "x")


@pytest.mark.parametrize("answer", ["text", [1, 2], None, {"documents": []}])
def test_an_answer_that_is_no_documents_is_an_error(answer: Any) -> None:
    with (
        PrefetchingRetriever(RunnableLambda(lambda _: answer)) as retriever,
        pytest.raises(TypeError, match="underlying_retriever must answer with a list of Document"),
    ):
        retriever.invoke("q")


# --- Two levels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sync", "async"])
async def test_two_levels_make_one_call_to_the_model(wrap: Wrap, how: str) -> None:
    model = ScriptedEmbeddings()
    with PrefetchingEmbeddings(model) as embeddings:
        store = InMemoryVectorStore.from_texts(["a", "b"], embeddings)
        retriever = wrap(store.as_retriever(search_kwargs={"k": 1}))
        if how == "sync":
            retriever.prefetch("q")
            assert retriever.wait_for_prefetch("q")
            retriever.invoke("q")
            assert embeddings.embed_query("q") == model.vector("q")  # another store asks
        else:
            await retriever.aprefetch("q")
            assert await retriever.await_for_prefetch("q")
            await retriever.ainvoke("q")
            assert await embeddings.aembed_query("q") == model.vector("q")
        assert model.calls_for("q") == 1
    assert_no_leaks(embeddings)


def test_a_prefetched_embedding_serves_the_retrieval(wrap: Wrap) -> None:
    model = ScriptedEmbeddings()
    with PrefetchingEmbeddings(model) as embeddings:
        retriever = wrap(InMemoryVectorStore.from_texts(["a"], embeddings).as_retriever())
        embeddings.prefetch("q")
        retriever.invoke("q")
        assert model.calls_for("q") == 1


def test_speech_and_tap_take_a_retriever(manual: Manual, scripted: ScriptedRetriever) -> None:
    retriever = manual(scripted)
    speech = UtterancePrefetcher(retriever, debounce=0.0, min_words=1)
    speech.on_partial("how much")
    retriever.time.advance(1.0)
    speech.on_final("how much is it")
    retriever.executor.run_all()
    assert retriever.is_ready("how much is it")
    assert prefetch_tap(retriever).invoke("and that") == "and that"
    retriever.executor.run_all()
    assert retriever.is_ready("and that")
    speech.reset()


def test_events_say_what_they_are_of(manual: Manual, scripted: ScriptedRetriever) -> None:
    events: list[PrefetchEvent] = []
    retriever = manual(scripted, on_event=events.append)
    retriever.prefetch("q")
    retriever.executor.run_all()
    retriever.invoke("q")
    assert [type(event).__name__ for event in events] == [
        "PrefetchStarted",
        "PrefetchSucceeded",
        "QueryServed",
    ]
    assert {event.kind for event in events} == {"retrieval"}


# --- Many at once, and nobody any more -----------------------------------------------------------


async def test_a_thousand_queries_on_a_loop_hold_no_thread(
    wrap: Wrap, scripted: ScriptedRetriever
) -> None:
    retriever = wrap(scripted)
    gates = [scripted.hold(str(n)) for n in range(1000)]
    before = threading.active_count()
    queries = [asyncio.create_task(retriever.ainvoke(str(n))) for n in range(1000)]
    await auntil(lambda: len(scripted.calls) == 1000)
    assert threading.active_count() == before
    for gate in gates:
        gate.open()
    assert await asyncio.gather(*queries) == [scripted.documents(str(n)) for n in range(1000)]


@pytest.mark.parametrize("when", ["at once", "under way", "joined"])
async def test_a_query_that_was_hung_up_on_leaves_nothing_running(wrap: Wrap, when: str) -> None:
    running: set[str] = set()

    async def search(text: str) -> list[Document]:
        running.add(text)
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            running.remove(text)
        return []

    def in_a_thread(_: str) -> list[Document]:
        raise AssertionError("it has an async side")

    retriever = wrap(RunnableLambda(in_a_thread, afunc=search))
    queries = [asyncio.create_task(retriever.ainvoke("q")) for _ in range(2)]
    if when != "at once":
        await auntil(lambda: running)
    if when == "joined":
        await auntil(lambda: retriever.stats().query_joined == 1)
    for query in queries:
        query.cancel()
    await asyncio.gather(*queries, return_exceptions=True)
    await auntil(lambda: not running)
    assert retriever.prefetcher.leaks() == []


# --- A drop-in -----------------------------------------------------------------------------------


class Cached(ScriptedRetriever):
    """Puts a cache in the place of the sync side alone, as teams do."""

    _cache: dict[str, list[Document]] = PrivateAttr(default_factory=dict)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        if query not in self._cache:
            self._cache[query] = super()._get_relevant_documents(query, run_manager=run_manager)
        return self._cache[query]


async def test_a_cached_subclass_is_not_gone_around(wrap: Wrap) -> None:
    cached = Cached()
    retriever = wrap(cached, ttl=0.001)
    for _ in range(2):
        assert await retriever.ainvoke("q") == cached.documents("q")
        retriever.clear()
    assert [method for method, _ in cached.calls] == ["invoke"]


def test_names_of_the_retriever_are_there() -> None:
    store = InMemoryVectorStore(ScriptedEmbeddings())
    with PrefetchingRetriever(store.as_retriever(search_kwargs={"k": 3})) as retriever:
        anything: Any = retriever
        assert anything.vectorstore is store
        assert anything.search_kwargs == {"k": 3}
        assert not hasattr(retriever, "base_compressor")
        assert not hasattr(retriever, "prefetched")


def make_store() -> Runnable[str, list[Document]]:
    return InMemoryVectorStore.from_texts(["a", "b"], ScriptedEmbeddings()).as_retriever(
        search_kwargs={"k": 1}
    )


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_copies_have_the_settings_and_an_empty_map(how: str) -> None:
    retriever = PrefetchingRetriever(
        Counted(tags=["inner"]), ttl=7.0, match=str.casefold, name="mine", tags=["t"]
    )
    retriever.invoke("q")
    made: PrefetchingRetriever
    if how == "pickle":
        made = pickle.loads(pickle.dumps(retriever))
    else:
        made = getattr(copy, how)(retriever)
    assert (made.ttl, made.name, made.tags) == (7.0, "mine", ["t"])
    assert made.match is str.casefold or made.match == str.casefold
    assert (made.underlying_retriever is retriever.underlying_retriever) is (how == "copy")
    assert not made.is_ready("q")
    assert made.invoke("q") == retriever.invoke("q")
    for each in (made, retriever):
        each.close()


WRONG: list[tuple[Any, str]] = [
    (None, "not None"),
    ("chroma", "not a str"),
    (ScriptedEmbeddings(), "PrefetchingEmbeddings"),
    (InMemoryVectorStore(ScriptedEmbeddings()), "as_retriever"),
    (ScriptedRetriever, "not the class ScriptedRetriever"),
    (lambda _: [], "not a function"),
]


@pytest.mark.parametrize(("thing", "hint"), WRONG)
def test_what_is_no_retriever_is_refused(thing: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=f"underlying_retriever .*{hint}"):
        PrefetchingRetriever(thing)


def test_a_prefetching_retriever_is_not_wrapped_again(wrap: Wrap) -> None:
    with pytest.raises(TypeError, match="already"):
        PrefetchingRetriever(wrap(ScriptedRetriever()))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ttl": 0}, ValueError),
        ({"ttl": "60"}, TypeError),
        ({"max_entries": 0}, ValueError),
        ({"max_workers": 1.5}, TypeError),
        ({"hedge": True}, TypeError),
        ({"match": "casefold"}, TypeError),
        ({"on_event": 1}, TypeError),
    ],
)
def test_a_wrong_setting_is_named(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        PrefetchingRetriever(ScriptedRetriever(), **options)


def test_a_query_that_is_no_text_is_refused(wrap: Wrap, scripted: ScriptedRetriever) -> None:
    retriever = wrap(scripted)
    with pytest.raises(TypeError, match="text must be a str"):
        retriever.invoke(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text must be a str"):
        retriever.prefetch(b"q")  # type: ignore[arg-type]


def test_a_retriever_that_asks_for_its_own_text_is_told(wrap: Wrap) -> None:
    outer: list[PrefetchingRetriever] = []

    def search(text: str) -> list[Document]:
        return outer[0].invoke(text)

    outer.append(wrap(RunnableLambda(search)))
    with pytest.raises(RuntimeError):
        outer[0].invoke("q")


def test_after_close_queries_work_on(scripted: ScriptedRetriever) -> None:
    retriever = PrefetchingRetriever(scripted)
    retriever.close()
    assert retriever.prefetch("q") is DROPPED
    assert retriever.invoke("q") == scripted.documents("q")


def test_late_signs_are_told_once_and_explained(
    manual: Manual, scripted: ScriptedRetriever, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = manual(scripted, max_workers=1, max_pending=1)
    assert [retriever.prefetch(text) for text in "abc"] == [STARTED, STARTED, DROPPED]
    miss = retriever.explain_miss("c")
    assert miss is not None
    assert miss.reason is MissReason.DROPPED
    retriever.close()
    for text in "de":
        assert retriever.prefetch(text) is DROPPED
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage() for record in warned] == [
        "prefetch after close: every prefetch of this wrapper is dropped"
    ]
    miss = retriever.explain_miss("d")
    assert miss is not None
    assert miss.reason is MissReason.CLOSED
