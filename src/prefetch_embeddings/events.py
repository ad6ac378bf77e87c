"""What listeners and the log are told: facts about flights and queries, never a text."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import secrets
from asyncio import CancelledError
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

logger: Final = logging.getLogger("prefetch_embeddings")


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchEvent:
    """Something that happened to one text.

    Attributes:
        text_digest: Eight hexadecimal digits that tell the texts of one process apart. Another
            process has others for them, so that no text can be guessed from its digest.
        text_length: The text's length in characters.
    """

    text_digest: str
    text_length: int


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchStarted(PrefetchEvent):
    """A prefetch has started a flight; told in the caller's thread and context.

    Attributes:
        flight: A number that the other events of this flight carry, too.
    """

    flight: int


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchSucceeded(PrefetchEvent):
    """A flight that a prefetch started has brought its vector.

    Attributes:
        flight: Its number.
        seconds: From the prefetch to the vector.
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
    """A prefetch was refused: the queue is full, the wrapper closed or the text blank."""


@dataclasses.dataclass(frozen=True, slots=True)
class HedgeStarted(PrefetchEvent):
    """A flight that took too long has got a second call.

    Attributes:
        flight: Its number.
    """

    flight: int


@dataclasses.dataclass(frozen=True, slots=True)
class QueryServed(PrefetchEvent):
    """A query has its vector.

    Attributes:
        flight: The number of the flight that served it.
        how: What the query met: a vector that was ready, a flight that it joined, one that was
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


_KEY: Final = secrets.token_bytes(16)
"""Of this process and its forked children; nobody can try out which text has a digest."""


def digest(text: str) -> str:
    """Return eight hexadecimal digits that stand for `text` in this process' logs and events."""
    encoded = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=4, key=_KEY).hexdigest()


class Reporter:
    """Tells the log and listeners. Call it with no lock held: a listener may do anything."""

    def __init__(self, listener: Callable[[PrefetchEvent], None] | None) -> None:
        # Never changed in place: others may be going through it.
        self._listeners: tuple[Callable[[PrefetchEvent], None], ...] = (
            () if listener is None else (listener,)
        )

    def add_listener(self, listener: Callable[[PrefetchEvent], None]) -> None:
        """Have one more listener told from now on. What it raises keeps no other from hearing."""
        self._listeners = (*self._listeners, listener)

    @property
    def listening(self) -> bool:
        """Whether anybody listens; lets hot paths skip making an event."""
        return bool(self._listeners)

    def started(self, text: str, flight: int) -> None:
        """Tell that a prefetch has started a flight."""
        if self._listeners:
            self.tell(PrefetchStarted(digest(text), len(text), flight))

    def hedged(self, text: str, flight: int) -> None:
        """Tell that a flight has got a second call."""
        if self._listeners:
            self.tell(HedgeStarted(digest(text), len(text), flight))

    def succeeded(self, text: str, flight: int, seconds: float, attempt: int) -> None:
        """Tell that a prefetched vector is there."""
        if not self._listeners and not logger.isEnabledFor(logging.DEBUG):
            return
        event = PrefetchSucceeded(digest(text), len(text), flight, seconds, attempt)
        logger.debug(
            "text %s (%d characters) ready %.3f s after its prefetch",
            event.text_digest,
            event.text_length,
            seconds,
        )
        self.tell(event)

    def failed(
        self, text: str, flight: int, error: BaseException, attempt: int, *, will_retry: bool
    ) -> None:
        """Tell that an attempt in the background failed."""
        event = PrefetchFailed(
            digest(text), len(text), flight, type(error).__name__, attempt, will_retry
        )
        # Cancellation is how loops end and wrappers close: nothing for an operator to look into.
        level = logging.WARNING if isinstance(error, Exception) else logging.DEBUG
        logger.log(
            level,
            "prefetch of text %s (%d characters) failed: %s, attempt %d%s",
            event.text_digest,
            event.text_length,
            event.error,
            attempt,
            ", will retry" if will_retry else "",
        )
        self.tell(event)

    def dropped(self, text: str) -> None:
        """Tell that a prefetch was refused."""
        if self._listeners:
            self.tell(PrefetchDropped(digest(text), len(text)))

    def served(
        self,
        text: str,
        flight: int,
        how: Literal["ready", "joined", "claimed", "missed"],
        seconds: float,
        *,
        recovered: bool = False,
    ) -> None:
        """Tell that a query has its vector."""
        if self._listeners:
            self.tell(QueryServed(digest(text), len(text), flight, how, seconds, recovered))

    def query_failed(self, text: str, flight: int, error: BaseException, seconds: float) -> None:
        """Tell that a query ended in an error."""
        if self._listeners:
            self.tell(QueryFailed(digest(text), len(text), flight, type(error).__name__, seconds))

    def tell(self, event: PrefetchEvent) -> None:
        """Hand `event` to the listeners; what they raise is logged and goes no further."""
        for listener in self._listeners:
            try:
                listener(event)
            except (Exception, CancelledError) as error:  # noqa: BLE001 - it must not harm a query
                # The class alone: a chained message could quote the text.
                logger.error(  # noqa: TRY400
                    "on_event raised %s on %s", type(error).__name__, type(event).__name__
                )
