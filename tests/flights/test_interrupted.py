"""An exception out of a signal handler is its caller's alone, at whatever step it comes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.flights.outside import (
    CallByCall,
    OnItsLoop,
    give_it_a_chance,
    places,
    queries_counted,
    run_program,
    until_joined,
)
from tests.helpers import PATIENCE, Call, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="there are no such signals"),
    # An exception thrown into a finaliser goes nowhere: Python only tells of it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class SoftTimeLimitExceededError(Exception):
    """As Celery raises it, out of the handler of a signal."""


class HardInterruptError(BaseException):
    """As `KeyboardInterrupt` is: no `Exception`."""


@contextmanager
def on_signal(error: type[BaseException]) -> Iterator[Callable[[], None]]:
    """Give a function that has `error` raised in the main thread, wherever it is."""
    main = threading.main_thread().ident
    assert threading.get_ident() == main, "signals come to the main thread"

    def handle(number: int, frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def soon(condition: Callable[[], object], then: Callable[[], None]) -> Call[None]:
    """Do something in another thread once something has come about."""

    def run() -> None:
        until(condition)
        give_it_a_chance(0.05)
        then()

    return Call(run)


ERRORS = [SoftTimeLimitExceededError, HardInterruptError, KeyboardInterrupt]


# A query runs the model itself.


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("prefetched", [False, True])
def test_who_joined_is_answered_by_a_call_of_its_own(
    manual: Manual, error: type[BaseException], prefetched: bool
) -> None:
    """The query of the main thread runs the model; others have joined; its time is up."""
    model = CallByCall(holding=1)
    embeddings = manual(model)
    other = OnItsLoop()
    followers: list[Callable[[], list[float]]] = []

    def join() -> None:
        model.wait_until_entered(1)
        followers.extend(Call(embeddings.embed_query, "q").result for _ in range(4))
        task = other.start(embeddings.aembed_query("q"))
        followers.append(lambda: task.result(PATIENCE))

    if prefetched:
        embeddings.prefetch("q")  # queued: the query claims it
    joining = Call(join)
    with on_signal(error) as interrupt:
        interrupting = soon(lambda: embeddings.stats().query_joined == 5, interrupt)
        with pytest.raises(error):
            embeddings.embed_query("q")
        interrupting.result()
    joining.result()
    assert [answer() for answer in followers] == [[2.0]] * 5
    assert model.calls == 2, "not one call for all who were waiting"
    other.close()
    embeddings.executor.run_all()
    stats = embeddings.stats()
    assert queries_counted(stats) == 6
    assert stats.query_recovered <= 5


@pytest.mark.parametrize("error", ERRORS)
def test_the_next_query_is_answered(manual: Manual, error: type[BaseException]) -> None:
    model = CallByCall(holding=1)
    embeddings = manual(model)
    with on_signal(error) as interrupt:
        interrupting = soon(lambda: model.running == 1, interrupt)
        with pytest.raises(error):
            embeddings.embed_query("q")
        interrupting.result()
    assert embeddings.embed_query("q") == [2.0]
    assert_no_leaks(embeddings)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_the_models_that_looks_alike_is_the_querys(
    manual: Manual, error: type[BaseException]
) -> None:
    """A model's own `Exception` is what a query raises, and what it tells of its failure."""
    model = CallByCall(failing={1: error()})
    embeddings = manual(model)
    with pytest.raises(error):
        embeddings.embed_query("q")
    assert embeddings.embed_query("q") == [2.0]


