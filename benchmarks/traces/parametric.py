"""Generates traces shaped like a streaming recogniser's log; synthetic, and the same for a seed."""

import enum
import math
import random
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.traces.trace import Partial, Trace, questions


class Punctuation(enum.StrEnum):
    """When the recogniser writes capitals and punctuation."""

    NEVER = "never"
    ALWAYS = "always"
    FINAL = "final"
    """In the final transcript alone, which then never equals a partial character for character."""


class Difference(enum.StrEnum):
    """In what a final transcript differs from the last interim one."""

    LAST_WORD = "last word"
    """The interim lacks it."""
    PUNCTUATION = "punctuation"
    """Or capitals; the words are the same."""
    REWRITTEN = "rewritten"
    """One word is another."""
    REVERTED = "reverted"
    """One word is another, and the interim before had it right."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the generated traces look like; the defaults follow the log, the rest is assumed."""

    #: From the log: the share of last interim transcripts that equal the final one ...
    settled_share: float = 0.61
    #: ... and the median of the seconds between the two.
    lead_median_seconds: float = 1.1
    #: The standard deviation of that lead's logarithm.
    lead_spread: float = 0.35
    #: What the others differ in, and how often.
    differences: tuple[tuple[Difference, float], ...] = (
        (Difference.LAST_WORD, 0.45),
        (Difference.PUNCTUATION, 0.20),
        (Difference.REWRITTEN, 0.25),
        (Difference.REVERTED, 0.10),
    )
    words_per_second: float = 2.6
    #: The chance that the speaker stops to think before a word, and for how long.
    pause_share: float = 0.05
    pause_seconds: tuple[float, float] = (0.3, 0.9)
    #: The chance that a word is first understood as another one, and when that is put right.
    revision_share: float = 0.2
    revision_seconds: tuple[float, float] = (0.1, 0.4)
    #: Interim transcripts come on this beat; what changed in between is never seen.
    interval_seconds: float = 0.1
    punctuation: Punctuation = Punctuation.NEVER
    #: When the final transcript comes after the last sound; None: by the log's lead.
    final_after_seconds: float | None = None


#: A recogniser that tells each word, and one that tells a few words at a time.
MANY_PARTIALS = Shape()
FEW_PARTIALS = Shape(interval_seconds=1.0)
#: One that knows the last word soon, and calls the transcript final 0.3 s after the last sound.
FAST_FINALS = Shape(revision_seconds=(0.0, 0.05), final_after_seconds=0.3)


def generate(count: int, seed: int = 1, shape: Shape = MANY_PARTIALS) -> tuple[Trace, ...]:
    """Make `count` traces; trace n is the same for a seed and a shape, whatever the count."""
    asked = questions()
    vocabulary = sorted({word for question in asked for word in _spoken(question).split()})
    return tuple(
        _trace(random.Random(f"{seed}/{number}"), shape, asked, vocabulary)
        for number in range(count)
    )


def _trace(
    dice: random.Random, shape: Shape, asked: tuple[str, ...], vocabulary: list[str]
) -> Trace:
    question = dice.choice(asked)
    words = _spoken(question).split()
    heard, speech_end, pauses = _heard_but_the_last_word(dice, shape, words, vocabulary)
    last, final = _ending(dice, shape, words, vocabulary)
    now = speech_end
    for text in last:
        now += dice.uniform(*shape.revision_seconds)
        heard.append((now, text))
    partials = _on_the_beat(heard, shape.interval_seconds)
    lead = dice.lognormvariate(math.log(shape.lead_median_seconds), shape.lead_spread)
    at_seconds = max(partials[-1].at_seconds + lead, speech_end)
    if shape.final_after_seconds is not None:
        at_seconds = speech_end + shape.final_after_seconds
        partials = tuple(partial for partial in partials if partial.at_seconds <= at_seconds)
    return Trace(
        partials, Partial(round(at_seconds, 3), final), round(speech_end, 3), question, pauses
    )


def _heard_but_the_last_word(
    dice: random.Random, shape: Shape, words: list[str], vocabulary: list[str]
) -> tuple[list[tuple[float, str]], float, tuple[tuple[float, float], ...]]:
    """The transcripts while the words come, as (seconds, text), when the last word has come, and
    the pauses before words.
    """
    heard: list[tuple[float, str]] = []
    pauses: list[tuple[float, float]] = []
    now = 0.0
    for spoken in range(1, len(words) + 1):
        if spoken > 1 and dice.random() < shape.pause_share:
            pauses.append((now, now := now + dice.uniform(*shape.pause_seconds)))
        now += dice.uniform(0.5, 1.5) / shape.words_per_second
        if heard and heard[-1][0] >= now:
            heard.pop()  # the next word came before the revision did
        if spoken == len(words):
            break
        so_far = words[:spoken]
        at = now
        if dice.random() < shape.revision_share:
            mistaken = _mistaken(dice, so_far, vocabulary, position=spoken - 1)
            heard.append((at, _written(mistaken, shape.punctuation)))
            at += dice.uniform(*shape.revision_seconds)
        heard.append((at, _written(so_far, shape.punctuation)))
    return heard, now, tuple(pauses)


def _ending(
    dice: random.Random, shape: Shape, words: list[str], vocabulary: list[str]
) -> tuple[list[str], str]:
    """The interim transcripts after the last word, and the final one."""
    interim = _written(words, shape.punctuation)
    final = _written(words, shape.punctuation, final=True)
    if dice.random() < shape.settled_share:
        return [interim], final
    differences, weights = zip(*shape.differences, strict=True)
    match dice.choices(differences, weights)[0]:
        case Difference.LAST_WORD:
            return [_written(words[:-1], shape.punctuation)], final
        case Difference.PUNCTUATION if shape.punctuation is Punctuation.NEVER:
            return [interim], _written(words, Punctuation.ALWAYS)
        case Difference.PUNCTUATION:
            return [_written(words, Punctuation.NEVER)], final
        case difference:
            mistaken = _mistaken(dice, words, vocabulary, dice.randrange(len(words)))
            written = _written(mistaken, shape.punctuation)
            return [interim, written] if difference is Difference.REVERTED else [written], final


def _mistaken(
    dice: random.Random, words: list[str], vocabulary: list[str], position: int
) -> list[str]:
    """The words with another one at `position`."""
    others = [word for word in vocabulary if word != words[position]]
    return [*words[:position], dice.choice(others), *words[position + 1 :]]


def _on_the_beat(heard: list[tuple[float, str]], interval: float) -> tuple[Partial, ...]:
    """What a listener sees who looks on the beat: the latest transcript, where it has changed."""
    seen = {math.floor(at / interval) + 1: text for at, text in heard}
    beats = sorted(seen.items())
    return tuple(
        Partial(round(beat * interval, 3), text)
        for (_, before), (beat, text) in pairwise([(0, ""), *beats])
        if text != before
    )


def _spoken(question: str) -> str:
    return question.lower().replace(",", "").rstrip(".?")


def _written(words: list[str], punctuation: Punctuation, *, final: bool = False) -> str:
    """The words as the recogniser writes them."""
    text = " ".join(words)
    if punctuation is Punctuation.ALWAYS or (punctuation is Punctuation.FINAL and final):
        mark = "?" if words[0] in _ASKING else "."
        return text[:1].upper() + text[1:] + mark
    return text


_ASKING = frozenset(
    {
        *("are", "can", "could", "do", "does", "how", "is"),
        *("what", "when", "where", "which", "who", "why"),
    }
)
