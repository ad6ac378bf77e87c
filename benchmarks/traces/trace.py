"""A trace: what a streaming recogniser said while one question was spoken, and when."""

import json
import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

#: The committed recording; `benchmarks.traces.record` makes it.
RECORDED = Path(__file__).with_name("pocketsphinx.jsonl")
QUESTIONS = Path(__file__).with_name("questions.txt")


@dataclass(frozen=True, slots=True)
class Partial:
    """A transcript as it stood from `at_seconds` on, counted in audio from the trace's start."""

    at_seconds: float
    text: str


@dataclass(frozen=True, slots=True)
class Trace:
    """One spoken question: each change of the interim transcript, then the final one."""

    partials: tuple[Partial, ...]
    final: Partial
    speech_end_seconds: float
    question: str
    """What was said, which a recogniser need not have understood."""
    pauses: tuple[tuple[float, float], ...] = ()
    """When the speaker stopped to think, and when he went on; not known of recorded ones."""

    def __post_init__(self) -> None:
        times = [partial.at_seconds for partial in self.partials]
        if any(earlier >= later for earlier, later in pairwise(times)):
            raise ValueError(f"partials do not ascend in time: {times}")
        if times and times[-1] > self.final.at_seconds:
            raise ValueError(f"the final at {self.final.at_seconds} s is before the last partial")

    @property
    def settled(self) -> bool:
        """Whether the last interim transcript is the final one, character for character."""
        return bool(self.partials) and self.partials[-1].text == self.final.text

    @property
    def lead_seconds(self) -> float:
        """How long the last interim transcript stood before the final one came; 0.0 without any."""
        return self.final.at_seconds - self.partials[-1].at_seconds if self.partials else 0.0

    def foretold(self, *, loosely: bool = False) -> bool:
        """Whether the final text was ever a partial; `loosely` compares the `plain` texts."""
        same = plain if loosely else str
        return same(self.final.text) in {same(partial.text) for partial in self.partials}


def load(path: Path = RECORDED, *, rescored: bool = False) -> tuple[Trace, ...]:
    """Read recorded traces, in the order of their questions.

    Args:
        path: A file written by `benchmarks.traces.record`: a header line, then a line per trace.
        rescored: Take the final transcripts that the recogniser's second and third pass over the
            whole utterance gave, instead of the streaming pass's own.
    """
    with path.open(encoding="utf-8") as lines:
        next(lines)
        return tuple(_trace(json.loads(line), rescored=rescored) for line in lines)


def questions() -> tuple[str, ...]:
    """The questions that were written for the traces."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


def plain(text: str) -> str:
    """The text without what a voice does not carry: case, punctuation, the kind of white space."""
    folded = (
        unicodedata.normalize("NFKC", text)
        .casefold()
        .replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    kept = "".join(
        "" if letter == "'" else " " if unicodedata.category(letter)[0] == "P" else letter
        for letter in folded
    )
    return " ".join(kept.split())


def _trace(line: dict[str, Any], *, rescored: bool) -> Trace:
    at_seconds, text = line["final"]
    return Trace(
        partials=tuple(Partial(at, interim) for at, interim in line["partials"]),
        final=Partial(at_seconds, line["rescored"] if rescored else text),
        speech_end_seconds=line["speech_end"],
        question=line["question"],
    )