# A query, or a wait, has joined.


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("how", ["query", "wait", "wait with a time-out"])
@pytest.mark.parametrize("runs", ["in a thread", "on a loop"])
def test_a_waiter_that_is_interrupted_disturbs_nobody(
    wrap: Wrap, error: type[BaseException], how: str, runs: str
) -> None:
    model = CallByCall(holding=1)
    embeddings = wrap(model)
    other = OnItsLoop()
    if runs == "in a thread":
        embeddings.prefetch("q")
    else:
        other.run(embeddings.aprefetch("q"))
    model.wait_until_entered(1)
    follower = Call(embeddings.embed_query, "q")
    until_joined(embeddings)
    with on_signal(error) as interrupt:
        if how == "query":
            interrupting = soon(lambda: embeddings.stats().query_joined == 2, interrupt)
        else:
            interrupting = soon(lambda: give_it_a_chance(0.2) is None, interrupt)  # type: ignore[func-returns-value]
        with pytest.raises(error):  # noqa: PT012
            if how == "query":
                embeddings.embed_query("q")
            elif how == "wait":
                embeddings.wait_for_prefetch("q")
            else:
                embeddings.wait_for_prefetch("q", PATIENCE)
        interrupting.result()
    assert model.running == 1
    model.open()
    assert follower.result() == [1.0]
    assert embeddings.embed_query("q") == [1.0]
    assert model.calls == 1
    assert_no_leaks(embeddings)
    other.close()


def test_a_wait_that_runs_what_was_queued(wrap: Wrap) -> None:
    """The prefetch is not the waiter's alone: it is carried out, or its place comes back."""
    model = CallByCall(holding=1)
    embeddings = wrap(model, max_workers=1)
    blocking = ScriptedEmbeddings()
    del blocking
    with on_signal(SoftTimeLimitExceededError) as interrupt:
        embeddings.prefetch("q")
        interrupting = soon(lambda: model.running == 1, interrupt)
        with pytest.raises(SoftTimeLimitExceededError):
            embeddings.wait_for_prefetch("q")
        interrupting.result()
    model.open()
    assert Call(embeddings.embed_query, "q").result()
    until(lambda: model.running == 0)
    assert_no_leaks(embeddings)


# At every step: where the interpreter looks for signals, one comes.


class Interrupter:
    """Raises at the n-th moment at which a signal's handler may run inside the library.

    CPython looks for signals where a function begins, and when a call of a C function has
    returned. `sys.setprofile` is told of both.
    """

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self._left = at
        self._error = error
        self.raised = False
        self.where = ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or "/prefetch_embeddings/" not in code.co_filename:
            return
        self._left -= 1
        if not self._left:
            sys.setprofile(None)
            self.raised = True
            self.where = (
                f"{code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {event} {argument}"
            )
            raise self._error


def interrupted_at(at: int, error: type[BaseException], call: Callable[[], object]) -> Interrupter:
    """Make a call, and interrupt it at its n-th step; tell whether it had so many.

    It is made in a thread of its own, for CPython 3.11 miscounts the depth of a thread's stack when
    a profile function raises where a function begins.
    """
    interrupter = Interrupter(at, error)

    def interrupted() -> None:
        with suppress(error):
            sys.setprofile(interrupter)
            try:
                call()
            finally:
                sys.setprofile(None)

    try:
        Call(interrupted).result()
    except AssertionError as hangs:
        interrupter.where += f": {hangs}"
    return interrupter


def prefetched(embeddings: ManualPrefetchingEmbeddings) -> None:
    embeddings.prefetch("q")


def ready(embeddings: ManualPrefetchingEmbeddings) -> None:
    embeddings.prefetch("q")
    embeddings.executor.run_all()


def nothing(embeddings: ManualPrefetchingEmbeddings) -> None:
    pass


def other_ones(embeddings: ManualPrefetchingEmbeddings) -> None:
    for number in range(4):  # max_entries: the next one has another leave
        embeddings.prefetch(f"other {number}")
    embeddings.executor.run_all()


Doing = Callable[[ManualPrefetchingEmbeddings], Any]

