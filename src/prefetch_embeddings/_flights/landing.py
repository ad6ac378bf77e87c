"""How a run ends, and with it a flight. The only place that completes, fails, retries, abandons.

Whichever runner is the last to fail decides: the flight is tried again, or it ends. Whoever ended
it then tells those who wait, cancels the calls that are still under way, and reports.
"""

from __future__ import annotations

import enum
import functools
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from prefetch_embeddings._flights import loops
from prefetch_embeddings._flights.admission import PROBE_SECONDS, can_be_mended
from prefetch_embeddings._flights.flight import AbandonedError, Failure, Flight, Run, State
from prefetch_embeddings._flights.steps import Steps, put_off, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prefetch_embeddings._flights.books import Books
    from prefetch_embeddings.reporting import Reporter

V = TypeVar("V")

RETRY_PAUSE: Final = 0.2
"""Seconds before the second attempt in the background, doubled for each further one."""


class Verdict(enum.Enum):
    """What becomes of a flight when one of its runs has failed."""

    GOES_ON = enum.auto()  # without this run, or without any change
    TRIED_AGAIN = enum.auto()
    ENDED = enum.auto()


class Landing(Generic[V]):
    """Ends runs and flights.

    Args:
        books: What the steps read and write.
        steps: The lock that the map has, too.
        reporter: Is told what happens.
        try_again: Has flights that wait for their next attempt run in so many seconds.
        sound: Whether a value may be kept.
    """

    def __init__(
        self,
        books: Books,
        steps: Steps,
        *,
        reporter: Reporter,
        try_again: Callable[[Sequence[Flight[V]], float], None],
        sound: Callable[[V], bool] | None,
    ) -> None:
        self._books: Final = books
        self.steps: Final = steps
        self._reporter: Final = reporter
        self._try_again: Final = try_again
        self._sound: Final = sound

    # --- Called by runners -----------------------------------------------------------------------

    def complete(self, run: Run, value: V) -> None:
        """Land a run that has brought a value. If another one was first, this changes nothing."""
        flight = run.flight
        kept = self._sound is None or self._sound(value)
        try:
            losers, resumes = self._complete(run, value, kept)
        finally:
            _tell_waiters(flight)
        if not losers:
            return
        if len(losers) > 1:
            _cancel(losers, but=run)
        if resumes:
            self._reporter.resumed()
        if flight.by_prefetch:
            seconds = flight.finished_at - flight.asked_at
            self._reporter.succeeded(flight.text, flight.number, seconds, flight.attempt)

    def fail(self, run: Run, error: BaseException) -> None:
        """Land a run that has failed."""
        self.fail_all((run,), error)

    def fail_all(self, runs: Sequence[Run], error: BaseException) -> None:
        """Land runs that one call stood for, and that has failed."""
        again: list[Flight[V]] = []
        mendable = can_be_mended(error)  # asks the error, and so not within a step
        for run in runs:
            flight, attempt = run.flight, run.flight.attempt
            background = flight.by_prefetch and not flight.for_query
            try:
                verdict, pauses = self._fail(run, error, mendable)
            finally:
                _tell_waiters(flight)
            if pauses:
                self._reporter.paused()
            if verdict is Verdict.TRIED_AGAIN:
                again.append(flight)
            if background and verdict is not Verdict.GOES_ON:
                will_retry = verdict is Verdict.TRIED_AGAIN
                self._reporter.failed(
                    flight.text, flight.number, error, attempt, will_retry=will_retry
                )
        if again:
            paused = self._books.admission.paused  # a moment's difference does no harm
            self._try_again(again, _pause(again[0].attempt, paused=paused))

    @put_off(None)
    def lose(self, run: Run) -> None:
        """Land a run that nobody carries out: its loop has closed, its caller was thrown out."""
        self.fail(run, AbandonedError())

    # --- Called by others ------------------------------------------------------------------------

    @put_off(None)
    def abandon(self, flight: Flight[V], *, only_queued: bool = False) -> None:
        """End a flight that nobody will finish, or wants; its waiters see to themselves."""
        runs = flight.runs
        attempt = flight.attempt
        try:
            abandoned = self._abandon(flight, only_queued=only_queued)
        finally:
            _tell_waiters(flight)
        if abandoned:
            self.let_down(flight, runs, attempt)

    def drop(self, flights: Iterable[Flight[V]]) -> None:
        """Tell those who wait for flights that a step of the map has ended."""
        for flight in flights:
            _tell_waiters(flight)

    def let_down(self, flight: Flight[V], runs: tuple[Run, ...], attempt: int) -> None:
        """Cancel the runs of a flight that was ended before its time, and report that."""
        _cancel(runs)
        if flight.by_prefetch and not flight.for_query:
            self._reporter.failed(
                flight.text, flight.number, AbandonedError(), attempt, will_retry=False
            )

    # --- The steps -------------------------------------------------------------------------------

    @step
    def _complete(self, run: Run, value: V, kept: bool) -> tuple[tuple[Run, ...], bool]:  # noqa: FBT001
        """Take in a value.

        Returns:
            The runs of the flight that this has ended, none if another was first; and whether
            prefetching had paused until now.
        """
        flight, books = run.flight, self._books
        runs = flight.runs
        if run not in runs:
            return (), False
        flight.value = value
        current = flight.era is books.era
        if current:
            if run.beside:
                books.ledger.counts.hedge_won += 1
            books.ledger.durations.add(books.clock() - run.started_at)
        if not kept and flight.held:
            books.let_go(flight)
        books.end(flight, State.DONE)
        return runs, current and books.admission.note_success()

    @step
    def _fail(self, run: Run, error: BaseException, mendable: bool) -> tuple[Verdict, bool]:  # noqa: FBT001
        """Take in a failed run; return what follows, and whether prefetching pauses now."""
        flight, books = run.flight, self._books
        if run not in flight.runs:
            return Verdict.GOES_ON, False
        flight.runs = tuple(other for other in flight.runs if other is not run)
        counts = isinstance(error, Exception) and flight.era is books.era
        pauses = counts and books.admission.note_failure()
        if run.for_query and not isinstance(error, AbandonedError):
            flight.failure = Failure(run, error, error.__traceback__)
        if flight.runs:
            return Verdict.GOES_ON, pauses
        if mendable and self._deserves_another(flight):
            flight.state = State.QUEUED
            books.admission.take_place(flight)
            return Verdict.TRIED_AGAIN, pauses
        books.end(flight, State.FAILED)
        return Verdict.ENDED, pauses

    def _deserves_another(self, flight: Flight[V]) -> bool:
        """Tell whether a flight whose last runner has failed is to be tried again."""
        return (
            flight.by_prefetch
            and not flight.for_query
            and not flight.waiters
            and flight.held
            and flight.asks > 0
            and flight.attempt < self._books.attempts
            and flight.era is self._books.era
            and not self._books.closed
        )

    @step
    def _abandon(self, flight: Flight[V], *, only_queued: bool) -> bool:
        if flight.ended or (only_queued and flight.state is not State.QUEUED):
            return False
        self._books.end(flight, State.FAILED)
        return True

    def mend(self, thrown_out: int) -> None:
        """Put in order what a torn step may have left. Called within the next step."""
        for flight in self._books.mend(thrown_out):
            self.steps.put_off.append(functools.partial(_tell_waiters, flight))


def _tell_waiters(flight: Flight[Any]) -> None:
    """Wake those who wait for a flight, if it has ended. Each looks for itself: twice is no harm.

    A signal handler may throw an exception out of here, too. Nobody may be left waiting for it.
    """
    if flight.ended and flight.waiters:
        try:
            _wake(flight)
        except BaseException:
            _wake(flight)
            raise


def _wake(flight: Flight[Any]) -> None:
    for waiter in list(flight.waiters):
        waiter.wake()


def _cancel(runs: Iterable[Run], *, but: Run | None = None) -> None:
    """Cancel what still runs for a flight that has ended, where it can be; not the current task."""
    for run in runs:
        task, loop = run.task, run.loop
        if run is but or task is None or loop is None:
            continue
        if loops.running_loop() is not loop:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(task.cancel)
        elif task is not loops.current_task():
            task.cancel()


def _pause(attempt: int, *, paused: bool) -> float:
    """Return how long to pause before the next attempt, in seconds, spread by a random half."""
    pause: float = RETRY_PAUSE * 2 ** (attempt - 1)
    pause *= random.uniform(0.75, 1.25)  # noqa: S311 - not a secret
    return max(pause, PROBE_SECONDS) if paused else pause
