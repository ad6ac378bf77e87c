"""Keys, matches and listeners are others' code: what they raise harms the one call it is raised in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from typing import Any

import pytest

from prefetch_embeddings import PrefetchEvent, PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.flights.outside import CallByCall, OnItsLoop, places, until_joined
from tests.helpers import PATIENCE, Call, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]


class OddError(Exception):
    pass


class Key:
    """Equal by its text, with a hash that all share. Raises at the n-th comparison or hashing."""

    left = -1
    """How many more go well; negative for all."""
    what: type[BaseException] = OddError
    call: Callable[[], object] | None = None
    """Is called instead of raising."""
    made = 0

    def __init__(self, text: str) -> None:
        self.text = text

    def __hash__(self) -> int:
        Key.step()
        return 1

    def __eq__(self, other: object) -> bool:
        Key.step()
        return isinstance(other, Key) and self.text == other.text

    @classmethod
    def step(cls) -> None:
        cls.made += 1
        cls.left -= 1
        if cls.left == 0:
            if cls.call is not None:
                cls.call()
            else:
                raise cls.what

    @classmethod
    def reset(cls, left: int = -1) -> None:
        cls.left, cls.what, cls.call, cls.made = left, OddError, None, 0


Doing = Callable[[ManualPrefetchingEmbeddings], Any]


async def awaiting(embeddings: ManualPrefetchingEmbeddings) -> None:
    await embeddings.aprefetch("q")
    await embeddings.aembed_query("q")
    await embeddings.aembed_query("b")


DOING: dict[str, Doing] = {
    "prefetch": lambda e: e.prefetch("q"),
    "prefetch and run": lambda e: (e.prefetch("q"), e.executor.run_all()),
    "prefetch_many": lambda e: e.prefetch_many(["q", "b", "q"]),
    "query that misses": lambda e: e.embed_query("q"),
    "query that finds": lambda e: e.embed_query("a"),
    "query that claims": lambda e: e.embed_query("b"),
    "coroutines": lambda e: asyncio.run(awaiting(e)),
    "forget": lambda e: (e.forget("b"), e.forget("a")),
    "look": lambda e: (e.is_ready("a"), e.expected_wait("b"), e.explain_miss("q")),
    "wait": lambda e: (e.wait_for_prefetch("b", 0.0), e.wait_for_prefetch("b")),
    "run": lambda e: e.executor.run_all(),
    "clear": lambda e: e.clear(),
    "expire": lambda e: (e.time.advance(1000.0), e.embed_query("a"), e.prefetch("b")),
}


@pytest.mark.parametrize("what", [OddError, KeyboardInterrupt])
@pytest.mark.parametrize("doing", DOING)
def test_comparing_and_hashing_that_raise(
    model: ScriptedEmbeddings, doing: str, what: type[BaseException]
) -> None:
    """At each comparison and hashing, one by one: nothing is left pending, and all works on."""
    at = 0
    while True:
        at += 1
        Key.reset()
        embeddings = ManualPrefetchingEmbeddings(
            model, match=Key, max_entries=3, max_workers=2, max_pending=4
        )
        free = places(embeddings)
        for text in ("a", "c", "d"):
            embeddings.prefetch(text)
        embeddings.executor.run_all()
        embeddings.prefetch("b")
        Key.reset(at)
        Key.what = what

        def do() -> None:
            try:
                DOING[doing](embeddings)  # noqa: B023
            except (OddError, KeyboardInterrupt):
                pass

        Call(do).result()
        made = Key.made
        Key.reset()
        for text in ("q", "a", "b", "another"):
            assert Call(embeddings.embed_query, text).result() == model.vector(text)
        embeddings.executor.run_all()
        embeddings.time.advance(10.0)
        embeddings.executor.run_all()
        assert_no_leaks(embeddings)
        assert places(embeddings) == free, f"places are gone after step {at}"
        embeddings.close()
        assert_no_leaks(embeddings)
        if made < at:
            break


@pytest.mark.parametrize("doing", DOING)
def test_comparing_and_hashing_that_call_back(model: ScriptedEmbeddings, doing: str) -> None:
    at = 0
    while True:
        at += 1
        Key.reset()
        embeddings = ManualPrefetchingEmbeddings(
            model, match=Key, max_entries=3, max_workers=2, max_pending=4
        )
        for text in ("a", "c", "d"):
            embeddings.prefetch(text)
        embeddings.executor.run_all()
        embeddings.prefetch("b")

        def back() -> None:
            embeddings.forget("b")  # noqa: B023
            embeddings.prefetch("c")  # noqa: B023
            embeddings.stats()  # noqa: B023
            embeddings.prefetch("new")  # noqa: B023
            embeddings.embed_query("a")  # noqa: B023
            embeddings.clear()  # noqa: B023

        Key.reset(at)
        Key.call = back
        Call(DOING[doing], embeddings).result()
        made = Key.made
        reached = Key.left <= 0
        Key.reset()
        for text in ("q", "a", "b", "another"):
            assert Call(embeddings.embed_query, text).result() == model.vector(text)
        embeddings.executor.run_all()
        assert_no_leaks(embeddings)
        embeddings.close()
        assert_no_leaks(embeddings)
        if made < at and not reached:
            break
        if at > 300:
            break


@pytest.mark.parametrize("error", [OddError, KeyboardInterrupt])
def test_keys_that_raise_when_their_flight_ends(manual: Manual, error: type[BaseException]) -> None:
    """In a worker, where nobody sees it: those who wait are told all the same."""
    Key.reset()
    model = CallByCall(holding=1)
    embeddings = manual(model, match=Key)
    embeddings.prefetch("other")
    embeddings.prefetch("q")

    def work() -> None:
        while embeddings.executor:
            try:
                embeddings.executor.run_next()
            except BaseException as raised:
                assert isinstance(raised, error)

    worker = Call(work)
    model.wait_until_entered(1)
    queries = [Call(embeddings.embed_query, "q") for _ in range(2)]
    on = OnItsLoop()
    task = on.start(embeddings.aembed_query("q"))
    until_joined(embeddings, 3)
    Key.what = error
    Key.left = 1
    model.open()
    worker.result()
    until(lambda: model.running == 0)
    results = [Call(lambda query=query: query.thread.join(PATIENCE)) for query in queries]  # type: ignore[misc]
    for result in results:
        result.result()
    assert not any(query.thread.is_alive() for query in queries), "a future is left pending"
    assert task.exception(PATIENCE) is None or isinstance(task.exception(), error)
    Key.reset()
    assert embeddings.embed_query("q")[0] >= 1.0
    on.close()


@pytest.mark.parametrize("error", [OddError, KeyboardInterrupt, SystemExit])
def test_a_match_that_raises(manual: Manual, error: type[BaseException]) -> None:
    raising = False

    def match(text: str) -> Hashable:
        if raising:
            raise error
        return text

    model = ScriptedEmbeddings()
    embeddings = manual(model, match=match)
    embeddings.prefetch("a")
    before = embeddings.stats()
    raising = True
    calls: list[Callable[[str], object]] = [
        embeddings.prefetch,
        lambda text: embeddings.prefetch_many([text]),
        embeddings.embed_query,
        embeddings.is_ready,
        embeddings.forget,
        embeddings.expected_wait,
        embeddings.explain_miss,
        lambda text: embeddings.wait_for_prefetch(text, 0.0),
    ]
    for call in calls:
        with pytest.raises(error):
            call("a")
    raising = False
    assert embeddings.stats() == before
    embeddings.executor.run_all()
    assert embeddings.is_ready("a")


def test_a_match_that_calls_back(manual: Manual) -> None:
    """It runs in the caller's thread, before anything else."""
    model = ScriptedEmbeddings()
    inside = False

    def match(text: str) -> Hashable:
        nonlocal inside
        if not inside:
            inside = True
            embeddings.prefetch("from within")
            embeddings.embed_query("from within, too")
            embeddings.stats()
            embeddings.forget("from within")
            inside = False
        return text.casefold()

    embeddings = manual(model, match=match)
    embeddings.prefetch("Q")
    assert embeddings.embed_query("q") == model.vector("q")
    embeddings.executor.run_all()