STEPS: dict[str, tuple[Doing, Doing]] = {
    "a query that misses": (nothing, lambda e: e.embed_query("q")),
    "a query that claims": (prefetched, lambda e: e.embed_query("q")),
    "a query that finds": (ready, lambda e: e.embed_query("q")),
    "a query that has another leave": (other_ones, lambda e: e.embed_query("q")),
    "a coroutine that misses": (nothing, lambda e: asyncio.run(e.aembed_query("q"))),
    "a coroutine that claims": (prefetched, lambda e: asyncio.run(e.aembed_query("q"))),
    "a prefetch": (nothing, lambda e: e.prefetch("q")),
    "a second prefetch": (prefetched, lambda e: e.prefetch("q")),
    "an async prefetch": (nothing, lambda e: asyncio.run(e.aprefetch("q"))),
    "many prefetches": (prefetched, lambda e: e.prefetch_many(["q", "r", "s"])),
    "a wait": (prefetched, lambda e: e.wait_for_prefetch("q")),
    "a wait with a time-out": (prefetched, lambda e: e.wait_for_prefetch("q", 0.0)),
    "forgetting what is queued": (prefetched, lambda e: e.forget("q")),
    "forgetting what is ready": (ready, lambda e: e.forget("q")),
    "clearing": (prefetched, lambda e: e.clear()),
    "looking": (
        ready,
        lambda e: (e.stats(), e.is_ready("q"), e.explain_miss("r"), e.expected_wait("q")),
    ),
    "closing": (prefetched, lambda e: e.close()),
}


@pytest.mark.parametrize("error", [SoftTimeLimitExceededError, HardInterruptError])
@pytest.mark.parametrize("what", STEPS)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_at_every_step(model: ScriptedEmbeddings, what: str, error: type[BaseException]) -> None:
    before, call = STEPS[what]
    at = 0
    wrong = []
    while True:
        at += 1
        embeddings = ManualPrefetchingEmbeddings(
            model, max_workers=2, max_pending=6, max_entries=4, symmetric=True
        )
        free = places(embeddings)
        before(embeddings)
        # Each is a process' one query after another; a later one finds all in order.
        interrupter = interrupted_at(at, error, lambda: call(embeddings))  # noqa: B023
        try:
            later = [Call(embeddings.embed_query, text) for text in ("q", "r", "another")]
            assert [each.result() for each in later] == [
                model.vector(text) for text in ("q", "r", "another")
            ], "wrong vectors"
            embeddings.executor.run_all()
            embeddings.time.advance(10.0)
            embeddings.executor.run_all()
            assert_no_leaks(embeddings)
            if what != "closing":
                assert embeddings.embed_query("q") == model.vector("q")
                assert places(embeddings) == free, "places are gone"
            embeddings.close()
            assert_no_leaks(embeddings)
            counted = queries_counted(embeddings.stats())
            asked = 3 + (what != "closing")
            assert asked <= counted <= asked + 1, f"{counted} queries counted"
        except AssertionError as failure:
            wrong.append(f"step {at}, {interrupter.where}: {str(failure).splitlines()[:1]}")
        if not interrupter.raised:
            break
    assert not wrong, "\n".join([f"{len(wrong)} of {at} steps", *wrong[:20]])
    assert at > 3, "nothing was interrupted"


@pytest.mark.parametrize("what", ["a query", "a wait"])
def test_at_every_step_of_a_join(model: ScriptedEmbeddings, what: str) -> None:
    """While the flight runs in another thread; it comes to its end when the waiter waits."""
    at = 0
    wrong = []
    while True:
        at += 1
        gate = model.hold("q")
        embeddings = PrefetchingEmbeddings(model, max_workers=2)
        embeddings.prefetch("q")
        gate.wait_until_entered()
        opening = Call(lambda: (give_it_a_chance(0.005), gate.open()))  # type: ignore[func-returns-value]  # noqa: B023
        call = {"a query": embeddings.embed_query, "a wait": embeddings.wait_for_prefetch}[what]  # type: ignore[dict-item]
        interrupter = interrupted_at(at, SoftTimeLimitExceededError, lambda: call("q"))  # noqa: B023
        try:
            opening.result()
            assert Call(embeddings.embed_query, "q").result() == model.vector("q")
            until(lambda: embeddings.is_ready("q"))  # noqa: B023
            assert_no_leaks(embeddings)
            embeddings.close()
            assert_no_leaks(embeddings)
        except AssertionError as failure:
            wrong.append(f"step {at}, {interrupter.where}: {str(failure).splitlines()[:1]}")
        if not interrupter.raised:
            break
    assert not wrong, "\n".join([f"{len(wrong)} of {at} steps", *wrong[:20]])
    assert at > 3, "nothing was interrupted"


# Storms of real signals.

