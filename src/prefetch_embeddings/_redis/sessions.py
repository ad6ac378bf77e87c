"""Sessions: ways to one place that are open, and what the threads of a lane share of them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

from prefetch_embeddings._redis.jobs import Job, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prefetch_embeddings._redis.breaker import Health
    from prefetch_embeddings._redis.jobs import Command

MOST_JOBS: Final = 64
"""Jobs that travel together."""

TAKEN: Final = object()
"""What comes out where somebody else was quicker to take it."""


def do_nothing() -> None:
    """Nobody is to be told."""


class Session(Protocol):
    """A way to one place that is open. Used by one thread at a time.

    Attributes:
        lendable: Whether it can `ask` and `read`.
    """

    lendable: bool

    def ask(self, command: Command, seconds: float) -> Any:
        """Return the reply to one command, or `LATE` if it has not begun within `seconds`.

        Raises:
            Exception: As by `execute`.
        """

    def read(self) -> Any:
        """Return the reply that was late."""

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies in order; an error that the server answered is a `Refusal` in place.

        Raises:
            Gone: The other side has closed the connection.
            Exception: Whatever else went wrong.
        """

    def close(self) -> None:
        """Let go of it."""


class Kept:
    """A session, and what is known of it.

    It is its line's, at hand or lent: one at a time. A line makes it its own again by taking it
    from what is at hand, or else by its bell.

    Attributes:
        session: What is kept.
        opened_at: By `time.monotonic`, like all times here.
        used_at: When a reply came last.
        deadline: When whoever borrowed it last wants to be away.
        owes: The job whose reply is still to be read, since its caller did not wait for it here.
        broken: Whether it is of no use any more.
        wanted: Whether its line waits for it.
    """

    __slots__ = (
        "_bell",
        "broken",
        "deadline",
        "opened_at",
        "owes",
        "session",
        "used_at",
        "wanted",
    )

    def __init__(self, session: Session) -> None:
        self.session = session
        self.opened_at = self.used_at = time.monotonic()
        self.deadline = 0.0
        self.owes: Job | None = None
        self.broken = False
        self.wanted = False
        self._bell = threading.Lock()
        self._bell.acquire()

    @property
    def in_order(self) -> bool:
        """Whether the next caller may borrow it."""
        return not self.broken and self.owes is None

    def give_to_line(self) -> None:
        """Have its line get it back."""
        self._bell.release()

    def came_back(self, seconds: float) -> bool:
        """Wait up to `seconds` for it, as its line; return whether it came."""
        return self._bell.acquire(timeout=seconds)

    def close(self) -> None:
        """Let go of it, also while a caller reads from it: that one gets an error."""
        self.broken = True
        with contextlib.suppress(Exception):  # nobody needs it any more
            self.session.close()


class Shared:
    """What the threads of a lane share, and how they get their jobs."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        health: Health | None,
        heed: Callable[[Refusal | None], None],
    ) -> None:
        self.open = open_session
        self.health = health
        self.heed = heed
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # Sessions that callers may borrow: whoever takes one out has it for itself.
        self.at_hand: dict[Kept, None] = {}
        # One entry for each thread that waits; who submits takes one out, and so counts on it.
        self.idle: dict[object, None] = {}
        self.threads: dict[object, None] = {}
        self.sessions: dict[object, None] = {}
        self.connecting: dict[object, float] = {}  # since when
        self.moved_at = 0.0
        self.took = float("inf")  # the last reply, in seconds
        self.wanted_at = 0.0
        self.drop_before = 0.0  # sessions opened earlier are not used again
        self.suspect_before = 0.0  # nor those that were used last before
        self.closed = False

    def next(self, waits: Iterable[float]) -> Job | None:
        """Return the next job; None: none came in all of `waits`, each so many seconds long."""
        if not self.jobs.empty() and (ready := self._get(0.0)) is not None:
            return ready
        token = object()
        self.idle[token] = None
        job = None
        for seconds in waits:
            job = self._get(seconds)
            if job is not None or self.closed:
                break
        if self.idle.pop(token, TAKEN) is TAKEN and job is None and not self.closed:
            return self._get(1.0)  # somebody counts on this thread: the job is on its way
        return job

    def borrow(self, seconds: float) -> Kept | None:
        """Return a session that is at hand, for `seconds`; None: there is none."""
        try:
            kept, _ = self.at_hand.popitem()
        except KeyError:
            return None
        kept.deadline = time.monotonic() + seconds
        if self.is_stale(kept):
            kept.broken = True
            self.give_back(kept)
            return None
        return kept

    def give_back(self, kept: Kept) -> None:
        """Let the next caller have what was borrowed, or its line, where that is due."""
        if kept.in_order:
            self.at_hand[kept] = None
            if not kept.wanted or self.at_hand.pop(kept, TAKEN) is TAKEN:
                return
        kept.give_to_line()

    def nudge(self) -> None:
        """Wake the lines that wait, so that one reads the reply which its session owes."""
        for _ in range(len(self.idle)):
            nothing = Job((), do_nothing)
            nothing.leave()
            self.jobs.put(nothing)

    def is_stale(self, kept: Kept) -> bool:
        """Return whether a session is not to be used again."""
        return kept.opened_at < self.drop_before or kept.used_at < self.suspect_before

    def _get(self, seconds: float) -> Job | None:
        try:
            return self.jobs.get(timeout=seconds)
        except queue.Empty:
            return None

    def with_more(self, first: Job) -> list[Job]:
        """Return `first` and what else is in line, as much as should travel together."""
        batch = [first]
        while len(batch) < MOST_JOBS and not self.jobs.empty():
            try:
                job = self.jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:  # the end, which is some thread's to hear
                self.jobs.put(None)
                break
            batch.append(job)
        return batch

    def end_others(self) -> None:
        """Let all threads hear that the lane is closed."""
        for _ in range(len(self.threads)):
            self.jobs.put(None)

    def fail_queued(self, error: Exception) -> None:
        """End all jobs that are in line."""
        while True:
            try:
                job = self.jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.end(error)
