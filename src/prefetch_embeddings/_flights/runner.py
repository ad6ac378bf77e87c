"""Runs flights and waits for them: in worker threads, inline, and on event loops.

Who runs a flight is whoever claimed it in the map. A waiter only ever waits for a flight that
somebody runs, and trusts nobody for ever. A loop that has stopped under a flight is noticed, and
the flight abandoned: it ends, and its waiters see to themselves. A flight that may still come, but
not soon, is given up: those who do so see to themselves, and it goes on for the others.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from prefetch_embeddings import misses
from prefetch_embeddings._background import forks
from prefetch_embeddings._flights import loops
from prefetch_embeddings._flights import reentry as waits
from prefetch_embeddings._flights.failures import own_copy
from prefetch_embeddings._flights.map import (
    AbandonedError,
    Batch,
    End,
    Flight,
    FlightMap,
    Met,
    PrefetchOutcome,
    State,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
    from concurrent.futures import Future

    from prefetch_embeddings._background.pool import Executor
    from prefetch_embeddings._background.timer import Scheduler
    from prefetch_embeddings.events import Reporter

V = TypeVar("V")

RETRY_PAUSE: Final = 0.2
"""Seconds before the second attempt in the background, doubled for each further one."""


GIVE_UP_SECONDS: Final = 30.0
"""How long anybody waits for a flight that somebody else runs, unless told otherwise. Longer than a
call takes that still succeeds, and yet not for ever: the flight may be waiting for what its waiters
hold, a thread of a pool or a lock, in ways that nobody can see."""


class FlightRunner(Generic[V]):
    """Gets values by key, through flights.

    Args:
        flights: The map that decides who runs what.
        load: Loads one text's value. Each call gives a value that nobody else holds.
        aload: The same on an event loop.
        load_many: Loads several at once; None if texts are loaded one by one.
        native_async: Whether `aload` has a client of its own, and needs no thread.
        executor: Runs prefetches.
        aside: Runs at once, whatever it runs already, what nobody can be made to wait in line
            for and no caller's thread may be stuck in: flights that explicit waits claim; with
            hedging those that queries claim, too, and second calls.
        scheduler: Wakes flights that pause between attempts.
        reporter: Is told what happens.
    """

    def __init__(
        self,
        flights: FlightMap[V],
        *,
        load: Callable[[str], V],
        aload: Callable[[str], Awaitable[V]],
        load_many: Callable[[list[str]], Sequence[V]] | None,
        native_async: bool,
        executor: Executor,
        aside: Executor,
        scheduler: Scheduler,
        reporter: Reporter,
    ) -> None:
        self._flights: Final = flights
        self._load: Final = load
        self._aload: Final = aload
        self._load_many: Final = load_many
        self._native_async: Final = native_async
        self._executor: Final = executor
        self._aside: Final = aside
        self._scheduler: Final = scheduler
        self._reporter: Final = reporter
        forks.register(self)

    def reset_after_fork(self) -> None:
        """Start anew in a forked child: an empty map, and threads of its own."""
        self._flights.reset_after_fork()
        self._executor.reset_after_fork()
        self._aside.reset_after_fork()
        self._scheduler.reset_after_fork()

    # --- Queries -------------------------------------------------------------------------------

    def get(self, key: Hashable, text: str) -> V:
        """Return the value of `key`; the calling thread waits.

        Raises:
            Exception: What the model raised in a call made for a query.
            RuntimeError: If the model, while it loads a text, asks for that text.
        """
        query = _Query(self._flights, self._reporter, key, text)
        while True:
            with query as flight, waits.waiting_for(flight, mine=query.mine):
                if query.mine:
                    self._run(flight, aside=self._flights.hedging)
                    query.handed_over = True
                self._join(flight, None, mine=query.mine)
                if query.settle():
                    return flight.value

    async def aget(self, key: Hashable, text: str) -> V:
        """Return the value of `key`; the calling coroutine waits. Raises what `get` raises.

        Cancelling the caller cancels its wait, and never the work, which others may wait for.
        """
        loop = asyncio.get_running_loop()
        query = _Query(self._flights, self._reporter, key, text, loop)
        while True:
            with query as flight, waits.waiting_for(flight, mine=query.mine):
                if query.mine:
                    self._launch(flight, loop)
                    query.handed_over = True
                await self._ajoin(flight, None, mine=query.mine)
                if query.settle():
                    return flight.value

    # --- Prefetches ----------------------------------------------------------------------------

    def prefetch(self, key: Hashable, text: str) -> PrefetchOutcome:
        """Have `key` loaded in the background."""
        context = contextvars.copy_context()
        outcome, flight = self._flights.begin(key, text, context)
        if outcome is PrefetchOutcome.IN_FLIGHT and self._abandon_if_dead(flight):
            outcome, flight = self._flights.begin(key, text, context)
        if outcome is PrefetchOutcome.STARTED and flight is not None:
            self._reporter.started(text, flight.number)
            outcome = self._submit(flight)
        if outcome is PrefetchOutcome.DROPPED:
            self._reporter.dropped(text)
        return outcome

    def prefetch_many(self, items: Iterable[tuple[Hashable, str]]) -> list[PrefetchOutcome]:
        """Have several keys loaded in the background, in one call where the model allows it."""
        if self._load_many is None:
            return [self.prefetch(key, text) for key, text in items]
        items = list(items)
        for key, _ in items:
            self._abandon_if_dead(self._flights.get(key))
        outcomes, batch = self._flights.begin_batch(items, contextvars.copy_context())
        for flight in batch.flights:
            self._reporter.started(flight.text, flight.number)
        if batch.flights and not self._executor.submit(batch, self._fly):
            started = iter(batch.flights)
            outcomes = [
                PrefetchOutcome.DROPPED
                if outcome is PrefetchOutcome.STARTED and self._flights.undo(next(started))
                else outcome
                for outcome in outcomes
            ]
        if batch.flights:
            self._withdraw(batch.flights[0])  # if all were claimed before they came into the queue
        for (_, text), outcome in zip(items, outcomes, strict=True):
            if outcome is PrefetchOutcome.DROPPED:
                self._reporter.dropped(text)
        return outcomes

    async def aprefetch(self, key: Hashable, text: str) -> PrefetchOutcome:
        """Have `key` loaded on the running loop; returns once the first step is done."""
        if not self._native_async:
            return self.prefetch(key, text)
        loop = asyncio.get_running_loop()
        outcome, flight = self._flights.begin_on_loop(key, text, loop)
        if outcome is PrefetchOutcome.IN_FLIGHT and self._abandon_if_dead(flight):
            outcome, flight = self._flights.begin_on_loop(key, text, loop)
        if outcome is PrefetchOutcome.STARTED and flight is not None:
            self._reporter.started(text, flight.number)
            self._launch(flight, loop)
            await asyncio.sleep(0)
        elif outcome is PrefetchOutcome.DROPPED:
            self._reporter.dropped(text)
        return outcome

    def wait(self, key: Hashable, timeout: float | None) -> bool:
        """Wait for the flight of `key`, if it has one; True if its value is there.

        Without a timeout a flight that is still queued is run at once, in a thread of its own:
        the model may hang, and closing must let this thread go.

        Raises:
            RuntimeError: If the model waits, while it loads a text, for that text.
        """
        flight, mine = self._flights.attend(key, claim=timeout is None)
        if flight is None:
            return False
        handed_over = False
        try:
            with waits.waiting_for(flight, mine=mine):
                if mine:
                    self._run(flight, _context_of(flight), aside=True)
                handed_over = True
                if flight.loop is None or flight.loop is not loops.running_loop():
                    self._join(flight, timeout, mine=mine)
                # else: the loop that runs it cannot turn while this thread waits
        finally:
            if mine and not handed_over:  # interrupted before the call could even begin
                self._flights.abandon(flight)
            self._flights.leave(flight, flight.text, 0.0, End.GONE)
        return flight.state is State.DONE

    async def await_(self, key: Hashable, timeout: float | None) -> bool:
        """Do what `wait` does without blocking the loop."""
        loop = asyncio.get_running_loop()
        # Without an async client of its own a model needs a thread of the loop's executor: it
        # would go on there after the timeout, and hold up the end of the loop.
        claim = timeout is None or self._native_async
        flight, mine = self._flights.attend(key, claim=claim, loop=loop)
        if flight is None:
            return False
        try:
            with waits.waiting_for(flight, mine=mine):
                if mine:
                    self._launch(flight, loop, _context_of(flight))
                await self._ajoin(flight, timeout, mine=mine)
        except GeneratorExit:
            self._flights.leave_later(flight, flight.text, 0.0, End.GONE)
            raise
        except BaseException:
            self._flights.leave(flight, flight.text, 0.0, End.GONE)
            raise
        self._flights.leave(flight, flight.text, 0.0, End.GONE)
        return flight.state is State.DONE

    # --- Looks ---------------------------------------------------------------------------------

    @property
    def clock(self) -> Callable[[], float]:
        """The monotonic clock that everything goes by, in seconds."""
        return self._flights.clock

    def call_later(self, seconds: float, call: Callable[[], None]) -> bool:
        """Call `call()` in `seconds` seconds, from the one thread that all delays share.

        Returns:
            False if it never will.
        """
        return self._scheduler.call_later(seconds, call)

    def explain_miss(self, key: Hashable, text: str) -> misses.Miss | None:
        """Tell why a query for `text` finds no flight; None if a prefetch is there for it."""
        return misses.explain(key, text, self._flights)

    # --- Removal -------------------------------------------------------------------------------

    def forget(self, key: Hashable) -> bool:
        """Take `key` out of the map; True if it was there."""
        flight = self._flights.forget(key)
        if flight is not None and flight.ended:  # else it runs, or somebody waits for its turn
            self._withdraw(flight)
        return flight is not None

    def number_of(self, key: Hashable) -> int | None:
        """Return the number of the flight of `key`, if it has one."""
        flight = self._flights.get(key)
        return None if flight is None else flight.number

    def withdraw(self, key: Hashable, number: int, asks: int) -> bool:
        """Take back all `asks` prefetches of flight `number`, if it has not begun to run.

        Returns:
            Whether it was so. It is not if anybody else waits for it, or has prefetched it.
        """
        flight = self._flights.withdraw(key, number, asks)
        if flight is None:
            return False
        self._withdraw(flight)
        return True

    def clear(self) -> None:
        """Take everything out of the map."""
        for flight in self._flights.clear():
            self._withdraw(flight)

    def close(self) -> None:
        """End what is under way in the background; begin nothing more."""
        for flight in self._flights.close():
            self._drop(flight)
        self._executor.close()
        self._aside.close()
        self._scheduler.close()

    # --- Running in a worker -------------------------------------------------------------------

    def _submit(self, flight: Flight[V]) -> PrefetchOutcome:
        if not self._executor.submit(flight, self._fly) and self._flights.undo(flight):
            return PrefetchOutcome.DROPPED
        if flight.for_query or flight.ended:
            # Claimed or ended before it came into the queue: it must not stay there. (Not if it is
            # merely running: by the time of the withdrawal its next attempt may be in the queue.)
            self._executor.withdraw(flight)
        return PrefetchOutcome.STARTED

    def _withdraw(self, flight: Flight[V]) -> None:
        """Take a flight's job off the executor's queue if nothing of it is left to run."""
        job = flight.job
        if not isinstance(job, Batch) or all(f.state is not State.QUEUED for f in job.flights):
            self._executor.withdraw(job)

    def _fly(self, job: Flight[V] | Batch[V]) -> None:
        """Run a flight, or those of a batch that are still queued. Called in a worker."""
        flights = self._flights.claim(job.flights if isinstance(job, Batch) else (job,))
        if not flights:
            return
        context = _context_of(flights[0]) or contextvars.Context()
        try:
            context.run(self._attempt, flights, together=isinstance(job, Batch))
        except BaseException:  # noqa: BLE001 - whatever it is, no flight may stay unfinished
            for flight in flights:
                self._flights.abandon(flight)
        finally:
            self._flights.worker_done()

    def _attempt(self, flights: list[Flight[V]], *, together: bool) -> None:
        try:
            with waits.running_together(flights):
                if together and self._load_many is not None:
                    values = self._load_many([flight.text for flight in flights])
                    if len(values) != len(flights):
                        raise ValueError(f"{len(flights)} texts gave {len(values)} vectors")
                else:
                    values = [self._load(flight.text) for flight in flights]
        except BaseException as error:  # noqa: BLE001 - the flights carry it
            again = [flight for flight in flights if self._fail(flight, error)]
            if again:
                job = Batch(again) if together else again[0]
                for flight in again:
                    flight.job = job
                pause = _pause(again[0])
                if not self._scheduler.call_later(pause, lambda: self._resubmit(job, again)):
                    self._give_up_queued(again)
        else:
            for flight, value in zip(flights, values, strict=True):
                self._complete(flight, value)

    def _resubmit(self, job: Flight[V] | Batch[V], flights: list[Flight[V]]) -> None:
        if not any(flight.state is State.QUEUED for flight in flights):
            return
        if not self._executor.submit(job, self._fly):
            self._give_up_queued(flights)

    def _give_up_queued(self, flights: Iterable[Flight[V]]) -> None:
        """Abandon those flights that no query has claimed meanwhile: nothing will run them."""
        for flight in flights:
            self._flights.abandon(flight, only_queued=True)

    # --- Running for a waiter in a thread ------------------------------------------------------

    def _run(
        self, flight: Flight[V], context: contextvars.Context | None = None, *, aside: bool
    ) -> None:
        """Run a claimed flight for the calling thread: aside, or inline.

        Args:
            flight: The flight.
            context: The context to run it in, aside; None for the caller's.
            aside: Whether to run it aside, if a thread can be had.
        """
        if flight.by_prefetch:
            self._withdraw(flight)
        context = context or contextvars.copy_context()
        if not aside or not self._run_aside(flight, context, hedge=False):
            self._run_inline(flight)

    def _run_aside(self, flight: Flight[V], context: contextvars.Context, *, hedge: bool) -> bool:
        """Run a flight in a thread of its own, which may hang; False if none can be had."""

        def run(job: object) -> None:  # noqa: ARG001 - a job is only a name here
            with suppress(BaseException):  # the flight carries it to who asked
                context.run(self._run_inline, flight, hedge=hedge)

        return self._aside.submit(object(), run)

    def _run_inline(self, flight: Flight[V], *, hedge: bool = False) -> None:
        """Run a claimed flight here. An `Exception` stays with the flight."""
        try:
            with waits.running_together((flight,)):
                value = self._load(flight.text)
        except Exception as error:  # noqa: BLE001 - the flight carries it
            self._fail(flight, error)
        except BaseException as error:
            self._fail(flight, error)
            raise
        else:
            self._complete(flight, value, hedge=hedge)

    # --- Running on an event loop --------------------------------------------------------------

    def _launch(
        self,
        flight: Flight[V],
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context | None = None,
    ) -> None:
        """Run a claimed flight in a task of its own, which no waiter's cancellation reaches.

        Args:
            flight: The flight.
            loop: The running loop.
            context: The context to run it in; None for a copy of the caller's.
        """
        if flight.by_prefetch:
            self._withdraw(flight)
        self._start_task(flight, loop, lambda: self._fly_on_loop(flight, loop), context)

    def _start_task(
        self,
        flight: Flight[V],
        loop: asyncio.AbstractEventLoop,
        run: Callable[[], Awaitable[object]],
        context: contextvars.Context | None = None,
    ) -> None:
        begun = False

        async def begin() -> None:
            nonlocal begun
            begun = True
            await run()

        def on_done(_: asyncio.Task[None]) -> None:
            if not begun:  # cancelled before its first step
                self._fail(flight, asyncio.CancelledError())

        task = loop.create_task(begin(), context=context)
        task.add_done_callback(on_done)
        if not self._flights.hold_task(flight, task):
            task.cancel()

    async def _fly_on_loop(self, flight: Flight[V], loop: asyncio.AbstractEventLoop) -> None:
        try:
            while await self._attempt_on_loop(flight):
                await asyncio.sleep(_pause(flight))
                if not self._flights.reclaim(flight, loop):
                    return  # a query claimed it meanwhile
        except asyncio.CancelledError:
            self._flights.abandon(flight, only_queued=True)
            raise

    async def _attempt_on_loop(self, flight: Flight[V], *, hedge: bool = False) -> bool:
        """Run a flight once, in the current task; True if another attempt is due."""
        waits.running.set(flight)  # in this task's own context
        task = asyncio.current_task()
        try:
            value = await self._aload(flight.text)
        except BaseException as error:
            if loops.current_task() is not task:
                # The collector destroys a task whose loop is gone. It may do so at any moment, even
                # within the map's lock: touch nothing. Waiters notice themselves.
                raise
            again = self._fail(flight, error)
            if isinstance(error, asyncio.CancelledError):
                raise
            return again
        if loops.current_task() is task:
            self._complete(flight, value, hedge=hedge)
        return False

    # --- Hedging -------------------------------------------------------------------------------

    def _arm_hedge(self, flight: Flight[V]) -> None:
        """See to it that a flight which somebody waits for does not take too long."""
        seconds = self._flights.hedge_due_in(flight) if self._flights.hedging else None
        if seconds is not None:
            context = contextvars.copy_context()
            self._scheduler.call_later(max(0.0, seconds), lambda: self._hedge(flight, context))

    def _hedge(self, flight: Flight[V], context: contextvars.Context) -> None:
        """Give a flight that is still running its second runner, of the kind of its first."""
        if not self._flights.add_hedge(flight):
            return
        self._reporter.hedged(flight.text, flight.number)
        loop = flight.loop
        if loop is None:
            of_prefetch = None if flight.for_query else _context_of(flight)
            if not self._run_aside(flight, of_prefetch or context, hedge=True):
                self._flights.remove_hedge(flight)
            return

        def launch() -> None:
            self._start_task(flight, loop, lambda: self._attempt_on_loop(flight, hedge=True))

        try:
            loop.call_soon_threadsafe(launch, context=context)
        except RuntimeError:  # closed: the flight's waiters will notice
            self._flights.remove_hedge(flight)

    # --- Ends ----------------------------------------------------------------------------------

    def _complete(self, flight: Flight[V], value: V, *, hedge: bool = False) -> None:
        if not self._flights.complete(flight, value, hedge=hedge):
            return
        if flight.by_prefetch:
            seconds = flight.finished_at - flight.asked_at
            self._reporter.succeeded(flight.text, flight.number, seconds, flight.attempt)
        _cancel_tasks(flight)  # slower runners need not go on

    def _fail(self, flight: Flight[V], error: BaseException) -> bool:
        """Take in a failed run; True if its runner is to try again."""
        attempt, background = flight.attempt, flight.by_prefetch and not flight.for_query
        state = self._flights.fail(flight, error)
        if background and state is not None:
            again = state is State.QUEUED
            self._reporter.failed(flight.text, flight.number, error, attempt, will_retry=again)
        return state is State.QUEUED

    def _abandon(self, flight: Flight[V], loop: asyncio.AbstractEventLoop) -> bool:
        """Abandon a flight that is still `loop`'s to run; True if it was so."""
        abandoned = self._flights.abandon(flight, only_on=loop)
        if abandoned:
            self._drop(flight)
        return abandoned

    def _drop(self, flight: Flight[V]) -> None:
        """Let go of a flight that was abandoned while it was under way."""
        _cancel_tasks(flight)
        if flight.by_prefetch and not flight.for_query and flight.error is not None:
            self._reporter.failed(
                flight.text, flight.number, flight.error, flight.attempt, will_retry=False
            )

    def _abandon_if_dead(self, flight: Flight[V] | None) -> bool:
        """Abandon a flight whose loop has closed; True if it was so."""
        loop = None if flight is None else flight.loop
        if flight is None or loop is None or not loop.is_closed():
            return False
        return self._abandon(flight, loop)

    # --- Waiting -------------------------------------------------------------------------------

    def _join(self, flight: Flight[V], timeout: float | None, *, mine: bool) -> None:
        """Block until a flight has ended, or is not to be waited for any longer.

        Args:
            flight: The flight.
            timeout: Seconds after which it is not; None for when it is to be given up.
            mine: Whether it runs on behalf of the caller, who does not give it up.
        """
        self._arm_hedge(flight)
        patience = timeout if timeout is not None else None if mine else GIVE_UP_SECONDS
        loop = flight.loop
        if loop is None or flight.ended:
            _ended(flight, patience)
            return
        if loop.is_closed() or loop is loops.running_loop():
            self._abandon(flight, loop)  # it cannot get anywhere while this thread waits
            return
        until = math.inf if patience is None else time.monotonic() + patience
        with loops.standing_aside(loop):
            watch = loops.LoopWatch(loop)
            while True:
                left = until - time.monotonic()
                if left <= 0 or _ended(flight, min(left, loops.LOOK_SECONDS)):
                    return
                sign = watch.look()
                if sign is loops.Sign.SILENT and timeout is None:
                    return
                if sign is loops.Sign.DEAD:
                    break
        if not self._abandon(flight, loop):  # it has ended, or somebody else runs it by now
            self._join(flight, timeout, mine=mine)

    async def _ajoin(self, flight: Flight[V], timeout: float | None, *, mine: bool) -> None:
        """Do what `_join` does without blocking the loop."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        def on_ended(_: Future[V]) -> None:
            with suppress(RuntimeError):  # the waiter's loop has closed
                loop.call_soon_threadsafe(wake)

        future = flight.future
        if future is None:  # it has ended
            return
        future.add_done_callback(on_ended)
        self._arm_hedge(flight)
        patience = timeout if timeout is not None else None if mine else GIVE_UP_SECONDS
        runs_on = flight.loop
        if runs_on is None or runs_on is loop:
            await asyncio.wait((ended,), timeout=patience)
            return
        until = math.inf if patience is None else time.monotonic() + patience
        watch = loops.LoopWatch(runs_on)
        while not runs_on.is_closed():
            left = min(until - time.monotonic(), loops.LOOK_SECONDS)
            if left <= 0 or (await asyncio.wait((ended,), timeout=left))[0]:
                return
            sign = watch.look()
            if sign is loops.Sign.SILENT and timeout is None:
                return
            if sign is loops.Sign.DEAD:
                break
        if not self._abandon(flight, runs_on):
            await self._ajoin(flight, timeout, mine=mine)


class _Query(Generic[V]):
    """One query's way from flight to flight, until it has a value or an error to raise.

    As a context manager it enters the next flight, and parts from it at the end of the block.
    """

    def __init__(
        self,
        flights: FlightMap[V],
        reporter: Reporter,
        key: Hashable,
        text: str,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._flights = flights
        self._reporter = reporter
        self._key = key
        self._text = text
        self._loop = loop
        self._began = flights.clock()
        self._met: Met | None = None  # what it met first
        self._after: Flight[V] | None = None  # the flight that failed it
        self.mine = False
        """Whether the flight is this query's to run."""
        self.handed_over = False
        """Whether somebody runs that flight now."""

    def __enter__(self) -> Flight[V]:
        self._flight, met = self._flights.enter(
            self._key, self._text, loop=self._loop, after=self._after
        )
        self._met = self._met or met
        self.mine = met in (Met.CLAIMED, Met.MISSED)
        self.handed_over = False
        self._served = False
        return self._flight

    def settle(self) -> bool:
        """Draw the conclusion from a flight that is not to be waited for any longer.

        Returns:
            True if the query has its value; False if it has to see to itself: a prefetch failed,
            or whoever ran the flight went away, or takes too long.

        Raises:
            BaseException: What the model raised to the query that ran the flight.
        """
        flight = self._flight
        error = flight.error
        if flight.state is State.DONE:
            self._served = True
        elif isinstance(error, AbandonedError) or not flight.for_query:
            pass
        elif self.mine and error is not None:
            raise error
        elif isinstance(error, Exception):
            raise own_copy(error, flight.traceback)
        return self._served

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        flight = self._flight
        if self._served:
            end = End.SERVED if self._after is None else End.RECOVERED
        else:
            end = End.FAILED if isinstance(error, Exception) else End.GONE
        # A query that goes on to recover counts its whole wait there.
        goes_on = not self._served and error is None
        waited = 0.0 if goes_on else self._flights.clock() - self._began
        if isinstance(error, GeneratorExit):
            self._flights.leave_later(flight, self._text, waited, end)
            return
        if self.mine and not self.handed_over and not flight.ended:
            self._flights.abandon(flight)  # interrupted before the call could even begin
        self._flights.leave(flight, self._text, waited, end)
        if goes_on:
            self._after = flight
        elif self._served and self._met is not None:
            recovered = end is End.RECOVERED
            self._reporter.served(
                self._text, flight.number, self._met.value, waited, recovered=recovered
            )
        elif isinstance(error, Exception):
            self._reporter.query_failed(self._text, flight.number, error, waited)
        if self._met is Met.MISSED and not goes_on:
            misses.log_at_debug(self._key, self._text, self._flights)


def _ended(flight: Flight[Any], timeout: float | None) -> bool:
    """Block until a flight has ended; False if that took too long."""
    future = flight.future
    if future is not None:  # else it has ended
        try:
            future.exception(timeout)
        except TimeoutError:
            return False
    return True


def _cancel_tasks(flight: Flight[Any]) -> None:
    """Cancel what still runs a flight that has ended, the current task excepted."""
    tasks, flight.tasks = flight.tasks, ()
    current = loops.current_task() if tasks else None
    for task in tasks:
        if task is not current:
            with suppress(RuntimeError):  # its loop has closed
                task.get_loop().call_soon_threadsafe(task.cancel)


def _context_of(flight: Flight[Any]) -> contextvars.Context | None:
    """Return a context to run a flight in: a copy, for its last attempt may still be in another."""
    context = flight.context
    return None if context is None else context.copy()


def _pause(flight: Flight[Any]) -> float:
    """Return how long to pause before the next attempt, in seconds, spread by a random half."""
    pause: float = RETRY_PAUSE * 2 ** (flight.attempt - 1)
    return pause * random.uniform(0.75, 1.25)  # noqa: S311 - not a secret
