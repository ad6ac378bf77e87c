"""Runs flights in threads: a worker's, the caller's own, or one aside."""

from __future__ import annotations

import contextvars
import functools
import inspect
import signal
import threading
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from prefetch_embeddings._flights import reentry

if TYPE_CHECKING:
    from types import CodeType

    from prefetch_embeddings._background.pool import Job, JobPool
    from prefetch_embeddings._flights.flight import Run
    from prefetch_embeddings._flights.landing import Landing
    from prefetch_embeddings._flights.loader import Loader
    from prefetch_embeddings._flights.map import Claimed, FlightMap

V = TypeVar("V")


class InThreads(Generic[V]):
    """Carries out runs in threads. It is the source that worker threads take their jobs from.

    Args:
        flights: The map, whose queue the workers empty.
        landing: Where runs end.
        loader: Loads the values.
        aside: Runs at once, whatever it runs already, what nobody may be made to wait in line for
            and no caller's thread may be stuck in.
    """

    def __init__(
        self,
        flights: FlightMap[V],
        landing: Landing[V],
        loader: Loader[V],
        *,
        aside: JobPool,
    ) -> None:
        self._flights: Final = flights
        self._landing: Final = landing
        self._loader: Final = loader
        self._aside: Final = aside

    # --- In workers ----------------------------------------------------------------------------

    def take(self) -> Job | None:
        """Claim the next job; return what runs it."""
        claimed, expired = self._flights.claim_job()
        self._landing.drop(expired)
        return None if claimed is None else functools.partial(self._work, claimed)

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._flights)

    def _work(self, claimed: Claimed) -> None:
        runs = claimed.runs
        context = runs[0].flight.context
        context = contextvars.Context() if context is None else context.copy()
        try:
            context.run(self._run_together, runs)
        except BaseException:
            for run in runs:
                self._landing.lose(run)  # whatever it was, no flight may stay unfinished
            raise
        finally:
            self._flights.worker_done(claimed.token)

    def _run_together(self, runs: list[Run]) -> None:
        for run in runs:
            run.began = True
        flights = [run.flight for run in runs]
        try:
            with reentry.running_for(flights):
                if len(runs) > 1 and self._loader.loads_many:
                    values = self._loader.load_many([flight.text for flight in flights])
                    if len(values) != len(runs):
                        raise ValueError(f"{len(runs)} texts gave {len(values)} values")
                else:
                    values = [self._loader.load(f.text, f.options) for f in flights]
        except BaseException as error:
            self._landing.fail_all(runs, error)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise  # it is the thread's, too
        else:
            for run, value in zip(runs, values, strict=True):
                self._landing.complete(run, value)

    # --- For those who wait --------------------------------------------------------------------

    def run_here(self, run: Run, *, is_callers: bool = True) -> None:
        """Carry out a run in the calling thread. The model's `Exception` stays with the flight.

        Args:
            run: The run.
            is_callers: Whether the thread is that of the caller who waits.

        Raises:
            BaseException: What interrupted the caller. It is the caller's alone: for the flight
                it is as if nobody carried out this run.
        """
        try:
            self._carry_out(run, is_callers=is_callers)
        except BaseException:
            self._landing.lose(run)  # unless it has landed
            raise

    def _carry_out(self, run: Run, *, is_callers: bool) -> None:
        flight = run.flight
        run.began = True
        try:
            token = reentry.running.set(flight)
            try:
                value = self._loader.load(flight.text, flight.options)
            finally:
                reentry.running.reset(token)
                reentry.run_has_ended(flight)
        except BaseException as error:
            if is_callers and (not isinstance(error, Exception) or came_from_a_signal(error)):
                raise
            self._landing.fail(run, error)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise  # it is the thread's, too
        else:
            self._landing.complete(run, value)

    def run_aside(self, run: Run, context: contextvars.Context) -> bool:
        """Carry out a run in a thread of its own, which may hang; False if none can be had."""

        def job() -> None:
            if run.flight.ended:
                return  # it ended before this thread came to it: nobody wants the call
            run.aside = True  # from here on, and not before, it is another thread's
            context.run(self.run_here, run, is_callers=False)

        if not self._aside.submit(job):
            return False
        run.began = True
        return True


def came_from_a_signal(error: BaseException) -> bool:
    """Tell whether a signal handler raised `error` in the midst of what this thread did.

    The handler's frame then is among those that the exception went through.
    """
    if threading.current_thread() is not threading.main_thread():
        return False  # Python calls signal handlers in the main thread alone
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _code_of(handler: object) -> CodeType | None:
    """Return the code that a handler starts with, as far as it is written in Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if inspect.ismethod(handler):
        handler = handler.__func__
    if not inspect.isfunction(handler) and not inspect.isbuiltin(handler):
        handler = getattr(type(handler), "__call__", None)  # noqa: B004 - its code is wanted
    return handler.__code__ if inspect.isfunction(handler) else None
