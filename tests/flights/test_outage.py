"""A failed prefetch costs the provider nothing: speculation yields while calls keep failing."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import Hedge, PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.flights.outside import queries_counted
from tests.helpers import PATIENCE, Call, auntil, until

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]

MOST_REQUESTS = 1.1
"""What the provider may get in an outage, by what it would get without the library."""


class RefusedError(Exception):
    """As clients raise it."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"the provider said {status_code}")
        self.status_code = status_code


class Provider(Embeddings):
    """Fails while it is down, and counts its requests.

    Args:
        status_code: What it refuses with; None for errors without one.
        seconds: How long each call takes.
    """

    def __init__(self, status_code: int | None = 503, seconds: float = 0.0) -> None:
        self.down = False
        self.calls = 0
        self.texts: list[str] = []
        self._status_code = status_code
        self._seconds = seconds
        self._lock = threading.Lock()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self._count(" ".join(texts))
        self._refuse()
        return [[1.0] for _ in texts]

    def embed_query(self, text: str) -> list[float]:
        self._count(text)
        if self._seconds:
            threading.Event().wait(self._seconds)
        self._refuse()
        return [1.0]

    async def aembed_query(self, text: str) -> list[float]:
        self._count(text)
        await asyncio.sleep(self._seconds)
        self._refuse()
        return [1.0]

    def _count(self, text: str) -> None:
        with self._lock:
            self.calls += 1
            self.texts.append(text)

    def _refuse(self) -> None:
        if not self.down:
            return
        if self._status_code is None:
            raise ConnectionError("no route")
        raise RefusedError(self._status_code)


def at_rest(embeddings: PrefetchingEmbeddings) -> bool:
    stats = embeddings.stats()
    return stats.prefetch_started == (
        stats.prefetch_succeeded + stats.prefetch_failed + stats.prefetch_withdrawn
    )


def turn(embeddings: ManualPrefetchingEmbeddings, text: str, *, apart: float = 0.15) -> bool:
    """Prefetch, let some time pass, and ask; True if there was an answer."""
    embeddings.prefetch(text)
    embeddings.executor.run_all()
    embeddings.time.advance(apart)
    embeddings.executor.run_all()
    try:
        embeddings.embed_query(text)
    except (RefusedError, ConnectionError):
        return False
    return True


def in_an_outage(embeddings: ManualPrefetchingEmbeddings, model: Provider) -> None:
    """Bring the provider down, and let the library notice."""
    for number in range(10):
        assert turn(embeddings, f"well {number}")
    model.down = True
    for number in range(12):
        assert not turn(embeddings, f"down {number}")
    model.calls = 0


# What another try cannot mend.


@pytest.mark.parametrize("status_code", [400, 401, 403, 404, 413, 422])
def test_what_another_try_cannot_mend_is_not_retried(manual: Manual, status_code: int) -> None:
    model = ScriptedEmbeddings()
    embeddings = manual(model, attempts=5)
    for number in range(5):
        embeddings.embed_query(f"well {number}")
    model.fail("q", *[RefusedError(status_code) for _ in range(5)])
    embeddings.prefetch("q")
    for _ in range(20):
        embeddings.executor.run_all()
        embeddings.time.advance(1.0)
    assert model.calls_for("q") == 1
    assert embeddings.stats().prefetch_retried == 0
    assert embeddings.stats().prefetch_failed == 1


@pytest.mark.parametrize("status_code", [408, 409, 425, 429, 500, 502, 503, 504, 529, None, "4xx"])
def test_what_another_try_can_mend_is_retried(
    manual: Manual, status_code: int | str | None
) -> None:
    error: Exception = OSError()
    if status_code is not None:
        error = RefusedError(status_code)  # type: ignore[arg-type] - some have a word there
    model = ScriptedEmbeddings()
    embeddings = manual(model, attempts=2)
    for number in range(5):
        embeddings.embed_query(f"well {number}")
    model.fail("q", error)
    embeddings.prefetch("q")
    for _ in range(5):
        embeddings.executor.run_all()
        embeddings.time.advance(1.0)
    assert model.calls_for("q") == 2
    assert embeddings.is_ready("q")


async def test_nor_is_it_on_a_loop(wrap: Wrap) -> None:
    model = ScriptedEmbeddings()
    embeddings = wrap(model, attempts=5)
    for number in range(5):
        await embeddings.aembed_query(f"well {number}")
    model.fail("q", *[RefusedError(401) for _ in range(5)])
    await embeddings.aprefetch("q")
    await auntil(lambda: at_rest(embeddings))
    await asyncio.sleep(0.5)  # the pause before a second try is 0.2 s
    assert model.calls_for("q") == 1


