"""Runs flights and waits for them: in worker threads, inline, and on event loops.

Who runs a flight is whoever claimed it in the map. A waiter only ever waits for a flight that
somebody runs, and trusts nobody for ever: a loop that stops turning under a flight is noticed, the
flight is abandoned, and its waiters see to themselves.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import random
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from prefetch_embeddings import waits
from prefetch_embeddings.failures import own_copy
from prefetch_embeddings.flights import (
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

    from prefetch_embeddings.events import Reporter
    from prefetch_embeddings.timer import Scheduler
    from prefetch_embeddings.workers import Executor

V = TypeVar("V")

RETRY_PAUSE: Final = 0.2
"""Seconds before the second attempt in the background, doubled for each further one."""

LOOK_SECONDS: Final = 0.05
"""How often a waiter looks after the loop that runs its flight."""

PATIENCE_SECONDS: Final = 1.0
"""How long a loop, or its executor, may be silent before a waiter gives up on it."""


class FlightRunner(Generic[V]):
    """Gets values by key, through flights.

    Args:
        flights: The map that decides who runs what.
        load: Loads one text's value. Each call gives a value that nobody else holds.
        aload: The same on an event loop.
        load_many: Loads several at once; None if texts are loaded one by one.
        native_async: Whether `aload` has a client of its own, and needs no thread.
        executor: Runs prefetches.
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
        scheduler: Scheduler,
        reporter: Reporter,
    ) -> None:
        self._flights: Final = flights
        self._load: Final = load
        self._aload: Final = aload
        self._load_many: Final = load_many
        self._native_async: Final = native_async
        self._executor: Final = executor
        self._scheduler: Final = scheduler
        self._reporter: Final = reporter
        _runners.add(self)

    def reset_after_fork(self) -> None:
        """Start anew in a forked child: an empty map, and threads of its own."""
        self._flights.reset_after_fork()
        self._executor.reset_after_fork()
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
            with query as flight, waits.waiting_for(flight):
                if query.mine:
                    self._run_inline(flight)
                else:
                    self._join(flight, None)
                if query.settle():
                    return flight.value

    async def aget(self, key: Hashable, text: str) -> V:
        """Return the value of `key`; the calling coroutine waits. Raises what `get` raises.

        Cancelling the caller cancels its wait, and never the work, which others may wait for.
        """
        loop = asyncio.get_running_loop()
        query = _Query(self._flights, self._reporter, key, text, loop)
        while True:
            with query as flight, waits.waiting_for(flight):
                if query.mine:
                    self._launch(flight, loop)
                await self._ajoin(flight, None)
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
            outcome = self._submit(flight)
        if outcome is PrefetchOutcome.DROPPED:
            self._reporter.dropped(text)
        return outcome

    def prefetch_many(self, items: Iterable[tuple[Hashable, str]]) -> list[PrefetchOutcome]:
        """Have several keys loaded in the background, in one call where the model allows it."""
        if self._load_many is None:
            return [self.prefetch(key, text) for key, text in items]
        items = list(items)
        outcomes, batch = self._flights.begin_batch(items, contextvars.copy_context())
        if batch.flights and not self._executor.submit(batch, self._fly):
            started = iter(batch.flights)
            outcomes = [
                PrefetchOutcome.DROPPED
                if outcome is PrefetchOutcome.STARTED and self._flights.undo(next(started))
                else outcome
                for outcome in outcomes
            ]
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
            self._launch(flight, loop)
            await asyncio.sleep(0)
        elif outcome is PrefetchOutcome.DROPPED:
            self._reporter.dropped(text)
        return outcome

    def wait(self, key: Hashable, timeout: float | None) -> bool:
        """Wait for the flight of `key`, if it has one; True if its value is there.

        Without a timeout a flight that is still queued is run at once, by this thread.

        Raises:
            RuntimeError: If the model waits, while it loads a text, for that text.
        """
        flight, mine = self._flights.attend(key, claim=timeout is None)
        if flight is None:
            return False
        try:
            with waits.waiting_for(flight):
                if mine:
                    self._run_inline(flight)
                elif flight.loop is None or _running_loop() is None:
                    self._join(flight, timeout)
                # else: this thread's loop cannot turn while it waits
        finally:
            self._flights.unattend(flight)
        return flight.state is State.DONE

    async def await_(self, key: Hashable, timeout: float | None) -> bool:
        """Do what `wait` does without blocking the loop."""
        loop = asyncio.get_running_loop()
        flight, mine = self._flights.attend(key, claim=True, loop=loop)
        if flight is None:
            return False
        try:
            with waits.waiting_for(flight):
                if mine:
                    self._launch(flight, loop)
                await self._ajoin(flight, timeout)
        finally:
            self._flights.unattend(flight)
        return flight.state is State.DONE

    # --- Removal -------------------------------------------------------------------------------

    def forget(self, key: Hashable) -> bool:
        """Take `key` out of the map; True if it was there."""
        flight = self._flights.forget(key)
        if flight is None:
            return False
        self._withdraw(flight)
        return True

    def withdraw(self, key: Hashable) -> bool:
        """Take back a prefetch that has not begun to run; True if it was so."""
        flight = self._flights.withdraw(key)
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
            _cancel_task(flight)
        self._executor.close()
        self._scheduler.close()

    # --- Running in a worker -------------------------------------------------------------------

    def _submit(self, flight: Flight[V]) -> PrefetchOutcome:
        if not self._executor.submit(flight, self._fly) and self._flights.undo(flight):
            return PrefetchOutcome.DROPPED
        if flight.state is not State.QUEUED:
            # Claimed or ended before it came into the queue: it must not stay there.
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
        context = flights[0].context or contextvars.Context()
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
                self._scheduler.call_later(_pause(again[0]), lambda: self._resubmit(job, again))
        else:
            for flight, value in zip(flights, values, strict=True):
                self._complete(flight, value)

    def _resubmit(self, job: Flight[V] | Batch[V], flights: list[Flight[V]]) -> None:
        if not any(flight.state is State.QUEUED for flight in flights):
            return
        if not self._executor.submit(job, self._fly):
            for flight in flights:
                self._flights.abandon(flight, only_queued=True)

    # --- Running in the waiter's own thread ----------------------------------------------------

    def _run_inline(self, flight: Flight[V]) -> None:
        """Run a claimed flight here. An `Exception` stays with the flight."""
        if flight.by_prefetch:
            self._withdraw(flight)
        try:
            with waits.running_together((flight,)):
                value = self._load(flight.text)
        except Exception as error:  # noqa: BLE001 - the flight carries it
            self._fail(flight, error)
        except BaseException as error:
            self._fail(flight, error)
            raise
        else:
            self._complete(flight, value)

    # --- Running on an event loop --------------------------------------------------------------

    def _launch(self, flight: Flight[V], loop: asyncio.AbstractEventLoop) -> None:
        """Run a claimed flight in a task of its own, which no waiter's cancellation reaches."""
        if flight.by_prefetch:
            self._withdraw(flight)
        flight.task = loop.create_task(self._fly_on_loop(flight, loop))
        loop.call_soon(_probe_executor, flight, loop)

    async def _fly_on_loop(self, flight: Flight[V], loop: asyncio.AbstractEventLoop) -> None:
        waits.running.set(flight)  # in this task's own context
        try:
            while await self._attempt_on_loop(flight):
                await asyncio.sleep(_pause(flight))
                if not self._flights.reclaim(flight, loop):
                    return  # a query claimed it meanwhile
        except asyncio.CancelledError:
            self._flights.abandon(flight, only_queued=True)
            raise
        finally:
            flight.task = None

    async def _attempt_on_loop(self, flight: Flight[V]) -> bool:
        """Run a flight once; True if another attempt is due."""
        try:
            value = await self._aload(flight.text)
        except asyncio.CancelledError as error:
            self._fail(flight, error)
            raise
        except BaseException as error:
            if isinstance(error, GeneratorExit) and _current_task() is not flight.task:
                # Not the model: the collector destroys a task whose loop is gone. It may do so at
                # any moment, even within the map's lock: touch nothing. Waiters notice themselves.
                raise
            return self._fail(flight, error)
        self._complete(flight, value)
        return False

    # --- Ends ----------------------------------------------------------------------------------

    def _complete(self, flight: Flight[V], value: V) -> None:
        if self._flights.complete(flight, value) and flight.by_prefetch:
            seconds = flight.finished_at - flight.asked_at
            self._reporter.succeeded(flight.text, seconds, flight.attempt)

    def _fail(self, flight: Flight[V], error: BaseException) -> bool:
        """Take in a failed run; True if its runner is to try again."""
        attempt, background = flight.attempt, flight.by_prefetch and not flight.for_query
        state = self._flights.fail(flight, error)
        if background and state is not None:
            again = state is State.QUEUED
            self._reporter.failed(flight.text, error, attempt, will_retry=again)
        return state is State.QUEUED

    def _abandon(self, flight: Flight[V]) -> None:
        if self._flights.abandon(flight):
            _cancel_task(flight)

    def _abandon_if_dead(self, flight: Flight[V] | None) -> bool:
        """Abandon a flight whose loop has closed; True if it was so."""
        if flight is None or flight.loop is None or not flight.loop.is_closed():
            return False
        self._abandon(flight)
        return True

    # --- Waiting -------------------------------------------------------------------------------

    def _join(self, flight: Flight[V], timeout: float | None) -> None:
        """Block until a flight has ended, or for `timeout` seconds."""
        if flight.loop is None:
            _ended(flight, timeout)
            return
        if _running_loop() is not None:
            # This thread's loop stands still while it waits. Whatever loop runs the flight may,
            # right now, wait for this one.
            self._abandon(flight)
            return
        watch = _LoopWatch(flight, for_thread=True)
        give_up_at = None if timeout is None else time.monotonic() + timeout
        while True:
            look = LOOK_SECONDS
            if give_up_at is not None:
                look = min(look, give_up_at - time.monotonic())
            if look <= 0 or _ended(flight, look):
                return
            if watch.stranded():
                self._abandon(flight)

    async def _ajoin(self, flight: Flight[V], timeout: float | None) -> None:
        """Wait until a flight has ended, or for `timeout` seconds."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        def on_ended(_: Future[V]) -> None:
            with suppress(RuntimeError):  # the waiter's loop has closed
                loop.call_soon_threadsafe(wake)

        if flight.future is None:  # it had ended when the waiter came
            return
        flight.future.add_done_callback(on_ended)
        if flight.loop is None or flight.loop is loop:
            if timeout is None:
                await ended
            else:
                await asyncio.wait((ended,), timeout=timeout)
            return
        watch = _LoopWatch(flight, for_thread=False)
        give_up_at = None if timeout is None else time.monotonic() + timeout
        while True:
            look = LOOK_SECONDS
            if give_up_at is not None:
                look = min(look, give_up_at - time.monotonic())
            if look <= 0 or (await asyncio.wait((ended,), timeout=look))[0]:
                return
            if watch.stranded():
                self._abandon(flight)


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
        self._recovering = False
        self.mine = False
        """Whether the flight is this query's to run."""

    def __enter__(self) -> Flight[V]:
        self._flight, met = self._flights.enter(
            self._key, self._text, loop=self._loop, recovering=self._recovering
        )
        self._met = self._met or met
        self.mine = met in (Met.CLAIMED, Met.MISSED)
        self._served = False
        return self._flight

    def settle(self) -> bool:
        """Draw the conclusion from a flight that has ended.

        Returns:
            True if the query has its value; False if it has to see to itself: a prefetch failed,
            or whoever ran the flight went away.

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
        if self._served:
            end = End.RECOVERED if self._recovering else End.SERVED
        else:
            end = End.FAILED if isinstance(error, Exception) else End.GONE
        # A query that goes on to recover counts its whole wait there.
        goes_on = not self._served and error is None
        waited = 0.0 if goes_on else self._flights.clock() - self._began
        self._flights.leave(self._flight, waited, end)
        self._recovering = goes_on
        if self._served and self._met is not None:
            recovered = end is End.RECOVERED
            self._reporter.served(self._text, self._met.value, waited, recovered=recovered)
        elif isinstance(error, Exception):
            self._reporter.query_failed(self._text, error, waited)


class _LoopWatch:
    """Tells whether the loop that runs a flight still gets anywhere.

    A loop that was stopped or closed does not. Nor does one whose thread is blocked, perhaps by
    the very query that waits. And a flight can be stuck behind threads: a model that hands part of
    its async work to the loop's default executor (as LangChain's default does, and OpenAI's
    tokenizer) never proceeds while queries block all of that executor's threads, waiting for it.
    Hence `_probe_executor`: as long as what was put in line right behind the flight's first step
    has not run, neither has, maybe, the flight's own.
    """

    def __init__(self, flight: Flight[Any], *, for_thread: bool) -> None:
        self._flight = flight
        self._for_thread = for_thread
        self._since = time.monotonic()
        self._asked_at = 0.0
        self._answered = True

    def stranded(self) -> bool:
        """Tell whether to give up on the flight; to be asked every now and then."""
        loop = self._flight.loop
        if loop is None:
            return False
        now = time.monotonic()
        if self._for_thread and not self._flight.executor_passed:
            return now - self._since > PATIENCE_SECONDS
        try:
            if loop.is_closed() or not loop.is_running():
                return True
            if self._answered:
                self._answered = False
                self._asked_at = now
                loop.call_soon_threadsafe(self._answer)
        except RuntimeError:  # closed in between
            return True
        return now - self._asked_at > PATIENCE_SECONDS

    def _answer(self) -> None:
        self._answered = True


def _probe_executor(flight: Flight[Any], loop: asyncio.AbstractEventLoop) -> None:
    """Put a mark in line behind what the flight's first step handed to the loop's executor."""

    def passed() -> None:
        flight.executor_passed = True

    try:
        loop.run_in_executor(None, passed)
    except RuntimeError:  # shut down: nothing can be stuck in it
        passed()


def _ended(flight: Flight[Any], timeout: float | None) -> bool:
    """Block until a flight has ended; False if that took too long."""
    if flight.future is not None:  # else it had ended when the waiter came
        try:
            flight.future.exception(timeout)
        except TimeoutError:
            return False
    return True


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _cancel_task(flight: Flight[Any]) -> None:
    task, loop = flight.task, flight.loop
    if task is not None and loop is not None:
        with suppress(RuntimeError):  # closed
            loop.call_soon_threadsafe(task.cancel)


def _pause(flight: Flight[Any]) -> float:
    """Return how long to pause before the next attempt, in seconds, spread by a random half."""
    pause: float = RETRY_PAUSE * 2 ** (flight.attempt - 1)
    return pause * random.uniform(0.75, 1.25)  # noqa: S311 - not a secret


_runners: Final[weakref.WeakSet[FlightRunner[Any]]] = weakref.WeakSet()


def _reset_after_fork() -> None:
    waits.reset_after_fork()
    for runner in list(_runners):
        runner.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
