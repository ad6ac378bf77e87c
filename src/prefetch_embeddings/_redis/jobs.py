"""What goes to Redis and what comes back: jobs, refusals, and whose lateness it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prefetch_embeddings._redis.breaker import Health

    Command: TypeAlias = tuple[str | bytes | int | float, ...]

MOST_TIMEOUTS: Final = 10
"""So many times its time a job may wait in our own line, as long as that moves."""


class Gone(Exception):  # noqa: N818 - says what has happened, not what went wrong
    """The other side has closed the connection, perhaps long ago."""

    @property
    def name_of_class(self) -> str:
        """The class of the client's exception."""
        return type(self.__cause__ or self).__name__


class NotAsked(Exception):  # noqa: N818 - says nothing about Redis
    """Redis was not asked, since this process has as much under way as it may, or no client."""


class Refusal(Exception):  # noqa: N818 - an answer
    """An error that the server answered; stands in its reply's place.

    Attributes:
        name_of_class: Of the client's exception.
        code: The first word of the server's answer.
    """

    def __init__(self, name_of_class: str, code: str) -> None:
        super().__init__(name_of_class, code)
        self.name_of_class = name_of_class
        self.code = code

    @property
    def is_of_type(self) -> bool:
        """Whether Redis is well, and only something else stands under the key."""
        return self.code == "WRONGTYPE"

    @property
    def is_elsewhere(self) -> bool:
        """Whether the cluster is moving the key, or has moved it."""
        return self.code in {"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "CROSSSLOT"}

    @property
    def is_of_writing(self) -> bool:
        """Whether only writing is refused."""
        return self.code in {"READONLY", "OOM", "MISCONF", "NOREPLICAS"}


class Late:
    """Stands for a reply that has not come in time."""


class NotAtHand:
    """Stands for a reply that there is not, since no session is at hand: ask by a job."""


LATE: Final = Late()
NOT_AT_HAND: Final = NotAtHand()


class Job:
    """Commands for one place, what came of them, and who is told.

    Exactly one of two comes first: its end, which tells whoever waits; or that its caller leaves.
    What is left and has not been sent is not sent any more. A caller that leaves what was sent may
    have said what is to be done with a reply that comes late.

    Attributes:
        submitted: When it was made, by `time.monotonic`, like all times here.
        sent: When it was sent; None: not yet.
        finished: When the replies were there, or the error.
        replies: One for each command in their order, or what went wrong with all of them.
    """

    __slots__ = (
        "_commands",
        "_first",
        "_late",
        "finished",
        "notify",
        "replies",
        "sent",
        "submitted",
    )

    def __init__(
        self,
        commands: Sequence[Command] | Callable[[], Sequence[Command]],
        notify: Callable[[], None],
        late: Callable[[list[Any]], None] | None = None,
    ) -> None:
        self._commands = commands
        self.notify = notify
        self._late = late
        self._first = [None]  # whoever takes it comes first
        self.submitted = time.monotonic()
        self.sent: float | None = None
        self.finished: float | None = None
        self.replies: list[Any] | Exception | None = None

    def commands(self) -> Sequence[Command]:
        """Return the commands; those of a vector are made only now, on the lane's thread."""
        if callable(self._commands):
            self._commands = self._commands()
        return self._commands

    @property
    def left(self) -> bool:
        """Whether nobody waits any more, or it has ended."""
        return not self._first

    def end(self, replies: list[Any] | Exception) -> None:
        """Note what came of it, and tell whoever waits."""
        self.replies = replies
        self.finished = time.monotonic()
        if self._comes_first():
            self.notify()
        else:
            self._came_late()

    def answer(self, replies: list[Any] | Exception) -> None:
        """Note what came of it while its caller submits it, and need not be told."""
        self.replies = replies
        self.finished = time.monotonic()
        self._comes_first()

    def leave(self) -> bool:
        """Note that its caller leaves. False: it has ended, and `replies` are the caller's."""
        return self._comes_first()

    def give_up(self) -> None:
        """Leave, whatever it has come to; a reply counts as late."""
        if not self._comes_first():
            self._came_late()

    def _comes_first(self) -> bool:
        try:
            self._first.pop()
        except IndexError:
            return False
        return True

    def _came_late(self) -> None:
        if self._late is not None and isinstance(self.replies, list):
            self._late(self.replies)


def more_time(job: Job, seconds: float, moved_at: float) -> float:
    """Return how many seconds more a caller should wait for `job`, which was to take `seconds`.

    The one rule of whose lateness it is. The time that Redis has counts from when it was asked. A
    job that is still in line may stay there while the line moves: then we are what is slow.

    Args:
        job: What is waited for.
        seconds: What Redis may take.
        moved_at: When the line moved last.
    """
    now = time.monotonic()
    if now - job.submitted > MOST_TIMEOUTS * seconds:
        return 0.0
    if job.sent is not None:
        return max(0.0, job.sent + seconds - now)
    return max(0.0, moved_at + seconds - now)


def judge(
    replies: Sequence[Any],
    health: Health | None,
    began: float,
    seconds: float,
    heed: Callable[[Refusal | None], None],
) -> None:
    """Tell the health of a place, and whoever heeds refusals, what the replies say of it."""
    refusals = [reply for reply in replies if isinstance(reply, Refusal) and not reply.is_of_type]
    if not refusals:
        if health is not None:
            health.answered(seconds)
        return
    for refusal in refusals:
        heed(refusal)
    if health is None:
        return
    bad = [refusal for refusal in refusals if not (refusal.is_elsewhere or refusal.is_of_writing)]
    if bad and len(bad) == len(replies):
        health.failed(bad[0], began, seconds)
    else:
        health.answered(seconds)


def counted(replies: list[Any], commands: Sequence[Command]) -> list[Any]:
    """Return `replies` if there is one for each command.

    Raises:
        ValueError: There is not: nobody can tell which is whose.
    """
    if len(replies) != len(commands):
        raise ValueError("another number of replies than of commands")
    return replies


def as_exception(error: BaseException) -> Exception:
    """Return `error` as something that callers may be told; a thread's exit is not theirs."""
    if isinstance(error, Exception):
        return error
    wrapped = RuntimeError(f"a client raised {type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped
