"""A wrapper goes to other processes as its model does, and each starts with an empty map."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings, match_spoken
from tests.helpers import PATIENCE

METHODS = pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())

# Since Python 3.12; it is what these tests are about.
pytestmark = pytest.mark.filterwarnings(r"ignore:This process \(pid=\d+\) is multi-threaded")


class Model(Embeddings):
    """Can be pickled, as local models can."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        self.asked.append(text)
        return [float(len(text)), 1.0]


def embeddings_with_a_past() -> PrefetchingEmbeddings:
    embeddings = PrefetchingEmbeddings(Model(), match=match_spoken)
    embeddings.prefetch("Known?")
    assert embeddings.wait_for_prefetch("Known?", PATIENCE)
    return embeddings


def use(embeddings: PrefetchingEmbeddings) -> dict[str, Any]:
    """Use a wrapper in another process, and tell what was seen."""
    empty = not embeddings.is_ready("Known?") and embeddings.stats().prefetch_started == 0
    model = embeddings.underlying_embeddings
    assert isinstance(model, Model)
    before = len(model.asked)
    embeddings.prefetch("A question?")
    arrived = embeddings.wait_for_prefetch("A question?", PATIENCE)
    vector = embeddings.embed_query("a question")  # the same, as `match` has it
    return {
        "empty": empty,
        "arrived": arrived,
        "vector": vector,
        "asked": model.asked[before:],
        "elsewhere": os.getpid(),
    }


def put(embeddings: PrefetchingEmbeddings, queue: Any) -> None:
    queue.put(use(embeddings))


def assert_used(seen: dict[str, Any]) -> None:
    assert seen.pop("elsewhere") != os.getpid()
    assert seen == {
        "empty": True,
        "arrived": True,
        "vector": [11.0, 1.0],
        "asked": ["A question?"],
    }


def assert_unmoved(embeddings: PrefetchingEmbeddings) -> None:
    assert embeddings.embed_query("known") == [6.0, 1.0]
    stats = embeddings.stats()
    assert (stats.prefetch_started, stats.query_ready, stats.query_missed) == (1, 1, 0)
    embeddings.close()


@METHODS
def test_as_an_argument_of_a_process(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    embeddings = embeddings_with_a_past()
    queue = context.Queue()
    process = context.Process(target=put, args=(embeddings, queue))
    process.start()
    assert_used(queue.get(timeout=PATIENCE))
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert_unmoved(embeddings)


@METHODS
def test_as_an_argument_of_a_pools_calls(method: str) -> None:
    embeddings = embeddings_with_a_past()
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for seen in pool.map(use, [embeddings] * 4):
            assert_used(seen)
    assert_unmoved(embeddings)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_that_is_forked_while_calls_are_under_way() -> None:
    class Slow(Model):
        def embed_query(self, text: str) -> list[float]:
            time.sleep(0.05)
            return super().embed_query(text)

    embeddings = PrefetchingEmbeddings(Slow(), match=match_spoken)
    embeddings.prefetch_many([f"question {number}" for number in range(40)])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=put, args=(embeddings, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    for _ in processes:
        assert_used(queue.get(timeout=PATIENCE))
    for process in processes:
        process.join(PATIENCE)
    for number in range(40):
        assert embeddings.embed_query(f"question {number}")
    assert embeddings.stats().query_missed == 0
    embeddings.close()
