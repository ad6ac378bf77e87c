"""Go the way of a query, in the manner of a thread or of a coroutine.

A way (see `query`) yields what is to be done: a call to make, or seconds to wait until woken.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._flights.flight import Run

if TYPE_CHECKING:
    from collections.abc import Generator

    from prefetch_embeddings._flights.in_threads import InThreads
    from prefetch_embeddings._flights.joins import LoopVisit, ThreadVisit
    from prefetch_embeddings._flights.on_loops import OnLoops


class Drivers:
    """Makes calls and waits.

    Args:
        in_threads: Carries out runs in threads.
        on_loops: Carries out runs as tasks.
        hedges: Whether flights get second calls early. Then a thread makes no call itself: it
            could not leave it for the second one's value.
    """

    def __init__(self, in_threads: InThreads[Any], on_loops: OnLoops[Any], *, hedges: bool) -> None:
        self._in_threads: Final = in_threads
        self._on_loops: Final = on_loops
        self._hedges: Final = hedges

    def drive(self, way: Generator[Run | float | None, None, Any], visit: ThreadVisit) -> Any:
        """Go a way in the calling thread: make its calls, wait its waits."""
        try:
            while True:
                act = next(way)
                if not isinstance(act, Run):
                    visit.wait(act)
                elif not self._goes_aside(act):
                    self._in_threads.run_here(act)
        except StopIteration as stop:
            return stop.value
        finally:
            way.close()

    async def adrive(self, way: Generator[Run | float | None, None, Any], visit: LoopVisit) -> Any:
        """Go a way in the calling coroutine, without blocking its loop."""
        try:
            while True:
                act = next(way)
                if isinstance(act, Run):
                    self._on_loops.launch(act, self._context_of(act))
                else:
                    await visit.wait(act)
        except StopIteration as stop:
            return stop.value
        finally:
            way.close()

    def _goes_aside(self, run: Run) -> bool:
        """Have a run carried out aside where the caller must be free to leave, if that can be."""
        if run.for_query and not self._hedges:
            return False
        context = self._context_of(run)
        if context is None:
            context = contextvars.copy_context()
        return self._in_threads.run_aside(run, context)

    @staticmethod
    def _context_of(run: Run) -> contextvars.Context | None:
        """Return a context for a run that is the prefetch's; None where it is the caller's."""
        prefetched = None if run.for_query else run.flight.context
        return None if prefetched is None else prefetched.copy()
