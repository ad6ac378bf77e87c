"""Threads in every order: what their steps in the core do to each other.

Each scenario is explored with one forced switch at every line of the core; and, with `DEEP=1`, with
one at every bytecode, and with two at every line. Wrong variants of the core, small and likely
mistakes, must be caught. `make schedules` goes deep, and shows how many schedules that were. From
Python 3.12 on a thread is no longer told of each bytecode.

What this cannot see:

* More preemptions than that, and more threads than a scenario has.
* Switches within what is written in C, or outside the core: these run as one step.
* Event loops. Coroutines switch where they await; tests of their own hold them there by gates.
* Memory that is weaker than the interpreter's lock makes it: free-threaded builds.
* The real `RLock`, `SimpleQueue` and threads of the pools: stand-ins take their place that let the
  explorer switch, so it takes on trust that the real ones do what they say.
"""

from __future__ import annotations
import __future__

import inspect
import logging
import os
import queue
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeAlias
from unittest import mock

import pytest

from prefetch_embeddings import Hedge, PrefetchOutcome, _flights
from prefetch_embeddings._flights import joins, prefetcher, query
from prefetch_embeddings._flights.books import Books
from prefetch_embeddings._flights.landing import Landing
from prefetch_embeddings._flights.map import FlightMap
from prefetch_embeddings._flights.visits import Visits
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.helpers import Call, until
from tests.tools.schedules import Found, Schedule, explore

logger = logging.getLogger("prefetch_embeddings")

STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome

FILES = [str(path) for path in Path(str(_flights.__file__)).parent.glob("*.py")]

FEW_FILES = [path for path in FILES if Path(path).stem in ("landing", "overdue", "joins")]

Depth: TypeAlias = dict[str, Any]

ONE_SWITCH: Depth = {"preemptions": 1}
BYTECODES: Depth = {"preemptions": 1, "opcodes": True}
TWO_SWITCHES: Depth = {"preemptions": 2}
DEEP = bool(os.environ.get("DEEP"))
deep_only = pytest.mark.skipif(not DEEP, reason="for a long run")
depths = pytest.mark.parametrize(
    "depth",
    [
        pytest.param(ONE_SWITCH, id="one switch"),
        pytest.param(
            BYTECODES,
            id="bytecodes",
            marks=[
                deep_only,
                pytest.mark.skipif(sys.version_info >= (3, 12), reason="not all are traced"),
            ],
        ),
        pytest.param(TWO_SWITCHES, id="two switches", marks=deep_only),
    ],
)


class PrefetchError(Exception):
    pass


class Aside:
    """Stands in for the pool of the threads aside: a worker of the scenario is its thread."""

    def __init__(self, max_workers: int | None) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], None]) -> bool:
        self.jobs.append(job)
        return True

    def close(self) -> None:
        """Do nothing: what was begun goes on."""

    def join(self, timeout: float) -> bool:
        return not self.jobs


