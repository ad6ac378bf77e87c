"""Everything at once, for a while: `python -m tests.tools.soak --seconds 600`.

Threads and coroutines query, prefetch, cancel, forget and clear. The model fails, hangs and answers
late; Redis is paused, and killed and started again. It goes on until all of that has happened. At
the end every vector served was the right one for its text, the counters add up, and nothing is
left: no flight, no thread, no memory.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import itertools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings

from prefetch_embeddings import (
    Hedge,
    PrefetchingEmbeddings,
    PrefetchingRetriever,
    PrefetchStats,
)
from prefetch_embeddings._flights.flight import Flight
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from prefetch_embeddings.reporting import logger
from prefetch_embeddings.testing import ScriptedEmbeddings, assert_no_leaks
from tests.helpers import PATIENCE, until
from tests.redis_tier.server import RedisServer
from tests.retriever.facade import RetrievedVectors

THREADS = 6
LOOPS = 2
TASKS_PER_LOOP = 8
KNOWN_TEXTS = [f"question {number}" for number in range(100)]
MOST_GROWTH = 32 * 2**20
"""Bytes by which the process may grow in the second half: much less than what it serves then."""

MOST_WAITING = 200.0
"""Seconds after which it gives up on what has not happened yet."""

TROUBLES = ["hanging", "late", "failing"]
OUTAGES = ["paused", "killed"]
HAPPENING = [
    "prefetch_started",
    "prefetch_deduplicated",
    "prefetch_dropped",
    "prefetch_succeeded",
    "prefetch_failed",
    "prefetch_withdrawn",
    "prefetch_retried",
    "prefetch_used",
    "prefetch_wasted",
    "query_ready",
    "query_joined",
    "query_claimed",
    "query_missed",
    "query_recovered",
    "query_failed",
    "hedge_started",
    "hedge_won",
]
HAPPENING_TO_REDIS = ["hits", "misses", "skipped", "errors", "writes", "writes_dropped"]

vector = ScriptedEmbeddings(512).vector


class ModelError(Exception):
    pass


class TroubledModel(Embeddings):
    """A model on a bad day: late, now and then failing, at times hanging."""

    def __init__(self, seed: int) -> None:
        self.happened: Counter[str] = Counter()  # guarded by _lock
        self._lock = threading.Lock()
        self._random = random.Random(seed)

    def _trouble(self) -> tuple[float, bool]:
        """Return how many seconds a call takes, and whether it then fails."""
        with self._lock:
            lot = self._random.random()
            how = "hanging" if lot < 0.01 else "late" if lot < 0.2 else "in time"
            fails = self._random.random() < 0.08
            self.happened.update(["calls", how, *["failing"] * fails])
        return {"hanging": 1.0, "late": 0.1 * lot, "in time": 0.002}[how], fails

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        seconds, fails = self._trouble()
        time.sleep(seconds)
        if fails:
            raise ModelError
        return [vector(text) for text in texts]

    async def aembed_query(self, text: str) -> list[float]:
        seconds, fails = self._trouble()
        await asyncio.sleep(seconds)
        if fails:
            raise ModelError
        return vector(text)


@dataclasses.dataclass
class Tally:
    """What one thread, or one event loop, did."""

    queries: int = 0
    served: int = 0
    failed: int = 0
    cancelled: int = 0
    prefetches: int = 0
    waits: int = 0
    forgotten: int = 0
    cleared: int = 0

    def __add__(self, other: Tally) -> Tally:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Tally(*(a + b for a, b in pairs))


class Soak:
    """One soak, of so many seconds, or of as many as it takes."""

    def __init__(
        self, seconds: float, seed: int, *, redis: bool = True, retrieval: bool = False
    ) -> None:
        self.seconds = seconds
        self.retrieval = retrieval
        self.seed = seed
        self.stop = threading.Event()
        self.model = TroubledModel(seed)
        self.server = RedisServer() if redis else None
        self.tier: RedisCachedEmbeddings | None = None
        if self.server is not None:
            self.tier = RedisCachedEmbeddings(
                self.model,
                self.server.url,
                model_id="soak",
                ttl=2.0,
                timeout=0.05,
                single_flight=True,
            )
        make: Any = PrefetchingEmbeddings
        if retrieval:  # documents in the place of vectors
            make = partial(RetrievedVectors, kind=PrefetchingRetriever)
        self.embeddings = make(
            self.tier or self.model,
            ttl=0.5,
            max_entries=64,
            max_workers=4,
            max_pending=8,
            symmetric=True,
            hedge=Hedge(after=0.1, budget=0.5),
        )
        self.tallies: list[Tally] = []
        self.errors: list[BaseException] = []
        self.outages: Counter[str] = Counter()
        self.grown = 0
        self.new_texts = itertools.count()

    def run(self) -> tuple[Tally, PrefetchStats]:
        """Soak; return what was done, and the wrapper's counts of it.

        Raises:
            AssertionError: If something was wrong, or is left.
        """
        logger.disabled = True  # thousands of failures, all of them wanted
        before = threading.active_count()
        jobs: list[Callable[[], None]] = [
            *(lambda number=number: self._thread(number) for number in range(THREADS)),
            *(lambda number=number: self._loop(number) for number in range(LOOPS)),
            self._harm_redis,
        ]
        threads = [threading.Thread(target=self._guard, args=(job,), daemon=True) for job in jobs]
        try:
            for thread in threads:
                thread.start()
            self.stop.wait(self.seconds / 2)
            early = memory()
            self.stop.wait(self.seconds / 2)
            give_up_at = time.monotonic() + MOST_WAITING
            while self._missing() and time.monotonic() < give_up_at and not self.stop.wait(0.1):
                pass
            self.stop.set()
            for thread in threads:
                thread.join(PATIENCE)
                assert not thread.is_alive(), "a caller hangs"
            self.grown = memory() - early
        finally:
            self.stop.set()
            logger.disabled = False
            self.embeddings.close()
            if self.tier is not None:
                self.tier.close()
            if self.server is not None:
                self.server.resume()
                self.server.close()
        if self.errors:
            raise self.errors[0]
        missing = self._missing()
        assert not missing, f"a soak in which this never happened: {missing}"
        tally = sum(self.tallies, Tally())
        self._check_counts(tally)
        assert_no_leaks(self.embeddings)
        until(lambda: threading.active_count() <= before)
        assert self.grown < MOST_GROWTH, f"it grew by {self.grown / 2**20:.0f} MiB"
        stats = self.embeddings.stats()
        self._check_flights()
        return tally, stats

    def _guard(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def _missing(self) -> list[str]:
        """Return the names of what a soak is made of, and has not happened yet."""
        counts: dict[str, float] = dataclasses.asdict(sum(self.tallies, Tally()))
        counts |= {f"calls {how}": self.model.happened[how] for how in TROUBLES}
        stats = dataclasses.asdict(self.embeddings.stats())
        counts |= {name: stats[name] for name in HAPPENING}
        if self.tier is not None:
            redis_stats = dataclasses.asdict(self.tier.stats())
            counts |= {f"Redis {how}": self.outages[how] for how in OUTAGES}
            counts |= {f"Redis {name}": redis_stats[name] for name in HAPPENING_TO_REDIS}
        return [name for name, count in counts.items() if not count]

    def _check_counts(self, tally: Tally) -> None:
        stats = self.embeddings.stats()
        met = stats.query_ready + stats.query_joined + stats.query_claimed + stats.query_missed
        assert met == tally.queries, f"{tally.queries} queries, {met} counted"
        # A retriever tells its callbacks of a failure: a caller may be cancelled just then.
        cancelled_late = stats.query_failed - tally.failed
        assert 0 <= cancelled_late <= (tally.cancelled if self.retrieval else 0)
        assert tally.queries == tally.served + tally.failed + tally.cancelled
        counted = stats.prefetch_started + stats.prefetch_deduplicated + stats.prefetch_dropped
        assert counted == tally.prefetches
        assert stats.hedge_won <= stats.hedge_started

    def _check_flights(self) -> None:
        """Check that no flight outlives its wrapper's interest in it."""

        def gone() -> bool:
            gc.collect()
            flights = [each for each in gc.get_objects() if isinstance(each, Flight)]
            return not [f for f in flights if not f.ended]

        until(gone)

    def _text(self, lots: random.Random) -> str:
        if lots.random() < 0.2:
            return f"new {next(self.new_texts)}"
        return lots.choice(KNOWN_TEXTS)

    # --- Threads -------------------------------------------------------------------------------

    def _thread(self, number: int) -> None:
        lots = random.Random(f"{self.seed} thread {number}")
        tally = Tally()
        self.tallies.append(tally)
        while not self.stop.is_set():
            text = self._text(lots)
            lot = lots.random()
            if lot < 0.5:
                self._query(text, tally)
            elif lot < 0.75:
                tally.prefetches += 1
                self.embeddings.prefetch(text)
            elif lot < 0.83:
                texts = [self._text(lots) for _ in range(lots.randrange(1, 6))]
                tally.prefetches += len(texts)
                self.embeddings.prefetch_many(texts)
            elif lot < 0.9:
                tally.waits += self.embeddings.wait_for_prefetch(
                    text, lots.choice([None, 0.0, 0.01])
                )
            elif lot < 0.95:
                tally.forgotten += self.embeddings.forget(text)
            elif lot < 0.951:
                tally.cleared += 1
                self.embeddings.clear()
            else:
                self.embeddings.is_ready(text)
                assert self.embeddings.expected_wait(text) >= 0.0
                self.embeddings.stats()
            self.stop.wait(0.002 * lots.random())

    def _query(self, text: str, tally: Tally) -> None:
        tally.queries += 1
        try:
            served = self.embeddings.embed_query(text)
        except ModelError:
            tally.failed += 1
        else:
            tally.served += 1
            assert served == vector(text), f"a wrong vector for {text}"

    # --- Event loops ---------------------------------------------------------------------------

    def _loop(self, number: int) -> None:
        lots = random.Random(f"{self.seed} loop {number}")
        tally = Tally()
        self.tallies.append(tally)

        async def all_tasks() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(TASKS_PER_LOOP):
                    group.create_task(self._task(lots, tally))

        asyncio.run(all_tasks())

    async def _task(self, lots: random.Random, tally: Tally) -> None:
        while not self.stop.is_set():
            text = self._text(lots)
            lot = lots.random()
            if lot < 0.4:
                await self._aquery(text, tally)
            elif lot < 0.6:
                with suppress(TimeoutError):  # a caller that hangs up
                    await asyncio.wait_for(self._aquery(text, tally), 0.02 * lots.random())
            elif lot < 0.9:
                tally.prefetches += 1
                await self.embeddings.aprefetch(text)
            else:
                tally.waits += await self.embeddings.await_for_prefetch(
                    text, lots.choice([None, 0.0, 0.01])
                )
            await asyncio.sleep(0.005 * lots.random())

    async def _aquery(self, text: str, tally: Tally) -> None:
        tally.queries += 1
        try:
            served = await self.embeddings.aembed_query(text)
        except ModelError:
            tally.failed += 1
        except asyncio.CancelledError:
            tally.cancelled += 1
            raise
        else:
            tally.served += 1
            assert served == vector(text), f"a wrong vector for {text}"

    # --- Redis ---------------------------------------------------------------------------------

    def _harm_redis(self) -> None:
        lots = random.Random(f"{self.seed} redis")
        while self.server is not None and not self.stop.wait(1.0 + lots.random()):
            if self.outages["paused"] == self.outages["killed"]:
                self.server.pause()
                self.stop.wait(0.5)
                self.server.resume()
                self.outages["paused"] += 1
            else:
                self.server.kill()
                self.stop.wait(0.5)
                self.server.start()
                self.outages["killed"] += 1


def memory() -> int:
    """Return how many bytes the process holds; 0 where that cannot be told."""
    gc.collect()
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * 4096
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-redis", action="store_true", help="leave Redis out")
    parser.add_argument("--retrieval", action="store_true", help="prefetch documents")
    options = parser.parse_args()
    soak = Soak(
        options.seconds, options.seed, redis=not options.no_redis, retrieval=options.retrieval
    )
    tally, stats = soak.run()
    for name, count in dataclasses.asdict(tally).items():
        print(f"{name:>24} {count}")
    print(f"{'MiB grown':>24} {soak.grown / 2**20:.1f}")
    for what, count in soak.model.happened.items():
        print(f"{'model, ' + what:>24} {count}")
    for what, count in soak.outages.items():
        print(f"{'Redis, ' + what:>24} {count}")
    for name, count in dataclasses.asdict(stats).items():
        print(f"{name:>24} {count:.10g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
