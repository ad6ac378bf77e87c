"""`UtterancePrefetcher`: partial transcripts in, prefetches out, while somebody still speaks."""

from __future__ import annotations

import contextvars
import math
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from prefetch_embeddings._background import forks
from prefetch_embeddings._flights.flight import PrefetchOutcome
from prefetch_embeddings._flights.prefetcher import Prefetcher
from prefetch_embeddings._speech.mailbox import Mailbox
from prefetch_embeddings._speech.served import ServedQueries
from prefetch_embeddings._speech.utterance import (
    SpeechStats,
    Transcript,
    Utterance,
    UtteranceStats,
)
from prefetch_embeddings.matching import count_words
from prefetch_embeddings.reporting import digest, logger

if TYPE_CHECKING:
    from collections.abc import Hashable

    from prefetch_embeddings._speech.utterance import Ask

__all__ = ["SpeechStats", "UtterancePrefetcher", "UtteranceStats"]

SHORT_SECONDS: Final = 0.55
"""What a partial transcript of fewer words than `min_words` must stand: it may be all there is."""

SETTLING_SECONDS: Final = 0.01
"""From the detector's "stopped", or a partial transcript after it, to the prefetch.

Enough for what a recogniser sends in one go. Each further tenth of a second costs that much lead.
"""

ROUNDING_SECONDS: Final = 1e-6
"""A moment so near has come: sums of floats are not exact."""


class Prefetches(Protocol):
    """What an `UtterancePrefetcher` feeds: `PrefetchingEmbeddings` and its like."""

    @property
    def prefetcher(self) -> Prefetcher[Any]:
        """What does the work."""


