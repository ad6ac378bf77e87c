"""Any public method may be called at any moment, also within a call of the same thread."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

from prefetch_embeddings import PrefetchOutcome
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.flights.outside import run_program
from tests.helpers import Call

Doing = Callable[[ManualPrefetchingEmbeddings], Any]

# At every line of the library a finaliser, or a signal's handler, may run. So at every line, one by
# one, each method is called, by a trace function in the very same thread. What deadlocks does so
# every time.

DEEP = bool(os.environ.get("DEEP"))

INSIDE: dict[str, Doing] = {
    "prefetch": lambda e: e.prefetch("q"),
    "prefetch_many": lambda e: e.prefetch_many(["q", "r"]),
    "prefetch and run": lambda e: (e.prefetch("q"), e.executor.run_all()),
    "claim": lambda e: (e.prefetch("q"), e.embed_query("q")),
    "miss": lambda e: e.embed_query("q"),
    "find": lambda e: (e.embed_query("q"), e.embed_query("q")),
    "evict": lambda e: [e.embed_query(f"other {n}") for n in range(4)],
    "expire": lambda e: (e.embed_query("q"), e.time.advance(1000.0), e.embed_query("q")),  # type: ignore[func-returns-value]
    "fail": lambda e: (e.prefetch("fails"), e.executor.run_all(), e.time.advance(9.0)),  # type: ignore[func-returns-value]
    "coroutines": lambda e: asyncio.run(coroutines(e)),
    "forget": lambda e: (e.prefetch("q"), e.forget("q"), e.prefetch("r"), e.clear()),  # type: ignore[func-returns-value]
    "wait": lambda e: (e.prefetch("q"), e.wait_for_prefetch("q", 0.0), e.wait_for_prefetch("q")),
    "look": lambda e: (e.stats(), e.is_ready("q"), e.explain_miss("q"), e.expected_wait("q")),
    "close": lambda e: (e.prefetch("q"), e.close()),  # type: ignore[func-returns-value]
}


async def coroutines(embeddings: ManualPrefetchingEmbeddings) -> None:
    await embeddings.aprefetch("q")
    await embeddings.aembed_query("q")
    embeddings.prefetch("r")
    await embeddings.aembed_query("r")
    await embeddings.aembed_query("another")


def queries(embeddings: ManualPrefetchingEmbeddings) -> None:
    for text in ("q", "r", "new"):
        try:
            assert embeddings.embed_query(text) == ScriptedEmbeddings().vector(text)
        except RuntimeError as error:
            # Where this thread has the model called for that very text, it looks as if the model
            # had asked: that is refused.
            assert "model" in str(error)  # noqa: PT017


def waits(embeddings: ManualPrefetchingEmbeddings) -> None:
    with suppress(RuntimeError):  # as with queries
        embeddings.wait_for_prefetch("q", 0.0)


CALLED: dict[str, Doing] = {
    "prefetch": lambda e: (e.prefetch("q"), e.prefetch("another one")),
    "prefetch_many": lambda e: e.prefetch_many(["q", "another one", "r"]),
    "embed_query": queries,
    "forget": lambda e: (e.forget("q"), e.forget("r"), e.forget("fails")),
    "clear": lambda e: e.clear(),
    "close": lambda e: e.close(),
    "stats": lambda e: e.stats(),
    "is_ready": lambda e: e.is_ready("q"),
    "expected_wait": lambda e: e.expected_wait("q"),
    "explain_miss": lambda e: e.explain_miss("q"),
    "wait_for_prefetch": waits,
    "many": lambda e: (
        e.prefetch("q"),
        e.stats(),
        e.forget("r"),
        e.explain_miss("q"),
        e.clear(),  # type: ignore[func-returns-value]
        e.prefetch("r"),
    ),
}


class CallsAtLine:
    """Makes a call at the n-th line that a thread goes through within the library."""

    def __init__(self, at: int, call: Callable[[], object]) -> None:
        self._left = at
        self._call = call
        self.called = False
        self.where = ""
        self.error: BaseException | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> CallsAtLine | None:
        if self.called or "/prefetch_embeddings/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self._left -= 1
            if not self._left:
                self.called = True
                sys.settrace(None)
                name = frame.f_code.co_filename.rpartition("/")[2]
                self.where = f"{name}:{frame.f_lineno}"
                try:
                    self._call()
                except BaseException as error:
                    self.error = error
        return self


def called_at_line(inside: str, called: str, at: int) -> tuple[CallsAtLine, str]:
    """Make one call within another; return how it was, and what went wrong."""
    model = ScriptedEmbeddings()
    model.fail("fails", OSError(), OSError())
    embeddings = ManualPrefetchingEmbeddings(
        model, max_workers=2, max_pending=6, max_entries=3, attempts=2
    )
    tracer = CallsAtLine(at, lambda: CALLED[called](embeddings))

    def go() -> None:
        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            INSIDE[inside](embeddings)
        finally:
            sys.settrace(before)

    try:
        Call(go).result()
        if tracer.error is not None:
            return tracer, f"{tracer.error!r} was raised"
        # What could not be done there and then has been done by now.
        if tracer.called and called == "close":
            outcome = embeddings.prefetch("later")
            if outcome is not PrefetchOutcome.DROPPED:
                return tracer, "it is not closed"
        if Call(embeddings.embed_query, "later").result() != model.vector("later"):
            return tracer, "a wrong vector"
        embeddings.executor.run_all()
        embeddings.time.advance(10.0)
        embeddings.executor.run_all()
        assert_no_leaks(embeddings)
        embeddings.close()
        assert_no_leaks(embeddings)
    except AssertionError as failure:
        return tracer, str(failure).splitlines()[0]
    except Exception as error:
        return tracer, repr(error)
    return tracer, ""


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("inside", INSIDE)
def test_at_every_line(inside: str, called: str) -> None:
    # Every line with DEEP=1; else every fifth, another one in each case.
    stride = 1 if DEEP else 5
    at = -(len(inside + called) % stride)
    wrong = []
    while True:
        at += stride if at < 400 or DEEP else 7  # loops of asyncio's are long
        tracer, what = called_at_line(inside, called, at)
        if what:
            wrong.append(f"at {tracer.where}: {what}")
            if len(wrong) > 20 or "hangs" in what:
                break
        if not tracer.called:
            break
    assert not wrong, "\n".join(["", *dict.fromkeys(wrong)])
    assert at > 3, "nothing was called"


@pytest.mark.parametrize("forgets", ["forget", "clear"])
def test_what_is_forgotten_in_between_is_forgotten(forgets: str) -> None:
    """At every line of a query for another text, what is ready is dropped, and stays so."""
    at = 0
    while True:
        at += 1
        model = ScriptedEmbeddings()
        embeddings = ManualPrefetchingEmbeddings(model)
        embeddings.embed_query("known")
        tracer = CallsAtLine(
            at,
            embeddings.clear if forgets == "clear" else lambda: embeddings.forget("known"),  # noqa: B023
        )

        def go() -> None:
            sys.settrace(tracer)  # noqa: B023
            try:
                embeddings.embed_query("q")  # noqa: B023
            finally:
                sys.settrace(None)

        Call(go).result()
        if not tracer.called:
            break
        assert not embeddings.is_ready("known"), f"still there, after {tracer.where}"
        assert embeddings.embed_query("q") == model.vector("q")
        embeddings.close()
        assert_no_leaks(embeddings)
    assert at > 3


# Finalisers that the collector runs by itself.

COLLECTOR = """
import gc, threading
from prefetch_embeddings import PrefetchingEmbeddings, UtterancePrefetcher
from prefetch_embeddings.testing import ScriptedEmbeddings, assert_no_leaks

