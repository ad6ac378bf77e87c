"""One query's way from flight to flight, until it has a value or an error to raise.

Written once, as a generator. It yields the calls that its caller is to make and the seconds for
which it is to wait. A thread does that in one way, a coroutine in another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from prefetch_embeddings._flights import loops, reentry
from prefetch_embeddings._flights.failures import own_copy
from prefetch_embeddings._flights.flight import End, Flight, Met, Run, State, Visit, Waiter
from prefetch_embeddings._flights.joins import joining
from prefetch_embeddings._flights.steps import ReenteredError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable

    from prefetch_embeddings._flights.landing import Landing
    from prefetch_embeddings._flights.overdue import Lookout
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
        lookout: Looks after flights that are waited for.
        reporter: Is told how queries end.
        on_missed: Is called with the key and text of a query that found nothing, once it has ended.
    """

    def __init__(
        self,
        visits: Visits[V],
        landing: Landing[V],
        lookout: Lookout,
        *,
        reporter: Reporter,
        on_missed: Callable[[Hashable, str], None] | None,
    ) -> None:
        self._visits: Final = visits
        self._landing: Final = landing
        self._lookout: Final = lookout
        self._reporter: Final = reporter
        self._on_missed: Final = on_missed

    def way(
        self, key: Hashable, text: str, options: Any, waiter: Waiter, clock: Callable[[], float]
    ) -> Generator[Run | float | None, None, Answer]:
        """Lead one query. Yields a call to make, or how many seconds to wait at the most.

        Raises:
            ReenteredError: The same thread is within a step.
            RuntimeError: The model, while it loads a text, asks for that text.
        """
        began = clock()
        met: Met | None = None
        after: Flight[V] | None = None
        while True:
            visit = Visit(key, text, options, waiter, after)
            end = End.GONE
            error: BaseException | None = None
            try:
                self._visits.enter(visit)
                met = met or visit.met
                yield from self._stay(visit)
                end, error = _conclude(visit)
            except RuntimeError:
                end = End.FAILED
                raise
            finally:
                flight = visit.flight
                waited = 0.0 if end is End.GOES_ON else clock() - began
                self._part(visit, waited, end)
            assert flight is not None  # noqa: S101 - `enter` has taken the visitor in
            if end is not End.GOES_ON:
                self._report(visit, flight, met, waited, end, error)
                return Answer(flight, error)
            after = flight
            del flight, visit, error

    def wait(
        self, key: Hashable, waiter: Waiter, timeout: float | None, *, claim: bool
    ) -> Generator[Run | float | None, None, bool]:
        """Lead an explicit wait, which returns whether the value is there.

        Raises:
            ReenteredError: The same thread is within a step.
            RuntimeError: The model waits, while it loads a text, for that text.
        """
        visit: Visit[V] = Visit(key, "", None, waiter)
        try:
            self._visits.attend(visit, claim=claim)
            flight = visit.flight
            if flight is None:
                return False
            here = loops.running_loop() if waiter.loop is None else None
            if here is None or not (flight.home is here or flight.runs_only_on(here)):
                yield from self._stay(visit, timeout)
            # else: the loop that runs it cannot turn while this thread waits
            return flight.state is State.DONE
        finally:
            self._part(visit, 0.0, End.GONE)

    def _stay(self, visit: Visit[V], timeout: float | None = None) -> Generator[Run | float | None]:
        """Make the call that is the visitor's, and wait for its flight."""
        flight, waiter = visit.flight, visit.waiter
        assert flight is not None  # noqa: S101 - as above
        self._lookout.plan()
        with reentry.waiting_for(flight, mine=visit.run is not None):
            if visit.run is None and waiter.loop is None and any(r.loop for r in flight.runs):
                here = loops.running_loop()
                if here is not None and flight.runs_only_on(here):
                    self._visits.join_in(visit)  # that loop does not turn while this thread waits
            if visit.run is not None:
                yield visit.run
            yield from joining(flight, waiter, self._landing, timeout)

    def _part(self, visit: Visit[V], waited: float, end: End) -> None:
        """Part a visitor from its flight, also where a signal handler throws us out half way."""
        try:
            self._leave(visit, waited, end)
        except BaseException:
            self._leave(visit, waited, end)
            raise

    def _leave(self, visit: Visit[V], waited: float, end: End) -> None:
        flight, run = visit.flight, visit.run
        if flight is None:
            return
        if run is not None and not run.began:
            self._landing.lose(run)  # thrown out before the call could even begin
        attempt = flight.attempt
        try:
            unwanted = self._visits.leave(visit, waited, end)
        except ReenteredError:  # a coroutine that the collector destroys within a step
            self._visits.steps.put_off.append(lambda: self._leave(visit, waited, end))
            return
        if unwanted:
            self._landing.let_down(flight, unwanted, attempt)
        visit.flight = visit.run = None

    def _report(
        self,
        visit: Visit[V],
        flight: Flight[V],
        met: Met | None,
        waited: float,
        end: End,
        error: BaseException | None,
    ) -> None:
        if end is End.FAILED and error is not None:
            self._reporter.query_failed(visit.text, flight.number, error, waited)
        elif error is None and met is not None:
            recovered = end is End.RECOVERED
            self._reporter.served(visit.text, flight.number, met.value, waited, recovered=recovered)
        if met is Met.MISSED and self._on_missed is not None:
            self._on_missed(visit.key, visit.text)


def _conclude(visit: Visit[Any]) -> tuple[End, BaseException | None]:
    """Draw the conclusion from a flight that has ended.

    A query that made the call gets the model's very exception, the others one of their own. Where
    no call for a query has failed, the query sees to itself.
    """
    flight = visit.flight
    if flight is None or flight.state is State.DONE:
        return End.SERVED if visit.after is None else End.RECOVERED, None
    failure = flight.failure
    if failure is not None and failure.run is visit.run:
        end = End.FAILED if isinstance(failure.error, Exception) else End.GONE
        return end, failure.error
    if failure is not None and isinstance(failure.error, Exception):
        return End.FAILED, own_copy(failure.error, failure.traceback)
    return End.GOES_ON, None
