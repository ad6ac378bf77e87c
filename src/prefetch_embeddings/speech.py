"""`UtterancePrefetcher`: partial transcripts in, prefetches out, while somebody still speaks."""

from __future__ import annotations

import contextvars
import dataclasses
import math
import threading
from typing import TYPE_CHECKING, Any, Final, Self

from prefetch_embeddings._background import forks
from prefetch_embeddings._flights.flight import PrefetchOutcome
from prefetch_embeddings.reporting import logger
from prefetch_embeddings.stats import Snapshot

if TYPE_CHECKING:
    from collections.abc import Hashable

    from prefetch_embeddings._flights.flight import Ticket
    from prefetch_embeddings.embeddings import PrefetchingEmbeddings

ROUNDING_SECONDS: Final = 1e-6
"""A moment so near has come: sums of floats are not exact."""


@dataclasses.dataclass(frozen=True, slots=True)
class UtteranceStats:
    """What prefetching did for one utterance.

    Attributes:
        calls: Calls to the model that were started for it, the one at the final transcript
            included. Less those withdrawn.
        withdrawn: Prefetches taken back while they were queued, and not paid for.
        wasted: Calls for another text than the final one.
        hit: Whether a partial transcript had the final text prefetched.
        lead: Seconds by which that prefetch came before the final transcript; 0.0 without a hit.
    """

    calls: int
    withdrawn: int
    wasted: int
    hit: bool
    lead: float


@dataclasses.dataclass(frozen=True, slots=True)
class SpeechStats(Snapshot):
    """What prefetching did for all utterances so far. Two snapshots subtract.

    `calls` and `withdrawn` count at once, the rest when an utterance ends.

    Attributes:
        utterances: Utterances that have ended, with a final transcript or by a `reset`.
        calls: As in `UtteranceStats`.
        withdrawn: As in `UtteranceStats`.
        wasted: As in `UtteranceStats`.
        hits: Utterances whose final text a partial transcript had prefetched.
        lead_seconds: The sum of their leads.
    """

    utterances: int = 0
    calls: int = 0
    withdrawn: int = 0
    wasted: int = 0
    hits: int = 0
    lead_seconds: float = 0.0

    def __add__(self, later: SpeechStats) -> SpeechStats:
        """Return the sums."""
        return SpeechStats(
            *(
                getattr(self, field.name) + getattr(later, field.name)
                for field in dataclasses.fields(self)
            )
        )