class Scenario:
    """A wrapper whose locks and waits the explorer knows, with the text "q" prefetched."""

    options: ClassVar[dict[str, Any]] = {}
    few_places = False
    """Whether threads are stopped in some files only, but in a long run: there are many orders."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.model = ScriptedEmbeddings()
        with mock.patch.object(prefetcher, "JobPool", self.make_aside):
            self.embeddings = ManualPrefetchingEmbeddings(self.model, **self.options)
        self.core = self.embeddings.prefetcher
        self.core.steps.lock = schedule.lock()  # type: ignore[assignment]
        self.executor = self.embeddings.executor
        self.seen: list[Any] = []
        self.set_up()

    def make_aside(self, max_workers: int | None) -> Aside:
        self.aside = Aside(max_workers)
        return self.aside

    @property
    def workers(self) -> list[Callable[[], Any]]:
        return [self.one, self.other]

    def set_up(self) -> None:
        self.embeddings.prefetch("q")

    def one(self) -> Any:
        return self.executor.run_next()

    def other(self) -> Any:
        self.query()

    def query(self) -> None:
        assert self.embeddings.embed_query("q") == self.model.vector("q")

    def check(self) -> None:
        """Assert what must hold when all threads have returned. Ends what is still queued."""
        self.executor.run_all()
        assert_no_leaks(self.embeddings)


# --- Right and wrong cores -----------------------------------------------------------------------

Variant: TypeAlias = tuple[Any, str, Any]
"""Of which class or module, what, and what takes its place."""


def without_lock(owner: type, name: str) -> Variant:
    """Return a step as a method without any lock."""
    return owner, name, inspect.unwrap(getattr(owner, name))


def altered(owner: Any, name: str, *changes: tuple[str, str]) -> Variant:
    """Return a function with pieces of its source exchanged: each old one for a new one."""
    function = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, f"{name} has changed: {old}"
        source = source.replace(old, new)
    code = compile(
        source,
        function.__code__.co_filename,
        "exec",
        flags=__future__.annotations.compiler_flag,
    )
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    return owner, name, namespace[name]


@contextmanager
def quiet() -> Iterator[None]:
    logger.disabled = True  # thousands of warnings say nothing
    try:
        yield
    finally:
        logger.disabled = False


def explored(scenario: type[Scenario], depth: Depth, *wrong: Variant) -> Found:
    current: list[Schedule] = []

    def make(schedule: Schedule) -> Scenario:
        current[:] = [schedule]
        return scenario(schedule)

    stand_in = types.SimpleNamespace(SimpleQueue=lambda: current[0].bell(), Empty=queue.Empty)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(mock.patch.object(joins, "queue", stand_in))
        for owner, name, instead in wrong:
            stack.enter_context(mock.patch.object(owner, name, instead))
        files = FEW_FILES if scenario.few_places and not DEEP else FILES
        found = explore(make, files, **depth)
    kind = "wrong" if wrong else "right"
    print(f"{kind} {scenario.__name__}, {depth}: {found.schedules} schedules")
    return found


def check(scenario: type[Scenario], depth: Depth) -> None:
    found = explored(scenario, depth)
    if found.failure is not None:
        raise found.failure
    assert found.schedules > 20


# --- The scenarios -------------------------------------------------------------------------------


class PrefetchAndQuery(Scenario):
    """A text is prefetched while a query asks for it."""

    def set_up(self) -> None:
        pass

    def one(self) -> Any:
        self.seen.append(self.embeddings.prefetch("q"))

    def check(self) -> None:
        super().check()
        assert self.model.calls_for("q") == 1
        stats = self.embeddings.stats()
        met = stats.query_missed + stats.query_claimed
        assert met == 1, "the one query made the call"
        assert stats.prefetch_started == stats.query_claimed == self.seen.count(STARTED)


class TwoQueries(Scenario):
    """Two queries ask for a text that nobody has asked for before."""

    def set_up(self) -> None:
        pass

    def one(self) -> Any:
        self.query()

    def check(self) -> None:
        super().check()
        assert self.model.calls_for("q") == 1
        stats = self.embeddings.stats()
        assert (stats.query_missed, stats.query_joined + stats.query_ready) == (1, 1)


class ClaimAndClaim(Scenario):
    """A worker and a query find the same flight queued."""

    def check(self) -> None:
        super().check()
        assert self.model.calls_for("q") == 1
        stats = self.embeddings.stats()
        met = stats.query_ready + stats.query_joined + stats.query_claimed
        assert (met, stats.query_missed, stats.prefetch_used) == (1, 0, 1)


class TwoPrefetches(Scenario):
    """Two threads prefetch one text."""

    def set_up(self) -> None:
        pass

    def one(self) -> Any:
        self.seen.append(self.embeddings.prefetch("q"))

    def other(self) -> Any:
        self.one()

    def check(self) -> None:
        assert sorted(self.seen) == [IN_FLIGHT, STARTED]
        super().check()
        assert self.model.calls_for("q") == 1
        assert self.embeddings.stats().prefetch_deduplicated == 1


class LandAndForget(Scenario):
    """A flight ends while its text is forgotten."""

    def other(self) -> Any:
        assert self.embeddings.forget("q")

    def check(self) -> None:
        assert not self.embeddings.is_ready("q"), "what was forgotten is back"
        super().check()
        stats = self.embeddings.stats()
        assert stats.prefetch_wasted + stats.prefetch_withdrawn == 1


class LandAndBeginAnew(Scenario):
    """A flight ends while its text is forgotten and prefetched again."""

    def other(self) -> Any:
        self.embeddings.clear()
        self.seen.append(self.embeddings.prefetch("q"))

    def check(self) -> None:
        assert self.seen == [STARTED], "the cleared flight is back"
        super().check()
        assert self.embeddings.is_ready("q")
        assert self.embeddings.stats().prefetch_started == 2


class JoinAndLand(Scenario):
    """A query begins to wait for a flight while that lands."""

    def set_up(self) -> None:
        super().set_up()
        job = self.executor._source.take()
        assert job is not None
        self.job = job

    @property
    def workers(self) -> list[Callable[[], Any]]:
        return [self.query, self.job]

    def check(self) -> None:
        super().check()
        assert self.model.calls_for("q") == 1
        stats = self.embeddings.stats()
        assert stats.query_ready + stats.query_joined == 1


class FailAndJoin(Scenario):
    """A prefetch fails for good while a query finds it."""

    options: ClassVar[dict[str, Any]] = {"attempts": 1}

    def set_up(self) -> None:
        super().set_up()
        self.model.fail("q", PrefetchError())

    def other(self) -> Any:
        try:
            self.query()
        except PrefetchError:
            self.seen.append("failed")

    def check(self) -> None:
        super().check()
        stats = self.embeddings.stats()
        # Only a query that made the call itself may see its error.
        assert self.seen == ["failed"] * stats.query_claimed
        assert self.model.calls_for("q") == 2 - stats.query_claimed
        assert stats.query_recovered == stats.query_joined


class RetryAndJoin(FailAndJoin):
    """A prefetch fails, and would pause before it is tried again, while a query finds it."""

    options: ClassVar[dict[str, Any]] = {"attempts": 2}

    def check(self) -> None:
        self.embeddings.time.advance(60.0)
        Scenario.check(self)
        assert self.model.calls_for("q") <= 2


class RetryAndClaim(Scenario):
    """The pause before the next attempt is over just when a query claims the flight."""

    options: ClassVar[dict[str, Any]] = {"attempts": 2}

    def set_up(self) -> None:
        super().set_up()
        self.model.fail("q", PrefetchError())
        self.executor.run_next()

    def one(self) -> Any:
        self.embeddings.time.advance(1.0)
        self.executor.run_next()

    def check(self) -> None:
        super().check()
        assert self.model.calls_for("q") == 2
        stats = self.embeddings.stats()
        assert stats.prefetch_retried + stats.query_claimed == 1


class CloseAndPrefetch(Scenario):
    """The wrapper is closed while a prefetch begins."""

    def set_up(self) -> None:
        pass

    def one(self) -> Any:
        self.seen.append(self.embeddings.prefetch("q"))

    def other(self) -> Any:
        self.embeddings.close()

    def check(self) -> None:
        super().check()
        stats = self.embeddings.stats()
        if self.seen == [STARTED]:
            assert (stats.prefetch_withdrawn, stats.prefetch_dropped) == (1, 0)
        else:  # dropped at once, or withdrawn before anybody could be told to run it
            assert self.seen == [DROPPED]
            assert stats.prefetch_withdrawn == stats.prefetch_started
            assert stats.prefetch_dropped == 1


class CloseAndQuery(Scenario):
    """The wrapper is closed while a query claims what was prefetched."""

    def one(self) -> Any:
        self.embeddings.close()

    def check(self) -> None:
        super().check()
        assert self.model.calls_for("q") == 1
        assert not self.embeddings.is_ready("q"), "a closed wrapper keeps nothing"


class TakeBackAndAsk(Scenario):
    """The one who asked for a text takes that back while another one asks for it."""

    def set_up(self) -> None:
        _, self.ticket = self.core.ask("q")

    def one(self) -> Any:
        assert self.ticket is not None
        self.seen.append(self.core.take_back(self.ticket))

    def other(self) -> Any:
        self.seen.append(self.embeddings.prefetch("q"))

    def check(self) -> None:
        super().check()
        assert (True in self.seen) == (STARTED in self.seen)
        assert self.embeddings.is_ready("q"), "the second ask was taken back with the first"
        assert self.model.calls_for("q") == 1


class HedgeAndLand(Scenario):
    """A flight's first call returns while a second one is begun beside it."""

    few_places = True
    options: ClassVar[dict[str, Any]] = {"hedge": Hedge(after=1.0, budget=1.0)}

    @property
    def workers(self) -> list[Callable[[], Any]]:
        return [self.ask, self.one, self.other]

    def ask(self) -> None:
        self.query()
        self.seen.append("answered")

    def one(self) -> Any:
        self.schedule.wait_until(lambda: len(self.aside.jobs) > 0 or bool(self.seen))
        while self.aside.jobs:
            self.aside.jobs.pop(0)()

    def other(self) -> Any:
        self.schedule.wait_until(lambda: self.embeddings.time.calls_to_come > 0 or bool(self.seen))
        self.embeddings.time.advance(1.0)
        while self.aside.jobs:
            self.aside.jobs.pop(0)()

    def check(self) -> None:
        super().check()
        stats = self.embeddings.stats()
        assert 1 <= self.model.calls_for("q") <= 1 + stats.hedge_started
        assert stats.hedge_won <= stats.hedge_started <= 1
        assert (stats.query_claimed, stats.prefetch_succeeded) == (1, 1)


