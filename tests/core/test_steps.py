"""Steps: one at a time, refused where one is under way, mended after one that was torn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from prefetch_embeddings._flights.steps import ReenteredError, Steps, put_off, step
from tests.helpers import Call


class Thing:
    """Something with steps, each of which notes what it does."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.done: list[Any] = []
        self.steps.mend = lambda thread: self.done.append("mended")

    @step
    def make(self, what: Any, *, then: Callable[[], Any] | None = None) -> Any:
        """Note it, and call something in the midst of the step."""
        self.done.append(what)
        return then() if then else what

    @put_off("later")
    def do(self, what: Any, *, twice: bool = False) -> str:
        self.make(what)
        if twice:
            self.make(what)
        return "done"


def test_a_step_is_made_under_the_lock_by_itself() -> None:
    thing = Thing()

    def taken() -> bool:
        return thing.steps.lock.acquire(blocking=False)

    assert thing.make("a") == "a"
    assert thing.make("b", then=lambda: Call(taken).result()) is False
    assert Call(taken).result() is True
    assert thing.make.__name__ == "make"
    assert (thing.make.__doc__ or "").startswith("Note it")
    assert thing.do.__name__ == "do"


def test_a_step_within_a_step_is_refused_and_does_nothing() -> None:
    thing = Thing()

    def inner() -> str:
        with pytest.raises(ReenteredError):
            thing.make("inner")
        return "refused"

    assert thing.make("outer", then=inner) == "refused"
    assert thing.done == ["outer"]
    assert thing.steps.torn_by is None, "a refused step tears nothing"
    assert thing.steps.within is False
    assert thing.make("after") == "after"
    assert thing.done == ["outer", "after"]


def test_another_thread_waits_for_the_step_that_is_under_way() -> None:
    thing = Thing()
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go_on.wait()

    outer = Call(lambda: thing.make("outer", then=wait))
    begun.wait()
    inner = Call(thing.make, "inner")
    go_on.set()
    outer.result()
    assert inner.result() == "inner"
    assert thing.done == ["outer", "inner"]


def test_what_is_put_off_is_done_once_the_step_is_over() -> None:
    thing = Thing()

    def inner() -> str:
        first = thing.do("first")
        assert thing.do("second", twice=True) == "later"
        assert thing.done == ["outer"]
        return first

    assert thing.make("outer", then=inner) == "later"
    assert thing.done == ["outer", "first", "second", "second"]
    assert not thing.steps.put_off
    assert thing.do("third") == "done"


def test_what_is_put_off_within_what_was_put_off_is_done_too() -> None:
    thing = Thing()

    def again() -> None:
        thing.make("again", then=lambda: thing.do("last"))

    thing.make("outer", then=lambda: thing.steps.put_off.append(again))
    thing.make("next")
    assert thing.done == ["outer", "again", "last", "next"]


def test_two_threads_that_catch_up_share_the_work() -> None:
    steps = Steps()
    made: list[str] = []

    def quicker() -> None:
        made.append("first")
        while steps.put_off:  # another thread has taken the second
            steps.put_off.popleft()

    steps.put_off.append(quicker)
    steps.put_off.append(lambda: made.append("second"))
    steps.catch_up()
    assert made == ["first"]


def test_who_is_too_late_to_catch_up_returns() -> None:
    class Emptied(deque[Callable[[], object]]):
        """One that another thread empties just after this one has looked."""

        def __bool__(self) -> bool:
            return True

    steps = Steps()
    steps.put_off = Emptied()
    steps.catch_up()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_torn_step_what_may_have_come_apart_is_mended_first(
    error: type[BaseException],
) -> None:
    thing = Thing()

    def throw() -> None:
        raise error

    def look(thread: int) -> None:
        thing.done.append(thread)

    thing.steps.mend = look
    with pytest.raises(error):
        thing.make("torn", then=throw)
    assert thing.steps.torn_by == threading.get_ident()
    assert thing.steps.within is False
    thing.make("next")
    thing.make("after")
    assert thing.done == ["torn", threading.get_ident(), "next", "after"]
    assert thing.steps.torn_by is None


def test_a_mending_that_is_torn_is_done_again() -> None:
    thing = Thing()
    failures = [KeyboardInterrupt()]

    def mend(thread: int) -> None:
        thing.done.append("mended")
        if failures:
            raise failures.pop()

    def throw() -> None:
        raise ValueError

    thing.steps.mend = mend
    with pytest.raises(ValueError, match=r"^$"):
        thing.make("torn", then=throw)
    with pytest.raises(KeyboardInterrupt):
        thing.make("not made")
    thing.make("made")
    assert thing.done == ["torn", "mended", "mended", "made"]


def test_a_forked_child_starts_with_a_lock_that_nobody_holds() -> None:
    thing = Thing()
    steps = thing.steps
    lock = steps.lock
    holder = Call(lock.acquire)  # and that thread does not exist in the child
    assert holder.result() is True
    steps.within, steps.torn_by = True, 1
    steps.put_off.append(lambda: thing.done.append("the parent's"))
    steps.start_anew()
    assert steps.lock is not lock
    assert Call(thing.make, "child").result() == "child"
    assert thing.done == ["child"]
