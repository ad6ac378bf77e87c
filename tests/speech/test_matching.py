"""Which texts are the same question."""

# ruff: noqa: RUF001 - Cyrillic and look-alikes are meant

from __future__ import annotations

import asyncio
import string
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefetch_embeddings import PrefetchStats
from prefetch_embeddings.matching import (
    ENGLISH_FILLERS,
    RUSSIAN_FILLERS,
    MatchSpoken,
    match_spoken,
)
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import Call, until

Manual = Callable[..., ManualPrefetchingEmbeddings]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How much is it?", "how much is it"),
        ("«Сколько стоит?»", "сколько стоит"),
        ("what's the price", "what’s the price"),
        ("what's the price", "whats the price"),
        ("what´s the price", "whats the price"),
        ("  how\tmuch\u00a0is \n it ", "how much is it"),
        ("Ёлка ещё есть", "елка еще есть"),
        ("е\u0308лка", "ёлка"),  # decomposed
        ("ｈｏｗ ｍｕｃｈ", "how much"),
        ("ﬁber tariff", "fiber tariff"),
        ("Straße", "strasse"),
        ("wi-fi — at home…", "wi fi at home"),
        ("hello,world", "hello world"),
    ],
)
def test_what_a_voice_does_not_carry_makes_no_difference(one: str, other: str) -> None:
    assert match_spoken(one) == match_spoken(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("how much is it", "how much was it"),
        ("3.5 gigabytes", "35 gigabytes"),
        ("5 %", "5"),
        ("c#", "c"),
        ("c++", "c"),
        ("5 €", "5 $"),
        ("мой", "мои"),
        ("how much is it", "howmuch is it"),
    ],
)
def test_what_a_voice_carries_does(one: str, other: str) -> None:
    assert match_spoken(one) != match_spoken(other)


def test_texts_of_nothing_but_punctuation_match_themselves_alone() -> None:
    assert match_spoken("?!") == match_spoken("?!")
    assert len({match_spoken(text) for text in ("?!", "...", "—", "")}) == 4


@given(st.text())
@example("ŉ")
@example("İ")
@example("\u1ac2'\u1ce7\u0a53")
def test_a_normal_form_is_its_own_normal_form(text: str) -> None:
    assert match_spoken(match_spoken(text)) == match_spoken(text)


@given(st.text(string.ascii_letters + "абвёЁй "), st.sampled_from(",.!?;:…—«»“”()[]"))
def test_punctuation_around_words_makes_no_difference(text: str, mark: str) -> None:
    marked = mark.join(f" {word} " for word in ("a", *text.split(), "b"))
    assert match_spoken(marked) == match_spoken(" ".join(("a", *text.split(), "b")))


def test_fillers_are_left_out() -> None:
    match = MatchSpoken()
    assert match("Um, how much, er, is it?") == match("how much is it")
    assert match("Ну э-э сколько это стоит") == match("сколько это стоит")
    assert match("umbrella") == "umbrella"
    assert match_spoken("um how") != match_spoken("how")


def test_what_is_nothing_but_fillers_stays() -> None:
    match = MatchSpoken()
    assert match("Um.") == "um"
    assert match("um, uh") != match("er")
    assert match("?") == "?"


def test_fillers_are_compared_in_their_normal_form() -> None:
    match = MatchSpoken(fillers={"Please", "y'know", "Ёлки"})
    assert match("please, the price y’know елки") == "the price"
    assert MatchSpoken(fillers=())("um the price") == "um the price"


def test_the_fillers_are_normal_forms() -> None:
    for filler in ENGLISH_FILLERS | RUSSIAN_FILLERS:
        assert match_spoken(filler) == filler
        assert unicodedata.is_normalized("NFKC", filler)


# --- A query that is served by a text which differs ---------------------------------------------


def test_a_matching_query_gets_the_vector_of_the_prefetched_text_and_is_counted(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, match=match_spoken)
    embeddings.prefetch("how much is it")
    embeddings.executor.run_all()
    before = embeddings.stats()
    assert embeddings.embed_query("How much is it?") == model.vector("how much is it")
    assert asyncio.run(embeddings.aembed_query("How much is it")) == model.vector("how much is it")
    after = embeddings.stats() - before
    assert (after.query_ready, after.query_matched) == (2, 2)
    embeddings.embed_query("how much is it")
    assert (embeddings.stats() - before).query_matched == 2
    assert len(model.calls) == 1


def test_a_query_that_joins_a_text_which_differs_is_counted(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, match=match_spoken)
    gate = model.hold("price")
    embeddings.prefetch("price")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    query = Call(embeddings.embed_query, "Price?")
    until(lambda: embeddings.stats().query_joined == 1)
    gate.open()
    assert query.result() == model.vector("price")
    run.result()
    assert embeddings.stats().query_matched == 1


def test_a_query_that_runs_the_flight_itself_gets_the_vector_of_its_own_text(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model, match=match_spoken)
    embeddings.prefetch("price")
    assert embeddings.embed_query("Price?") == model.vector("Price?")
    stats = embeddings.stats()
    assert (stats.query_claimed, stats.query_matched) == (1, 0)


def test_a_match_that_fails_is_not_counted(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model, match=match_spoken, attempts=1)
    gate = model.hold("price")
    model.fail("price", ValueError())
    embeddings.prefetch("price")
    run = Call(embeddings.executor.run_next)
    gate.wait_until_entered()
    query = Call(embeddings.embed_query, "Price?")
    until(lambda: embeddings.stats().query_joined == 1)
    gate.open()
    assert query.result() == model.vector("Price?")
    run.result()
    stats = embeddings.stats()
    assert (stats.query_recovered, stats.query_matched) == (1, 0)


def test_without_match_texts_are_the_same_if_they_are_equal(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    embeddings.prefetch("price")
    embeddings.executor.run_all()
    assert embeddings.embed_query("Price") == model.vector("Price")
    assert embeddings.embed_query("price") == model.vector("price")
    stats = embeddings.stats() - PrefetchStats()
    assert (stats.query_ready, stats.query_missed, stats.query_matched) == (1, 1, 0)