def test_a_status_code_that_raises_when_looked_at_harms_nobody(manual: Manual) -> None:
    class OddError(Exception):
        @property
        def status_code(self) -> int:
            raise ValueError

    model = ScriptedEmbeddings()
    embeddings = manual(model)
    model.fail("q", OddError(), OddError(), OddError())
    embeddings.prefetch("q")
    for _ in range(5):
        embeddings.executor.run_all()
        embeddings.time.advance(1.0)
    assert at_rest(embeddings)


def test_a_text_that_the_provider_refuses_stops_no_other(manual: Manual) -> None:
    """One caller's bad text is no outage, as long as other calls succeed."""
    model = ScriptedEmbeddings()
    embeddings = manual(model)
    for number in range(30):
        model.fail("bad", RefusedError(400))
        embeddings.prefetch("bad")
        embeddings.executor.run_all()
        assert embeddings.prefetch(f"good {number}") is PrefetchOutcome.STARTED
        embeddings.executor.run_all()
        assert embeddings.is_ready(f"good {number}")


# Pausing.


def test_while_calls_keep_failing_prefetches_are_dropped_and_counted(manual: Manual) -> None:
    model = Provider()
    embeddings = manual(model)
    in_an_outage(embeddings, model)
    before = embeddings.stats()
    for number in range(20):
        text = f"more {number}"
        assert embeddings.prefetch(text) is PrefetchOutcome.DROPPED
        assert embeddings.executor.run_all() == 0
        embeddings.time.advance(0.1)
        with pytest.raises(RefusedError):
            embeddings.embed_query(text)
    during = embeddings.stats() - before
    assert during.prefetch_dropped == 20
    assert during.prefetch_started == 0
    assert during.query_missed == during.query_failed == 20
    assert model.calls == 20


async def test_so_are_those_of_coroutines_and_batches(manual: Manual) -> None:
    model = Provider()
    embeddings = manual(model, symmetric=True)
    in_an_outage(embeddings, model)
    assert await embeddings.aprefetch("a") is PrefetchOutcome.DROPPED
    assert embeddings.prefetch_many(["b", "c"]) == [PrefetchOutcome.DROPPED] * 2
    embeddings.executor.run_all()
    await asyncio.sleep(0.05)
    assert model.calls == 0


def test_it_resumes_with_the_first_call_that_succeeds(manual: Manual) -> None:
    model = Provider()
    embeddings = manual(model)
    in_an_outage(embeddings, model)
    assert embeddings.prefetch("a") is PrefetchOutcome.DROPPED
    model.down = False
    embeddings.embed_query("how are you?")
    assert embeddings.prefetch("a") is PrefetchOutcome.STARTED
    embeddings.executor.run_all()
    assert embeddings.is_ready("a")


async def test_a_coroutines_success_ends_the_pause_as_well(manual: Manual) -> None:
    model = Provider()
    embeddings = manual(model)
    in_an_outage(embeddings, model)
    model.down = False
    await embeddings.aembed_query("how are you?")
    assert embeddings.prefetch("a") is PrefetchOutcome.STARTED
    embeddings.executor.run_all()


def test_without_queries_it_probes_once_a_second_at_most(manual: Manual) -> None:
    model = Provider()
    embeddings = manual(model)
    in_an_outage(embeddings, model)
    for number in range(200):  # 20 s
        embeddings.time.advance(0.1)
        embeddings.prefetch(f"more {number}")
        embeddings.executor.run_all()
    assert model.calls <= 21
    model.down = False
    for number in range(30):  # within 3 s
        embeddings.time.advance(0.1)
        text = f"again {number}"
        if embeddings.prefetch(text) is PrefetchOutcome.STARTED:
            embeddings.executor.run_all()
            if embeddings.is_ready(text):
                break
    else:
        pytest.fail("prefetching did not resume")
    assert embeddings.prefetch("and another") is PrefetchOutcome.STARTED
    embeddings.executor.run_all()


async def test_without_queries_coroutines_probe_once_a_second_at_most(manual: Manual) -> None:
    model = Provider()
    embeddings = manual(model)
    in_an_outage(embeddings, model)
    for number in range(200):
        embeddings.time.advance(0.1)
        await embeddings.aprefetch(f"more {number}")
        embeddings.executor.run_all()
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert model.calls <= 21
    model.down = False
    for number in range(30):
        embeddings.time.advance(0.1)
        text = f"again {number}"
        if await embeddings.aprefetch(text) is PrefetchOutcome.STARTED:
            embeddings.executor.run_all()
            await embeddings.await_for_prefetch(text, PATIENCE)
            if embeddings.is_ready(text):
                break
    else:
        pytest.fail("prefetching did not resume")


