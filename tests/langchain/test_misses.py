"""Why a query found no flight: on demand, and in the DEBUG log, never as text."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable

import pytest

from prefetch_embeddings import misses
from prefetch_embeddings._flights.ledger import UNUSED_KEPT
from prefetch_embeddings.matching import match_spoken
from prefetch_embeddings.misses import Miss, MissReason
from prefetch_embeddings.reporting import digest
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import Call, auntil, waiters

Manual = Callable[..., ManualPrefetchingEmbeddings]


def _explain(embeddings: ManualPrefetchingEmbeddings, text: str) -> Miss:
    miss = embeddings.explain_miss(text)
    assert miss is not None
    return miss


@pytest.mark.parametrize(
    ("prefetched", "query", "reason"),
    [
        ("how much is it", "How much is IT", MissReason.CASE),
        ("how much is it", "how much is it?", MissReason.PUNCTUATION),
        ("how much is it", "How much is it?", MissReason.PUNCTUATION),
        ("whats the price", "what's  the price", MissReason.PUNCTUATION),
        ("how much is", "How much is it?", MissReason.PREFIX),
        ("and how much is it", "How much is the gigabit tariff?", MissReason.REWRITTEN),
        ("how much is it then", "how much is it", MissReason.REWRITTEN),
        ("сколько стоит тариф", "какова цена тарифа", MissReason.REWRITTEN),
        ("where is my parcel", "how much is it?", MissReason.NEVER_PREFETCHED),
    ],
)
def test_reasons(
    manual: Manual, model: ScriptedEmbeddings, prefetched: str, query: str, reason: MissReason
) -> None:
    embeddings = manual(model)
    embeddings.prefetch(prefetched)
    embeddings.executor.run_all()
    embeddings.time.advance(0.5)
    embeddings.embed_query(query)
    miss = _explain(embeddings, query)
    assert (miss.reason, miss.text_digest, miss.text_length) == (reason, digest(query), len(query))
    if reason is MissReason.NEVER_PREFETCHED:
        assert (miss.nearest_digest, miss.nearest_length, miss.seconds) == ("", 0, 0.0)
    else:
        assert (miss.nearest_digest, miss.nearest_length) == (digest(prefetched), len(prefetched))
        assert miss.seconds == pytest.approx(0.5)
        assert 0 < miss.similarity <= 1


def test_nothing_was_prefetched(manual: Manual, model: ScriptedEmbeddings) -> None:
    assert _explain(manual(model), "q").reason is MissReason.NEVER_PREFETCHED


def test_the_nearest_tells_and_of_equally_near_ones_the_latest(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    for text in ("how", "how much is", "how much", "how would it be", "HOW MUCH IS IT?"):
        embeddings.prefetch(text)
    assert _explain(embeddings, "how much is it").nearest_digest == digest("HOW MUCH IS IT?")
    embeddings.forget("HOW MUCH IS IT?")
    assert _explain(embeddings, "how much is it").nearest_digest == digest("how much is")
    embeddings.time.advance(1.0)
    embeddings.prefetch("How much is")
    miss = _explain(embeddings, "how much is it")
    assert (miss.nearest_digest, miss.seconds) == (digest("How much is"), 0.0)


def test_a_prefetch_that_a_query_can_use_is_no_miss(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, match=match_spoken)
    embeddings.prefetch("how much")
    assert embeddings.explain_miss("How much?") is None
    embeddings.executor.run_all()
    assert embeddings.explain_miss("How much?") is None


def test_what_served_a_query_is_no_longer_near(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    embeddings.prefetch("how much is it")
    embeddings.executor.run_all()
    embeddings.embed_query("how much is it")
    assert _explain(embeddings, "How much is it?").reason is MissReason.NEVER_PREFETCHED


def test_what_queries_asked_for_themselves_is_no_prefetch(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    embeddings.embed_query("how much is it")
    assert _explain(embeddings, "How much is it?").reason is MissReason.NEVER_PREFETCHED


def test_what_a_query_waits_for_or_runs_is_in_use(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    gate = model.hold("how much is it")
    embeddings.prefetch("how much is it")
    query = Call(embeddings.embed_query, "how much is it")
    gate.wait_until_entered()
    assert _explain(embeddings, "How much is it?").reason is MissReason.NEVER_PREFETCHED
    gate.open()
    query.result()


async def test_what_a_query_asked_for_and_gave_up_is_no_prefetch(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    gate = model.hold("how much is it")
    query = asyncio.create_task(embeddings.aembed_query("how much is it"))
    await gate.await_until_entered()
    wait = asyncio.create_task(embeddings.await_for_prefetch("how much is it"))  # keeps it alive
    await auntil(lambda: waiters(embeddings, "how much is it") == 2)
    query.cancel()
    gate.open()
    assert await wait
    assert _explain(embeddings, "How much is it?").reason is MissReason.NEVER_PREFETCHED


def test_a_prefetch_that_serves_its_query_is_no_miss(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, max_pending=2 * UNUSED_KEPT)
    embeddings.prefetch("used")
    embeddings.executor.run_all()
    embeddings.embed_query("used")
    embeddings.prefetch("old")
    for number in range(UNUSED_KEPT + 1):
        embeddings.prefetch(f"new {number}")
    for text in ("used", "old"):
        assert embeddings.explain_miss(text) is None


def test_the_very_text_was_prefetched_and_is_gone(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, attempts=1, ttl=10.0)
    model.fail("failed", ValueError())
    embeddings.prefetch("failed")
    embeddings.executor.run_all()
    embeddings.prefetch("expired")
    embeddings.executor.run_all()
    _, ticket = embeddings.prefetcher.ask("withdrawn")
    assert ticket is not None
    assert embeddings.prefetcher.take_back(ticket)
    embeddings.time.advance(11.0)
    for text in ("failed", "expired", "withdrawn"):
        miss = _explain(embeddings, text)
        assert (miss.reason, miss.nearest_digest) == (MissReason.GONE, digest(text))
        assert miss.seconds == pytest.approx(11.0)


def test_a_text_that_is_forgotten_is_forgotten(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, attempts=1)
    for forget in (lambda: embeddings.forget("q"), embeddings.clear):
        model.fail("q", ValueError())
        embeddings.prefetch("q")
        embeddings.executor.run_all()
        embeddings.prefetch("q")  # once lost, once held
        forget()
        assert _explain(embeddings, "q").reason is MissReason.NEVER_PREFETCHED
        assert embeddings.prefetcher.unused("?") == []


def test_what_is_remembered_is_bounded(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, max_entries=1)
    for i in range(2 * UNUSED_KEPT):
        embeddings.prefetch(f"question {i}")
        embeddings.executor.run_all()
    assert len(embeddings.prefetcher._books.ledger._unused) == UNUSED_KEPT
    assert len(embeddings.prefetcher.unused("?") or []) == UNUSED_KEPT
    assert _explain(embeddings, "question 0").reason is not MissReason.GONE
    assert _explain(embeddings, f"question {2 * UNUSED_KEPT - 2}").reason is MissReason.GONE


def test_looking_changes_nothing(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    embeddings.prefetch("how much")
    embeddings.executor.run_all()
    before = embeddings.stats()
    embeddings.explain_miss("how much is it")
    assert embeddings.stats() == before
    with pytest.raises(TypeError):
        embeddings.explain_miss(7)  # type: ignore[arg-type]


# --- Privacy, and the log ------------------------------------------------------------------------

SECRET = "my card number is 4111"


def test_no_text_in_a_miss(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    embeddings.prefetch(SECRET)
    miss = _explain(embeddings, SECRET + " and more")
    assert miss.reason is MissReason.PREFIX
    for value in dataclasses.astuple(miss):
        assert not any(part in str(value) for part in ("4111", "card"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        miss.similarity = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("native", [True, False])
def test_debug_tells_why_as_digests(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture, native: bool
) -> None:
    caplog.set_level(logging.DEBUG, "prefetch_embeddings")
    embeddings = manual(model)
    embeddings.prefetch(SECRET)
    embeddings.time.advance(0.25)
    query = SECRET.capitalize()
    if native:
        asyncio.run(embeddings.aembed_query(query))
    else:
        embeddings.embed_query(query)
    (line,) = [r.getMessage() for r in caplog.records if "missed" in r.getMessage()]
    for part in (digest(query), digest(SECRET), "case", f"{len(SECRET)} characters", "0.250 s"):
        assert part in line
    assert "4111" not in caplog.text
    assert "card" not in caplog.text


def test_debug_tells_of_a_query_that_nothing_was_like(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "prefetch_embeddings")
    embeddings = manual(model)
    model.fail("q", ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        embeddings.embed_query("q")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"query {digest('q')} (1 characters) missed: nothing like it was prefetched"
    )


def test_nothing_is_done_without_debug(
    manual: Manual, model: ScriptedEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explain(*_: object) -> None:
        raise AssertionError("work on the hot path")

    monkeypatch.setattr(misses, "explain", explain)
    embeddings = manual(model)
    embeddings.prefetch("how much")
    embeddings.embed_query("how much is it")
    assert embeddings.stats().query_missed == 1


def test_only_misses_are_explained(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = manual(model)
    embeddings.prefetch("ready")
    embeddings.executor.run_all()
    embeddings.prefetch("queued")
    caplog.set_level(logging.DEBUG, "prefetch_embeddings")
    embeddings.embed_query("ready")
    embeddings.embed_query("queued")
    assert not [record for record in caplog.records if "missed" in record.getMessage()]
