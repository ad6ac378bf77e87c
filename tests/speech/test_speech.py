"""Partial transcripts: which are prefetched, when, and what is taken back."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings._background.timer import Timer
from prefetch_embeddings.matching import match_spoken
from prefetch_embeddings.speech import SpeechStats, UtterancePrefetcher, UtteranceStats
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import Call, auntil, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

HOUR = 3600.0


@pytest.fixture
def embeddings(manual: Manual, model: ScriptedEmbeddings) -> Iterator[ManualPrefetchingEmbeddings]:
    embeddings = manual(model, max_workers=1000)
    yield embeddings
    embeddings.time.advance(HOUR)
    assert embeddings.time.calls_to_come == 0, "the timer keeps what nobody needs"


def _run(embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings) -> list[str]:
    """Run what is queued; return the texts embedded so far."""
    embeddings.executor.run_all()
    return [text for _, texts in model.calls for text in texts]


def _last(speech: UtterancePrefetcher) -> UtteranceStats:
    assert speech.last_utterance is not None
    return speech.last_utterance


# --- When a partial transcript is prefetched ----------------------------------------------------


def test_a_partial_is_prefetched_once_it_has_stood(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("how much")
    embeddings.time.advance(0.39)
    assert _run(embeddings, model) == []
    embeddings.time.advance(0.01)
    assert _run(embeddings, model) == ["how much"]


def test_a_change_starts_the_wait_anew(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    for text in ("how much", "how much is", "how much is it"):
        speech.on_partial(text)
        embeddings.time.advance(0.3)
        assert _run(embeddings, model) == []
    embeddings.time.advance(0.09)
    assert _run(embeddings, model) == []
    embeddings.time.advance(0.01)
    assert _run(embeddings, model) == ["how much is it"]


def test_no_moment_is_missed_for_rounding(manual: Manual, model: ScriptedEmbeddings) -> None:
    # A moment that is the sum of several floats, and a timer that comes to it in several steps.
    dice = random.Random(7)
    embeddings = manual(model, max_entries=10_000)
    for i in range(2_000):
        speech = UtterancePrefetcher(embeddings, debounce=0.1 * (i % 7))
        for j in range(3):
            speech.on_partial(f"question {i} {j}")
            embeddings.time.advance(dice.random() * speech.debounce)
        embeddings.time.advance(speech.debounce + 1e-6)
        assert f"question {i} 2" in embeddings._flights._by_key
        speech.reset()


def test_the_same_text_again_does_not(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    for _ in range(3):
        speech.on_partial("how much")
        embeddings.time.advance(0.2)
    assert _run(embeddings, model) == ["how much"]
    assert embeddings.stats().prefetch_deduplicated == 0


def test_a_text_that_comes_back_has_to_stand_again(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    for text in ("how much", "how must", "how much"):
        speech.on_partial(text)
        embeddings.time.advance(0.3)
    assert _run(embeddings, model) == []
    embeddings.time.advance(0.1)
    assert _run(embeddings, model) == ["how much"]


def test_match_decides_what_is_unchanged(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, match=match_spoken)
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("how much")
    embeddings.time.advance(0.2)
    speech.on_partial("How much?")
    embeddings.time.advance(0.2)
    assert _run(embeddings, model) == ["how much"]
    speech.on_final("How much?")
    assert _run(embeddings, model) == ["how much"]
    assert _last(speech).hit
    assert embeddings.embed_query("How much?") == model.vector("how much")
    assert embeddings.stats().query_matched == 1


def test_a_short_partial_is_not_prefetched_and_supersedes(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4, min_words=3)
    speech.on_partial("how  much")
    embeddings.time.advance(1.0)
    speech.on_partial("how much is")
    embeddings.time.advance(0.3)
    speech.on_partial("how many")
    embeddings.time.advance(1.0)
    assert _run(embeddings, model) == []
    speech.on_partial("how many are")
    embeddings.time.advance(0.4)
    assert _run(embeddings, model) == ["how many are"]


@pytest.mark.parametrize("blank", ["", " \t"])
def test_a_blank_partial_changes_nothing(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings, blank: str
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4, min_words=0)
    speech.on_partial(blank)
    embeddings.time.advance(1.0)
    speech.on_partial("how much")
    embeddings.time.advance(0.2)
    speech.on_partial(blank)
    embeddings.time.advance(0.2)
    assert _run(embeddings, model) == ["how much"]
    assert embeddings.stats().prefetch_dropped == 0


def test_without_debounce_a_partial_is_prefetched_at_once(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.0)
    speech.on_partial("how")
    speech.on_partial("how much")
    assert _run(embeddings, model) == ["how much"]
    assert embeddings.time.calls_to_come == 0


def test_no_more_calls_than_allowed(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4, max_calls=2)
    for text in ("a b", "a b c", "a b c d", "a b c d e"):
        speech.on_partial(text)
        embeddings.time.advance(0.4)
        embeddings.executor.run_all()
    assert _run(embeddings, model) == ["a b", "a b c"]
    speech.on_final("a b c d e f")
    assert _run(embeddings, model) == ["a b", "a b c", "a b c d e f"]
    assert _last(speech) == UtteranceStats(calls=3, withdrawn=0, wasted=2, hit=False, lead=0.0)
    speech.on_partial("x y")
    embeddings.time.advance(0.4)
    assert _run(embeddings, model)[3:] == ["x y"], "the limit is one utterance's"


def test_no_calls_allowed_but_the_final_one(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, max_calls=0)
    speech.on_partial("a b c")
    embeddings.time.advance(1.0)
    assert _run(embeddings, model) == []
    speech.on_final("a b c")
    assert _run(embeddings, model) == ["a b c"]


def test_what_is_there_already_is_no_call(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    embeddings.prefetch("a b")
    embeddings.executor.run_all()
    embeddings.prefetch("a b c")  # queued
    speech = UtterancePrefetcher(embeddings, debounce=0.4, max_calls=1)
    for text in ("a b", "a b c", "a b c d"):
        speech.on_partial(text)
        embeddings.time.advance(0.4)
    assert _run(embeddings, model) == ["a b", "a b c", "a b c d"]
    assert speech.stats() == SpeechStats(calls=1)


@pytest.mark.parametrize("number", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["debounce", "min_words", "max_calls"])
def test_numbers_out_of_range(
    embeddings: ManualPrefetchingEmbeddings, name: str, number: float
) -> None:
    with pytest.raises(ValueError, match=name):
        UtterancePrefetcher(embeddings, **{name: number})  # type: ignore[arg-type]


def test_text_that_is_no_text(embeddings: ManualPrefetchingEmbeddings) -> None:
    speech = UtterancePrefetcher(embeddings)
    with pytest.raises(TypeError):
        speech.on_partial(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        speech.on_final(b"how much")  # type: ignore[arg-type]
    assert speech.stats() == SpeechStats()


def test_presets(embeddings: ManualPrefetchingEmbeddings) -> None:
    class Own(UtterancePrefetcher):
        pass

    many = Own.for_many_partials(embeddings)
    few = Own.for_few_partials(embeddings)
    eager = Own.for_eager_turn_ends(embeddings)
    assert {type(many), type(few), type(eager)} == {Own}
    assert many.debounce > few.debounce == eager.debounce == 0.0
    assert many.max_calls > few.max_calls > eager.max_calls
    assert eager.min_words == 1


# --- What is superseded -------------------------------------------------------------------------


def test_a_queued_prefetch_that_is_superseded_is_withdrawn_and_not_paid_for(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4, max_calls=1)
    for text in ("a b", "a b c", "a b c d"):
        speech.on_partial(text)
        assert len(embeddings.executor) == 0
        embeddings.time.advance(0.4)
        assert len(embeddings.executor) == 1
    assert _run(embeddings, model) == ["a b c d"]
    speech.on_final("a b c d e")
    assert _run(embeddings, model) == ["a b c d", "a b c d e"]
    assert _last(speech) == UtteranceStats(calls=2, withdrawn=2, wasted=1, hit=False, lead=0.0)
    assert embeddings.stats().prefetch_withdrawn == 2


def test_a_short_partial_and_a_final_one_supersede_too(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    speech.on_partial("a")
    assert len(embeddings.executor) == 0
    speech.on_partial("a c")
    embeddings.time.advance(0.4)
    speech.on_final("a d")
    assert _run(embeddings, model) == ["a d"]
    assert _last(speech) == UtteranceStats(calls=1, withdrawn=2, wasted=0, hit=False, lead=0.0)


def test_a_running_prefetch_is_not_withdrawn(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    gate = model.hold("a b")
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    speech.on_partial("a b c")
    gate.open()
    run.result()
    assert embeddings.is_ready("a b")
    speech.reset()
    assert _last(speech) == UtteranceStats(calls=1, withdrawn=0, wasted=1, hit=False, lead=0.0)


def test_what_others_prefetched_is_not_withdrawn(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    embeddings.prefetch("a b")
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    speech.on_partial("a b c")
    speech.reset()
    assert _run(embeddings, model) == ["a b"]


@pytest.mark.parametrize("give_up", ["on_partial", "reset"])
def test_what_others_prefetched_meanwhile_is_not_withdrawn(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings, give_up: str
) -> None:
    mine, other = (UtterancePrefetcher(embeddings, debounce=0) for _ in range(2))
    mine.on_partial("a b")
    other.on_final("a b")
    if give_up == "reset":
        mine.on_final("a b")
        mine.reset()
    else:
        mine.on_partial("a b c")
        mine.reset()
    assert _run(embeddings, model) == ["a b"]
    assert embeddings.is_ready("a b")


def test_what_the_same_utterance_prefetched_twice_is_withdrawn(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0)
    speech.on_partial("a b")
    speech.on_final("a b")
    speech.reset()
    assert _run(embeddings, model) == []


def test_a_superseded_text_that_comes_back_is_prefetched_again(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    speech.on_partial("a c")
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    embeddings.time.advance(0.25)
    speech.on_final("a b")
    assert _run(embeddings, model) == ["a b"]
    assert _last(speech).lead == pytest.approx(0.25)
    assert dataclasses.replace(_last(speech), lead=0.25) == UtteranceStats(
        calls=1, withdrawn=1, wasted=0, hit=True, lead=0.25
    )


# --- Ends ---------------------------------------------------------------------------------------


def test_a_final_text_that_stood_before_is_a_hit(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.5)
    speech.on_partial("how much")
    embeddings.time.advance(0.5)
    embeddings.executor.run_all()
    speech.on_partial("how much is it")
    embeddings.time.advance(1.25)
    speech.on_final("how much is it")
    assert _last(speech) == UtteranceStats(calls=2, withdrawn=0, wasted=1, hit=True, lead=0.75)
    assert _run(embeddings, model) == ["how much", "how much is it"]
    assert speech.stats() == SpeechStats(utterances=1, calls=2, wasted=1, hits=1, lead_seconds=0.75)


def test_any_partial_of_the_utterance_counts_not_just_the_last(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.5)
    for text in ("a b", "a b c"):
        speech.on_partial(text)
        embeddings.time.advance(0.5)
        embeddings.executor.run_all()
    speech.on_final("a b")
    assert _last(speech) == UtteranceStats(calls=2, withdrawn=0, wasted=1, hit=True, lead=0.5)


def test_a_final_that_comes_before_the_debounce_is_no_hit(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("how much")
    embeddings.time.advance(0.3)
    speech.on_final("how much")
    assert _last(speech) == UtteranceStats(calls=1, withdrawn=0, wasted=0, hit=False, lead=0.0)
    embeddings.time.advance(1.0)
    assert _run(embeddings, model) == ["how much"]
    assert embeddings.stats().prefetch_deduplicated == 0, "the utterance was over"


def test_a_final_alone(embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings) -> None:
    speech = UtterancePrefetcher(embeddings, max_calls=0, min_words=5)
    assert speech.last_utterance is None
    speech.on_final("why")
    assert _run(embeddings, model) == ["why"]
    assert _last(speech) == UtteranceStats(calls=1, withdrawn=0, wasted=0, hit=False, lead=0.0)


def test_a_partial_whose_prefetch_failed_is_no_hit(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, attempts=1)
    speech = UtterancePrefetcher(embeddings, debounce=0.5)
    model.fail("a b", ValueError())
    speech.on_partial("a b")
    embeddings.time.advance(0.5)
    embeddings.executor.run_all()
    speech.on_final("a b")
    assert _last(speech) == UtteranceStats(calls=2, withdrawn=0, wasted=0, hit=False, lead=0.0)
    assert _run(embeddings, model) == ["a b", "a b"]


def test_a_dropped_partial_is_neither_a_call_nor_a_hit(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, max_workers=1, max_pending=1)
    speech = UtterancePrefetcher(embeddings, debounce=0.5)
    embeddings.prefetch_many(["x", "y"])
    speech.on_partial("a b")
    embeddings.time.advance(0.5)
    embeddings.executor.run_all()
    speech.on_final("a b")
    assert _last(speech) == UtteranceStats(calls=1, withdrawn=0, wasted=0, hit=False, lead=0.0)
    embeddings.close()
    speech.on_final("a c")
    assert _last(speech) == UtteranceStats(calls=0, withdrawn=0, wasted=0, hit=False, lead=0.0)


def test_what_others_prefetched_after_a_drop_is_no_hit(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, max_workers=1, max_pending=1)
    speech = UtterancePrefetcher(embeddings, debounce=0.5)
    embeddings.prefetch_many(["x", "y"])
    speech.on_partial("a b")
    embeddings.time.advance(0.5)
    embeddings.executor.run_all()
    embeddings.prefetch("a b")
    speech.on_final("a b")
    assert _last(speech) == UtteranceStats(calls=0, withdrawn=0, wasted=0, hit=False, lead=0.0)
    embeddings.executor.run_all()


def test_the_lead_counts_from_the_first_prefetch_of_the_text(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.5)
    for text in ("a b", "a c", "a b"):
        speech.on_partial(text)
        embeddings.time.advance(0.5)
        embeddings.executor.run_all()
    speech.on_final("a b")
    assert _last(speech) == UtteranceStats(calls=2, withdrawn=0, wasted=1, hit=True, lead=1.0)


def test_a_blank_final_ends_the_utterance_and_leaves_the_final_before_alone(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_final("how much")
    speech.on_final("")
    assert speech.stats().utterances == 1
    speech.on_partial("a b")
    speech.on_final(" ")
    embeddings.time.advance(1.0)
    assert _run(embeddings, model) == ["how much"]
    assert speech.stats().utterances == 2
    assert embeddings.stats().prefetch_dropped == 0


def test_reset_drops_what_is_pending(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.reset()
    assert speech.stats() == SpeechStats()
    speech.on_partial("how much")
    speech.reset()
    embeddings.time.advance(1.0)
    assert _run(embeddings, model) == []
    assert speech.stats() == SpeechStats(utterances=1)
    speech.on_partial("how much")
    embeddings.time.advance(0.4)
    assert _run(embeddings, model) == ["how much"], "a new utterance has begun"


def test_reset_takes_back_what_is_queued_the_final_text_included(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    speech.reset()
    assert len(embeddings.executor) == 0
    assert _last(speech) == UtteranceStats(calls=0, withdrawn=1, wasted=0, hit=False, lead=0.0)
    for stood in (True, False):
        speech.on_partial("c d")
        embeddings.time.advance(0.5 if stood else 0.0)
        speech.on_final("c d")
        assert len(embeddings.executor) == 1
        speech.reset()
        assert len(embeddings.executor) == 0
        assert _last(speech).calls == 0
        assert _last(speech).withdrawn == 1
    embeddings.prefetch("c d")  # somebody else's
    speech.reset()
    assert _run(embeddings, model) == ["c d"]
    assert (speech.stats().calls, speech.stats().wasted) == (0, 0)


def test_reset_takes_back_the_last_final_text_while_the_next_is_spoken(
    embeddings: ManualPrefetchingEmbeddings,
) -> None:
    speech = UtterancePrefetcher(embeddings)
    speech.on_final("a b")
    speech.on_partial("c d")
    speech.reset()
    assert len(embeddings.executor) == 0


def test_reset_leaves_what_a_query_runs_or_waits_for(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings)
    gate = model.hold("how much")
    speech.on_final("how much")
    query = Call(embeddings.embed_query, "how much")
    gate.wait_until_entered()
    speech.reset()
    gate.open()
    assert query.result() == model.vector("how much")
    assert _last(speech).calls == 1
    speech.on_final("how many")
    wait = Call(embeddings.wait_for_prefetch, "how many", 30.0)
    until(lambda: embeddings._flights._by_key["how many"].waiters == 1)
    speech.reset()
    embeddings.executor.run_all()
    assert wait.result()


def test_a_new_utterance_leaves_the_final_text_of_the_last_alone(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    speech.on_final("a b")
    speech.on_partial("c d")
    embeddings.time.advance(0.4)
    assert _run(embeddings, model) == ["a b", "c d"]


def test_snapshots_subtract(embeddings: ManualPrefetchingEmbeddings) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.5)
    speech.on_final("a b")
    before = speech.stats()
    speech.on_partial("c d")
    embeddings.time.advance(0.75)
    speech.on_final("c d")
    assert speech.stats() - before == SpeechStats(utterances=1, calls=1, hits=1, lead_seconds=0.25)
    for stats in (before, _last(speech)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            stats.calls = 7  # type: ignore[misc]


# --- Callers, the timer -------------------------------------------------------------------------


@pytest.mark.parametrize("debounce", [0.0, 0.4])
def test_the_worker_sees_the_context_of_the_one_who_brought_the_partial(
    embeddings: ManualPrefetchingEmbeddings,
    model: ScriptedEmbeddings,
    monkeypatch: pytest.MonkeyPatch,
    debounce: float,
) -> None:
    call: contextvars.ContextVar[str] = contextvars.ContextVar("call", default="none")
    seen = []
    embed = model.embed_query

    def embed_query(text: str) -> list[float]:
        seen.append(call.get())
        return embed(text)

    monkeypatch.setattr(model, "embed_query", embed_query)
    speech = UtterancePrefetcher(embeddings, debounce=debounce)

    def bring(text: str) -> None:
        call.set(text)
        speech.on_partial(text)

    contextvars.copy_context().run(bring, "a b")
    contextvars.copy_context().run(bring, "a b c")
    embeddings.time.advance(0.4)
    embeddings.executor.run_all()
    assert seen == ["a b c"]


def test_a_prefetcher_has_one_entry_in_the_timer_at_the_most(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    for i in range(100):
        for j in range(10):
            speech.on_partial(f"a b {i} {j}")
            embeddings.time.advance(0.05)
            assert len(embeddings.time._heap) <= 1
        if i % 2:
            speech.reset()
        else:
            speech.on_final(f"a b {i}")
            assert _run(embeddings, model)[-1] == f"a b {i}"
    assert len(model.calls) == 50


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("follow", "then"),
    [
        (lambda speech: speech.on_partial("a b c"), []),
        (lambda speech: speech.on_final("a b d"), ["a b d"]),
        (lambda speech: speech.on_final("a b"), ["a b"]),
        (lambda speech: speech.reset(), []),
    ],
)
def test_what_comes_while_a_partial_starts_has_it_taken_back(
    embeddings: ManualPrefetchingEmbeddings,
    follow: Callable[[UtterancePrefetcher], None],
    then: list[str],
    before: bool,
) -> None:
    # The timer's thread has decided to prefetch, and has either not done so yet or not said so.
    prefetch = embeddings.prefetch
    started: list[str] = []

    def prefetch_late(text: str) -> PrefetchOutcome:
        if started:
            return prefetch(text)
        started.append(text)
        if before:
            follow(speech)
        outcome = prefetch(text)
        if not before:
            follow(speech)
        return outcome

    embeddings.prefetch = prefetch_late  # type: ignore[method-assign]
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    assert started == ["a b"]
    assert [flight.text for flight in embeddings._flights._queued] == then
    assert (speech.stats().calls, speech.stats().wasted) == (len(then), 0)


def test_a_partial_that_another_thread_supersedes_at_once_is_not_prefetched(
    embeddings: ManualPrefetchingEmbeddings,
    model: ScriptedEmbeddings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.0)
    speech.on_partial("a b")
    withdraw = embeddings._runner.withdraw

    def withdraw_late(key: str, number: int, asks: int) -> bool:
        monkeypatch.undo()
        speech.on_partial("a b c d")  # as another thread would, in between
        return withdraw(key, number, asks)

    monkeypatch.setattr(embeddings._runner, "withdraw", withdraw_late)
    speech.on_partial("a b c")
    assert _run(embeddings, model) == ["a b c d"]
    assert embeddings.stats().prefetch_started == 2


def test_two_threads_cannot_exceed_the_limit_together(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    prefetch = embeddings.prefetch
    nested: list[str] = []

    def prefetch_late(text: str) -> PrefetchOutcome:
        if not nested:
            nested.append(text)
            speech.on_partial("a b c")  # as another thread would, in between
        return prefetch(text)

    embeddings.prefetch = prefetch_late  # type: ignore[method-assign]
    speech = UtterancePrefetcher(embeddings, debounce=0.0, max_calls=1)
    speech.on_partial("a b")
    assert len(embeddings.executor) <= 1
    assert speech.stats().calls <= 1


def test_an_error_does_not_harm_the_timer(
    embeddings: ManualPrefetchingEmbeddings,
    model: ScriptedEmbeddings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prefetch = embeddings.prefetch

    def broken(text: str) -> PrefetchOutcome:
        raise ZeroDivisionError(text)

    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    embeddings.prefetch = broken  # type: ignore[method-assign]
    speech.on_partial("a secret")
    embeddings.time.advance(0.4)
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text
    embeddings.prefetch = prefetch  # type: ignore[method-assign]
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    assert _run(embeddings, model) == ["a b"]
    assert speech.stats().calls == 1


def test_a_partial_brought_on_a_loop_is_prefetched(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    speech = UtterancePrefetcher(embeddings, debounce=0.01)

    async def turn() -> list[float]:
        speech.on_partial("how much is it")
        await auntil(lambda: embeddings.is_ready("how much is it"))
        speech.on_final("how much is it")
        return await embeddings.aembed_query("how much is it")

    assert asyncio.run(turn()) == model.vector("how much is it")
    assert model.calls_for("how much is it") == 1
    assert _last(speech).hit


def test_what_many_threads_bring_one_prefetcher_adds_up(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model, max_workers=2)
    speech = UtterancePrefetcher(embeddings, debounce=0.001, max_calls=2)
    start = threading.Barrier(8)

    def speak(me: int) -> None:
        start.wait()
        for i in range(150):
            speech.on_partial(f"words of {me % 3} {i % 7}")
            if i % 5 == me % 5:
                speech.on_final(f"words of {me % 3} {i % 7}")
            if i % 11 == me:
                speech.reset()
            if i % 13 == me:
                time.sleep(0.002)

    for each in [Call(speak, i) for i in range(8)]:
        each.result()
    speech.reset()
    until(lambda: not speech._will_wake)
    speech.reset()
    until(lambda: not embeddings._flights._queued and not embeddings._flights._busy)
    stats, flown = speech.stats(), embeddings.stats()
    assert stats.calls == flown.prefetch_started - flown.prefetch_withdrawn
    assert stats.withdrawn == flown.prefetch_withdrawn
    assert stats.calls >= stats.wasted >= 0
    assert stats.utterances >= stats.hits


def test_thousands_at_once_share_one_thread_and_leave_nothing(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model, max_workers=4, max_pending=4000)
    timer = embeddings._runner._scheduler
    assert isinstance(timer, Timer)
    before = threading.active_count()
    under_way = [UtterancePrefetcher(embeddings, debounce=0.05) for _ in range(2000)]
    most = 0
    for words in ("how", "how much", "how much is", "how much is it"):
        for i, speech in enumerate(under_way):
            speech.on_partial(f"number {i} {words}")
        most = max(most, len(timer._heap))
    assert most <= len(under_way)
    timers = [t for t in threading.enumerate() if t is timer._thread]
    assert len(timers) == 1
    assert threading.active_count() <= before + 1 + 4
    for i, speech in enumerate(under_way):
        speech.on_final(f"number {i} how much is it")
    until(lambda: not timer._heap)
    assert sum(speech.stats().utterances for speech in under_way) == 2000
    until(lambda: not embeddings._flights._queued and not embeddings._flights._busy)
    ended = [weakref.ref(speech) for speech in under_way]
    del under_way, speech
    gc.collect()
    assert not any(ref() for ref in ended), "something keeps utterances that have ended"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_anew(embeddings: ManualPrefetchingEmbeddings) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("how much")
    with speech._lock:  # as another thread of the parent may hold it
        child = os.fork()
    if not child:
        code = 1
        try:
            speech.on_partial("how many")
            embeddings.time.advance(0.4)
            code = 0 if len(embeddings.executor) == 1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
