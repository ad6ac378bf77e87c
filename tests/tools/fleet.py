"""`make fleet`: a real cluster and real Sentinels under traffic, through failovers; what it cost.

One row for cluster and Sentinel, threads and coroutines, single flight off and on. In each a
primary is killed under traffic, a replica takes over, and later the dead one comes back. A failover
has ended when the replica calls itself a primary, and, where there are Sentinels, they name it. A
duplicate call is one that began while another worker's call for the same text was under way.
Then eight processes ask the same questions, and one is killed in the middle of its call. Exits with
1 where something is not as it should be, and says what.

    python -m tests.tools.fleet --seconds 20
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from langchain_core.embeddings import Embeddings

from prefetch_embeddings import RedisCachedEmbeddings
from tests.redis_tier.models import vector_of
from tests.redis_tier.server import HANG, Cluster, RedisServer, SentinelSet, ask

MODEL_SECONDS = 0.02
QUESTIONS = 300
WORKERS = 4
PROCESSES = 8
WORST_SECONDS = 0.15
LIVING_HITS = 0.9
BACK_SECONDS = 1.0
CALLS_PER_TEXT = 1.05
COLUMNS = (
    "servers",
    "face",
    "single flight",
    "queries",
    "wrong",
    "failed",
    "worst beyond the model",
    "hits, living shards",
    "hits back after the failover",
    "duplicate calls",
    "failover took",
)


class Model(Embeddings):
    """Takes its time, and notes when which text was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    def embed_query(self, text: str) -> list[float]:
        self.calls.append((text, time.monotonic()))
        time.sleep(MODEL_SECONDS)
        return vector_of(text)

    async def aembed_query(self, text: str) -> list[float]:
        self.calls.append((text, time.monotonic()))
        await asyncio.sleep(MODEL_SECONDS)
        return vector_of(text)


class Query(NamedTuple):
    at: float
    text: str
    seconds: float
    called: bool
    right: bool


class Traffic:
    """Queries from a few workers, by threads or coroutines, until it is stopped."""

    def __init__(self, url: str, *, face: str, single_flight: bool) -> None:
        self.queries: list[Query] = []
        self.failed = 0
        self._stop = threading.Event()
        self._made = [
            RedisCachedEmbeddings(Model(), url, model_id="fleet", single_flight=single_flight)
            for _ in range(WORKERS)
        ]
        run = self._run if face == "sync" else lambda one, n: asyncio.run(self._arun(one, n))
        self.threads = [
            threading.Thread(target=run, args=(one, n)) for n, one in enumerate(self._made)
        ]

    def fill(self) -> None:
        for each in self._made:
            each.warm_up()
        for number in range(QUESTIONS):
            self._made[0].embed_query(f"question {number}")
        assert self._made[0].flush(HANG)

    def _texts(self, seed: int) -> Iterator[str]:
        lots = random.Random(seed)
        while not self._stop.is_set():
            yield f"question {lots.randrange(QUESTIONS)}"

    def _run(self, one: RedisCachedEmbeddings, seed: int) -> None:
        for text in self._texts(seed):
            with self._noted(one, text) as note:
                note(one.embed_query(text))
            time.sleep(0.002)

    async def _arun(self, one: RedisCachedEmbeddings, seed: int) -> None:
        for text in self._texts(seed):
            with self._noted(one, text) as note:
                note(await one.aembed_query(text))
            await asyncio.sleep(0.002)

    @contextlib.contextmanager
    def _noted(
        self, one: RedisCachedEmbeddings, text: str
    ) -> Iterator[Callable[[list[float]], None]]:
        model: Any = one.underlying_embeddings
        before, began = len(model.calls), time.monotonic()

        def note(vector: list[float]) -> None:
            seconds, called = time.monotonic() - began, len(model.calls) > before
            self.queries.append(Query(began, text, seconds, called, vector == vector_of(text)))

        try:
            yield note
        except Exception:
            self.failed += 1

    def stop(self) -> None:
        self._stop.set()
        for thread in self.threads:
            thread.join(HANG)
        for each in self._made:
            each.close()

    def duplicates(self) -> int:
        """Return how many calls began while another one for the same text was under way."""
        models: list[Any] = [one.underlying_embeddings for one in self._made]
        calls = sorted(call for model in models for call in model.calls)
        return sum(
            text == before and began - begun < MODEL_SECONDS
            for (before, begun), (text, began) in itertools.pairwise(calls)
        )

    def keys(self) -> dict[str, str]:
        """Return the text of each key."""
        shelf = self._made[0]._tier.shelf
        texts = (f"question {number}" for number in range(QUESTIONS))
        return {shelf.slot("query", text).key: text for text in texts}


def run(kind: str, face: str, *, single_flight: bool, seconds: float) -> list[str]:
    """Measure and print one row of the table; return what is not as it should be."""
    servers: Cluster | SentinelSet = Cluster(3, 1) if kind == "cluster" else SentinelSet(2, 3)
    try:
        traffic = Traffic(servers.url, face=face, single_flight=single_flight)
        traffic.fill()
        doomed = servers.nodes[2] if isinstance(servers, Cluster) else servers.primary
        with doomed.client() as client:
            lost = {name.decode() for name in client.scan_iter(count=1000)}
        lost_texts = {text for key, text in traffic.keys().items() if key in lost}
        for thread in traffic.threads:
            thread.start()
        time.sleep(seconds / 4)
        killed = time.monotonic()
        doomed.kill()
        ended = _until_taken_over(servers, killed + HANG)
        time.sleep(seconds / 2)
        doomed.start()
        time.sleep(seconds / 4)
        traffic.stop()
        return _row(kind, face, single_flight, traffic, lost_texts, killed, ended)
    finally:
        servers.close()