def test_a_probe_that_hangs_is_one_probe(wrap: Wrap) -> None:
    """While it hangs nobody knows more than before; it is not to be doubled every second."""
    hanging = threading.Event()

    class Model(Provider):
        def embed_query(self, text: str) -> list[float]:
            if text.startswith("probe"):
                self._count(text)
                hanging.wait(PATIENCE)
                raise RefusedError(503)
            return super().embed_query(text)

    model = Model()
    embeddings = wrap(model, max_workers=8)
    model.down = True
    for number in range(12):
        embeddings.prefetch(f"down {number}")
        with pytest.raises(RefusedError):
            embeddings.embed_query(f"down {number}")
    until(lambda: at_rest(embeddings))
    model.calls = 0
    for number in range(25):
        embeddings.prefetch(f"probe {number}")
        threading.Event().wait(0.1)
    assert model.calls <= 3
    hanging.set()


def test_with_queries_there_are_no_probes(manual: Manual) -> None:
    """They tell by themselves how the provider is."""
    model = Provider()
    embeddings = manual(model)
    in_an_outage(embeddings, model)
    for number in range(50):
        assert not turn(embeddings, f"more {number}", apart=0.7)
    assert model.calls == 50


def test_what_is_queued_when_the_pause_begins_is_not_run_for_nothing(manual: Manual) -> None:
    model = Provider()
    embeddings = manual(model, max_pending=200)
    for number in range(100):
        assert embeddings.prefetch(f"queued {number}") is PrefetchOutcome.STARTED
    model.down = True
    for number in range(20):
        with pytest.raises(RefusedError):
            embeddings.embed_query(f"query {number}")
    model.calls = 0
    for _ in range(5):
        embeddings.executor.run_all()
        embeddings.time.advance(0.1)
    assert model.calls <= 2, "the whole queue fell upon a provider that is down"
    embeddings.clear()


# The provider's bill, over whole outages.

TURNS = 80


def bill(model: Provider, queries: int) -> None:
    assert model.calls >= queries
    assert model.calls <= MOST_REQUESTS * queries, f"{model.calls / queries:.2f} requests a query"


@pytest.mark.parametrize("status_code", [503, 429, 401, None])
@pytest.mark.parametrize("hedge", [None, Hedge(after=0.01, budget=0.05)])
def test_sync_bots(wrap: Wrap, status_code: int | None, hedge: Hedge | None) -> None:
    model = Provider(status_code, seconds=0.004)
    embeddings = wrap(model, hedge=hedge)
    model.down = True
    for number in range(TURNS):
        embeddings.prefetch(f"q {number}")
        threading.Event().wait((0.0, 0.002, 0.008)[number % 3])
        with pytest.raises((RefusedError, ConnectionError)):
            embeddings.embed_query(f"q {number}")
    until(lambda: at_rest(embeddings))
    threading.Event().wait(0.6)  # for whatever is to be tried again
    bill(model, TURNS)


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_an_outage_that_comes_out_of_the_blue(manual: Manual, attempts: int) -> None:
    model = Provider()
    embeddings = manual(model, attempts=attempts)
    for number in range(50):
        assert turn(embeddings, f"well {number}")
    model.down = True
    model.calls = 0
    for number in range(TURNS):
        assert not turn(embeddings, f"down {number}")
    for _ in range(20):
        embeddings.executor.run_all()
        embeddings.time.advance(1.0)
    bill(model, TURNS)
    model.down = False
    for number in range(20):
        assert turn(embeddings, f"again {number}")
    assert embeddings.stats().query_ready >= 50 + 19


def test_several_partials_a_turn(manual: Manual) -> None:
    model = Provider()
    embeddings = manual(model)
    model.down = True
    for number in range(TURNS):
        for partial in ("how", "how much", "how much is"):
            embeddings.prefetch(f"{partial} {number}")
            embeddings.executor.run_all()
            embeddings.time.advance(0.3)
        with pytest.raises(RefusedError):
            embeddings.embed_query(f"how much is it {number}")
        embeddings.time.advance(0.3)
    bill(model, TURNS)


@pytest.mark.parametrize("native", [True, False])
async def test_async_bots(wrap: Wrap, native: bool) -> None:
    model = Provider(seconds=0.004)
    embeddings = wrap(model)
    model.down = True
    for number in range(TURNS):
        if native:
            await embeddings.aprefetch(f"q {number}")
        else:
            embeddings.prefetch(f"q {number}")
        await asyncio.sleep((0.0, 0.002, 0.008)[number % 3])
        with pytest.raises(RefusedError):
            await embeddings.aembed_query(f"q {number}")
    await auntil(lambda: at_rest(embeddings))
    await asyncio.sleep(0.6)
    bill(model, TURNS)


