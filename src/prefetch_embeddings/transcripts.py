"""The log of a bot's traffic, for `prefetch_embeddings.replay`: writing it, and reading it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from prefetch_embeddings.matching import count_words, match_spoken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prefetch_embeddings.speech import UtterancePrefetcher

What: TypeAlias = Literal[
    "partial", "final", "speech_started", "speech_stopped", "query", "hang_up"
]


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line of a log.

    Attributes:
        call: Which call it belongs to.
        t: When, in seconds.
        e: What happened.
        text: The transcript or query; empty where there is none.
        seconds: What a query took; None if that is not known.
    """

    call: str
    t: float
    e: What
    text: str = ""
    seconds: float | None = None


class TranscriptLog:
    """Writes the log of a bot's traffic, one JSON object a line.

    Call it where the recogniser and the chain call the bot. Each call costs some microseconds and a
    write to a buffered file. Threads may share it.

    Example:
        ```python
        log = TranscriptLog("calls.jsonl", texts=False)
        log.partial(call, "how much is")
        log.final(call, "how much is it?")
        log.query(call, "how much is it?", seconds=0.71)
        ```

    Args:
        path: Is appended to.
        texts: Whether texts are written. Otherwise a digest stands for each, with the number of
            its words. The digest is keyed by a random key that nobody keeps, and is of what
            `match_spoken` makes of the text, so that texts that sound the same have the same.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        texts: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._texts: Final = texts
        self._clock: Final = clock
        self._key: Final = secrets.token_bytes(16)

    def partial(self, call: str, text: str) -> None:
        """Note an interim transcript: the whole utterance so far."""
        self._write(call, "partial", text)

    def final(self, call: str, text: str) -> None:
        """Note a final transcript."""
        self._write(call, "final", text)

    def speech_started(self, call: str) -> None:
        """Note that the voice activity detector hears speech."""
        self._write(call, "speech_started")

    def speech_stopped(self, call: str) -> None:
        """Note that it hears silence."""
        self._write(call, "speech_stopped")

    def query(self, call: str, text: str, *, seconds: float | None = None) -> None:
        """Note that the chain asked.

        Args:
            call: Which call.
            text: What it asked for.
            seconds: What that took, if it is known; then it is noted when it is over.
        """
        self._write(call, "query", text, seconds)

    def hang_up(self, call: str) -> None:
        """Note that a call has ended, or the caller talks into the answer."""
        self._write(call, "hang_up")

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        self._file.close()

    def _write(self, call: str, e: What, text: str = "", seconds: float | None = None) -> None:
        line: dict[str, Any] = {"call": call, "t": self._clock() - (seconds or 0.0), "e": e}
        if text and self._texts:
            line["text"] = text
        elif text:
            spoken = match_spoken(text).encode("utf-8", "surrogatepass")
            line["digest"] = hashlib.blake2b(spoken, digest_size=8, key=self._key).hexdigest()
            line["words"] = count_words(text)
        if seconds is not None:
            line["seconds"] = seconds
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")


class LoggedSpeech:
    """Stands in for an `UtterancePrefetcher`, and writes down what it is told.

    An adapter of a voice framework takes it in the place of the prefetcher.

    Args:
        speech: Is told the same; None for a bot that only writes its log.
        log: Where it is written.
        call: Which call it is.
    """

    def __init__(self, speech: UtterancePrefetcher | None, log: TranscriptLog, call: str) -> None:
        self._speech: Final = speech
        self._log: Final = log
        self._call: Final = call

    def on_speech_started(self) -> None:
        """Take in that the voice activity detector hears speech."""
        self._log.speech_started(self._call)
        if self._speech is not None:
            self._speech.on_speech_started()

    def on_speech_stopped(self) -> None:
        """Take in that it hears silence."""
        self._log.speech_stopped(self._call)
        if self._speech is not None:
            self._speech.on_speech_stopped()

    def on_partial(self, text: str) -> None:
        """Take in an interim transcript."""
        self._log.partial(self._call, text)
        if self._speech is not None:
            self._speech.on_partial(text)

    def on_final(self, text: str) -> None:
        """Take in a final transcript."""
        self._log.final(self._call, text)
        if self._speech is not None:
            self._speech.on_final(text)

    def reset(self) -> None:
        """Take in that the turn is void, or the call over."""
        self._log.hang_up(self._call)
        if self._speech is not None:
            self._speech.reset()


def read(lines: Iterable[str]) -> tuple[list[Line], list[int]]:
    """Read a log.

    Returns:
        Its lines in the order of time, and the numbers, from 1, of those that make no sense.
    """
    good: list[Line] = []
    bad: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            good.append(_parsed(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            bad.append(number)
    good.sort(key=lambda each: each.t)
    return good, bad


def _parsed(line: Any) -> Line:
    e, t, seconds = line["e"], line["t"], line.get("seconds")
    if e not in get_args(What):
        raise ValueError(e)
    for number in (t, seconds):
        if isinstance(number, bool) or not (number is None or math.isfinite(number)):
            raise ValueError(number)
    text = line.get("text")
    if text is None and "digest" in line:
        text = " ".join([str(line["digest"])] * max(1, int(line["words"])))
    if not isinstance(text, str) and e in ("partial", "final", "query"):
        raise TypeError(text)
    return Line(str(line["call"]), float(t), e, text or "", seconds)