class UtterancePrefetcher:
    """Prefetches what a speaker is likely to end up asking, from a recogniser's transcripts.

    One instance per call or conversation: give it each interim transcript (`on_partial`), the
    final one (`on_final`), and tell it when the turn is over without one (`reset`). Transcripts are
    of the whole utterance so far. A partial transcript is embedded once it has stood unchanged for
    `debounce` seconds. A newer one supersedes it: if its prefetch is still queued, it is withdrawn
    and not paid for. The final transcript is always prefetched, which does nothing where a partial
    one had the same text.

    With `match` set on the embeddings, "unchanged" and "the same" are what `match` says. Set
    `match=match_spoken` if the recogniser adds capitals or punctuation at the end.

    All methods may be called from any thread or event loop. They never block, and raise nothing
    but `TypeError` for what is not a `str`. However many instances wait at once, they share one
    timer thread, and each has at most one entry in it.

    Example:
        ```python
        speech = UtterancePrefetcher.for_many_partials(embeddings)
        recogniser.on_interim(speech.on_partial)
        recogniser.on_final(speech.on_final)
        caller.on_hang_up(speech.reset)
        ```

    Args:
        embeddings: What prefetches; the retriever must use it, too.
        debounce: Seconds that a partial transcript must stand unchanged; 0 for not at all.
        min_words: Words it must have. (Choose 1 for a language that is written without spaces.)
        max_calls: Calls to the model that the partial transcripts of one utterance may start.

    Raises:
        ValueError: If a number is negative or infinite.
    """

    def __init__(
        self,
        embeddings: PrefetchingEmbeddings,
        *,
        debounce: float = 0.4,
        min_words: int = 2,
        max_calls: int = 3,
    ) -> None:
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
        self._prefetcher: Final = embeddings.prefetcher
        self._key: Final = self._prefetcher.key
        forks.register(self)
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start anew: in a forked child nothing is pending."""
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._utterance: _Utterance | None = None  # the one under way
        self._last: _Utterance | None = None  # the last one that ended
        self._will_wake = False  # whether the timer has an entry for this prefetcher
        self._totals = SpeechStats()

    @classmethod
    def for_many_partials(cls, embeddings: PrefetchingEmbeddings) -> Self:
        """Make one for a recogniser that tells every word as it hears it, several a second.

        0.25 s is longer than most hypotheses that the recogniser takes back stand, and short
        beside the 0.7 s and more for which recognisers wait in silence before they call a
        transcript final: the rest is the lead. It is also about the gap between two words, so that
        a slow speaker's every word can start a call. A low limit on calls would be used up by the
        beginning of the sentence and miss its end, the one text that counts; so the limit only
        stops a runaway, and beginnings of less than four words are left out instead.
        """
        return cls(embeddings, debounce=0.25, min_words=4, max_calls=12)

    @classmethod
    def for_few_partials(cls, embeddings: PrefetchingEmbeddings) -> Self:
        """Make one for a recogniser that speaks up about once a second, or for phrases.

        What it says has settled before it says it, and there is little of it: each partial
        transcript is worth a call at once, and a wait would only shorten the lead.
        """
        return cls(embeddings, debounce=0.0, min_words=3, max_calls=6)

    @classmethod
    def for_eager_turn_ends(cls, embeddings: PrefetchingEmbeddings) -> Self:
        """Make one for a recogniser with eager end-of-turn events; give `on_partial` these alone.

        A turn model has judged that the speaker is probably done, which replaces debounce and
        length ("why?" is a question). A speaker who goes on brings another event: three calls
        cover two false alarms, and a fourth means that the threshold is too low.
        """
        return cls(embeddings, debounce=0.0, min_words=1, max_calls=3)

    # --- What happens on the line --------------------------------------------------------------

    def on_partial(self, text: str) -> None:
        """Take in an interim transcript. The first one after a final one begins an utterance.

        Args:
            text: The whole utterance so far. A blank one says nothing and changes nothing.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        key = self._key(text)
        if not text or text.isspace():
            return
        partial = _Transcript(key, text)
        if len(text.split()) >= self.min_words:
            partial.due = self._prefetcher.clock() + self.debounce
            partial.context = contextvars.copy_context()
        with self._lock:
            utterance = self._utterance = self._utterance or _Utterance()
            if utterance.standing is not None and utterance.standing.key == key:
                return
            superseded = utterance.supersede(partial)
            wake = partial.due is not None and self.debounce > 0 and not self._will_wake
            self._will_wake |= wake
        if superseded is not None:
            self._withdraw(utterance, superseded)
        if wake:
            self._call_later(self.debounce)
        elif not self.debounce:
            self._ask(utterance, partial)

    def on_final(self, text: str) -> None:
        """Take in the final transcript: it is prefetched in any case, and ends the utterance.

        Args:
            text: What will be asked, exactly as the retriever will get it (see `match`). A blank
                one ends the utterance, too.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        key = self._key(text)
        if not text or text.isspace():
            self._drop()
            return
        final = _Transcript(key, text)
        with self._lock:
            utterance, self._utterance = self._utterance or _Utterance(), None
            superseded = utterance.supersede(None, final=final)
        if superseded is not None:
            self._withdraw(utterance, superseded)
        came_at = self._prefetcher.clock()
        outcome, ticket = self._prefetcher.ask(text)
        with self._lock:
            if outcome is PrefetchOutcome.STARTED:
                self._count_call(utterance, key)
            utterance.note_ask(key, ticket)
            asked_at = utterance.asked_at.get(key)
            if asked_at is not None and outcome in _UNDER_WAY:
                utterance.hit = True
                utterance.lead = came_at - asked_at
            self._end(utterance)

    def reset(self) -> None:
        """Drop what is pending and take back what is queued, the last final transcript included.

        For a turn that is void: the caller has hung up, or talks into the answer. What a query
        waits for is not taken back.
        """
        with self._lock:
            last, final = self._last, None if self._last is None else self._last.final
        self._drop()
        if last is not None and final is not None:
            self._withdraw(last, final)

    # --- What it did ---------------------------------------------------------------------------

    @property
    def last_utterance(self) -> UtteranceStats | None:
        """What was done for the last utterance that ended; None before the first."""
        with self._lock:
            return None if self._last is None else self._last.stats()

    def stats(self) -> SpeechStats:
        """Return the sums over all utterances, as one consistent snapshot."""
        with self._lock:
            return self._totals

    # --- Behind the curtain --------------------------------------------------------------------

    def _call_later(self, seconds: float) -> None:
        if not self._prefetcher.call_later(seconds, self._wake):
            with self._lock:
                self._will_wake = False  # so that the next partial transcript tries again

    def _wake(self) -> None:
        """See whether a partial transcript has stood long enough. Called by the timer.

        The entry in the timer outlives the partial transcript it was made for, and the utterance:
        a newer one finds it there and makes none.
        """
        with self._lock:
            utterance = self._utterance
            partial = None if utterance is None else utterance.standing
            if utterance is None or partial is None or partial.due is None:
                self._will_wake = False
                return
            left = partial.due - self._prefetcher.clock()
            self._will_wake = left > ROUNDING_SECONDS
        if left > ROUNDING_SECONDS:
            self._call_later(left - ROUNDING_SECONDS / 2)
        else:
            self._ask(utterance, partial)

    def _ask(self, utterance: _Utterance, partial: _Transcript) -> None:
        """Prefetch a partial transcript, unless it was superseded or the calls are used up."""
        with self._lock:
            context, partial.context = partial.context, None
            partial.due = None
            if (
                context is None  # too short, or another thread was here first
                or utterance.standing is not partial
                or len(utterance.calls) >= self.max_calls
            ):
                return
            self._count_call(utterance, partial.key)  # before others ask whether one is left
            utterance.asked_at.setdefault(partial.key, self._prefetcher.clock())
        try:
            outcome, ticket = context.run(self._prefetcher.ask, partial.text)
        except Exception as error:  # noqa: BLE001 - the timer's thread must live
            logger.error("prefetch raised %s", type(error).__name__)  # not its message
            outcome, ticket = PrefetchOutcome.DROPPED, None
        with self._lock:
            if outcome is not PrefetchOutcome.STARTED:
                self._uncount_call(utterance, partial.key)
            if outcome is PrefetchOutcome.DROPPED:
                utterance.asked_at.pop(partial.key, None)
            utterance.note_ask(partial.key, ticket)
            withdraw = utterance.is_past(partial)
        if withdraw:  # superseded meanwhile, by somebody who could not know that it had started
            self._withdraw(utterance, partial)

    def _withdraw(self, utterance: _Utterance, transcript: _Transcript) -> None:
        """Take back a call of ours if it is still queued and nobody else counts on it."""
        key = transcript.key
        with self._lock:
            mine = utterance.tickets.pop(key, [])
        withdrawn = [self._prefetcher.take_back(ticket) for ticket in mine]
        if not any(withdrawn):
            return
        with self._lock:
            if key not in utterance.calls:
                return
            self._uncount_call(utterance, key)
            utterance.asked_at.pop(key, None)
            utterance.withdrawn += 1
            self._totals += SpeechStats(withdrawn=1)

    def _drop(self) -> None:
        """End the utterance under way, if there is one, without a final transcript."""
        with self._lock:
            utterance, self._utterance = self._utterance, None
            if utterance is None:
                return
            superseded = utterance.supersede(None)
            self._end(utterance)
        if superseded is not None:
            self._withdraw(utterance, superseded)

    # Under the lock:

    def _count_call(self, utterance: _Utterance, key: Hashable) -> None:
        utterance.calls.append(key)
        self._totals += SpeechStats(calls=1)

    def _uncount_call(self, utterance: _Utterance, key: Hashable) -> None:
        wasted = utterance.wasted
        utterance.calls.remove(key)
        if utterance.ended:
            self._totals += SpeechStats(calls=-1, wasted=utterance.wasted - wasted)
        else:
            self._totals += SpeechStats(calls=-1)

    def _end(self, utterance: _Utterance) -> None:
        utterance.ended = True
        self._last = utterance
        self._totals += SpeechStats(
            utterances=1, wasted=utterance.wasted, hits=utterance.hit, lead_seconds=utterance.lead
        )


class _Transcript:
    """A partial or final transcript. Guarded by the prefetcher's lock, but for key and text."""

    __slots__ = ("context", "due", "key", "text")

    def __init__(self, key: Hashable, text: str) -> None:
        self.key = key
        self.text = text
        self.context: contextvars.Context | None = None  # of the caller; None once it was asked for
        self.due: float | None = None  # when it will have stood long enough; None: nothing to do