what, rounds = sys.argv[1], int(sys.argv[2])
model = ScriptedEmbeddings()
embeddings = PrefetchingEmbeddings(model, max_workers=4, max_pending=10_000)
to_close = []
finalised = 0

actions = {
    "prefetch": lambda text: embeddings.prefetch(text),
    "prefetch_many": lambda text: embeddings.prefetch_many([text, text + "!"]),
    "embed_query": lambda text: embeddings.embed_query(text),
    "forget": lambda text: embeddings.forget(text),
    "clear": lambda text: embeddings.clear(),
    "close": lambda text: to_close and to_close.pop().close(),
    "stats": lambda text: embeddings.stats(),
    "is_ready": lambda text: embeddings.is_ready(text),
    "explain_miss": lambda text: embeddings.explain_miss(text),
    "expected_wait": lambda text: embeddings.expected_wait(text),
    "wait_for_prefetch": lambda text: embeddings.wait_for_prefetch(text, 0.0),
    "reset": lambda text: None,
}


class Call:
    def __init__(self, number):
        self.question = f"this is the question of call {number}"
        self.speech = UtterancePrefetcher(embeddings)
        self.me = self

    def __del__(self):
        global finalised
        finalised += 1
        actions[what](self.question)
        self.speech.reset()


def generator(number):
    me = None
    try:
        me = yield
        yield me
    finally:
        actions[what](f"this is the question of call {number}")


