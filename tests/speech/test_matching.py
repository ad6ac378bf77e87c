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
    FILLERS,
    RUSSIAN_FILLERS,
    MatchSpoken,
    match_spoken,
)
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import Call, until

Manual = Callable[..., ManualPrefetchingEmbeddings]


SAME = {
    "ru": [
        ("Сколько стоит роуминг?", "сколько стоит роуминг"),
        ("«Сколько стоит?»", "сколько стоит"),
        ("Ёлка ещё есть", "елка еще есть"),
        ("е\u0308лка", "ёлка"),  # decomposed
        ("Скидка 10 %?", "скидка 10%"),
        ("Тариф № 5", "тариф №5"),
        ("кто-нибудь — есть?", "кто нибудь есть"),
        ("10\u00a0000 рублей", "10 000 рублей"),
        ("Что такое «Привет, мир»?", "что такое привет мир"),
    ],
    "en": [
        ("How much is it?", "how much is it"),
        ("what's the price", "what’s the price"),
        ("what's the price", "whats the price"),
        ("what´s the price", "whats the price"),
        ("I don't know", "i dont know"),
        ("  how\tmuch\u00a0is \n it ", "how much is it"),
        ("ｈｏｗ ｍｕｃｈ", "how much"),
        ("ﬁber tariff", "fiber tariff"),
        ("wi-fi — at home…", "wi fi at home"),
        ("hello,world", "hello world"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("so\u00adft", "soft"),
        ("is it −5 °C", "is it -5°C"),
        ("CO₂ sensor", "co2 sensor"),
        ("the dogs' food", "the dogs food"),
        ("½ litre", "1/2 litre"),
    ],
    "de": [
        ("Straße", "strasse"),
        ("Wie viel kostet „Magenta“?", "wie viel kostet magenta"),
        ("Größe", "gro\u0308ße"),
        ("5 €", "5€"),
    ],
    "fr": [("Combien coûte l’abonnement ?", "combien coûte l'abonnement"), ("« Où »", "où")],
    "es": [("¿Cuánto cuesta?", "cuánto cuesta"), ("¡Ayuda!", "ayuda")],
    "pt": [("Quanto custa a instalação?", "quanto custa a instalação")],
    "it": [("Quant'è?", "quant’è"), ("Perché?", "perche\u0301")],
    "pl": [("Ile kosztuje łącze?", "ile kosztuje łącze")],
    "uk": [("Скільки коштує об’єднаний тариф?", "скільки коштує об'єднаний тариф")],
    "tr": [
        ("İnternet ne kadar?", "internet ne kadar"),
        ("I\u0307nternet ne kadar?", "internet ne kadar"),
        ("İnternet ne kadar?", "i\u0307nternet ne kadar"),  # as str.lower() writes it
        ("Isıtma ne kadar?", "ısıtma ne kadar"),
        ("Isparta bileti ne kadar?", "ısparta bileti ne kadar"),
        ("«İptal etmek istiyorum»", "iptal etmek istiyorum"),
    ],
    "zh": [
        ("千兆 套餐 多少 钱", "千兆套餐多少钱"),
        ("你好，千兆套餐多少钱？", "你好千兆套餐多少钱"),
        ("iPhone 多少钱", "iphone多少钱"),
        ("５ 元", "5元"),
    ],
    "ja": [
        ("インターネットの料金は、いくらですか。", "インターネットの料金はいくらですか"),
        ("料金 は いくら", "料金はいくら"),
        ("ｶﾞｽ料金", "ガス料金"),
    ],
    "th": [("ราคา อินเทอร์เน็ต\u200bเท่าไหร่", "ราคาอินเทอร์เน็ตเท่าไหร่")],
    "ko": [("요금이 얼마예요?", "요금이 얼마예요")],
    "ar": [("كم السعر؟", "كم السعر"), ("٥٪", "5%"), ("كـــم", "كم")],
    "hi": [("कीमत क्या है?", "कीमत क्या है"), ("५ जीबी।", "5 जीबी")],
}

DIFFERENT = {
    "ru": [
        ("мой", "мои"),
        ("сколько стоит кабель 5", "сколько стоит кабель 5 мм"),
        ("минус −5", "минус 5"),
        ("10² метров", "102 метров"),
        ("3,5 гигабайта", "35 гигабайт"),
        ("3,5 гигабайта", "3 5 гигабайт"),
        ("5+5", "55"),
        ("скидка 5 %", "скидка 5"),
        ("5 ₽", "5 $"),
        ("тариф №5", "тариф 5"),
        ("*100#", "100"),
        ("2½ часа", "21/2 часа"),
    ],
    "en": [
        ("how much is it", "how much was it"),
        ("3.5 gigabytes", "35 gigabytes"),
        ("3.5 gigabytes", "3 5 gigabytes"),
        ("is it -5 outside", "is it 5 outside"),
        ("is it –5 outside", "is it 5 outside"),
        ("what is 7 - 5", "what is 7 5"),
        ("what is 1/2", "what is 1 2"),
        ("room ①1", "room 11"),
        ("10₂", "102"),
        ("5 %", "5"),
        ("5‰", "5"),
        ("c#", "c"),
        ("c++", "c"),
        ("5 €", "5 $"),
        ("5 $6", "5$ 6"),
        ('a 5" cable', "a 5 cable"),
        ("5'10\"", "510"),
        ("we're open", "were open"),
        ("I'll", "ill"),
        ("how much is it", "howmuch is it"),
    ],
    "de": [("wie viel uhr", "um wie viel uhr"), ("schon", "schön"), ("ist da", "ist er da")],
    "fr": [("l'une", "lune"), ("ou", "où"), ("qu'elle", "quelle")],
    "es": [("ano", "año"), ("si", "sí"), ("cuanto mas", "cuánto más")],
    "pt": [("cancelar contrato", "cancelar um contrato"), ("avó", "avô")],
    "it": [("l'una", "luna"), ("c'era", "cera"), ("e", "è")],
    "pl": [("zadac", "żądać")],
    "uk": [("лист", "ліст")],
    "tr": [("sınır nerede", "sinir nerede"), ("ılık su", "ilik su"), ("Ilık su", "İlik su")],
    "zh": [("5、6元", "56元"), ("买5个", "买 -5 个"), ("苹果 3 5", "苹果 35")],
    "ja": [("びよういん", "びょういん"), ("5〜10", "510"), ("かき", "がき")],
    "ko": [("아버지가 방에", "아버지 가방에")],
    "ar": [("5٪", "5"), ("٣٫٥", "٣٥")],
    "hi": [("कल", "काल"), ("५%", "५")],
}


@pytest.mark.parametrize("language", SAME)
def test_what_a_voice_does_not_carry_makes_no_difference(language: str) -> None:
    in_the_language = MatchSpoken(*{language} & FILLERS.keys())
    for one, other in SAME[language]:
        for match in (match_spoken, MatchSpoken(), in_the_language):
            assert match(one) == match(other)


@pytest.mark.parametrize("language", DIFFERENT)
def test_what_can_change_a_question_does(language: str) -> None:
    in_the_language = MatchSpoken(*{language} & FILLERS.keys())
    for one, other in DIFFERENT[language]:
        for match in (match_spoken, MatchSpoken(), in_the_language):
            assert match(one) != match(other)


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


@pytest.mark.parametrize(
    ("with_sounds", "without"),
    [
        ("Hmm, how much is it?", "how much is it"),
        ("Uhhh how much is it?", "how much is it"),
        ("How much, ummm, is it?", "how much is it"),
        ("Ээээ, сколько это стоит?", "сколько это стоит"),
        ("М-м-м, сколько это стоит?", "сколько это стоит"),
        ("Сколько э-э стоит", "сколько стоит"),
        ("Хммм, сколько стоит", "сколько стоит"),
        ("Ähhh, was kostet das?", "was kostet das"),
        ("Ehh, ¿cuánto cuesta?", "cuánto cuesta"),
    ],
)
def test_drawn_out_sounds_are_left_out_in_any_language(with_sounds: str, without: str) -> None:
    assert MatchSpoken()(with_sounds) == match_spoken(without)
    assert match_spoken(with_sounds) != match_spoken(without)


@pytest.mark.parametrize(
    ("language", "with_sounds", "without"),
    [
        ("de", "Ähm, was kostet das?", "was kostet das"),
        ("en", "Um, how much, uh, is it?", "how much is it"),
        ("es", "Ehm, ¿cuánto cuesta?", "cuánto cuesta"),
        ("fr", "Euh, c’est combien ?", "c'est combien"),
        ("it", "Ehm, quanto costa?", "quanto costa"),
        ("ja", "えーと、いくらですか", "いくらですか"),
        ("pl", "Yyy, ile to kosztuje?", "ile to kosztuje"),
        ("pt", "Hã, quanto custa?", "quanto custa"),
        ("ru", "Эм, сколько, хм, стоит?", "сколько стоит"),
        ("tr", "Iıı, ne kadar?", "ne kadar"),
        ("uk", "Ем, скільки коштує?", "скільки коштує"),
        ("zh", "呃，多少钱？", "多少钱"),
    ],
)
def test_shorter_sounds_are_left_out_where_their_language_is_named(
    language: str, with_sounds: str, without: str
) -> None:
    assert MatchSpoken(language)(with_sounds) == match_spoken(without)
    assert MatchSpoken()(with_sounds) != match_spoken(without)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("where is the", "Where is the ER?"),
        ("сколько стоит кабель 5", "Сколько стоит кабель 5 мм?"),
        ("a cable of 5", "A cable of 5 mm"),
        ("a layer of 5", "a layer of 5 um"),
        ("a layer of 5", "a layer of 5, um"),
        ("кабель 5", "кабель 5 мммм"),
        ("wann kommt", "Wann kommt er?"),
        ("ist da", "Ist er da?"),
        ("quero cancelar contrato", "Quero cancelar um contrato"),
        ("wie viel uhr", "Um wie viel Uhr?"),
        ("что такое", "Что такое МММ?"),
        ("где купить погоди", "Где купить «Ну, погоди»?"),
        ("ваши реквизиты", "ООО ваши реквизиты"),
        ("batteries", "AAA batteries"),
        ("what does mean", "what does uh-uh mean"),
        ("he said", "he said mm-hmm"),
    ],
)
def test_words_that_carry_meaning_are_kept(one: str, other: str) -> None:
    for match in (match_spoken, MatchSpoken(), MatchSpoken("ru"), MatchSpoken("de", "pt")):
        assert match(one) != match(other)


