"""A set-up that cannot work and shows it only in use: one warning, and `explain_miss` says it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from prefetch_embeddings import MissReason, PrefetchOutcome
from prefetch_embeddings.amiss import UNASKED, UNASKED_SECONDS
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings

Manual = Callable[..., ManualPrefetchingEmbeddings]


def _reason(embeddings: ManualPrefetchingEmbeddings, text: str) -> MissReason | None:
    miss = embeddings.explain_miss(text)
    return None if miss is None else miss.reason


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def _prefetch_unasked(embeddings: ManualPrefetchingEmbeddings, count: int = UNASKED) -> None:
    for number in range(count):
        embeddings.prefetch(f"question {number}")
        embeddings.executor.run_all()


def test_a_prefetch_after_close(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = manual(model)
    embeddings.close()
    assert _warnings(caplog) == []
    for _ in range(2):
        assert embeddings.prefetch("q") is PrefetchOutcome.DROPPED
    (warning,) = _warnings(caplog)
    assert "after close" in warning
    assert _reason(embeddings, "q") is MissReason.CLOSED


async def test_a_prefetch_after_close_as_a_coroutine(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = manual(model)
    embeddings.close()
    await embeddings.aprefetch("q")
    embeddings.prefetch_many(["q", "r"])
    assert len(_warnings(caplog)) == 1


def test_a_full_queue_dropped_it(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, max_pending=1, max_workers=1)
    texts = ["one", "two", "three", "four"]
    outcomes = [embeddings.prefetch(text) for text in texts]
    dropped = texts[outcomes.index(PrefetchOutcome.DROPPED)]
    assert _reason(embeddings, dropped) is MissReason.DROPPED
    embeddings.executor.run_all()
    assert embeddings.prefetch(dropped) is PrefetchOutcome.STARTED
    assert _reason(embeddings, dropped) is None


def test_prefetching_paused(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, attempts=1)
    for text in ("a", "b", "c"):
        model.fail(text, ConnectionError())
        with pytest.raises(ConnectionError):
            embeddings.embed_query(text)
    assert embeddings.prefetch("q") is PrefetchOutcome.DROPPED
    assert _reason(embeddings, "q") is MissReason.PAUSED
    embeddings.embed_query("x")
    assert embeddings.prefetch("q") is PrefetchOutcome.STARTED
    assert _reason(embeddings, "q") is None


def test_no_query_ever_came(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = manual(model)
    _prefetch_unasked(embeddings)
    assert _warnings(caplog) == []  # a start-up may prefetch many at once
    embeddings.time.advance(UNASKED_SECONDS)
    embeddings.prefetch("late")
    embeddings.executor.run_all()
    embeddings.prefetch("later")
    embeddings.executor.run_all()
    (warning,) = _warnings(caplog)
    assert "no query ever came" in warning
    assert _reason(embeddings, "late") is MissReason.NEVER_ASKED
    embeddings.embed_query("late")
    assert _reason(embeddings, "xyz") is MissReason.NEVER_PREFETCHED


def test_one_query_is_enough(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = manual(model)
    embeddings.embed_query("q")
    _prefetch_unasked(embeddings)
    embeddings.time.advance(UNASKED_SECONDS)
    embeddings.prefetch("late")
    embeddings.executor.run_all()
    assert _warnings(caplog) == []
    assert _reason(embeddings, "late") is None


def test_a_few_prefetches_without_a_query_are_no_sign(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = manual(model)
    _prefetch_unasked(embeddings, UNASKED - 2)
    embeddings.time.advance(UNASKED_SECONDS)
    embeddings.prefetch("late")
    embeddings.executor.run_all()
    assert _warnings(caplog) == []