def one(number):
    call = Call(number)
    going = generator(number)
    next(going)
    going.send(going)  # a cycle: the collector closes it
    del going
    if what == "close" and number % 20 == 0:
        to_close.append(PrefetchingEmbeddings(model))
        to_close[-1].prefetch("anything")
    call.speech.on_partial(f"this is what call {number} begins with")
    call.speech.on_partial(f"this is what call {number} begins with and goes on")
    call.speech.on_final(call.question)
    assert embeddings.embed_query(call.question) == model.vector(call.question)
    embeddings.prefetch(f"other {number % 50}")
    embeddings.stats()
    if number % 3 == 0:
        embeddings.forget(f"other {number % 50}")


def many():
    for number in range(rounds):
        one(number)
        if number % 97 == 0:
            gc.collect()


gc.set_threshold(int(sys.argv[3]), 3, 3)
side = threading.Thread(target=many, daemon=True)
side.start()
many()
side.join(60)
assert not side.is_alive(), "deadlock"
gc.collect()
assert finalised >= rounds, finalised
gc.set_threshold(700, 10, 10)
for other in to_close:
    other.close()
embeddings.close()
import time
for _ in range(2000):
    try:
        assert_no_leaks(embeddings)
        break
    except AssertionError:
        time.sleep(0.01)
assert_no_leaks(embeddings)
print("ok")
"""


@pytest.mark.parametrize("threshold", ["1", "13"])
@pytest.mark.parametrize(
    "what",
    [
        "prefetch",
        "prefetch_many",
        "embed_query",
        "forget",
        "clear",
        "close",
        "stats",
        "is_ready",
        "explain_miss",
        "expected_wait",
        "wait_for_prefetch",
        "reset",
    ],
)
def test_finalisers_that_the_collector_runs(what: str, threshold: str) -> None:
    assert run_program(COLLECTOR, what, "300", threshold, limit=100.0) == ["ok"]


# Handlers of signals that come all the time.

HANDLER = """
import random, signal, threading, time
from prefetch_embeddings import PrefetchingEmbeddings, UtterancePrefetcher
from prefetch_embeddings.testing import ScriptedEmbeddings, assert_no_leaks

what, seconds = sys.argv[1], float(sys.argv[2])
model = ScriptedEmbeddings()
embeddings = PrefetchingEmbeddings(model, max_workers=4, max_pending=64, max_entries=50)
speech = UtterancePrefetcher(embeddings, debounce=0.0, min_words=1)
draw = random.Random(3)
inside = False
handled = 0
wrong = []


def text():
    return f"q {draw.randrange(40)}"


def prefetch():
    embeddings.prefetch(text())


def query():
    asked = text()
    assert embeddings.embed_query(asked) == model.vector(asked)


def speak():
    speech.on_partial(text())
    if draw.random() < 0.3:
        speech.on_final(text())
    if draw.random() < 0.1:
        speech.reset()


