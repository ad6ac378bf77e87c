"""No text in a log record, an event or a repr."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable

import pytest

from prefetch_embeddings import (
    PrefetchDropped,
    PrefetchEvent,
    PrefetchFailed,
    PrefetchStarted,
    PrefetchSucceeded,
    QueryFailed,
    QueryServed,
)
from prefetch_embeddings.reporting import digest
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings

Manual = Callable[..., ManualPrefetchingEmbeddings]

SECRET = "my card number is 4111"


def test_no_text_in_logs_or_events(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    events: list[PrefetchEvent] = []
    embeddings = manual(model, on_event=events.append, max_workers=1, max_pending=1)
    model.fail(SECRET, ValueError(SECRET), ValueError(SECRET), ValueError(SECRET))
    embeddings.prefetch(SECRET)
    embeddings.executor.run_all()
    embeddings.time.advance(60.0)
    embeddings.executor.run_all()
    with pytest.raises(ValueError, match=SECRET):
        embeddings.embed_query(SECRET)
    embeddings.time.advance(1.0)  # calls keep failing: after a second a prefetch may probe
    embeddings.prefetch(SECRET)
    embeddings.executor.run_all()
    embeddings.prefetch_many(f"{SECRET} {i}" for i in range(4))
    embeddings.embed_query(SECRET)
    asyncio.run(embeddings.aembed_query(SECRET + "!"))
    kinds = {type(event) for event in events}
    assert kinds == {
        PrefetchDropped,
        PrefetchFailed,
        PrefetchStarted,
        PrefetchSucceeded,
        QueryFailed,
        QueryServed,
    }
    told = [repr(event) for event in events]
    told += [repr(vars(record)) + record.getMessage() for record in caplog.records]
    told += [repr(embeddings), repr(embeddings.stats())]
    assert caplog.records
    for part in (SECRET, "4111", "card"):
        assert not any(part in line for line in told)


def test_a_failed_prefetch_is_logged_by_class_digest_length_and_attempt(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    embeddings = manual(model, attempts=1)
    model.fail(SECRET, ConnectionError(SECRET))
    embeddings.prefetch(SECRET)
    embeddings.executor.run_all()
    (record,) = caplog.records
    assert record.levelno == logging.INFO, "it has cost nobody anything"
    for part in ("ConnectionError", digest(SECRET), f"{len(SECRET)} characters", "attempt 1"):
        assert part in record.getMessage()
    assert record.name == "prefetch_embeddings"


def test_debug_tells_how_long_after_the_prefetch_the_vector_was_there(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "prefetch_embeddings")
    embeddings = manual(model)
    embeddings.prefetch("q")
    embeddings.time.advance(0.75)
    embeddings.executor.run_all()
    assert any("0.750 s after its prefetch" in record.getMessage() for record in caplog.records)


def test_events_tell_what_happened(manual: Manual, model: ScriptedEmbeddings) -> None:
    events: list[PrefetchEvent] = []
    embeddings = manual(model, on_event=events.append)
    model.fail("q", ValueError())
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    embeddings.time.advance(1.0)
    embeddings.executor.run_all()
    embeddings.embed_query("q")
    embeddings.embed_query("new")
    first = events[0]
    assert isinstance(first, PrefetchStarted)
    named = (digest("q"), 1, first.flight)
    missed = events[-1]
    assert isinstance(missed, QueryServed)
    assert missed.flight != first.flight
    assert events == [
        PrefetchStarted(*named),
        PrefetchFailed(*named, "ValueError", 1, will_retry=True),
        PrefetchSucceeded(*named, 1.0, 2),
        QueryServed(*named, "ready", 0.0),
        QueryServed(digest("new"), 3, missed.flight, "missed", 0.0),
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        events[0].text_length = 0  # type: ignore[misc]


def test_a_listener_that_raises_harms_nothing(
    manual: Manual, model: ScriptedEmbeddings, caplog: pytest.LogCaptureFixture
) -> None:
    def listener(event: PrefetchEvent) -> None:
        raise ZeroDivisionError(SECRET)

    embeddings = manual(model, on_event=listener)
    embeddings.prefetch("q")
    embeddings.executor.run_all()
    assert embeddings.embed_query("q") == model.vector("q")
    assert asyncio.run(embeddings.aembed_query("q")) == model.vector("q")
    assert embeddings.embed_query("new") == model.vector("new")
    assert any("ZeroDivisionError" in record.getMessage() for record in caplog.records)
    assert SECRET not in caplog.text


def test_a_listener_may_call_back(manual: Manual, model: ScriptedEmbeddings) -> None:
    # It is called with no lock held, so that it may do as it likes.
    def listener(event: PrefetchEvent) -> None:
        if not isinstance(event, QueryServed | PrefetchStarted):
            embeddings.stats()
            embeddings.prefetch("from the listener")
            embeddings.embed_query("from the listener")
            embeddings.clear()

    embeddings = manual(model, on_event=listener, attempts=1)
    model.fail("q", ValueError())
    embeddings.prefetch("q")
    embeddings.executor.run_next()
    assert embeddings.embed_query("q") == model.vector("q")


def test_lone_surrogates_have_a_digest() -> None:
    assert digest("\ud800") != digest("\ud801")


def test_nobody_can_try_out_which_text_has_a_digest() -> None:
    script = f"from prefetch_embeddings.reporting import digest; print(digest({SECRET!r}))"
    others = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(others) == 2
    assert digest(SECRET) == digest(SECRET)
    assert len(digest(SECRET)) == 8
