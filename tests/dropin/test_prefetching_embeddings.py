"""Wrapped, a model does all that it did before, and a wrong set-up says so at once."""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome, match_spoken
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import PATIENCE, Call, until

Wrap = Callable[..., PrefetchingEmbeddings]

GOOD = [0.5] * 8
UNSOUND: dict[str, list[float]] = {
    "NaN": [math.nan] * 8,
    "one NaN": [math.nan, *GOOD[1:]],
    "infinite": [*GOOD[1:], -math.inf],
    "empty": [],
    "zeros": [0.0] * 8,
    "negative zeros": [-0.0] * 8,
    "length": [0.5] * 5,
}
EVERY_UNSOUND = pytest.mark.parametrize("bad", UNSOUND.values(), ids=UNSOUND)


class Answers(Embeddings):
    """A model that answers `question` once with a bad vector; sync, or on loops."""

    def __init__(self, bad: list[float]) -> None:
        self.bad = [bad]
        self.asked: list[str] = []

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        self.asked.append(text)
        return self.bad.pop() if text == "question" and self.bad else list(GOOD)


class AnswersOnLoops(Answers):
    async def aembed_query(self, text: str) -> list[float]:
        return self.embed_query(text)


# --- 21: unsound vectors -----------------------------------------------------------------------


@EVERY_UNSOUND
@pytest.mark.parametrize("prefetched", [False, True])
def test_an_unsound_vector_is_returned_as_it_is_and_not_kept(
    wrap: Wrap, bad: list[float], prefetched: bool
) -> None:
    embeddings = wrap(Answers(bad))
    embeddings.embed_query("earlier")  # tells the model's length
    if prefetched:
        embeddings.prefetch("question")
        embeddings.wait_for_prefetch("question", PATIENCE)
    else:
        assert repr(embeddings.embed_query("question")) == repr(bad)
    assert not embeddings.is_ready("question")
    assert embeddings.embed_query("question") == GOOD
    assert embeddings.is_ready("question")


@EVERY_UNSOUND
@pytest.mark.parametrize("model", [Answers, AnswersOnLoops])
async def test_nor_is_it_kept_by_coroutines(
    wrap: Wrap, bad: list[float], model: type[Answers]
) -> None:
    embeddings = wrap(model(bad))
    await embeddings.aembed_query("earlier")
    assert repr(await embeddings.aembed_query("question")) == repr(bad)
    assert not embeddings.is_ready("question")
    assert await embeddings.aembed_query("question") == GOOD


@EVERY_UNSOUND
def test_nor_out_of_one_call_for_many(wrap: Wrap, bad: list[float]) -> None:
    embeddings = wrap(Answers(bad), symmetric=True)
    embeddings.embed_query("earlier")
    embeddings.prefetch_many(["before", "question", "after"])
    for text in ("before", "after"):
        assert embeddings.wait_for_prefetch(text, PATIENCE)
    until(lambda: not embeddings.wait_for_prefetch("question", 0.0))
    assert not embeddings.is_ready("question")
    assert embeddings.embed_query("before") == embeddings.embed_query("after") == GOOD
    assert embeddings.embed_query("question") == GOOD


def test_a_query_that_joined_gets_what_the_model_answered(wrap: Wrap) -> None:
    class Held(ScriptedEmbeddings):
        def vector(self, text: str) -> list[float]:
            return [0.0] * 8

    model = Held()
    embeddings = wrap(model)
    gate = model.hold("question")
    embeddings.prefetch("question")
    gate.wait_until_entered()
    joined = [Call(embeddings.embed_query, "question") for _ in range(3)]
    until(lambda: embeddings.stats().query_joined == 3)
    gate.open()
    assert [call.result() for call in joined] == [[0.0] * 8] * 3
    assert model.calls_for("question") == 1


# --- 22: a drop-in -----------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda embeddings: pickle.loads(pickle.dumps(embeddings)),
}


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_settings_and_starts_empty(
    wrap: Wrap, way: Callable[[PrefetchingEmbeddings], PrefetchingEmbeddings]
) -> None:
    embeddings = wrap(Answers(GOOD), match=match_spoken, max_pending=7, symmetric=True)
    embeddings.prefetch("Known?")
    assert embeddings.wait_for_prefetch("Known?", PATIENCE)
    with way(embeddings) as other:
        embeddings.close()
        assert not other.is_ready("Known?")
        assert other.stats().prefetch_started == 0
        assert other.prefetch("A question?") is PrefetchOutcome.STARTED
        assert other.wait_for_prefetch("A question?", PATIENCE)
        assert other.embed_query("a question") == GOOD
        assert other.embed_documents(["a question"]) == [GOOD]
        assert other.stats().query_ready == 2
    assert embeddings.stats().prefetch_started == 1


def test_a_deep_copy_has_a_model_of_its_own(wrap: Wrap) -> None:
    embeddings = wrap(Answers(GOOD))
    with copy.deepcopy(embeddings) as other:
        other.embed_query("question")
        assert isinstance(embeddings.underlying_embeddings, Answers)
        assert embeddings.underlying_embeddings.asked == []


def test_the_names_that_stores_look_for(wrap: Wrap) -> None:
    class OfImages(Answers):
        model = "clip"

        def embed_image(self, uris: list[str]) -> list[list[float]]:
            return [[float(len(uri))] for uri in uris]

    embeddings: Any = wrap(OfImages(GOOD))
    assert embeddings.model == "clip"
    assert embeddings.embed_image(["a.png"]) == [[5.0]]
    assert not hasattr(embeddings, "model_name")
    assert not hasattr(embeddings, "asked")
    plain = wrap(Answers(GOOD))
    assert not hasattr(plain, "embed_image")
    assert not hasattr(plain, "model")


