"""What stands in for a caller who speaks and a recogniser that listens. Not to be copied.

Makes partial transcripts of any question, synthetic and the same for a seed. They are shaped like
the log of a streaming recogniser in which the last partial equals the final transcript in about
61 % of the segments, 1.1 s (median) before it. The pace of speech, the pauses, the words misheard
and what the other finals differ in are assumed. `benchmarks/traces` says more, and has traces of a
real recogniser.
"""

import math
import random
from dataclasses import dataclass

SETTLED_SHARE = 0.61
LEAD_MEDIAN_SECONDS = 1.1
LEAD_SPREAD = 0.35
LAST_WORD_MISSING_SHARE = 0.45
PUNCTUATED_SHARE = 0.20
"""Of the last partials that do not settle: what they differ in. In the others one word is wrong.
Punctuation and capitals are no difference for a bot with `match_spoken`."""

WORDS_PER_SECOND = 2.6
PAUSE_SHARE = 0.05
PAUSE_SECONDS = (0.3, 0.9)
MISHEARD_SHARE = 0.2
REVISION_SECONDS = (0.1, 0.4)
BEAT_SECONDS = 0.1


@dataclass(frozen=True)
class Heard:
    """What the recogniser says about one spoken question; times in seconds from its first word.

    Args:
        partials: When it says what; each stands until the next.
        spoken: When the caller has finished.
        silences: From when to when the caller paused between two words.
        final_at: When it gives the final transcript, which is the question itself.
        question: The question.
    """

    partials: tuple[tuple[float, str], ...]
    spoken: float
    silences: tuple[tuple[float, float], ...]
    final_at: float
    question: str


def listen_to(question: str, *, seed: int) -> Heard:
    """Speak a question, and listen to it."""
    dice = random.Random(f"{seed}/{question}")
    words = question.split()
    heard: list[tuple[float, list[str]]] = []
    silences: list[tuple[float, float]] = []
    now = 0.0
    for count in range(1, len(words) + 1):
        if count > 1 and dice.random() < PAUSE_SHARE:
            paused = now
            now += dice.uniform(*PAUSE_SECONDS)
            silences.append((paused, now))
        now += dice.uniform(0.5, 1.5) / WORDS_PER_SECOND
        if count == len(words):
            break
        at = now
        if dice.random() < MISHEARD_SHARE:
            heard.append((at, _misheard(words[:count], count - 1)))
            at += dice.uniform(*REVISION_SECONDS)
        heard.append((at, words[:count]))
    spoken = now
    heard.append((now + dice.uniform(*REVISION_SECONDS), _last_heard(dice, words)))

    on_the_beat: dict[int, str] = {}  # what changed within a beat is never seen
    for at, so_far in sorted(heard, key=lambda each: each[0]):
        on_the_beat[math.floor(at / BEAT_SECONDS) + 1] = " ".join(so_far)
    partials: list[tuple[float, str]] = []
    for beat, text in on_the_beat.items():
        if text != (partials[-1][1] if partials else ""):
            partials.append((round(beat * BEAT_SECONDS, 3), text))
    lead = dice.lognormvariate(math.log(LEAD_MEDIAN_SECONDS), LEAD_SPREAD)
    last_at = partials[-1][0] if partials else spoken
    final_at = max(last_at + lead, spoken)
    return Heard(tuple(partials), spoken, tuple(silences), final_at, question)


def _last_heard(dice: random.Random, words: list[str]) -> list[str]:
    if dice.random() < SETTLED_SHARE:
        return words
    difference = dice.random()
    if difference < LAST_WORD_MISSING_SHARE:
        return words[:-1]
    if difference < LAST_WORD_MISSING_SHARE + PUNCTUATED_SHARE:
        return _punctuated(words)
    return _misheard(words, dice.randrange(len(words)))


def _punctuated(words: list[str]) -> list[str]:
    """The words with a capital and a question mark, or without where they had these."""
    capital, mark = words[0].capitalize(), words[-1].rstrip("?") + "?"
    written = [capital, *words[1:-1], mark] if len(words) > 1 else [f"{capital.rstrip('?')}?"]
    return written if written != words else " ".join(words).casefold().rstrip("?").split()


def _misheard(words: list[str], position: int) -> list[str]:
    """The words with only half of one understood."""
    word = words[position]
    half = word[: len(word) // 2] or word * 2
    return [*words[:position], half, *words[position + 1 :]]