STORM = """
import random, signal, threading, time
from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ScriptedEmbeddings, assert_no_leaks

what, kind, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
Base = BaseException if kind == "base" else Exception


class Interrupted(Base):
    pass


armed = False
hits = 0


def handle(number, frame):
    global armed, hits
    if armed:
        armed = False
        hits += 1
        raise Interrupted


def attempt(function, *arguments):
    global armed
    try:
        armed = True
        result = function(*arguments)
        armed = False
        return result
    except Interrupted:
        return None
    finally:
        armed = False


model = ScriptedEmbeddings()
embeddings = PrefetchingEmbeddings(model, max_workers=4, max_pending=64, max_entries=100)
stop = threading.Event()


def traffic(seed):
    draw = random.Random(seed)
    while not stop.is_set():
        text = f"q {draw.randrange(50)}"
        if draw.random() < 0.5:
            embeddings.prefetch(text)
        assert embeddings.embed_query(text) == model.vector(text)
        if draw.random() < 0.3:
            embeddings.forget(text)
        time.sleep(0.0005)


wrong = []


def guarded(seed):
    try:
        traffic(seed)
    except BaseException as error:
        wrong.append(repr(error))


threads = [threading.Thread(target=guarded, args=(seed,), daemon=True) for seed in range(2)]
for thread in threads:
    thread.start()

signal.signal(signal.SIGALRM, handle)
draw = random.Random(7)
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
asked = 0
for number in range(rounds):
    text = f"q {draw.randrange(50)}"
    if what == "queries":
        asked += 1
        vector = attempt(embeddings.embed_query, text)
        assert vector in (None, model.vector(text))
        if number % 3 == 0:
            embeddings.forget(text)
    elif what == "prefetches":
        attempt(embeddings.prefetch, text)
        if number % 3 == 0:
            attempt(embeddings.forget, text)
    else:
        choice = draw.randrange(8)
        if choice == 0:
            attempt(embeddings.prefetch, text)
        elif choice == 1:
            attempt(embeddings.prefetch_many, [text, text + "!", text + "?"])
        elif choice == 2:
            attempt(embeddings.wait_for_prefetch, text, 0.01)
        elif choice == 3:
            attempt(embeddings.forget, text)
        elif choice == 4:
            attempt(embeddings.wait_for_prefetch, text)
        elif choice == 5 and number % 50 == 0:
            attempt(embeddings.clear)
        elif choice == 6:
            attempt(embeddings.explain_miss, text)
        else:
            attempt(embeddings.embed_query, text)
signal.setitimer(signal.ITIMER_REAL, 0)
stop.set()
for thread in threads:
    thread.join(30)
    assert not thread.is_alive(), "another thread hangs"
assert not wrong, wrong

late = []


def ask(text):
    began = time.monotonic()
    assert embeddings.embed_query(text) == model.vector(text)
    late.append(time.monotonic() - began)


for number in range(50):
    for text in (f"q {number}", f"q {number}!", f"q {number}?"):
        ask(text)
# A query that waited for what nobody runs would wait for the whole limit, 1 s or 3 s.
assert max(late) < 0.9 or sorted(late)[-3] < 0.9, sorted(late)[-5:]

deadline = time.monotonic() + 20
while True:
    stats = embeddings.stats()
    if stats.prefetch_started == (
        stats.prefetch_succeeded + stats.prefetch_failed + stats.prefetch_withdrawn
    ):
        break
    assert time.monotonic() < deadline, stats
    time.sleep(0.01)
assert_no_leaks(embeddings)
started = 0
embeddings.clear()
gates = [model.hold(f"place {number}") for number in range(4 + 64)]
while embeddings.prefetch(f"place {started}") is PrefetchOutcome.STARTED:
    started += 1
assert started == 4 + 64, f"{started} places are left"
for gate in gates:
    gate.open()
embeddings.close()
assert_no_leaks(embeddings)
print("hits", hits)
"""


@pytest.mark.skipif(
    not os.environ.get("DEEP"), reason="DEEP=1: a storm also tears `threading.Thread.start` itself"
)
@pytest.mark.parametrize("kind", ["exception", "base"])
@pytest.mark.parametrize("what", ["queries", "prefetches", "everything"])
def test_storms_of_signals(what: str, kind: str) -> None:
    (line,) = run_program(STORM, what, kind, "6000")
    assert int(line.removeprefix("hits ")) > 20, "the storm was none"