class Cached(AnswersOnLoops):
    """A team's cache, in the sync method alone."""

    def __init__(self) -> None:
        super().__init__(GOOD)
        self.cache: dict[str, list[float]] = {}
        self.threads: set[str] = set()

    def embed_query(self, text: str) -> list[float]:
        self.threads.add(threading.current_thread().name)
        if text not in self.cache:
            self.cache[text] = super().embed_query(text)
        return self.cache[text]


class AroundTheCache(Cached):
    async def aembed_query(self, text: str) -> list[float]:
        return await asyncio.to_thread(self.embed_query, text)


async def test_a_cached_subclass_is_not_gone_around(wrap: Wrap) -> None:
    model = Cached()
    for _ in range(3):
        embeddings = wrap(model)
        await embeddings.aprefetch("question")
        assert await embeddings.aembed_query("question") == GOOD
        assert await embeddings.aembed_query("another") == GOOD
    assert model.asked == ["question", "another"]
    assert threading.main_thread().name not in model.threads, "it blocked the loop"


@pytest.mark.parametrize("in_coroutine", [False, True])
@pytest.mark.parametrize("ready", [False, True])
async def test_documents_that_were_prefetched(
    wrap: Wrap, model: ScriptedEmbeddings, in_coroutine: bool, ready: bool
) -> None:
    embeddings = wrap(model, symmetric=True)
    gate = model.hold("q")
    embeddings.prefetch("q")
    await gate.await_until_entered()

    async def embed(texts: list[str]) -> list[list[float]]:
        if in_coroutine:
            return await embeddings.aembed_documents(texts)
        return await asyncio.to_thread(embeddings.embed_documents, texts)

    if ready:
        gate.open()
        assert await embeddings.await_for_prefetch("q", PATIENCE)
    texts = ["a", "q", "b", "q", "a"]
    asking = asyncio.create_task(embed(texts))
    if not ready:
        await asyncio.to_thread(until, lambda: embeddings.stats().query_joined)
        gate.open()
    vectors = await asking
    assert vectors == [model.vector(text) for text in texts]
    assert vectors[1] is not vectors[3], "each is the caller's own"
    assert model.calls_for("q") == 1
    assert [texts for method, texts in model.calls if method.endswith("documents")] == [
        ("a", "b", "a")
    ]
    assert await embed(["q"]) == [model.vector("q")]
    assert await embed([]) == []
    assert model.calls_for("q") == 1


@pytest.mark.parametrize("in_coroutine", [False, True])
async def test_documents_of_a_model_that_is_not_symmetric(
    wrap: Wrap, model: ScriptedEmbeddings, in_coroutine: bool
) -> None:
    embeddings = wrap(model)
    embeddings.prefetch("q")
    assert await embeddings.await_for_prefetch("q", PATIENCE)
    if in_coroutine:
        await embeddings.aembed_documents(["q"])
    else:
        embeddings.embed_documents(["q"])
    assert model.calls_for("q") == 2


def test_a_prefetch_that_failed_is_asked_for_again(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model, symmetric=True, attempts=1)
    model.fail("q", ConnectionError("unreachable"))
    embeddings.prefetch("q")
    assert not embeddings.wait_for_prefetch("q", PATIENCE)
    assert embeddings.embed_documents(["q", "a"]) == [model.vector("q"), model.vector("a")]


# --- 23: wrong set-ups -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"underlying_embeddings": None}, TypeError),
        ({"underlying_embeddings": "text-embedding-3-small"}, TypeError),
        ({"underlying_embeddings": openai.OpenAI(api_key="none-needed")}, TypeError),
        ({"underlying_embeddings": lambda text: [1.0]}, TypeError),
        ({"underlying_embeddings": DeterministicFakeEmbedding}, TypeError),
        ({"ttl": "300"}, TypeError),
        ({"ttl": 0}, ValueError),
        ({"ttl": math.nan}, ValueError),
        ({"max_entries": 0}, ValueError),
        ({"max_entries": 1.5}, TypeError),
        ({"max_workers": None}, TypeError),
        ({"max_pending": -1}, ValueError),
        ({"attempts": True}, TypeError),
        ({"match": "lower"}, TypeError),
        ({"match": asyncio.sleep}, TypeError),
        ({"symmetric": "no"}, TypeError),
        ({"hedge": True}, TypeError),
        ({"hedge": 0.95}, TypeError),
        ({"on_event": 3}, TypeError),
    ],
)
def test_a_wrong_argument_is_named(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{next(iter(options))} must be "):
        PrefetchingEmbeddings(**{"underlying_embeddings": Answers(GOOD), **options})


def test_right_arguments_of_other_types(wrap: Wrap) -> None:
    embeddings = wrap(Answers(GOOD), ttl=math.inf, max_entries=np.int64(5), attempts=1)
    assert embeddings.embed_query("another") == GOOD


@pytest.mark.parametrize("call", ["prefetch", "embed_query", "is_ready", "forget"])
def test_a_match_without_return_is_named_at_the_first_text(wrap: Wrap, call: str) -> None:
    embeddings = wrap(Answers(GOOD), match=lambda text: None)
    with pytest.raises(TypeError, match=r"^match must return"):
        getattr(embeddings, call)("question")
