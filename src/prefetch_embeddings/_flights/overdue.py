"""Looks after flights that somebody waits for, and has the calls made that they are due."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._flights.steps import put_off

if TYPE_CHECKING:
    from prefetch_embeddings._background.timer import Scheduler
    from prefetch_embeddings._flights.in_threads import InThreads
    from prefetch_embeddings._flights.landing import Landing
    from prefetch_embeddings._flights.on_loops import OnLoops
    from prefetch_embeddings._flights.steps import Steps
    from prefetch_embeddings._flights.visits import Visits
    from prefetch_embeddings.reporting import Reporter


class Lookout:
    """Makes second and third calls when they are due.

    One look is planned at a time, for when the first flight may be due. It holds no flight and no
    context: what those who wait for need is with them.
    """

    def __init__(
        self,
        visits: Visits[Any],
        landing: Landing[Any],
        in_threads: InThreads[Any],
        on_loops: OnLoops[Any],
        *,
        scheduler: Scheduler,
        reporter: Reporter,
    ) -> None:
        self._visits: Final = visits
        self._landing: Final = landing
        self._in_threads: Final = in_threads
        self._on_loops: Final = on_loops
        self._scheduler: Final = scheduler
        self._reporter: Final = reporter

    @property
    def steps(self) -> Steps:
        """The lock that the map has."""
        return self._visits.steps

    def plan(self) -> None:
        """Plan the next look. Called where a flight is due before the one that is planned."""
        self._look_in(self._visits.plan_look())

    @put_off(None)
    def look(self) -> None:
        """Make the calls that are due, and plan the next look."""
        calls, ended, seconds = self._visits.begin_due_calls()
        self._landing.drop(ended)
        for run, context in calls:
            flight = run.flight
            self._reporter.hedged(flight.text, flight.number)
            if run.loop is not None:
                self._on_loops.launch_from_elsewhere(run, run.loop, context)
            elif not self._in_threads.run_aside(run, context):
                self._landing.lose(run)
        self._look_in(seconds)

    def _look_in(self, seconds: float | None) -> None:
        if seconds is None:
            return
        if seconds <= 0:
            self.look()
        elif not self._scheduler.call_later(seconds, partial(_look, weakref.ref(self))):
            self._visits.cancel_look()


def _look(reference: weakref.ref[Lookout]) -> None:
    """Look, if the lookout is still there: a timer keeps no wrapper alive."""
    lookout = reference()
    if lookout is not None:
        lookout.look()