ASYNC_STORM = """
import asyncio, random, signal, time
from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import ScriptedEmbeddings, assert_no_leaks


class Interrupted(BaseException):
    pass


armed = False
hits = 0


def handle(number, frame):
    global armed, hits
    if armed:
        armed = False
        hits += 1
        raise Interrupted


async def turns(embeddings, model, seed):
    global armed
    draw = random.Random(seed)
    for number in range(30):
        text = f"q {draw.randrange(20)}"
        if draw.random() < 0.5:
            await embeddings.aprefetch(text)
        assert await embeddings.aembed_query(text) == model.vector(text)
        embeddings.forget(text)


model = ScriptedEmbeddings(delays=lambda text: 0.0002)
embeddings = PrefetchingEmbeddings(model, max_pending=64)
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.004, 0.004)


async def all_turns(seed):
    await asyncio.gather(*(turns(embeddings, model, seed * 10 + n) for n in range(5)))


# Each loop is torn down by an exception out of the handler, wherever it was; the next one works.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
import warnings
warnings.simplefilter("ignore")
for seed in range(150):
    try:
        try:
            armed = True
            asyncio.run(all_turns(seed))
        finally:
            armed = False
    except Interrupted:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
late = []
for number in range(20):
    began = time.monotonic()
    assert embeddings.embed_query(f"q {number}") == model.vector(f"q {number}")
    late.append(time.monotonic() - began)
assert sorted(late)[-3] < 0.9, late
deadline = time.monotonic() + 20
while True:
    stats = embeddings.stats()
    if stats.prefetch_started == (
        stats.prefetch_succeeded + stats.prefetch_failed + stats.prefetch_withdrawn
    ):
        break
    assert time.monotonic() < deadline, stats
    time.sleep(0.01)
embeddings.close()
assert_no_leaks(embeddings)
print("hits", hits)
"""


@pytest.mark.skip(
    reason="asyncio alone does the same: with no more than `gather`, tasks and `asyncio.sleep`"
    " under such a storm, `asyncio.run` hangs within 1,500 loops, in `_cancel_all_tasks` as here"
    " (3.11; with a `BaseException` and with a `KeyboardInterrupt`)"
)
def test_loops_that_are_torn_down_by_signals() -> None:
    (line,) = run_program(ASYNC_STORM)
    assert int(line.removeprefix("hits ")) > 20, "the storm was none"


# What an interruption leaves to others.


def test_places_come_back_from_prefetches_that_were_interrupted(manual: Manual) -> None:
    embeddings = manual(ScriptedEmbeddings(), max_workers=1, max_pending=3)
    free = places(embeddings)
    for at in range(1, 400):
        interrupter = interrupted_at(
            at,
            SoftTimeLimitExceededError,
            lambda: embeddings.prefetch(f"q {at}"),  # noqa: B023
        )
        embeddings.executor.run_all()
        embeddings.forget(f"q {at}")
        if not interrupter.raised:
            break
    embeddings.executor.run_all()
    assert places(embeddings) == free
    assert embeddings.prefetch("q") is PrefetchOutcome.STARTED
    embeddings.executor.run_all()
    assert embeddings.is_ready("q")


def test_the_hundredth_interruption_is_like_the_first(wrap: Wrap) -> None:
    """A worker with a soft limit of milliseconds, and a model that always exceeds it."""
    embeddings = wrap(CallByCall(only="another"))

    class Slow(ScriptedEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            if text == "slow":
                threading.Event().wait(PATIENCE)
            return super().embed_query(text)

    model = Slow()
    embeddings = wrap(model)
    interruptions = 0
    with on_signal(SoftTimeLimitExceededError):
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGUSR1))
        try:
            for _ in range(100):
                with suppress(SoftTimeLimitExceededError):
                    signal.setitimer(signal.ITIMER_REAL, 0.005)
                    try:
                        embeddings.embed_query("slow")
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                interruptions += 1
                assert embeddings.embed_query("quick") == model.vector("quick")
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert interruptions == 100
    assert_no_leaks(embeddings)