def test_a_text_of_a_class_of_its_own(manual: Manual) -> None:
    class Text(str):
        __slots__ = ()
        odd = False

        def __eq__(self, other: object) -> bool:
            if Text.odd:
                raise OddError
            return str.__eq__(self, other)

        __hash__ = str.__hash__

        def isspace(self) -> bool:
            if Text.odd:
                raise OddError
            return str.isspace(self)

    model = ScriptedEmbeddings()
    embeddings = manual(model)
    embeddings.prefetch(Text("q"))
    embeddings.prefetch("p")
    Text.odd = True
    for call in (embeddings.prefetch, embeddings.embed_query, embeddings.forget):
        try:
            call(Text("q"))  # type: ignore[operator]
        except OddError:
            pass
    Text.odd = False
    embeddings.executor.run_all()
    assert embeddings.embed_query("q") == model.vector("q")
    assert embeddings.embed_query("p") == model.vector("p")


# Listeners.


@pytest.mark.parametrize("error", [OddError, asyncio.CancelledError])
def test_a_listener_that_raises_harms_nothing(
    manual: Manual, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "prefetch_embeddings")
    told: list[str] = []

    def listener(event: PrefetchEvent) -> None:
        told.append(type(event).__name__)
        raise error

    model = ScriptedEmbeddings()
    embeddings = manual(model, on_event=listener, max_pending=2, max_workers=1)
    assert embeddings.prefetch("a") is PrefetchOutcome.STARTED
    embeddings.executor.run_all()
    assert embeddings.embed_query("a") == model.vector("a")
    assert embeddings.embed_query("b") == model.vector("b")
    embeddings.prefetch("c")
    assert embeddings.embed_query("c") == model.vector("c")
    model.fail("d", ValueError(), ValueError())
    embeddings.prefetch("d")
    embeddings.executor.run_all()
    with pytest.raises(ValueError):  # noqa: PT011 - the listener raises others
        embeddings.embed_query("d")
    assert embeddings.prefetch(" ") is PrefetchOutcome.DROPPED
    assert asyncio.run(embeddings.aembed_query("e")) == model.vector("e")
    assert set(told) >= {
        "PrefetchStarted",
        "PrefetchSucceeded",
        "PrefetchFailed",
        "PrefetchDropped",
        "QueryServed",
        "QueryFailed",
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_listener_that_is_interrupted_leaves_no_flight_behind(
    manual: Manual, error: type[BaseException]
) -> None:
    """The interruption gets out, to whoever called; everybody else goes on."""
    for at in range(1, 12):
        left = at

        def listener(event: PrefetchEvent) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise error

        model = ScriptedEmbeddings()
        embeddings = manual(model, on_event=listener, max_pending=2, max_workers=1)
        free = 3
        model.fail("d", ValueError(), ValueError())
        for call in (
            lambda: embeddings.prefetch("a"),  # noqa: B023
            lambda: embeddings.executor.run_all(),  # noqa: B023
            lambda: embeddings.embed_query("a"),  # noqa: B023
            lambda: embeddings.embed_query("b"),  # noqa: B023
            lambda: embeddings.prefetch("c"),  # noqa: B023
            lambda: embeddings.embed_query("c"),  # noqa: B023
            lambda: embeddings.prefetch("d"),  # noqa: B023
            lambda: embeddings.executor.run_all(),  # noqa: B023
            lambda: embeddings.embed_query("d"),  # noqa: B023
        ):
            try:
                call()
            except (error, ValueError):
                pass
        left = -1
        embeddings.executor.run_all()
        embeddings.time.advance(10.0)
        embeddings.executor.run_all()
        for text in "abc":
            assert Call(embeddings.embed_query, text).result() == model.vector(text)
        assert_no_leaks(embeddings)
        assert places(embeddings) == free


@pytest.mark.parametrize("native", [True, False])
def test_a_listener_that_calls_everything_back(wrap: Wrap, native: bool) -> None:
    depth = 0
    told = 0

    def listener(event: PrefetchEvent) -> None:
        nonlocal depth, told
        told += 1
        if depth > 0 or told > 300:
            return
        depth += 1
        try:
            embeddings.prefetch(f"of {told % 7}")
            embeddings.embed_query(f"of {told % 5}")
            embeddings.forget(f"of {told % 3}")
            embeddings.prefetch_many([f"of {told}", "q"])
            embeddings.is_ready("q")
            embeddings.explain_miss("p")
            embeddings.expected_wait("q")
            embeddings.wait_for_prefetch("q", 0.0)
            embeddings.stats()
            if told % 10 == 0:
                embeddings.clear()
        finally:
            depth -= 1

    model = ScriptedEmbeddings()
    embeddings = wrap(model, on_event=listener)

    def turns() -> None:
        for number in range(30):
            text = f"q {number % 9}"
            if native:

                async def turn(text: str = text) -> list[float]:
                    await embeddings.aprefetch(text)
                    return await embeddings.aembed_query(text)

                assert asyncio.run(turn()) == model.vector(text)
            else:
                embeddings.prefetch(text)
                assert embeddings.embed_query(text) == model.vector(text)

    Call(turns).result()

    def at_rest() -> bool:
        stats = embeddings.stats()
        return stats.prefetch_started == (
            stats.prefetch_succeeded + stats.prefetch_failed + stats.prefetch_withdrawn
        )

    until(at_rest)


def test_a_listener_that_closes(wrap: Wrap) -> None:
    for at in range(1, 8):
        left = at

        def listener(event: PrefetchEvent) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                embeddings.close()  # noqa: B023

        model = ScriptedEmbeddings()
        embeddings = wrap(model, on_event=listener)
        for number in range(4):
            embeddings.prefetch(f"q {number}")
            query = Call(embeddings.embed_query, f"q {number}")
            assert query.result() == model.vector(f"q {number}")
