"""One request on its way: its jobs at their places, then what came of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._redis.jobs import Job, NotAsked
from prefetch_embeddings._redis.requests import FAILED, SKIPPED, NoReply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefetch_embeddings._redis.places import Place
    from prefetch_embeddings._redis.requests import Ask
    from prefetch_embeddings._redis.transports import Lane

LATE_SECONDS: Final = 0.01
"""Who is woken later than that is on a machine, or an event loop, that has too much to do."""

MOST_GRACES: Final = 3
"""So many times such a waiter gives a reply, which may lie ready, what it was late itself."""


class Errand:
    """One job of a request, and where its replies go."""

    __slots__ = ("deadline", "graces", "job", "lane", "place", "positions", "seconds")

    def __init__(
        self, job: Job, place: Place, lane: Lane, positions: Sequence[int], seconds: float
    ) -> None:
        self.job = job
        self.place = place
        self.lane = lane
        self.positions = positions
        self.seconds = seconds
        self.deadline = job.submitted + seconds
        self.graces = MOST_GRACES

    def more(self) -> float:
        """Return how many seconds more to wait, now that the deadline has passed; 0: none.

        Who was woken late was held up by something that holds up replies as well, so one that has
        come in time may still be on its way here.
        """
        now = time.monotonic()
        more = self.lane.more(self.job, self.seconds)
        late = now - self.deadline
        if more <= 0 and self.graces and late > LATE_SECONDS:
            self.graces -= 1
            more = min(late, self.seconds)
        self.deadline = now + more
        return more


class Errands:
    """What became of one `Ask`: its jobs on their ways, then its replies."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.began = time.monotonic()
        self.replies: list[Any] = [SKIPPED] * len(ask.commands)
        self.errands: list[Errand] = []

    def finish(self, errand: Errand) -> None:
        """Take in what became of one job, whose caller has waited for as long as it would."""
        job = errand.job
        if job.leave():
            answer: Sequence[Any] = [self._judge_silence(errand)] * len(errand.positions)
        elif isinstance(job.replies, list):
            answer = job.replies
            if len(answer) == len(self.replies):  # all from one place
                self.replies = answer
                return
        else:
            none: NoReply = FAILED
            if isinstance(job.replies, NotAsked):
                errand.place.health.breaker.not_tried()
                none = SKIPPED
            answer = [none] * len(errand.positions)
        for position, reply in zip(errand.positions, answer, strict=True):
            self.replies[position] = reply

    @staticmethod
    def _judge_silence(errand: Errand) -> NoReply:
        job = errand.job
        now = time.monotonic()
        if (
            job.sent is None and not errand.lane.connected
        ):  # a connection is being made, or cannot be
            errand.place.health.breaker.not_tried()
            return SKIPPED
        began = job.submitted if job.sent is None else job.sent
        errand.place.health.failed(TimeoutError(), began, now - began)
        return FAILED

    def give_up(self) -> None:
        """Leave all jobs: their caller was interrupted. What comes of them is late."""
        for errand in self.errands:
            errand.job.give_up()

    def charge(self) -> float:
        """Return the seconds that Redis took of its time."""
        if not self.ask.charged and not any(isinstance(one, NoReply) for one in self.replies):
            return 0.0
        seconds = 0.0
        for errand in self.errands:
            job = errand.job
            took = (job.finished or time.monotonic()) - (job.sent or self.began)
            seconds = max(seconds, took)
        return seconds