class UtterancePrefetcher:
    """Prefetches what a speaker is likely to end up asking, from a recogniser's transcripts.

    One instance per call or conversation: give it each interim transcript (`on_partial`), the
    final one (`on_final`), and tell it when the turn is over without one (`reset`). Transcripts are
    of the whole utterance so far. The final transcript is always prefetched, which does nothing
    where a partial one had the same text.

    When a partial transcript is prefetched depends on what else is known:

    * With a voice activity detector, tell `on_speech_started` and `on_speech_stopped`. Partial
      transcripts are held while the caller speaks. At the stop, the one that stands is prefetched,
      whatever its length, and so is each newer one that comes before the caller goes on. This costs
      the fewest calls. A final transcript that comes while the caller still speaks is one of
      several, and is taken as a partial one.
    * Without these signals a partial transcript is prefetched once it has stood unchanged for
      `debounce` seconds, or 0.55 s if it has fewer than `min_words` words.

    A newer transcript supersedes an older one: if its prefetch is still queued, it is withdrawn and
    not paid for. With `match` set on the prefetcher, "unchanged" and "the same" are what `match`
    says. Set `match=match_spoken` if the recogniser adds capitals or punctuation at the end.

    All methods may be called at any moment, from any thread or event loop, also while another one
    is under way in the same thread. They never block, and raise nothing but `TypeError` for what
    is not a `str`. However many instances wait at once, they share one timer thread.

    Example:
        ```python
        speech = UtterancePrefetcher.for_many_partials(embeddings)
        detector.on_speech_started(speech.on_speech_started)
        detector.on_speech_stopped(speech.on_speech_stopped)
        recogniser.on_interim(speech.on_partial)
        recogniser.on_final(speech.on_final)
        caller.on_hang_up(speech.reset)
        ```

    Args:
        prefetcher: What prefetches: a `PrefetchingEmbeddings`, which the retriever must use, too,
            or a `PrefetchingRetriever`.
        debounce: Seconds that a partial transcript must stand unchanged; 0 for not at all.
        min_words: Words from which that suffices. In scripts without spaces signs are counted.
        max_calls: Calls to the model that the partial transcripts of one utterance may start.

    Raises:
        TypeError: If `prefetcher` is nothing that prefetches.
        ValueError: If a number is negative or infinite.
    """

    def __init__(
        self,
        prefetcher: Prefetches,
        *,
        debounce: float = 0.4,
        min_words: int = 2,
        max_calls: int = 3,
    ) -> None:
        core = getattr(prefetcher, "prefetcher", None)
        if not isinstance(core, Prefetcher):
            raise TypeError(
                "prefetcher must be a PrefetchingEmbeddings or a PrefetchingRetriever, "
                f"not {type(prefetcher).__name__}"
            )
        for name, number in (
            ("debounce", debounce),
            ("min_words", min_words),
            ("max_calls", max_calls),
        ):
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} must be 0 or more, and finite, not {number}")
        self.debounce: Final = debounce
        self.min_words: Final = min_words
        self.max_calls: Final = max_calls
        self._prefetcher: Final[Prefetcher[Any]] = core
        self._served: Final = ServedQueries.of(core)
        forks.register(self)
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start anew: in a forked child nothing is pending."""
        self._mailbox = Mailbox()
        # Written by what the mailbox carries out alone, one thing after the other:
        self._utterance: Utterance | None = None  # the one under way
        self._last: Utterance | None = None  # the last one that ended
        self._wakes_at = math.inf  # when the timer's next entry for this prefetcher comes
        self._is_speaking: bool | None = None  # as the detector says; None: it never said
        self._stopped_at = -math.inf  # when it last said "stopped"
        self._totals = SpeechStats()

    @classmethod
    def for_many_partials(cls, prefetcher: Prefetches) -> Self:
        """Make one for a recogniser that tells every word as it hears it, several a second.

        With speech signals it counts on the silence that the recogniser waits for before it calls
        a transcript final, less the silence that the detector waits for: about half a second.

        Without them it counts on the former less 0.25 s. That is longer than most hypotheses that
        the recogniser takes back stand, but also about the gap between two words, so that a slow
        speaker's every word can start a call. A low limit on calls would be used up by the
        beginning of the sentence and miss its end, the one text that counts; so the limit only
        stops a runaway, and beginnings of less than four words have to stand longer instead.
        """
        return cls(prefetcher, debounce=0.25, min_words=4, max_calls=12)

    @classmethod
    def for_few_partials(cls, prefetcher: Prefetches) -> Self:
        """Make one for a recogniser that speaks up about once a second, or for phrases.

        With speech signals it counts on the same lead as `for_many_partials`.

        Without them it counts on all the time from the last partial transcript to the final one:
        what such a recogniser says has settled before it says it, and there is little of it. Each
        partial transcript is worth a call at once, and a wait would only shorten the lead.
        """
        return cls(prefetcher, debounce=0.0, min_words=3, max_calls=6)

    @classmethod
    def for_eager_turn_ends(cls, prefetcher: Prefetches) -> Self:
        """Make one for a recogniser with eager end-of-turn events; give `on_partial` these alone.

        It counts on the time from the eager event to the end of the turn, with and without speech
        signals: a turn model has judged that the speaker is probably done, which replaces debounce
        and length ("why?" is a question). A speaker who goes on brings another event: three calls
        cover two false alarms, and a fourth means that the threshold is too low.
        """
        return cls(prefetcher, debounce=0.0, min_words=1, max_calls=3)

    # --- What happens on the line --------------------------------------------------------------

    def on_speech_started(self) -> None:
        """Take in that the voice activity detector hears speech."""
        self._mailbox.post(self._started)

    def on_speech_stopped(self) -> None:
        """Take in that the voice activity detector hears silence, for long enough to say so."""
        self._mailbox.post(self._stopped, self._prefetcher.clock())

    def on_partial(self, text: str) -> None:
        """Take in an interim transcript. The first one after a final one begins an utterance.

        Args:
            text: The whole utterance so far. A blank one says nothing and changes nothing.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        transcript = self._transcript(text)
        if transcript is not None:
            self._mailbox.post(self._partial, transcript)

    def on_final(self, text: str) -> None:
        """Take in the final transcript: it is prefetched in any case, and ends the utterance.

        While the caller still speaks, by the detector, it is taken as a partial one.

        Args:
            text: What will be asked, exactly as the retriever will get it (see `match`). A blank
                one ends the utterance, too.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        transcript = self._transcript(text)
        if transcript is None:
            self._mailbox.post(self._drop)
        else:
            self._mailbox.post(self._final, transcript)

    def reset(self) -> None:
        """Drop what is pending and take back what is queued, the last final transcript included.

        For a turn that is void: the caller has hung up, or talks into the answer. What a query
        waits for is not taken back.
        """
        self._mailbox.post(self._reset)

    # --- What it did ---------------------------------------------------------------------------

    @property
    def last_utterance(self) -> UtteranceStats | None:
        """What was done for the last utterance that ended; None before the first."""
        last = self._last
        return None if last is None else last.stats()

    def stats(self) -> SpeechStats:
        """Return the sums over all utterances, as one consistent snapshot.

        What came while another thread was busy with this prefetcher may be missing for a moment.
        """
        return self._totals

    # --- What the mailbox carries out ------------------------------------------------------------

    def _started(self, _: None) -> None:
        self._is_speaking = True
        if self._utterance is not None and self._utterance.standing is not None:
            self._utterance.standing.due = None  # held, as those to come

    def _stopped(self, at: float) -> None:
        self._is_speaking = False
        self._stopped_at = at
        if self._utterance is not None and self._utterance.standing is not None:
            self._schedule(self._utterance, self._utterance.standing)

    def _partial(self, partial: Transcript) -> None:
        utterance = self._utterance = self._utterance or Utterance()
        superseded = utterance.standing
        if superseded is not None:
            if superseded.key == partial.key:
                return
            self._withdraw(utterance, superseded)
        utterance.standing = partial
        self._schedule(utterance, partial)

    def _final(self, final: Transcript) -> None:
        if self._is_speaking:
            self._partial(final)
            return
        utterance, self._utterance = self._utterance or Utterance(), None
        superseded, utterance.standing = utterance.standing, None
        utterance.final = final
        if superseded is not None and superseded.key != final.key:
            self._withdraw(utterance, superseded)
        ask = utterance.ask_for(final)
        outcome = self._ask(utterance, final)
        if ask.partial_at is not None and outcome in _UNDER_WAY:
            utterance.hit = True
            utterance.lead = final.came_at - ask.partial_at
        self._end(utterance)

    def _drop(self, _: None) -> None:
        """End the utterance under way, if there is one, without a final transcript."""
        utterance, self._utterance = self._utterance, None
        if utterance is not None:
            superseded, utterance.standing = utterance.standing, None
            if superseded is not None:
                self._withdraw(utterance, superseded)
            self._end(utterance)

    def _reset(self, _: None) -> None:
        last = self._last
        self._drop(None)
        if last is not None and last.final is not None:
            self._withdraw(last, last.final)

    def _note_served(self, mark: int | str) -> None:
        for utterance in (self._utterance, self._last):
            if utterance is None:
                continue
            was_served = utterance.served
            for ask in utterance.asks.values():
                ask.served |= mark in ask.marks
            if utterance.ended and utterance.served and not was_served:
                self._totals += SpeechStats(served=1)

    def _wake(self, _: None) -> None:
        """See whether a partial transcript is due.

        The entry in the timer outlives the partial transcript it was made for, and the utterance:
        a newer one finds it there and makes none.
        """
        self._wakes_at = math.inf
        utterance = self._utterance
        if utterance is not None and utterance.standing is not None:
            self._ask_when_due(utterance, utterance.standing)

    # --- Within that -----------------------------------------------------------------------------

    def _schedule(self, utterance: Utterance, partial: Transcript) -> None:
        """Settle when a partial transcript is due."""
        if self._is_speaking:
            partial.due = None
        elif self._is_speaking is None:
            is_short = count_words(partial.text) < self.min_words
            wait = max(self.debounce, SHORT_SECONDS) if is_short else self.debounce
            partial.due = partial.came_at + wait
        else:
            partial.due = max(partial.came_at, self._stopped_at) + SETTLING_SECONDS
        self._ask_when_due(utterance, partial)

    def _ask_when_due(self, utterance: Utterance, partial: Transcript) -> None:
        if partial.due is None or partial.context is None:
            return
        left = partial.due - self._prefetcher.clock()
        if left > ROUNDING_SECONDS:
            wakes_in_time = self._wakes_at <= partial.due + ROUNDING_SECONDS
            if not wakes_in_time and self._prefetcher.call_later(left, self._on_timer):
                self._wakes_at = partial.due
            return
        if utterance.calls < self.max_calls:
            ask = utterance.ask_for(partial)
            asked_at = self._prefetcher.clock()
            if self._ask(utterance, partial) is PrefetchOutcome.DROPPED:
                ask.partial_at = None
            elif ask.partial_at is None:
                ask.partial_at = asked_at
        partial.context = None

    def _on_timer(self) -> None:
        self._mailbox.post(self._wake)

    def _on_served(self, mark: int | str) -> None:
        self._mailbox.post(self._note_served, mark)

    def _ask(self, utterance: Utterance, transcript: Transcript) -> PrefetchOutcome:
        """Prefetch a transcript's text, and keep what tells what becomes of it."""
        context = transcript.context or contextvars.copy_context()
        ask = utterance.ask_for(transcript)
        try:
            outcome, ticket = context.run(self._prefetcher.ask, transcript.text)
        except Exception as error:  # noqa: BLE001 - the timer's thread must live
            logger.error("prefetch raised %s", type(error).__name__)  # not its message
            return PrefetchOutcome.DROPPED
        if outcome is PrefetchOutcome.STARTED:
            ask.calls += 1
            self._totals += SpeechStats(calls=1)
        if outcome is not PrefetchOutcome.DROPPED:
            self._mark(ask, digest(transcript.text))
        if ticket is not None:
            ask.tickets.append(ticket)
            if ticket.flight is not None:
                self._mark(ask, ticket.flight.number)
        return outcome

    def _mark(self, ask: Ask, mark: int | str) -> None:
        if mark not in ask.marks:
            ask.marks.add(mark)
            ask.places.append(self._served.tell(self._on_served, mark))

    def _withdraw(self, utterance: Utterance, transcript: Transcript) -> None:
        """Take back what was asked for a text; not paid for if it is queued and nobody else's."""
        ask = utterance.asks.get(transcript.key)
        if ask is None:
            return
        tickets, ask.tickets = ask.tickets, []
        taken_back = [self._prefetcher.take_back(ticket) for ticket in tickets]
        if any(taken_back) and ask.calls:
            wasted = utterance.wasted
            ask.calls -= 1
            ask.partial_at = None
            utterance.withdrawn += 1
            less = utterance.wasted - wasted if utterance.ended else 0
            self._totals += SpeechStats(calls=-1, withdrawn=1, wasted=less)

    def _end(self, utterance: Utterance) -> None:
        utterance.ended = True
        self._last = utterance
        self._totals += SpeechStats(
            utterances=1,
            wasted=utterance.wasted,
            hits=utterance.hit,
            lead_seconds=utterance.lead,
            served=utterance.served,
        )

    def _transcript(self, text: str) -> Transcript | None:
        """Return what to keep of a transcript; None for a blank one."""
        key: Hashable = self._prefetcher.key(text)
        if not text or text.isspace():
            return None
        return Transcript(key, text, self._prefetcher.clock(), contextvars.copy_context())


_UNDER_WAY: Final = (PrefetchOutcome.IN_FLIGHT, PrefetchOutcome.READY)