calls = {
    "prefetch": prefetch,
    "prefetch_many": lambda: embeddings.prefetch_many([text(), text()]),
    "embed_query": query,
    "forget": lambda: embeddings.forget(text()),
    "clear": embeddings.clear,
    "stats": embeddings.stats,
    "is_ready": lambda: embeddings.is_ready(text()),
    "explain_miss": lambda: embeddings.explain_miss(text()),
    "expected_wait": lambda: embeddings.expected_wait(text()),
    "wait_for_prefetch": lambda: embeddings.wait_for_prefetch(text(), 0.0),
    "speech": speak,
}
if what == "all":
    every = list(calls.values())
    call = lambda: draw.choice(every)()
else:
    call = calls[what]


def handle(number, frame):
    global inside, handled
    if inside:
        return
    inside = True
    try:
        call()
    except RuntimeError as error:  # this thread has the model called for it just now
        if "model" not in str(error):
            wrong.append(error)
    except BaseException as error:
        wrong.append(error)
    finally:
        handled += 1
        inside = False


signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
until = time.monotonic() + seconds
own = random.Random(5)
while time.monotonic() < until or handled < 200:
    asked = f"q {own.randrange(40)}"
    choice = own.randrange(8)
    if choice == 0:
        embeddings.prefetch(asked)
    elif choice == 1:
        embeddings.forget(asked)
    elif choice == 2:
        speech.on_partial(asked)
    elif choice == 3:
        embeddings.wait_for_prefetch(asked)
    elif choice == 4:
        embeddings.explain_miss(asked)
        embeddings.stats()
    else:
        assert embeddings.embed_query(asked) == model.vector(asked)
signal.setitimer(signal.ITIMER_REAL, 0)
assert not wrong, wrong[:5]
speech.reset()
embeddings.clear()
for number in range(40):
    asked = f"q {number}"
    assert embeddings.embed_query(asked) == model.vector(asked)
embeddings.close()
for _ in range(2000):
    try:
        assert_no_leaks(embeddings)
        break
    except AssertionError:
        time.sleep(0.01)
assert_no_leaks(embeddings)
print("ok")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize(
    "what",
    [
        "prefetch",
        "prefetch_many",
        "embed_query",
        "forget",
        "clear",
        "stats",
        "is_ready",
        "explain_miss",
        "expected_wait",
        "wait_for_prefetch",
        "speech",
        "all",
    ],
)
def test_handlers_of_signals(what: str) -> None:
    assert run_program(HANDLER, what, "1.0", limit=100.0) == ["ok"]


CLOSING_HANDLER = """
import signal, time
from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome, UtterancePrefetcher
from prefetch_embeddings.testing import ScriptedEmbeddings, assert_no_leaks

model = ScriptedEmbeddings()
embeddings = None
closed = 0


def handle(number, frame):
    global closed
    if embeddings is not None:
        embeddings.close()
        closed += 1


signal.signal(signal.SIGALRM, handle)
for round in range(400):
    embeddings = PrefetchingEmbeddings(model, max_workers=2)
    mine = embeddings
    speech = UtterancePrefetcher(embeddings, debounce=0.01, min_words=1)
    before, number = closed, 0
    signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.00001 * (round % 40))
    while closed == before:
        number += 1
        mine.prefetch(f"q {number}")
        speech.on_partial(f"p {number}")
        assert mine.embed_query(f"q {number}") == model.vector(f"q {number}")
        mine.prefetch(f"r {number}")
        mine.forget(f"r {number}")
    embeddings = None
    assert mine.prefetch("later") is PrefetchOutcome.DROPPED, "close() was not done"
    assert mine.embed_query("later") == model.vector("later")
    speech.reset()
    for _ in range(2000):
        try:
            assert_no_leaks(mine)
            break
        except AssertionError:
            time.sleep(0.01)
    assert_no_leaks(mine)
print("ok")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_handler_that_closes() -> None:
    assert run_program(CLOSING_HANDLER, limit=100.0) == ["ok"]


ASYNC_HANDLER = """
import asyncio, gc, random, signal, time
from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import ScriptedEmbeddings, assert_no_leaks

