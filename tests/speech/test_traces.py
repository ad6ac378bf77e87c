"""The traces: the recorded file, the generator's stated statistics, the recorder's pure parts."""

import json
import math
from collections import Counter
from dataclasses import FrozenInstanceError, dataclass, replace
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.traces import RECORDED, Partial, Trace, load, plain, questions
from benchmarks.traces.parametric import (
    FAST_FINALS,
    FEW_PARTIALS,
    MANY_PARTIALS,
    Difference,
    Punctuation,
    Shape,
    generate,
)
from benchmarks.traces.record import (
    BYTES_PER_SECOND,
    CHUNKS_MS,
    SAMPLE_RATE,
    VOICES,
    Endpointer,
    chunks,
    in_a_quiet_room,
    listen,
    resampled,
    speaker_of,
)
from benchmarks.traces.summary import statistics, table, word_error_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

RESCORED = pytest.mark.parametrize("rescored", [False, True])
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        MANY_PARTIALS,
        FEW_PARTIALS,
        FAST_FINALS,
        *(replace(MANY_PARTIALS, punctuation=punctuation) for punctuation in Punctuation),
        *(
            replace(MANY_PARTIALS, settled_share=0.0, differences=((difference, 1.0),))
            for difference in Difference
        ),
    ],
    ids=repr,
)


def trace(
    *partials: tuple[float, str],
    final: tuple[float, str],
    question: str = "why is it so slow",
) -> Trace:
    return Trace(tuple(Partial(*each) for each in partials), Partial(*final), 1.0, question)


def assert_sound(traces: "Sequence[Trace]") -> None:
    for each in traces:
        times = [partial.at_seconds for partial in each.partials]
        assert times
        assert times[0] >= 0.0
        assert all(earlier < later for earlier, later in pairwise(times))
        assert times[-1] <= each.final.at_seconds
        assert each.speech_end_seconds <= each.final.at_seconds
        texts = [partial.text for partial in each.partials]
        assert all(text == text.strip() != "" for text in [*texts, each.final.text])
        assert all(before != after for before, after in pairwise(texts))


# The questions and the recorded file.


def test_questions_are_varied_and_of_a_voice_bots_length() -> None:
    asked = questions()

    assert len(asked) >= 140
    assert len(set(map(plain, asked))) == len(asked)
    assert {4 <= len(question.split()) <= 16 for question in asked} == {True}


@RESCORED
def test_recorded_traces_are_sound(rescored: bool) -> None:
    traces = load(rescored=rescored)

    assert len(traces) >= 100
    assert [each.question for each in traces] == list(questions())
    assert_sound(traces)


def test_recorded_file_says_where_it_comes_from() -> None:
    header = json.loads(RECORDED.read_text(encoding="utf-8").splitlines()[0])

    assert header["synthetic"] is True
    assert set(header["packages"]) == {"pocketsphinx", "espeakng-loader", "numpy"}
    assert header["recogniser"]["endpointing_seconds"] == 0.7
    assert set(VOICES) == set(header["speech"]["voices"])


def test_recorded_finals_come_after_the_endpointing_delay() -> None:
    delays = [each.final.at_seconds - each.speech_end_seconds for each in load()]

    assert min(delays) >= 0.7 - 1e-9
    assert max(delays) < 0.7 + 0.1 + 0.03 + 1e-9  # at most a chunk and a frame later


def test_rescoring_changes_finals_alone() -> None:
    for streamed, rescored in zip(load(), load(rescored=True), strict=True):
        assert replace(rescored, final=streamed.final) == streamed
        assert rescored.final.at_seconds == streamed.final.at_seconds


# The trace itself.


def test_a_trace_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        trace((0.1, "why"), final=(1.0, "why")).question = "how"  # type: ignore[misc]


def test_a_trace_refuses_times_out_of_order() -> None:
    with pytest.raises(ValueError, match="ascend"):
        trace((0.2, "why"), (0.2, "why is"), final=(1.0, "why is"))
    with pytest.raises(ValueError, match="before the last partial"):
        trace((0.2, "why"), (1.2, "why is"), final=(1.0, "why is"))


def test_settled_and_lead_look_at_the_last_partial_and_foretold_at_all() -> None:
    settled = trace((0.2, "why"), (0.5, "why is"), final=(1.5, "why is"))
    reverted = trace((0.2, "why is"), (0.5, "why his"), final=(1.5, "Why is?"))
    silent = trace(final=(1.5, "why"))

    assert (settled.settled, reverted.settled, silent.settled) == (True, False, False)
    assert (settled.lead_seconds, silent.lead_seconds) == (1.0, 0.0)
    assert settled.foretold()
    assert not reverted.foretold()
    assert reverted.foretold(loosely=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Why, is  it?", "why is it"),
        ("don't", "dont"),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t", "dont"),
        ("Wi-Fi", "wi fi"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}", "a"),
    ],
)
def test_plain_drops_what_a_voice_does_not_carry(text: str, expected: str) -> None:
    assert plain(text) == expected