def test_what_is_nothing_but_fillers_stays() -> None:
    match = MatchSpoken("en")
    assert match("Um.") == "um"
    assert match("um, uh") != match("erm")
    assert match("?") == "?"
    assert match("umbrella") == "umbrella"


def test_fillers_are_compared_in_their_normal_form() -> None:
    match = MatchSpoken(fillers={"Please", "y'know", "Ёлки"})
    assert match("please, the price y’know елки") == "the price"
    assert MatchSpoken()("um the price") == "um the price"


def test_languages_and_fillers_that_are_none() -> None:
    with pytest.raises(ValueError, match="xx"):
        MatchSpoken("xx")
    with pytest.raises(TypeError, match="language"):
        MatchSpoken({"please"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fillers"):
        MatchSpoken(fillers="please")


def test_no_filler_is_a_word_of_another_list_or_means_something() -> None:
    assert FILLERS["en"] == ENGLISH_FILLERS
    assert FILLERS["ru"] == RUSSIAN_FILLERS
    means_something = {"er", "mm", "мм", "hm", "ну", "вот", "ага", "э", "eh", "ah", "like", "あの"}
    for fillers in FILLERS.values():
        assert not fillers & means_something
        assert all(unicodedata.is_normalized("NFKC", filler) for filler in fillers)


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
