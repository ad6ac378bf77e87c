"""What listeners are told: facts about flights and queries, never a text."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["embedding", "retrieval"]
"""What is prefetched: a vector, or documents."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchEvent:
    """Something that happened to one text.

    Attributes:
        text_digest: Eight hexadecimal digits that tell the texts of one process apart. Another
            process has others for them, so that no text can be guessed from its digest.
        text_length: The text's length in characters.
        kind: What is prefetched: "embedding" or "retrieval".
    """

    text_digest: str
    text_length: int
    kind: Kind = dataclasses.field(default="embedding", kw_only=True)


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchStarted(PrefetchEvent):
    """A prefetch has started a flight; told in the caller's thread and context.

    Attributes:
        flight: A number that the other events of this flight carry, too.
    """

    flight: int


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchSucceeded(PrefetchEvent):
    """A flight that a prefetch started has brought its value.

    Attributes:
        flight: Its number.
        seconds: From the prefetch to the value.
        attempt: Which try brought it, from 1.
    """

    flight: int
    seconds: float
    attempt: int


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchFailed(PrefetchEvent):
    """An attempt in the background has failed, or whoever was to make it has gone.

    Attributes:
        flight: The number of its flight.
        error: The name of the exception's class. (Its message may quote the text.)
        attempt: Which try failed, from 1; 0 if `close` took the prefetch back before its first.
        will_retry: Whether another try follows.
    """

    flight: int
    error: str
    attempt: int
    will_retry: bool


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchDropped(PrefetchEvent):
    """A prefetch was refused.

    The queue is full, calls keep failing, the wrapper is closed or the text is blank.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class HedgeStarted(PrefetchEvent):
    """A flight that took too long has got another call: a hedge, or beside one that is overdue.

    Attributes:
        flight: Its number.
    """

    flight: int


@dataclasses.dataclass(frozen=True, slots=True)
class QueryServed(PrefetchEvent):
    """A query has its value.

    Attributes:
        flight: The number of the flight that served it.
        how: What the query met: a value that was ready, a flight that it joined, one that was
            still queued and that it ran itself, or nothing.
        seconds: What the query waited.
        recovered: Whether the flight it had joined failed, and a call of its own answered it.
    """

    flight: int
    how: Literal["ready", "joined", "claimed", "missed"]
    seconds: float
    recovered: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class QueryFailed(PrefetchEvent):
    """A query ended in an error of the model.

    Attributes:
        flight: The number of the flight that failed it.
        error: The name of the exception's class.
        seconds: What the query waited.
    """

    flight: int
    error: str
    seconds: float
