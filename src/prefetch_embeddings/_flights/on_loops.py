"""Runs flights on event loops, each in a task that no waiter's cancellation reaches."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from prefetch_embeddings._flights import loops, reentry
from prefetch_embeddings._flights.in_threads import came_from_a_signal

if TYPE_CHECKING:
    import contextvars

    from prefetch_embeddings._flights.flight import Flight, Run
    from prefetch_embeddings._flights.landing import Landing
    from prefetch_embeddings._flights.loader import Loader
    from prefetch_embeddings._flights.map import FlightMap

V = TypeVar("V")


class OnLoops(Generic[V]):
    """Carries out runs as tasks.

    Args:
        flights: The map.
        landing: Where runs end.
        loader: Loads the values.
    """

    def __init__(self, flights: FlightMap[V], landing: Landing[V], loader: Loader[V]) -> None:
        self._flights: Final = flights
        self._landing: Final = landing
        self._loader: Final = loader

    def launch(self, run: Run, context: contextvars.Context | None = None) -> None:
        """Carry out a run in a task on the running loop, in a context; None for the caller's."""
        loop = run.loop or asyncio.get_running_loop()
        landed = _Landed(run, self._landing)
        run.task = task = loop.create_task(self._fly(run, landed), context=context)
        run.began = True
        task.add_done_callback(landed)
        if run.flight.ended:
            task.cancel()

    def launch_from_elsewhere(
        self, run: Run, loop: asyncio.AbstractEventLoop, context: contextvars.Context | None
    ) -> None:
        """Do the same on another thread's loop."""
        try:
            loop.call_soon_threadsafe(self.launch, run, context)
        except RuntimeError:  # it has closed
            self._landing.lose(run)
        else:
            run.began = True

    def relaunch(self, flight: Flight[V], loop: asyncio.AbstractEventLoop) -> None:
        """Run a flight that paused between attempts on `loop` again, there."""
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._relaunch_here, flight, loop)
            return
        self._landing.abandon(flight, only_queued=True)

    def _relaunch_here(self, flight: Flight[V], loop: asyncio.AbstractEventLoop) -> None:
        run = self._flights.reclaim(flight, loop)
        if run is None:
            self._landing.abandon(flight, only_queued=True)
        else:
            self.launch(run, None if flight.context is None else flight.context.copy())

    async def _fly(self, run: Run, landed: _Landed) -> None:
        flight = run.flight
        reentry.running.set(flight)  # in this task's own context
        task = asyncio.current_task()
        try:
            value = await self._loader.aload(flight.text, flight.options)
        except BaseException as error:
            if loops.current_task() is not task:
                # The collector destroys a task whose loop is gone. It may do so at any moment:
                # touch nothing. Those who wait notice by themselves.
                raise
            if came_from_a_signal(error):
                self._landing.lose(run)
                raise
            self._landing.fail(run, error)
            if not isinstance(error, Exception):
                raise
        else:
            if task is not None and loops.current_task() is task:
                try:
                    self._landing.complete(run, value)
                except BaseException:
                    self._landing.lose(run)  # unless it has landed
                    raise
                run.task = None
                task.remove_done_callback(landed)  # the loop need not call it, too
        finally:
            reentry.run_has_ended(flight)
            del task  # which keeps its exception, and that this frame


class _Landed:
    """Sees to a run whose task has ended without it: cancelled before its first step, say."""

    __slots__ = ("_landing", "_run")

    def __init__(self, run: Run, landing: Landing[Any]) -> None:
        self._run = run
        self._landing = landing

    def __call__(self, task: asyncio.Task[None]) -> None:
        run = self._run
        run.task = None
        if not task.cancelled():
            task.exception()  # retrieved: what interrupts a loop has been raised out of it already
        if run in run.flight.runs:
            self._landing.lose(run)