class OverdueAndLand(HedgeAndLand):
    """A flight's call returns while it gets another one, since it takes too long."""

    options: ClassVar[dict[str, Any]] = {}

    @property
    def workers(self) -> list[Callable[[], Any]]:
        return [self.executor.run_next, self.ask, self.other]

    def other(self) -> Any:
        self.schedule.wait_until(lambda: self.embeddings.time.calls_to_come > 0 or bool(self.seen))
        self.embeddings.time.advance(100.0)
        while self.aside.jobs:
            self.aside.jobs.pop(0)()

    def check(self) -> None:
        Scenario.check(self)
        stats = self.embeddings.stats()
        assert self.model.calls_for("q") <= 1 + stats.overdue_calls
        assert stats.query_missed + stats.query_recovered == 0
        assert (stats.prefetch_succeeded, stats.prefetch_used) == (1, 1)


SCENARIOS = (
    PrefetchAndQuery,
    TwoQueries,
    ClaimAndClaim,
    TwoPrefetches,
    LandAndForget,
    LandAndBeginAnew,
    JoinAndLand,
    FailAndJoin,
    RetryAndJoin,
    RetryAndClaim,
    CloseAndPrefetch,
    CloseAndQuery,
    TakeBackAndAsk,
    HedgeAndLand,
    OverdueAndLand,
)


