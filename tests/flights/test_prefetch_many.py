"""Several texts at once: one call where the model is symmetric, several otherwise."""

from __future__ import annotations

from collections.abc import Callable

from prefetch_embeddings import PrefetchOutcome
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings

Manual = Callable[..., ManualPrefetchingEmbeddings]
STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome


def test_several_flights_by_default(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    assert embeddings.prefetch_many(iter(["a", "b"])) == [STARTED, STARTED]
    embeddings.executor.run_all()
    assert model.calls == [("embed_query", ("a",)), ("embed_query", ("b",))]


def test_one_call_if_symmetric(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, symmetric=True)
    embeddings.embed_query("ready")
    outcomes = embeddings.prefetch_many(["a", "ready", "b", "a", ""])
    assert outcomes == [STARTED, READY, STARTED, IN_FLIGHT, DROPPED]
    embeddings.executor.run_all()
    assert model.calls[1:] == [("embed_documents", ("a", "b"))]
    assert embeddings.embed_query("b") == model.vector("b")
    assert embeddings.embed_query("a") == model.vector("a")
    assert embeddings.stats().query_ready == 2


def test_a_query_claims_its_text_out_of_a_batch(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, symmetric=True)
    embeddings.prefetch_many(["a", "b", "c"])
    assert embeddings.embed_query("b") == model.vector("b")
    embeddings.executor.run_all()
    assert model.calls == [("embed_query", ("b",)), ("embed_documents", ("a", "c"))]


def test_a_batch_that_was_claimed_whole_leaves_the_queue(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, symmetric=True)
    embeddings.prefetch_many(["a", "b"])
    embeddings.embed_query("a")
    assert len(embeddings.executor) == 1
    embeddings.embed_query("b")
    assert len(embeddings.executor) == 0


def test_each_text_takes_a_place_in_the_queue(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, symmetric=True, max_workers=1, max_pending=2)
    assert embeddings.prefetch_many(list("abcd")) == [STARTED] * 3 + [DROPPED]


def test_what_fails_together_is_tried_again_together(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, symmetric=True)
    model.fail("b", ValueError())
    embeddings.prefetch_many(["a", "b", "c"])
    embeddings.executor.run_all()
    assert embeddings.embed_query("c") == model.vector("c")
    embeddings.time.advance(60.0)
    embeddings.executor.run_all()
    assert model.calls[-1] == ("embed_documents", ("a", "b"))
    assert embeddings.is_ready("a")
    stats = embeddings.stats()
    assert (stats.prefetch_retried, stats.prefetch_succeeded, stats.query_claimed) == (2, 3, 1)