def _until_taken_over(servers: Cluster | SentinelSet, end: float) -> float:
    """Return when the failover had ended: a replica of the dead one is a primary."""
    before = servers.primary_port() if isinstance(servers, SentinelSet) else None
    heirs = [servers.nodes[5]] if isinstance(servers, Cluster) else servers.replicas
    while time.monotonic() < end:
        if any(b"role:master" in ask(heir, "INFO", "replication") for heir in heirs) and (
            isinstance(servers, Cluster) or servers.primary_port() != before
        ):
            return time.monotonic()
        time.sleep(0.02)
    raise AssertionError("nobody took over")


def _row(
    kind: str,
    face: str,
    single_flight: bool,
    traffic: Traffic,
    lost: set[str],
    killed: float,
    ended: float,
) -> list[str]:
    """Print one row; return what is not as it should be."""
    queries = traffic.queries
    wrong = sum(not query.right for query in queries)
    worst = max(query.seconds - MODEL_SECONDS * query.called for query in queries)
    living = [query for query in queries if query.text not in lost and query.at > killed]
    hits = sum(not query.called for query in living) / len(living) if living else None
    back = min(
        (
            query.at
            for query in queries
            if query.text in lost and query.at > ended and not query.called
        ),
        default=float("inf"),
    )
    share = "-" if hits is None else f"{hits:.1%}"
    print(
        f"| {kind} | {face} | {'on' if single_flight else 'off'} | {len(queries):,} | {wrong} | "
        f"{traffic.failed} | {worst:.3f} s | {share} | {back - ended:.2f} s | "
        f"{traffic.duplicates()} | {ended - killed:.1f} s |",
        flush=True,
    )
    what = f"{kind}, {face}, single flight {'on' if single_flight else 'off'}"
    return [
        f"{what}: {name}"
        for name, met in {
            "a vector is wrong": wrong == 0,
            "a query failed": traffic.failed == 0,
            f"a query took more than {WORST_SECONDS} s beyond the model": worst <= WORST_SECONDS,
            "living shards are not hit": hits is None or hits >= LIVING_HITS,
            "hits came back late": back - ended <= BACK_SECONDS,
        }.items()
        if not met
    ]


# --- one call in the fleet


class SlowModel(Embeddings):
    """Takes a second, and counts what all processes ask of it."""

    def __init__(self, calls: Any, owner: Any) -> None:
        self._calls = calls
        self._owner = owner

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    def embed_query(self, text: str) -> list[float]:
        if text.startswith("question"):
            with self._calls.get_lock():
                self._calls.value += 1
            self._owner.value = os.getpid()
        time.sleep(1.0)
        return vector_of(text)


def _work(url: str, calls: Any, owner: Any, start: Any, texts: int, results: Any) -> None:
    embeddings = RedisCachedEmbeddings(
        SlowModel(calls, owner), url, model_id="calls", single_flight=True
    )
    embeddings.warm_up()
    start.wait()
    longest, lost = 0.0, 0
    for number in range(texts):
        began = time.monotonic()
        lost += embeddings.embed_query(f"question {number}") != vector_of(f"question {number}")
        longest = max(longest, time.monotonic() - began)
    results.put((longest, lost))
    embeddings.close()


def calls_per_text(texts: int) -> list[str]:
    """Have eight processes ask for `texts` texts, and kill one of them in the middle of a call.

    Prints what came of it; returns what is not as it should be.
    """
    context = multiprocessing.get_context("fork")
    server = RedisServer()
    calls, owner = context.Value("i", 0), context.Value("i", 0)
    start, results = context.Barrier(PROCESSES + 1), context.Queue()
    processes = [
        context.Process(target=_work, args=(server.url, calls, owner, start, texts, results))
        for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    start.wait()
    while calls.value < max(2, texts // 2):
        time.sleep(0.01)
    os.kill(owner.value, signal.SIGKILL)
    told = [results.get(timeout=HANG + 10.0 * texts) for _ in range(PROCESSES - 1)]
    for process in processes:
        process.join(HANG)
    server.close()
    longest, lost = max(seconds for seconds, _ in told), sum(lost for _, lost in told)
    print(
        f"\n{PROCESSES} processes x {texts} new texts, model of 1 s, one process killed: "
        f"{calls.value / texts:.2f} calls a text, longest wait {longest:.2f} s, "
        f"wrong or lost {lost}"
    )
    # The one that is killed costs one more.
    most = max(CALLS_PER_TEXT * texts, texts + 1)
    return [
        *([f"{calls.value} calls for {texts} texts"] if calls.value > most else []),
        *([f"{lost} vectors wrong or lost"] if lost else []),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of traffic in each row")
    parser.add_argument("--texts", type=int, default=100, help="that eight processes ask for")
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"| {' | '.join('---' for _ in COLUMNS)} |", flush=True)
    wrong: list[str] = []
    for kind, face, single in itertools.product(
        ("cluster", "Sentinel"), ("sync", "async"), (False, True)
    ):
        wrong += run(kind, face, single_flight=single, seconds=options.seconds)
    wrong += calls_per_text(options.texts)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