# The generator.


@SHAPES
def test_generated_traces_are_sound(shape: Shape) -> None:
    assert_sound(generate(500, seed=3, shape=shape))


def test_generator_repeats_itself_for_a_seed() -> None:
    assert generate(50, seed=7) == generate(50, seed=7)
    assert generate(50, seed=7) == generate(80, seed=7)[:50]
    assert generate(50, seed=7) != generate(50, seed=8)


@pytest.mark.parametrize("shape", [MANY_PARTIALS, FEW_PARTIALS], ids=["many", "few"])
def test_generator_hits_its_stated_statistics(shape: Shape) -> None:
    count = 4_000
    traces = generate(count, seed=5, shape=shape)

    share = fmean(each.settled for each in traces)
    assert abs(share - 0.61) < 3 * math.sqrt(0.61 * 0.39 / count)

    logs = [math.log(each.lead_seconds) for each in traces if each.settled]
    # The error of a sample's median is that of its mean times the root of pi/2.
    error = shape.lead_spread * math.sqrt(math.pi / 2 / len(logs))
    assert abs(median(logs) - math.log(1.1)) < 3 * error
    assert stdev(logs) == pytest.approx(shape.lead_spread, rel=0.1)


@pytest.mark.parametrize("difference", Difference)
def test_every_difference_is_what_its_name_says(difference: Difference) -> None:
    shape = Shape(settled_share=0.0, differences=((difference, 1.0),), revision_share=0.0)

    for each in generate(200, shape=shape):
        last, final = each.partials[-1].text, each.final.text
        assert last != final
        match difference:
            case Difference.LAST_WORD:
                assert last.split() == final.split()[:-1]
            case Difference.PUNCTUATION:
                assert plain(last) == plain(final)
            case Difference.REWRITTEN | Difference.REVERTED:
                changed = [
                    ours != theirs for ours, theirs in zip(last.split(), final.split(), strict=True)
                ]
                assert sum(changed) == 1
                assert each.foretold() == (difference is Difference.REVERTED)


def test_differences_come_as_often_as_they_weigh() -> None:
    shape = replace(MANY_PARTIALS, settled_share=0.0, revision_share=0.0)
    traces = generate(4_000, seed=2, shape=shape)

    seen = Counter(
        Difference.PUNCTUATION
        if plain(each.partials[-1].text) == plain(each.final.text)
        else Difference.LAST_WORD
        if len(each.partials[-1].text.split()) < len(each.final.text.split())
        else Difference.REVERTED
        if each.foretold()
        else Difference.REWRITTEN
        for each in traces
    )
    for difference, weight in shape.differences:
        error = math.sqrt(weight * (1 - weight) / len(traces))
        assert abs(seen[difference] / len(traces) - weight) < 3 * error


def test_punctuation_in_the_final_alone_defeats_exact_matching_only() -> None:
    shape = replace(MANY_PARTIALS, punctuation=Punctuation.FINAL)
    traces = generate(1_000, seed=4, shape=shape)

    assert not any(each.foretold() for each in traces)
    assert fmean(each.foretold(loosely=True) for each in traces) > 0.6
    assert all(each.final.text[-1] in ".?" for each in traces)


def test_few_partials_are_few() -> None:
    many = fmean(len(each.partials) for each in generate(500, shape=MANY_PARTIALS))
    few = fmean(len(each.partials) for each in generate(500, shape=FEW_PARTIALS))

    assert few < many / 2


# The summary.


def test_summary_counts_what_it_names() -> None:
    settled = trace((0.2, "why"), (0.5, "why is it so slow"), final=(1.5, "why is it so slow"))
    cased = trace((0.5, "why is it so slow"), final=(2.0, "Why is it so slow?"))
    wrong = trace((0.5, "why is"), final=(1.0, "why is snow"))

    figures = statistics([settled, cased, wrong])

    assert figures["last interim equals the final"] == pytest.approx(1 / 3)
    assert figures["... plain"] == pytest.approx(2 / 3)
    assert figures["lead where plain equal, median s"] == pytest.approx(1.25)
    assert figures["partials per utterance, mean"] == pytest.approx(4 / 3)
    assert word_error_rate([settled, cased]) == 0.0
    assert word_error_rate([wrong]) == pytest.approx(3 / 5)
    assert table({"here": figures}).splitlines()[0] == "|  | here |"


# The recorder, without its two packages.


@dataclass
class Said:
    hypstr: str


class ScriptedRecogniser:
    """Knows one more transcript with each chunk; the end of the utterance may change the last."""

    def __init__(self, *texts: str | None, final: str | None = None) -> None:
        self._texts = list(texts)
        self._final = final
        self._heard = 0
        self._ended = False

    def start_utt(self) -> None:
        self._heard = 0

    def process_raw(self, data: bytes) -> None:
        self._heard += 1

    def hyp(self) -> Said | None:
        if self._ended and self._final is not None:
            return Said(self._final)
        text = self._texts[min(self._heard, len(self._texts)) - 1]
        return None if text is None else Said(text)

    def end_utt(self) -> None:
        self._ended = True