@depths
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_order_is_right(scenario: type[Scenario], depth: Depth) -> None:
    check(scenario, depth)


WRONG: list[tuple[str, type[Scenario], Variant]] = [
    ("begins unlocked", PrefetchAndQuery, without_lock(FlightMap, "begin")),
    ("begins twice", TwoPrefetches, without_lock(FlightMap, "begin")),
    ("enters unlocked", TwoQueries, without_lock(Visits, "enter")),
    ("claims unlocked", ClaimAndClaim, without_lock(FlightMap, "claim_job")),
    (
        "keeps no place free",
        ClaimAndClaim,
        altered(Books, "claim", ("self.admission.give_back(flight)", "pass")),
    ),
    ("closes unlocked", CloseAndPrefetch, without_lock(FlightMap, "close")),
    ("closes, and keeps", CloseAndQuery, altered(Books, "end", (" or self.closed", ""))),
    ("takes back unlocked", TakeBackAndAsk, without_lock(FlightMap, "take_back")),
    (
        "takes back everybody's",
        TakeBackAndAsk,
        altered(FlightMap, "take_back", (" or flight.wanted", "")),
    ),
    ("lands unlocked", LandAndForget, without_lock(Landing, "_complete")),
    (
        "keeps what was let go",
        LandAndBeginAnew,
        altered(Books, "end", ("if not flight.held:", "if False:")),
    ),
    (
        "looks before it can be woken",
        JoinAndLand,
        altered(
            query,
            "joining",
            ("if not flight.ended:\n            yield", "if True:\n            yield"),
        ),
    ),
    (
        "tells nobody",
        ClaimAndClaim,
        altered(Landing, "complete", ("_tell_waiters(flight)", "pass")),
    ),
    (
        "pauses despite waiters",
        RetryAndJoin,
        altered(Landing, "_deserves_another", ("and not flight.waiters", "")),
    ),
    ("requeues what was claimed", RetryAndClaim, without_lock(FlightMap, "claim_job")),
    (
        "lands twice",
        HedgeAndLand,
        altered(Landing, "_complete", ("run not in runs", "False")),
    ),
]


@pytest.mark.parametrize(
    ("scenario", "wrong"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG]
)
def test_a_wrong_core_is_caught(scenario: type[Scenario], wrong: Variant) -> None:
    found = explored(scenario, ONE_SWITCH, wrong)
    assert found.failure is not None, f"{found.schedules} schedules, and nothing found"


def test_no_call_is_made_for_a_flight_that_ended_before_its_thread_began() -> None:
    """A flight is overdue, and lands before the thread that is to call once more begins."""
    schedule = Schedule([], frozenset(), preemptions=0, opcodes=False)
    with quiet():
        scenario = OverdueAndLand(schedule)
        scenario.core.steps.lock = threading.RLock()
        job = scenario.executor._source.take()
        assert job is not None
        query = Call(scenario.query)
        until(lambda: scenario.embeddings.time.calls_to_come)
        scenario.embeddings.time.advance(100.0)
        assert scenario.aside.jobs
        job()
        query.result()
        for late in scenario.aside.jobs:
            late()
    assert scenario.model.calls_for("q") == 1
    assert_no_leaks(scenario.embeddings)
