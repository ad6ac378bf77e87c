"""What is known of one utterance: its transcripts, what was asked for them, what came of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings.stats import Snapshot

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Hashable

    from prefetch_embeddings._flights.flight import Ticket
    from prefetch_embeddings._speech.served import Place


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
        served: Whether a query has found the final text's vector ready, or under way. A hit that
            serves no query gains nothing: the retriever asks for another text.
    """

    calls: int
    withdrawn: int
    wasted: int
    hit: bool
    lead: float
    served: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SpeechStats(Snapshot):
    """What prefetching did for all utterances so far. Two snapshots subtract.

    `calls` and `withdrawn` count at once, the rest when an utterance ends, and `served` when its
    query comes, at the latest until the next utterance ends.

    Attributes:
        utterances: Utterances that have ended, with a final transcript or by a `reset`.
        calls: As in `UtteranceStats`.
        withdrawn: As in `UtteranceStats`.
        wasted: As in `UtteranceStats`.
        hits: Utterances whose final text a partial transcript had prefetched.
        lead_seconds: The sum of their leads.
        served: Utterances whose query found the final text's vector ready, or under way.
    """

    utterances: int = 0
    calls: int = 0
    withdrawn: int = 0
    wasted: int = 0
    hits: int = 0
    lead_seconds: float = 0.0
    served: int = 0

    def __add__(self, later: SpeechStats) -> SpeechStats:
        """Return the sums."""
        return SpeechStats(
            *(
                getattr(self, field.name) + getattr(later, field.name)
                for field in dataclasses.fields(self)
            )
        )


class Transcript:
    """A partial or final transcript.

    Args:
        key: What decides that two are the same.
        text: What was heard.
        came_at: When.
        context: Of whoever brought it.
    """

    __slots__ = ("came_at", "context", "due", "key", "text")

    def __init__(
        self, key: Hashable, text: str, came_at: float, context: contextvars.Context
    ) -> None:
        self.key: Final = key
        self.text: Final = text
        self.came_at: Final = came_at
        self.context: contextvars.Context | None = context  # None once it was asked for
        self.due: float | None = None  # when it is to be asked for; None: not by the clock


class Ask:
    """What one utterance asked for one text."""

    __slots__ = ("calls", "marks", "partial_at", "places", "served", "tickets")

    def __init__(self) -> None:
        self.calls = 0  # that this started
        self.tickets: list[Ticket[Any]] = []
        self.partial_at: float | None = None  # when a partial transcript had it prefetched
        self.marks: set[int | str] = set()  # its flights and its text, see `ServedQueries`
        self.places: list[Place] = []
        self.served = False


class Utterance:
    """One utterance. Used by one thread at a time."""

    def __init__(self) -> None:
        self.standing: Transcript | None = None  # the newest partial transcript
        self.final: Transcript | None = None
        self.ended = False
        self.asks: Final[dict[Hashable, Ask]] = {}  # by key
        self.withdrawn = 0
        self.hit = False
        self.lead = 0.0

    def ask_for(self, transcript: Transcript) -> Ask:
        """Return what was asked for a transcript's text."""
        return self.asks.setdefault(transcript.key, Ask())

    @property
    def calls(self) -> int:
        """How many calls it started."""
        return sum(ask.calls for ask in self.asks.values())

    @property
    def wasted(self) -> int:
        """How many of them were for another text than the final one."""
        return self.calls - (0 if self.final is None else self.ask_for(self.final).calls)

    @property
    def served(self) -> bool:
        """Whether a query was served with the final text's vector."""
        return self.final is not None and self.ask_for(self.final).served

    def stats(self) -> UtteranceStats:
        """Return what prefetching did for it."""
        return UtteranceStats(
            self.calls, self.withdrawn, self.wasted, self.hit, self.lead, self.served
        )