class LoudIsSpeech:
    frame_bytes = BYTES_PER_SECOND * 30 // 1000

    def is_speech(self, frame: bytes) -> bool:
        assert len(frame) == self.frame_bytes
        return any(frame)


def audio(*seconds_and_level: tuple[float, int]) -> bytes:
    return b"".join(
        bytes([level]) * int(seconds * BYTES_PER_SECOND) for seconds, level in seconds_and_level
    )


def test_listen_notes_changes_and_the_final_after_the_silence() -> None:
    spoken = audio((0.3, 0), (0.6, 1), (2.0, 0))
    recogniser = ScriptedRecogniser(None, "", "why", "why", " why is ", "why", final="why not")

    heard = listen(spoken, 100, recogniser, Endpointer(LoudIsSpeech(), 0.7))

    assert heard.partials == ((0.3, "why"), (0.5, "why is"), (0.6, "why"))
    assert heard.speech_end == pytest.approx(0.9)
    assert heard.final == (1.7, "why not")


def test_listen_refuses_audio_that_ends_within_the_speech() -> None:
    with pytest.raises(ValueError, match="no end of speech"):
        listen(audio((1.0, 1)), 100, ScriptedRecogniser("why"), Endpointer(LoudIsSpeech(), 0.7))


@pytest.mark.parametrize("chunk_ms", CHUNKS_MS)
def test_endpointer_waits_for_speech_and_hears_the_same_in_any_chunks(chunk_ms: int) -> None:
    endpointer = Endpointer(LoudIsSpeech(), 0.7)
    spoken = audio((1.5, 0), (0.3, 1), (0.6, 0), (0.3, 1), (2.0, 0))

    over = next(
        number for number, chunk in enumerate(chunks(spoken, chunk_ms)) if endpointer.hear(chunk)
    )

    assert endpointer.speech_end_seconds == pytest.approx(2.7)
    assert 3.4 <= (over + 1) * chunk_ms / 1000 <= 3.4 + 0.03 + chunk_ms / 1000 + 1e-9


def test_chunks_put_together_are_the_audio() -> None:
    spoken = np.random.default_rng(1).bytes(10_000)

    assert b"".join(chunks(spoken, 20)) == spoken
    assert {len(chunk) for chunk in list(chunks(spoken, 20))[:-1]} == {640}


def test_resampling_keeps_what_is_audible_and_drops_what_would_alias() -> None:
    rate = 22_050
    seconds = np.arange(rate) / rate

    kept = resampled(np.sin(2 * np.pi * 440 * seconds), rate)
    dropped = resampled(np.sin(2 * np.pi * 9_500 * seconds), rate)

    assert len(kept) == SAMPLE_RATE
    expected = np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert np.abs(kept - expected)[100:-100].max() < 0.01
    assert np.abs(dropped)[100:-100].max() < 0.01


def test_a_room_is_repeatable_and_puts_silence_around_the_speech() -> None:
    speech = np.sin(np.arange(SAMPLE_RATE) / 10)

    quiet = in_a_quiet_room(speech, np.random.default_rng(1))

    assert quiet == in_a_quiet_room(speech, np.random.default_rng(1))
    assert quiet != in_a_quiet_room(speech, np.random.default_rng(2))
    samples = np.frombuffer(quiet, dtype="<i2")
    assert 3.3 * SAMPLE_RATE <= len(samples) <= 3.8 * SAMPLE_RATE
    assert 9_000 < np.abs(samples).max() < 10_500
    assert np.abs(samples[-2 * SAMPLE_RATE :]).max() < 100


def test_speakers_vary_and_depend_on_seed_and_line_alone() -> None:
    speakers = [speaker_of(line, seed=1) for line in range(100)]

    assert speakers == [speaker_of(line, seed=1) for line in range(100)]
    assert speakers != [speaker_of(line, seed=2) for line in range(100)]
    assert {speaker.voice for speaker in speakers} == set(VOICES)
    assert {speaker.chunk_ms for speaker in speakers} == set(CHUNKS_MS)


def test_a_fast_recogniser_is_final_soon_after_the_last_sound() -> None:
    for each in generate(100, shape=FAST_FINALS):
        assert each.final.at_seconds - each.speech_end_seconds == pytest.approx(0.3, abs=0.002)


def test_pauses_lie_within_the_speech() -> None:
    traces = generate(200, shape=MANY_PARTIALS)
    assert any(each.pauses for each in traces)
    for each in traces:
        times = [moment for pause in each.pauses for moment in pause]
        assert times == sorted(times)
        assert all(0.0 < moment < each.speech_end_seconds for moment in times)
