"""Tells listeners and the log what happens, and names a text by its digest."""

from __future__ import annotations

import hashlib
import logging
import secrets
from asyncio import CancelledError
from typing import TYPE_CHECKING, Final, Literal

from prefetch_embeddings.events import (
    HedgeStarted,
    PrefetchDropped,
    PrefetchFailed,
    PrefetchStarted,
    PrefetchSucceeded,
    QueryFailed,
    QueryServed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefetch_embeddings.events import Kind, PrefetchEvent

logger: Final = logging.getLogger("prefetch_embeddings")

_KEY: Final = secrets.token_bytes(16)
"""Of this process and its forked children; nobody can try out which text has a digest."""


def digest(text: str) -> str:
    """Return eight hexadecimal digits that stand for `text` in this process' logs and events."""
    encoded = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=4, key=_KEY).hexdigest()


class Reporter:
    """Tells the log and listeners. Call it with no lock held: a listener may do anything.

    Args:
        listener: Is told every event.
        kind: What the values are, for events.
        on_dropped: Is called with the text of each prefetch that is refused.
        on_ready: Is called for each prefetched value that is there.
    """

    def __init__(
        self,
        listener: Callable[[PrefetchEvent], None] | None,
        kind: Kind = "embedding",
        *,
        on_dropped: Callable[[str], None] | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._kind: Final[Kind] = kind
        self._on_dropped: Final = on_dropped
        self._on_ready: Final = on_ready
        # Never changed in place: others may be going through it.
        self._listeners: tuple[Callable[[PrefetchEvent], None], ...] = (
            () if listener is None else (listener,)
        )
        self.listening = listener is not None
        """Whether anybody listens; lets hot paths skip making an event."""

    def add_listener(self, listener: Callable[[PrefetchEvent], None]) -> None:
        """Have one more listener told from now on. What it raises keeps no other from hearing."""
        self._listeners = (*self._listeners, listener)
        self.listening = True

    def started(self, text: str, flight: int) -> None:
        """Tell that a prefetch has started a flight."""
        if self._listeners:
            self.tell(PrefetchStarted(digest(text), len(text), flight, kind=self._kind))

    def hedged(self, text: str, flight: int) -> None:
        """Tell that a flight has got a second call."""
        if self._listeners:
            self.tell(HedgeStarted(digest(text), len(text), flight, kind=self._kind))

    def succeeded(self, text: str, flight: int, seconds: float, attempt: int) -> None:
        """Tell that a prefetched vector is there."""
        if self._on_ready is not None:
            self._on_ready()
        if not self._listeners and not logger.isEnabledFor(logging.DEBUG):
            return
        event = PrefetchSucceeded(
            digest(text), len(text), flight, seconds, attempt, kind=self._kind
        )
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
            digest(text),
            len(text),
            flight,
            type(error).__name__,
            attempt,
            will_retry,
            kind=self._kind,
        )
        # A prefetch that failed has cost nobody anything: that calls keep failing is the news. And
        # to be abandoned is how a flight ends when its loop does, or when it is closed.
        level = logging.INFO if isinstance(error, Exception) else logging.DEBUG
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

    def paused(self) -> None:
        """Tell that prefetching pauses: calls keep failing."""
        logger.warning("prefetching pauses: calls keep failing")

    def resumed(self) -> None:
        """Tell that prefetching goes on."""
        logger.info("prefetching goes on: a call succeeded")

    def dropped(self, text: str) -> None:
        """Tell that a prefetch was refused."""
        if self._on_dropped is not None:
            self._on_dropped(text)
        if self._listeners:
            self.tell(PrefetchDropped(digest(text), len(text), kind=self._kind))

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
            self.tell(
                QueryServed(
                    digest(text), len(text), flight, how, seconds, recovered, kind=self._kind
                )
            )

    def query_failed(self, text: str, flight: int, error: BaseException, seconds: float) -> None:
        """Tell that a query ended in an error."""
        if self._listeners:
            name = type(error).__name__
            self.tell(QueryFailed(digest(text), len(text), flight, name, seconds, kind=self._kind))

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