async def test_many_async_bots_at_once(wrap: Wrap) -> None:
    model = Provider(seconds=0.01)
    embeddings = wrap(model)
    model.down = True

    async def bot(name: str) -> None:
        for number in range(40):
            await embeddings.aprefetch(f"{name} {number}")
            await asyncio.sleep(0.005)
            with pytest.raises(RefusedError):
                await embeddings.aembed_query(f"{name} {number}")

    await asyncio.gather(*(bot(f"bot {number}") for number in range(10)))
    await auntil(lambda: at_rest(embeddings))
    await asyncio.sleep(0.6)
    bill(model, 400)


def test_many_bots_in_threads(wrap: Wrap) -> None:
    model = Provider(seconds=0.01)
    embeddings = wrap(model)
    model.down = True

    def bot(name: str) -> None:
        for number in range(40):
            embeddings.prefetch(f"{name} {number}")
            threading.Event().wait(0.005)
            with pytest.raises(RefusedError):
                embeddings.embed_query(f"{name} {number}")

    bots = [Call(bot, f"bot {number}") for number in range(8)]
    for each in bots:
        each.result()
    until(lambda: at_rest(embeddings))
    threading.Event().wait(0.6)
    bill(model, 320)


def test_all_ask_for_the_same(wrap: Wrap) -> None:
    """Without the library each query is a request of its own: the bill is no larger for it."""
    model = Provider(seconds=0.01)
    embeddings = wrap(model)
    model.down = True

    def bot(name: str) -> None:
        for number in range(40):
            embeddings.prefetch(f"q {number}")
            with pytest.raises(RefusedError):
                embeddings.embed_query(f"q {number}")

    bots = [Call(bot, f"bot {number}") for number in range(8)]
    for each in bots:
        each.result()
    until(lambda: at_rest(embeddings))
    assert model.calls <= MOST_REQUESTS * 320


def test_an_outage_with_flickers(manual: Manual) -> None:
    """One call in forty gets through: each success resumes, and costs a failure or two."""
    model = Provider()
    embeddings = manual(model)
    queries = 0
    for number in range(400):
        model.down = number % 40 != 39
        queries += 1
        turn(embeddings, f"q {number}")
    bill(model, queries)


async def test_callers_who_give_up(wrap: Wrap) -> None:
    """Calls hang, and each caller leaves: without the library one request a turn."""

    class Model(Provider):
        async def aembed_query(self, text: str) -> list[float]:
            self._count(text)
            await asyncio.sleep(3600)
            return [1.0]

    model = Model()
    embeddings = wrap(model)
    turns = 40

    async def one(number: int) -> None:
        await embeddings.aprefetch(f"q {number}")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await embeddings.aembed_query(f"q {number}")

    await asyncio.gather(*(one(number) for number in range(turns)))
    assert model.calls <= MOST_REQUESTS * turns


# What an operator is told.


def told(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("prefetch_embeddings") and record.levelno >= level
    ]


@pytest.mark.parametrize("turns", [30, 90])
def test_one_warning_when_it_begins_and_one_line_when_it_ends(
    manual: Manual, caplog: pytest.LogCaptureFixture, turns: int
) -> None:
    model = Provider()
    embeddings = manual(model)
    with caplog.at_level(logging.INFO, "prefetch_embeddings"):
        for number in range(10):
            turn(embeddings, f"well {number}")
        assert told(caplog, logging.INFO) == []
        model.down = True
        for number in range(turns):
            turn(embeddings, f"secret {number}")
        warnings = told(caplog, logging.WARNING)
        # The one that tells of the pause, and at most two of the failures that led to it.
        assert 1 <= len(warnings) <= 3, warnings
        caplog.clear()
        for number in range(turns):
            turn(embeddings, f"secret {number}")
        assert told(caplog, logging.INFO) == [], "it goes on and on about it"
        model.down = False
        for number in range(20):
            turn(embeddings, f"again {number}")
        assert len(told(caplog, logging.INFO)) == 1
        assert "secret" not in caplog.text


def test_the_counts_add_up_over_an_outage(manual: Manual) -> None:
    model = Provider()
    embeddings = manual(model)
    for number in range(100):
        model.down = 20 <= number < 80
        turn(embeddings, f"q {number}")
    stats = embeddings.stats()
    assert queries_counted(stats) == 100
    assert stats.query_failed == 60
    assert stats.prefetch_dropped >= 40
