"""Partial transcripts: which are prefetched, when, and what is taken back."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import gc
import math
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefetch_embeddings import PrefetchEvent, PrefetchingEmbeddings, PrefetchStarted
from prefetch_embeddings.matching import count_words, match_spoken
from prefetch_embeddings.speech import (
    SETTLING_SECONDS,
    SpeechStats,
    UtterancePrefetcher,
    UtteranceStats,
)
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
    until(lambda: speech.last_utterance is not None)  # another thread may be at it
    last = speech.last_utterance
    assert last is not None
    return last


def _waiters(embeddings: PrefetchingEmbeddings, text: str) -> int:
    flight = embeddings.prefetcher._flights.get(text)
    return 0 if flight is None else len(flight.waiters)


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
        assert len(embeddings.executor) == 1
        speech.reset()
        assert len(embeddings.executor) == 0


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


def test_a_short_partial_has_to_stand_longer_and_supersedes(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.25, min_words=3)
    speech.on_partial("how  much")
    embeddings.time.advance(0.54)
    speech.on_partial("how much is")
    embeddings.time.advance(0.24)
    speech.on_partial("how many")
    embeddings.time.advance(0.54)
    assert _run(embeddings, model) == []
    embeddings.time.advance(0.01)
    assert _run(embeddings, model) == ["how many"]
    speech.on_partial("how many are")
    embeddings.time.advance(0.25)
    assert _run(embeddings, model) == ["how many", "how many are"]


@pytest.mark.parametrize(
    "question",
    [
        "balance",
        "сколько стоит роуминг",
        "请问千兆套餐一个月多少钱",
        "余额",
        "ราคาอินเทอร์เน็ตเท่าไหร่",
        "インターネットの料金はいくらですか",
    ],
)
@pytest.mark.parametrize(
    "preset",
    [
        UtterancePrefetcher,
        UtterancePrefetcher.for_many_partials,
        UtterancePrefetcher.for_few_partials,
        UtterancePrefetcher.for_eager_turn_ends,
    ],
)
@pytest.mark.parametrize("signals", [False, True])
def test_every_preset_prefetches_short_questions_and_those_without_spaces(
    embeddings: ManualPrefetchingEmbeddings,
    preset: Callable[[PrefetchingEmbeddings], UtterancePrefetcher],
    question: str,
    signals: bool,
) -> None:
    speech = preset(embeddings)
    if signals:
        speech.on_speech_started()
    speech.on_partial(question)
    embeddings.time.advance(0.1)
    if signals:
        speech.on_speech_stopped()
    embeddings.time.advance(0.5)
    embeddings.executor.run_all()
    speech.on_final(question)
    assert _last(speech).hit


def test_signs_count_as_words_where_there_are_no_spaces(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.25, min_words=4)
    speech.on_partial("千兆套餐")
    embeddings.time.advance(0.25)
    assert _run(embeddings, model) == ["千兆套餐"]
    assert [count_words(text) for text in ("", "how much?", "- ?", "余额 iPhone 15")] == [
        0,
        2,
        0,
        4,
    ]


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


@pytest.mark.parametrize("thing", [None, "embeddings", ScriptedEmbeddings()])
def test_what_prefetches_nothing(thing: Any) -> None:
    with pytest.raises(TypeError, match="prefetcher must be a PrefetchingEmbeddings"):
        UtterancePrefetcher(thing)


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


# --- Speech signals -----------------------------------------------------------------------------


def test_partials_are_held_while_the_caller_speaks_and_due_at_the_stop(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.1, min_words=4)
    speech.on_speech_started()
    speech.on_partial("how much is it to go")
    embeddings.time.advance(1.0)
    speech.on_partial("tell me")
    embeddings.time.advance(1.0)
    assert _run(embeddings, model) == []
    speech.on_speech_stopped()
    assert _run(embeddings, model) == []
    embeddings.time.advance(SETTLING_SECONDS)
    assert _run(embeddings, model) == ["tell me"]


def test_a_partial_after_the_stop_is_due_a_settling_time_after_it_came(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=9.0, min_words=4)
    speech.on_speech_started()
    speech.on_speech_stopped()
    embeddings.time.advance(1.0)
    speech.on_partial("how")
    embeddings.time.advance(SETTLING_SECONDS / 2)
    speech.on_partial("how much")  # what comes in one go is one call
    embeddings.time.advance(SETTLING_SECONDS / 2)
    assert _run(embeddings, model) == []
    embeddings.time.advance(SETTLING_SECONDS / 2)
    assert _run(embeddings, model) == ["how much"]


def test_a_caller_who_goes_on_has_what_stands_held_again(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings)
    speech.on_speech_started()
    speech.on_partial("how much")
    speech.on_speech_stopped()
    embeddings.time.advance(SETTLING_SECONDS / 2)
    speech.on_speech_started()
    embeddings.time.advance(1.0)
    assert _run(embeddings, model) == []
    speech.on_partial("how much is it")
    speech.on_speech_stopped()
    embeddings.time.advance(SETTLING_SECONDS)
    assert _run(embeddings, model) == ["how much is it"]


def test_a_stop_is_kept_to_though_the_timer_has_a_later_entry(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=5.0)
    speech.on_partial("how much is it")  # before the first signal
    speech.on_speech_stopped()
    embeddings.time.advance(SETTLING_SECONDS)
    assert _run(embeddings, model) == ["how much is it"]


def test_a_second_stop_asks_for_nothing_again(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings)
    for _ in range(3):
        speech.on_speech_started()
        speech.on_partial("how much")
        speech.on_speech_stopped()
        embeddings.time.advance(1.0)
    assert _run(embeddings, model) == ["how much"]
    assert embeddings.stats().prefetch_deduplicated == 0


def test_a_final_segment_while_the_caller_speaks_counts_as_a_partial(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings)
    speech.on_speech_started()
    speech.on_final("how much is")
    embeddings.time.advance(1.0)
    assert _run(embeddings, model) == []
    assert speech.last_utterance is None
    speech.on_final("how much is a ticket")
    speech.on_speech_stopped()
    embeddings.time.advance(SETTLING_SECONDS)
    assert _run(embeddings, model) == ["how much is a ticket"]
    embeddings.time.advance(0.5)
    speech.on_final("how much is a ticket")
    assert _last(speech) == UtteranceStats(calls=1, withdrawn=0, wasted=0, hit=True, lead=0.5)


def test_the_limit_on_calls_holds_with_signals_too(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings, max_calls=2)
    for text in ("a", "a b", "a b c"):
        speech.on_speech_started()
        speech.on_partial(text)
        speech.on_speech_stopped()
        embeddings.time.advance(1.0)
        embeddings.executor.run_all()
    assert _run(embeddings, model) == ["a", "a b"]


def test_reset_leaves_the_detector_its_say(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    speech = UtterancePrefetcher(embeddings)
    speech.on_speech_started()
    speech.reset()  # barge-in: the caller speaks
    speech.on_partial("no, to the museum")
    embeddings.time.advance(5.0)
    assert _run(embeddings, model) == []
    speech.on_speech_stopped()
    embeddings.time.advance(SETTLING_SECONDS)
    assert _run(embeddings, model) == ["no, to the museum"]


# --- Whether the query was served ---------------------------------------------------------------


def test_a_query_that_finds_the_vector_was_served(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, match=match_spoken)
    speech = UtterancePrefetcher(embeddings, debounce=0.0)
    speech.on_partial("how much is it")
    embeddings.executor.run_all()
    speech.on_final("How much is it?")
    assert not _last(speech).served
    embeddings.embed_query("how much is IT")  # another text, the same flight
    assert _last(speech).served
    embeddings.embed_query("how much is it")
    assert speech.stats().served == 1


def test_a_query_that_comes_before_the_final_transcript_was_served(
    embeddings: ManualPrefetchingEmbeddings,
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.0)
    speech.on_partial("how much is it")
    embeddings.executor.run_all()
    embeddings.embed_query("how much is it")
    assert speech.stats().served == 0
    speech.on_final("how much is it")
    assert _last(speech).served
    assert speech.stats().served == 1


def test_a_query_for_what_somebody_else_had_prefetched_was_served(
    embeddings: ManualPrefetchingEmbeddings,
) -> None:
    embeddings.prefetch("how much is it")
    embeddings.executor.run_all()
    speech = UtterancePrefetcher(embeddings)
    speech.on_final("how much is it")
    embeddings.embed_query("how much is it")
    assert speech.stats().served == 1


def test_a_query_for_another_text_was_not_served(
    embeddings: ManualPrefetchingEmbeddings,
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.0)
    speech.on_partial("how much")
    speech.on_final("how much is it")
    embeddings.executor.run_all()
    embeddings.embed_query("price of the gigabit tariff")  # as a tool-calling model writes it
    embeddings.embed_query("how much")
    assert not _last(speech).served
    assert speech.stats().served == 0


def test_a_query_that_runs_the_prefetch_itself_was_not_served(
    embeddings: ManualPrefetchingEmbeddings,
) -> None:
    speech = UtterancePrefetcher(embeddings)
    speech.on_final("how much is it")
    embeddings.embed_query("how much is it")
    assert speech.stats().served == 0


def test_prefetchers_of_one_wrapper_share_a_listener_and_each_hears_of_its_own(
    embeddings: ManualPrefetchingEmbeddings,
) -> None:
    speeches = [UtterancePrefetcher(embeddings) for _ in range(5)]
    for i, speech in enumerate(speeches):
        speech.on_final(f"how much is it {i // 2}")
    embeddings.executor.run_all()
    embeddings.embed_query("how much is it 0")
    assert [speech.stats().served for speech in speeches] == [1, 1, 0, 0, 0]


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
    until(lambda: _waiters(embeddings, "how many") == 1)
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
    model: ScriptedEmbeddings,
    follow: Callable[[UtterancePrefetcher], None],
    then: list[str],
    before: bool,
) -> None:
    # The timer's thread has decided to prefetch, and has either not done so yet or not said so.
    ask = embeddings.prefetcher.ask
    started: list[str] = []

    def ask_late(text: str) -> Any:
        if started:
            return ask(text)
        started.append(text)
        if before:
            follow(speech)
        asked = ask(text)
        if not before:
            follow(speech)
        return asked

    embeddings.prefetcher.ask = ask_late  # type: ignore[assignment, method-assign]
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    assert started == ["a b"]
    assert _run(embeddings, model) == then
    assert (speech.stats().calls, speech.stats().wasted) == (len(then), 0)


def test_a_partial_that_comes_while_another_is_taken_back_supersedes_both(
    embeddings: ManualPrefetchingEmbeddings,
    model: ScriptedEmbeddings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.0, min_words=1)
    speech.on_partial("a b")
    take_back = embeddings.prefetcher.take_back

    def take_back_late(ticket: Any) -> bool:
        monkeypatch.undo()
        speech.on_partial("a b c d")  # as another thread would, in between
        return take_back(ticket)

    monkeypatch.setattr(embeddings.prefetcher, "take_back", take_back_late)
    speech.on_partial("a b c")
    assert _run(embeddings, model) == ["a b c d"]
    assert embeddings.stats().prefetch_withdrawn == 2


def test_two_threads_cannot_exceed_the_limit_together(
    embeddings: ManualPrefetchingEmbeddings, model: ScriptedEmbeddings
) -> None:
    ask = embeddings.prefetcher.ask
    nested: list[str] = []

    def ask_late(text: str) -> Any:
        if not nested:
            nested.append(text)
            speech.on_partial("a b c")  # as another thread would, in between
        return ask(text)

    embeddings.prefetcher.ask = ask_late  # type: ignore[assignment, method-assign]
    speech = UtterancePrefetcher(embeddings, debounce=0.0, max_calls=1)
    speech.on_partial("a b")
    assert len(embeddings.executor) <= 1
    assert speech.stats().calls <= 1


def test_an_error_does_not_harm_the_timer(
    embeddings: ManualPrefetchingEmbeddings,
    model: ScriptedEmbeddings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(text: str) -> Any:
        raise ZeroDivisionError(text)

    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    monkeypatch.setattr(embeddings.prefetcher, "ask", broken)
    speech.on_partial("a secret")
    embeddings.time.advance(0.4)
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text
    monkeypatch.undo()
    speech.on_partial("a b")
    embeddings.time.advance(0.4)
    assert _run(embeddings, model) == ["a b"]
    assert speech.stats().calls == 1


def test_calls_from_within_calls_are_carried_out_after_them(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    # As a finaliser or a signal handler would, at the worst moment: amid another call.
    def listener(event: PrefetchEvent) -> None:
        if isinstance(event, PrefetchStarted) and len(events) < 5:
            events.append(event)
            speech.on_speech_started()
            speech.on_speech_stopped()
            speech.on_partial(f"a b {len(events)}")
            speech.reset()
            speech.on_final(f"c d {len(events)}")

    events: list[PrefetchEvent] = []
    embeddings = manual(model, on_event=listener)
    speech = UtterancePrefetcher(embeddings, debounce=0.0)
    speech.on_partial("a b")
    embeddings.time.advance(1.0)
    assert len(events) == 5
    assert _run(embeddings, model) == ["c d 5"]
    assert speech.stats().utterances == 10


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such signals")
def test_a_signal_handler_may_call_everything_at_any_moment(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model, max_entries=10_000)
    speech = UtterancePrefetcher(embeddings, debounce=0.0)
    handled = 0

    def handler(*_: object) -> None:
        nonlocal handled
        handled += 1
        speech.on_speech_started()
        speech.on_partial(f"signal {handled}")
        speech.on_speech_stopped()
        speech.on_final(f"final {handled}")
        speech.reset()
        speech.stats()

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
        i = 0
        while handled < 200:
            i += 1
            speech.on_partial(f"partial {i}")
            speech.on_speech_started()
            speech.on_speech_stopped()
            speech.on_final(f"this is {i}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not speech._mailbox._posted


def test_a_partial_brought_on_a_loop_is_prefetched(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    speech = UtterancePrefetcher(embeddings, debounce=0.01)

    async def turn() -> list[float]:
        speech.on_partial("how much is it")
        await auntil(lambda: embeddings.is_ready("how much is it"))
        speech.on_final("how much is it")
        await auntil(lambda: speech.last_utterance)  # the timer's thread may carry it out
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
    until(lambda: speech._wakes_at == math.inf)
    speech.reset()
    until(lambda: not embeddings.prefetcher.leaks())
    stats, flown = speech.stats(), embeddings.stats()
    assert stats.calls == flown.prefetch_started - flown.prefetch_withdrawn
    assert stats.withdrawn == flown.prefetch_withdrawn
    assert stats.calls >= stats.wasted >= 0
    assert stats.utterances >= stats.hits


def test_thousands_at_once_share_one_thread_and_leave_nothing(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model, max_workers=4, max_pending=4000)
    before = set(threading.enumerate())
    under_way = [UtterancePrefetcher(embeddings, debounce=0.05) for _ in range(2000)]
    for words in ("how", "how much", "how much is", "how much is it"):
        for i, speech in enumerate(under_way):
            speech.on_partial(f"number {i} {words}")
    started = [thread.name for thread in threading.enumerate() if thread not in before]
    assert started.count("prefetch-embeddings-timer") == 1
    assert len(started) <= 1 + 4
    for i, speech in enumerate(under_way):
        speech.on_final(f"number {i} how much is it")
    until(lambda: sum(speech.stats().utterances for speech in under_way) == 2000)  # noqa: F821
    until(lambda: not embeddings.prefetcher.leaks())
    ended = [weakref.ref(speech) for speech in under_way]
    del under_way, speech

    def all_gone() -> bool:
        gc.collect()
        return not any(ref() for ref in ended)

    until(all_gone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_anew(embeddings: ManualPrefetchingEmbeddings) -> None:
    speech = UtterancePrefetcher(embeddings, debounce=0.4)
    speech.on_partial("how much")
    with speech._mailbox._at_work:  # as another thread of the parent may be
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
