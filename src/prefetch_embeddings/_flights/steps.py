"""Steps that happen one at a time, also when something calls in while one is under way.

There is one lock, in one `Steps`, which the objects that share it hold as `steps`. A method marked
as a step runs under that lock, alone.

The lock is an `RLock`, for one reason: a thread must never deadlock with itself. The garbage
collector may run a finaliser, or the interpreter a signal handler, between any two instructions
of a step, and these may call any method, in the same thread. Such a call finds a step half done, so
it is refused: it raises `ReenteredError`, having touched nothing. Its caller puts it off until the
step is over, or does without.

A signal handler can also throw an exception out of a step. The step then is torn: before the next
one, what may have come apart is mended.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


class ReenteredError(Exception):
    """The same thread is within a step, or has yet to make a call. Never reaches a caller."""


class Steps:
    """The one lock, and what came in between."""

    def __init__(self) -> None:
        self.start_anew()

    mend: Callable[[int], None]
    """Puts in order what a torn step may have left, given the thread that was thrown out of it.
    Called within the next one."""

    def start_anew(self) -> None:
        """Make the lock; once more in a forked child, where another thread may have held it."""
        self.lock = threading.RLock()
        self.within = False  # guarded by lock: whether a step is under way
        self.torn_by: int | None = None  # guarded by lock: the thread that was thrown out of one
        # Appended to where no lock can be taken; emptied by whoever has ended a step:
        self.put_off: deque[Callable[[], object]] = deque()

    def catch_up(self) -> None:
        """Make the calls that were put off. Called with no step under way."""
        while self.put_off:
            try:
                call = self.put_off.popleft()
            except IndexError:  # another thread was quicker
                return
            call()


class _HasSteps(Protocol):
    @property
    def steps(self) -> Steps: ...


S = TypeVar("S", bound=_HasSteps)


def step(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Mark a method as a step.

    Raises:
        ReenteredError: It was called within a step, and did nothing.
    """

    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        steps = self.steps
        with steps.lock:
            if steps.within:
                raise ReenteredError
            steps.within = True
            try:
                if steps.torn_by is not None:
                    steps.mend(steps.torn_by)
                    steps.torn_by = None
                result = method(self, *args, **kwargs)
            except ReenteredError:
                raise  # the step has found out by itself, before it changed anything
            except BaseException:
                steps.torn_by = threading.get_ident()
                raise
            finally:
                steps.within = False
        if steps.put_off:
            steps.catch_up()
        return result

    functools.update_wrapper(run, method)
    return run


def hot_step(method: Callable[[S, A, B, C, D], R]) -> Callable[[S, A, B, C, D], R]:
    """Mark a method of four arguments as a step.

    The same as `step`, but for packing the arguments, which would be a tenth of a prefetch.
    """

    def run(self: S, a: A, b: B, c: C, d: D) -> R:
        steps = self.steps
        with steps.lock:
            if steps.within:
                raise ReenteredError
            steps.within = True
            try:
                if steps.torn_by is not None:
                    steps.mend(steps.torn_by)
                    steps.torn_by = None
                result = method(self, a, b, c, d)
            except BaseException:
                steps.torn_by = threading.get_ident()
                raise
            finally:
                steps.within = False
        if steps.put_off:
            steps.catch_up()
        return result

    functools.update_wrapper(run, method)
    return run


def look(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Mark a method that only looks. Within a step of the same thread it sees it half done."""

    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        steps = self.steps
        with steps.lock:
            within = steps.within
            result = method(self, *args, **kwargs)
        if steps.put_off and not within:
            steps.catch_up()
        return result

    functools.update_wrapper(run, method)
    return run


def put_off(
    answer: R,
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Have a method that calls steps made again later, and answer `answer`, where it is refused."""

    def decorate(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(self, *args, **kwargs)
            except ReenteredError:
                self.steps.put_off.append(lambda: call(self, *args, **kwargs))
                return answer

        functools.update_wrapper(call, method)
        return call

    return decorate