model = ScriptedEmbeddings(delays=lambda text: random.choice((0.0, 0.001)))
embeddings = PrefetchingEmbeddings(model, max_pending=64, max_entries=50)
draw = random.Random(11)
inside = False
handled = 0


def text():
    return f"q {draw.randrange(40)}"


wrong = []


def act():
    choice = draw.randrange(7)
    if choice == 0:
        embeddings.prefetch(text())
    elif choice == 1:
        asked = text()
        assert embeddings.embed_query(asked) == model.vector(asked)
    elif choice == 2:
        embeddings.forget(text())
    elif choice == 3:
        embeddings.stats()
    elif choice == 4:
        embeddings.explain_miss(text())
    elif choice == 5:
        embeddings.clear()
    else:
        embeddings.wait_for_prefetch(text(), 0.0)


def handle(number, frame):
    global inside, handled
    if inside:
        return
    inside = True
    try:
        act()
    except RuntimeError as error:  # this thread has the model called for it just now
        if "model" not in str(error):
            wrong.append(error)
    except BaseException as error:
        wrong.append(error)
    finally:
        handled += 1
        inside = False


async def turns(seed):
    own = random.Random(seed)
    while time.monotonic() < until or handled < 200:
        asked = f"q {own.randrange(40)}"
        if own.random() < 0.5:
            await embeddings.aprefetch(asked)
        if own.random() < 0.2:
            await embeddings.await_for_prefetch(asked, 0.01)
        assert await embeddings.aembed_query(asked) == model.vector(asked)
        if own.random() < 0.3:
            embeddings.forget(asked)


async def main():
    await asyncio.gather(*(turns(seed) for seed in range(10)))


signal.signal(signal.SIGALRM, handle)
until = time.monotonic() + 2
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
asyncio.run(main())
signal.setitimer(signal.ITIMER_REAL, 0)
assert not wrong, wrong[:5]
embeddings.close()
for _ in range(2000):
    try:
        assert_no_leaks(embeddings)
        break
    except AssertionError:
        time.sleep(0.01)
assert_no_leaks(embeddings)
print("ok")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_handlers_of_signals_amid_coroutines() -> None:
    """They run in the loop's own thread, where the loop cannot turn until they return."""
    assert run_program(ASYNC_HANDLER, limit=100.0) == ["ok"]


# What is called by the library calls it.


def test_a_finaliser_of_a_key_calls_back() -> None:
    """Dropping an entry drops its key, whose finaliser runs there and then."""
    program = """
    from prefetch_embeddings.testing import (
        ManualPrefetchingEmbeddings, ScriptedEmbeddings, assert_no_leaks,
    )

    finalised = 0

    class Key:
        def __init__(self, text):
            self.text = text

        def __hash__(self):
            return hash(self.text)

        def __eq__(self, other):
            return isinstance(other, Key) and self.text == other.text

        def __del__(self):
            global finalised
            if not embeddings:
                return
            finalised += 1
            if finalised % 2 and finalised < 4000:
                embeddings.forget("q 1")
                embeddings.prefetch(f"of a finaliser {finalised % 5}")
                embeddings.stats()
                embeddings.is_ready("q 2")

    embeddings = None
    embeddings = ManualPrefetchingEmbeddings(ScriptedEmbeddings(), match=Key, max_entries=3)
    for number in range(200):
        embeddings.prefetch(f"q {number % 7}")
        embeddings.executor.run_next()
        embeddings.embed_query(f"q {number % 11}")
        embeddings.forget(f"q {number % 5}")
        embeddings.time.advance(40.0)
        if number % 20 == 0:
            embeddings.clear()
    assert finalised > 100
    while embeddings.executor.run_all():
        pass
    embeddings.time.advance(10.0)
    embeddings.executor.run_all()
    done, embeddings = embeddings, None
    done.close()
    assert_no_leaks(done)
    print("ok")
    """
    assert run_program(program, limit=60.0) == ["ok"]
