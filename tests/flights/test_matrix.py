"""The same behaviour whatever runs prefetches, however long vectors are kept, and with any Redis.

Every test runs over all combinations of executor, time to live, Redis and caller.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchingRetriever, PrefetchOutcome
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ManualPrefetchingRetriever,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.helpers import PATIENCE, Call, TimeByHand, until
from tests.redis_tier.server import RedisServer, closed_port
from tests.retriever.facade import RetrievedVectors

STARTED, IN_FLIGHT, READY, DROPPED = PrefetchOutcome

EXECUTORS = ("threaded", "manual", "rejecting")
TTLS = {"long": 300.0, "tiny": 1e-9}
REDIS = ("none", "up", "down")
CALLERS = ("sync", "async")


class ModelError(Exception):
    pass


@dataclasses.dataclass
class Setting:
    """One combination: a wrapper, the model at its bottom, and a way to ask."""

    executor: str
    ttl: str
    redis: str
    caller: str
    model: ScriptedEmbeddings
    tier: RedisCachedEmbeddings | None
    embeddings: Any

    def calls_below(self) -> set[int]:
        """How many calls the next query makes that the wrapper lets through, for a known text."""
        if self.tier is None:
            return {1}
        assert self.tier.flush(PATIENCE)
        # A vector that still waits to be written serves, too, for as long as it does.
        return {0} if self.redis == "up" else {0, 1}

    def ask(self, text: str) -> list[float]:
        if self.caller == "sync":
            vector: list[float] = self.embeddings.embed_query(text)
            return vector
        return asyncio.run(self.embeddings.aembed_query(text))

    def run_prefetches(self) -> None:
        """Have what was prefetched done."""
        if self.executor != "threaded":
            self.embeddings.executor.run_all()

        def done() -> bool:
            stats = self.embeddings.stats()
            return bool(stats.prefetch_started == stats.prefetch_succeeded + stats.prefetch_failed)

        until(done)
        if hasattr(self.embeddings, "time"):
            self.embeddings.time.advance(1e-6)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def refusing_port() -> Iterator[int]:
    with closed_port() as port:
        yield port


names = (f"matrix-{number}" for number in itertools.count())


DOCUMENTS = itertools.product(("manual", "rejecting"), TTLS, ("none", "up"), CALLERS)
SETTINGS = [
    *((*each, "vectors") for each in itertools.product(EXECUTORS, TTLS, REDIS, CALLERS)),
    *((*each, "documents") for each in DOCUMENTS),
    *(("threaded", "long", "none", caller, "documents") for caller in CALLERS),
]


@pytest.fixture(params=SETTINGS, ids="-".join)
def setting(
    request: pytest.FixtureRequest, server: RedisServer, refusing_port: int
) -> Iterator[Setting]:
    executor, ttl, redis, caller, what = request.param
    model = ScriptedEmbeddings()
    tier = None
    if redis != "none":
        url = server.url if redis == "up" else f"redis://127.0.0.1:{refusing_port}/0"
        # Ample, so that a busy machine cannot make a healthy server look slow.
        tier = RedisCachedEmbeddings(model, url, model_id="matrix", prefix=next(names), timeout=20)
    kind: Any = ManualPrefetchingEmbeddings
    if executor == "threaded":
        kind = TimeByHand if ttl == "tiny" else PrefetchingEmbeddings
    if what == "documents":
        manual = executor != "threaded"
        retriever = ManualPrefetchingRetriever if manual else PrefetchingRetriever
        kind = partial(RetrievedVectors, kind=retriever)
    embeddings = kind(tier or model, ttl=TTLS[ttl], attempts=1)
    if executor != "threaded":
        embeddings.executor.refusing = executor == "rejecting"
    yield Setting(executor, ttl, redis, caller, model, tier, embeddings)
    embeddings.close()
    assert_no_leaks(embeddings)
    if tier is not None:
        tier.close()


def test_a_query_gets_its_own_list_of_the_right_vector(setting: Setting) -> None:
    first = setting.ask("q")
    assert first == setting.model.vector("q")
    first.clear()
    assert setting.ask("q") == setting.model.vector("q")


def test_a_prefetched_text(setting: Setting) -> None:
    rejecting = setting.executor == "rejecting"
    assert setting.embeddings.prefetch("q") is (DROPPED if rejecting else STARTED)
    setting.run_prefetches()
    below = {1} if rejecting else setting.calls_below() if setting.ttl == "tiny" else {0}
    before = setting.model.calls_for("q")
    assert setting.ask("q") == setting.model.vector("q")
    assert setting.model.calls_for("q") - before in below
    stats = setting.embeddings.stats()
    served = stats.prefetch_used + stats.prefetch_wasted
    assert served == stats.prefetch_started == (0 if rejecting else 1)
    if setting.ttl == "long" and not rejecting:
        assert (stats.query_ready, stats.prefetch_used) == (1, 1)
    else:
        assert (stats.query_missed, stats.prefetch_used) == (1, 0)


def test_a_query_does_not_wait_for_the_background(setting: Setting) -> None:
    setting.embeddings.prefetch("q")
    assert setting.ask("q") == setting.model.vector("q")
    stats = setting.embeddings.stats()
    met = stats.query_ready + stats.query_joined + stats.query_claimed + stats.query_missed
    assert met == 1
    setting.run_prefetches()


def test_callers_at_once_share_a_call(setting: Setting) -> None:
    gate = setting.model.hold("q")
    calls = [Call(setting.ask, "q") for _ in range(4)]
    until(lambda: setting.embeddings.stats().query_joined == 3)
    gate.open()
    assert [call.result() for call in calls] == [setting.model.vector("q")] * 4
    assert setting.model.calls_for("q") == 1


def test_a_failure_reaches_the_query_that_made_the_call_and_no_other(setting: Setting) -> None:
    setting.model.fail("q", ModelError())
    with pytest.raises(ModelError):
        setting.ask("q")
    assert setting.ask("q") == setting.model.vector("q")
    assert setting.model.calls_for("q") == 2
    assert setting.embeddings.stats().query_failed == 1


def test_a_failed_prefetch_costs_nothing(setting: Setting) -> None:
    if setting.executor == "rejecting":
        setting.embeddings.prefetch("q")
    else:
        setting.model.fail("q", ModelError())
        setting.embeddings.prefetch("q")
        setting.run_prefetches()
    assert setting.ask("q") == setting.model.vector("q")
    assert setting.embeddings.stats().query_failed == 0


@pytest.mark.parametrize("remove", ["forget", "clear", "close"])
def test_what_is_removed_is_loaded_anew(setting: Setting, remove: str) -> None:
    setting.embeddings.prefetch("q")
    setting.run_prefetches()
    below = setting.calls_below() if setting.executor != "rejecting" else {1}
    if remove == "forget":
        setting.embeddings.forget("q")
    else:
        getattr(setting.embeddings, remove)()
    assert not setting.embeddings.is_ready("q")
    before = setting.model.calls_for("q")
    assert setting.ask("q") == setting.model.vector("q")
    assert setting.model.calls_for("q") - before in below
    assert setting.embeddings.stats().query_missed == 1


def test_documents_pass_straight_through(setting: Setting) -> None:
    texts = ["a", "b", "a"]
    if setting.caller == "sync":
        vectors = setting.embeddings.embed_documents(texts)
    else:
        vectors = asyncio.run(setting.embeddings.aembed_documents(texts))
    assert vectors == [setting.model.vector(text) for text in texts]