class _Utterance:
    """One utterance. Guarded by the prefetcher's lock."""

    def __init__(self) -> None:
        self.standing: _Transcript | None = None  # the newest partial transcript
        self.final: _Transcript | None = None
        self.ended = False
        self.calls: list[Hashable] = []  # the keys of calls started, or about to be
        self.tickets: dict[Hashable, list[Ticket[Any]]] = {}  # by key, of all that it asked for
        self.asked_at: dict[Hashable, float] = {}  # by key, when a partial one was prefetched
        self.withdrawn = 0
        self.hit = False
        self.lead = 0.0

    def supersede(
        self, by: _Transcript | None, *, final: _Transcript | None = None
    ) -> _Transcript | None:
        """Put another partial transcript, or none, in place.

        Returns:
            The one before if that is another text.
        """
        old, self.standing, self.final = self.standing, by, final
        return old if old is not None and self.is_past(old) else None

    def note_ask(self, key: Hashable, ticket: Ticket[Any] | None) -> None:
        """Keep a ticket, for when its ask is to be taken back."""
        if ticket is not None:
            self.tickets.setdefault(key, []).append(ticket)

    def is_past(self, partial: _Transcript) -> bool:
        """Whether a newer text has taken the place of a partial transcript's."""
        newest = self.standing or self.final
        return newest is None or newest.key != partial.key

    @property
    def wasted(self) -> int:
        """How many calls were for another text than the final one."""
        return sum(self.final is None or key != self.final.key for key in self.calls)

    def stats(self) -> UtteranceStats:
        return UtteranceStats(len(self.calls), self.withdrawn, self.wasted, self.hit, self.lead)


_UNDER_WAY: Final = (PrefetchOutcome.IN_FLIGHT, PrefetchOutcome.READY)
