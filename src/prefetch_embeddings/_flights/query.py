"""One query's way from flight to flight, until it has a value or an error to raise.

Written once, as a generator. It yields the calls that its caller is to make and the seconds for
which it is to wait. A thread does that in one way, a coroutine in another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from prefetch_embeddings._flights import loops, reentry
from prefetch_embeddings._flights.failures import own_copy
from prefetch_embeddings._flights.flight import End, Flight, Met, Run, State, Visit
from prefetch_embeddings._flights.joins import joining
from prefetch_embeddings._flights.steps import ReenteredError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable

    from prefetch_embeddings._flights.joins import LoopVisit, ThreadVisit
    from prefetch_embeddings._flights.landing import Landing
    from prefetch_embeddings._flights.visits import Visits
    from prefetch_embeddings.reporting import Reporter

V = TypeVar("V")


class Answer(NamedTuple):
    """What a query ended in: a flight that is done, or an error to raise."""

    flight: Flight[Any]
    error: BaseException | None = None


class Queries(Generic[V]):
    """Leads queries and explicit waits to their flights, and away from them.

    Args:
        visits: Takes waiters in, and parts them from flights.
        landing: Where runs end.
        clock: A monotonic clock, in seconds.
        reporter: Is told how queries end.
        on_missed: Is called with the key and text of a query that found nothing, once it has ended.
    """

    def __init__(
        self,
        visits: Visits[V],
        landing: Landing[V],
        *,
        clock: Callable[[], float],
        reporter: Reporter,
        on_missed: Callable[[Hashable, str], None] | None,
    ) -> None:
        self._clock: Final = clock
        self._visits: Final = visits
        self._landing: Final = landing
        self._reporter: Final = reporter
        self._on_missed: Final = on_missed

    def way(self, visit: ThreadVisit | LoopVisit) -> Generator[Run | float | None, None, Answer]:
        """Lead one query. Yields a call to make, or how many seconds to wait at the most.

        Raises:
            ReenteredError: The same thread is within a step.
            RuntimeError: The model, while it loads a text, asks for that text.
        """
        began = self._clock()
        while True:
            end = End.GONE
            error: BaseException | None = None
            try:
                self._visits.enter(visit)
                flight = visit.flight
                assert flight is not None  # noqa: S101 - `enter` has taken it in
                if not flight.ended:
                    yield from self._stay(visit, flight)
                end, error = _conclude(visit, flight)
            except RuntimeError:
                end = End.FAILED
                raise
            finally:
                if end is not End.GOES_ON:  # else it leaves by entering the next one
                    try:
                        waited = self._part(visit, began, end)
                    except BaseException:  # a signal handler has thrown us out half way
                        waited = self._part(visit, began, end)
                        raise
            if end is not End.GOES_ON:
                if self._reporter.listening or (visit.met is Met.MISSED and self._on_missed):
                    self._report(visit, flight, waited, end, error)
                return Answer(flight, error)
            visit.after = flight

    def wait(
        self, visit: ThreadVisit | LoopVisit, timeout: float | None, *, claim: bool
    ) -> Generator[Run | float | None, None, bool]:
        """Lead an explicit wait, which returns whether the value is there.

        Raises:
            ReenteredError: The same thread is within a step.
            RuntimeError: The model waits, while it loads a text, for that text.
        """
        try:
            self._visits.attend(visit, claim=claim)
            flight = visit.flight
            if flight is None:
                return False
            here = loops.running_loop() if visit.loop is None else None
            if here is None or not (flight.home is here or flight.runs_only_on(here)):
                yield from self._stay(visit, flight, timeout)
            # else: the loop that runs it cannot turn while this thread waits
            return flight.state is State.DONE
        finally:
            try:
                self._part(visit, None, End.GONE)
            except BaseException:  # as above
                self._part(visit, None, End.GONE)
                raise

    def _stay(
        self, visit: ThreadVisit | LoopVisit, flight: Flight[V], timeout: float | None = None
    ) -> Generator[Run | float | None]:
        """Make the call that is the visitor's, and wait for its flight."""
        behalf_of = reentry.begin_wait(flight, mine=visit.run is not None)
        try:
            if visit.run is None and visit.loop is None and {r.loop for r in flight.runs} - {None}:
                here = loops.running_loop()
                if here is not None and flight.runs_only_on(here):
                    self._visits.join_in(visit)  # that loop does not turn while this thread waits
            if visit.run is not None:
                yield visit.run
            if not flight.ended:
                yield from joining(flight, visit, self._landing, timeout)
        finally:
            if behalf_of is not None:
                reentry.end_wait(behalf_of, flight)

    def _part(self, visit: Visit[V], began: float | None, end: End) -> float:
        """Part a visitor from its flight; return what it waited since it `began`, in seconds.

        It may be called again where it was left half way.
        """
        waited = 0.0 if began is None else self._clock() - began
        flight, run = visit.flight, visit.run
        if flight is None:
            return waited
        if run is not None and not run.began:
            self._landing.lose(run)  # thrown out before the call could even begin
        try:
            unwanted = self._visits.leave(visit, waited, end)
        except ReenteredError:  # a coroutine that the collector destroys within a step
            self._visits.steps.put_off.append(lambda: self._part(visit, began, end))
            return waited
        if unwanted:
            self._landing.let_down(flight, unwanted, flight.attempt)
        visit.flight = visit.run = None
        return waited

    def _report(
        self,
        visit: Visit[V],
        flight: Flight[V],
        waited: float,
        end: End,
        error: BaseException | None,
    ) -> None:
        met = visit.met
        if end is End.FAILED and error is not None:
            self._reporter.query_failed(visit.text, flight.number, error, waited)
        elif error is None and met is not None:
            recovered = end is End.RECOVERED
            self._reporter.served(visit.text, flight.number, met.value, waited, recovered=recovered)
        if met is Met.MISSED and self._on_missed is not None:
            self._on_missed(visit.key, visit.text)


def _conclude(visit: Visit[Any], flight: Flight[Any]) -> tuple[End, BaseException | None]:
    """Draw the conclusion from a flight that has ended.

    A query that made the call gets the model's very exception, the others one of their own. Where
    no call for a query has failed, the query sees to itself.
    """
    if flight.state is State.DONE:
        return End.SERVED if visit.after is None else End.RECOVERED, None
    failure = flight.failure
    if failure is not None and failure.run is visit.run:
        end = End.FAILED if isinstance(failure.error, Exception) else End.GONE
        return end, failure.error
    if failure is not None and isinstance(failure.error, Exception):
        return End.FAILED, own_copy(failure.error, failure.traceback)
    return End.GOES_ON, None
