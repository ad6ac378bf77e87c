"""Runs threads one at a time in every order there is, up to a number of preemptions.

A scenario makes its threads anew for each schedule. Only one of them runs at a time; it may be
stopped before each line (or bytecode) of the traced files, at each lock and at each wait. The
explorer first never stops a thread that can go on, and then, depth first, at each such point in
turn, and at each two of them: most races need one or two preemptions in the right places.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol

HANG = 60.0
MOST_WAITS = 10_000
"""Locks and waits in one schedule after which its workers are taken to run in circles."""


class Scenario(Protocol):
    """What is run in one schedule."""

    @property
    def workers(self) -> Sequence[Callable[[], object]]:
        """What each thread does."""

    def check(self) -> None:
        """Assert what must hold when all workers have returned."""


class StuckError(BaseException):
    """Raised in a worker that waits for what will never come."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What exploring came to.

    Attributes:
        schedules: How many schedules were run.
        failure: What went wrong in the last of them; None if nothing did.
    """

    schedules: int
    failure: BaseException | None


class _Worker:
    def __init__(self, run: Callable[[], object], schedule: Schedule) -> None:
        self.turn = threading.Semaphore(0)
        self.awaits: Callable[[], bool] | None = None
        self.done = False
        self._run = run
        self._schedule = schedule
        self.thread = threading.Thread(target=self._work, daemon=True)

    @property
    def can_run(self) -> bool:
        return not self.done and (self.awaits is None or self.awaits())

    def _work(self) -> None:
        self.turn.acquire()
        sys.settrace(self._schedule.trace)
        try:
            self._run()
        except BaseException as error:
            self._schedule.fail(error)
        finally:
            sys.settrace(None)
            self.done = True
            self._schedule.switch()


class Schedule:
    """One run of a scenario's workers; what they share is made by its methods."""

    def __init__(
        self, prefix: Sequence[int], files: frozenset[str], *, preemptions: int, opcodes: bool
    ) -> None:
        self.trail: list[tuple[int, int]] = []  # at each decision: the choice, of how many
        self.failure: BaseException | None = None
        self.over = threading.Event()
        self._prefix = prefix
        self._files = files
        self._preemptions = preemptions
        self._opcodes = opcodes
        self._workers: list[_Worker] = []
        self._current: _Worker | None = None
        self._aborted = False
        self._choosing = False
        self._waits = 0
        self._running = False

    def run(self, workers: Sequence[Callable[[], object]]) -> None:
        self._workers = [_Worker(run, self) for run in workers]
        for worker in self._workers:
            worker.thread.start()
        self._running = True
        self.switch()
        assert self.over.wait(HANG), "a worker blocks on what the explorer does not know"
        for worker in self._workers:
            worker.thread.join(HANG)
        self._running = False
        self._current = None

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or error

    def lock(self) -> Lock:
        """Return what stands in for a `threading.RLock`."""
        return Lock(self)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Have the current worker wait until another has brought about `condition`."""
        worker = self._current
        if worker is None or not self._running:  # not in a worker, but before or after them
            assert condition()
            return
        self._waits += 1
        if self._waits > MOST_WAITS and not self._aborted:
            self._abort("they run in circles")
        worker.awaits = condition
        self.switch()
        worker.awaits = None
        if self._waits > MOST_WAITS or not condition():
            raise StuckError

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = self._opcodes
        frame.f_trace_lines = not self._opcodes
        return self._at_point

    def _at_point(self, frame: FrameType, event: str, arg: object) -> Any:
        if self._aborted:
            raise StuckError
        if self._preemptions == 0:  # there is nothing more to decide but at locks and waits
            frame.f_trace = None
            sys.settrace(None)
            return None
        if event in ("line", "opcode"):
            self.switch()
        return self._at_point

    def bell(self) -> Bell:
        """Return what stands in for a `SimpleQueue`."""
        return Bell(self)

    def switch(self) -> None:
        """Let the worker run whose turn it is by the schedule, which may be the current one.

        Called by a worker; elsewhere it does nothing.
        """
        if not self._running:
            return
        if self._aborted:
            self._stop_if_all_done()
            return
        if self._choosing:  # a condition that is traced
            return
        current = self._current
        self._choosing = True
        following = self._choose(current)
        self._choosing = False
        if following is current and current is not None:
            return
        self._current = following
        if following is not None:
            following.turn.release()
        elif all(worker.done for worker in self._workers):
            self.over.set()
            return
        else:
            self._abort("nobody can go on")
        if current is not None and not current.done:
            current.turn.acquire()

    def _choose(self, current: _Worker | None) -> _Worker | None:
        options = [worker for worker in self._workers if worker.can_run and worker is not current]
        preempts = current is not None and current.can_run
        if preempts and current is not None:
            options.insert(0, current)
            if not self._preemptions:
                return current
        if len(options) < 2:
            return options[0] if options else None
        position = len(self.trail)
        choice = self._prefix[position] if position < len(self._prefix) else 0
        self.trail.append((choice, len(options)))
        if preempts and choice:
            self._preemptions -= 1
        return options[choice]

    def _abort(self, why: str) -> None:
        self.fail(StuckError(why))
        self._aborted = True
        for worker in self._workers:
            worker.turn.release()

    def _stop_if_all_done(self) -> None:
        if all(worker.done for worker in self._workers):
            self.over.set()


class Lock:
    """A re-entrant lock whose every taking and giving back is a point to switch at."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._holder != me:
            self._schedule.wait_until(lambda: self._holder is None)
            self._holder = me
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder = None
            self._schedule.switch()


class Bell:
    """What stands in for a `SimpleQueue` that threads wait on, without a limit of time."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._rings = 0

    def put(self, item: None) -> None:
        """Ring it once more."""
        self._rings += 1
        self._schedule.switch()

    def get(self, timeout: float | None = None) -> None:
        """Wait for a ring, however long."""
        self._schedule.wait_until(lambda: self._rings > 0)
        self._rings -= 1


def explore(
    scenario: Callable[[Schedule], Scenario],
    files: Sequence[str],
    *,
    preemptions: int = 2,
    opcodes: bool = False,
) -> Found:
    """Run a scenario in every schedule with so many preemptions; stop at the first failure.

    Args:
        scenario: Makes it, with the schedule's own locks and waits.
        files: Where threads may be stopped.
        preemptions: How often a thread is stopped that could go on.
        opcodes: Whether threads may be stopped within a line.
    """
    prefix: list[int] = []
    schedules = 0
    while True:
        schedule = Schedule(prefix, frozenset(files), preemptions=preemptions, opcodes=opcodes)
        made = scenario(schedule)
        schedule.run(made.workers)
        schedules += 1
        if schedule.failure is None:
            try:
                made.check()
            except BaseException as error:
                schedule.fail(error)
        if schedule.failure is not None:
            return Found(schedules, schedule.failure)
        trail = schedule.trail
        while trail and trail[-1][0] + 1 == trail[-1][1]:
            trail.pop()
        if not trail:
            return Found(schedules, None)
        prefix = [choice for choice, _ in trail[:-1]] + [trail[-1][0] + 1]
