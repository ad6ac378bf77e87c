"""Any number of event loops, forked children and exits: nothing is shared, and nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import trustme

from prefetch_embeddings._redis.breaker import PAUSE, CircuitBreaker
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from prefetch_embeddings.testing import ManualTime
from tests.helpers import auntil, until
from tests.redis_tier.insides import with_gate
from tests.redis_tier.models import CountingModel, vector_of
from tests.redis_tier.server import HANG, RedisServer


def test_loops_opened_and_closed_leave_no_connection(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    embeddings = cached(model)
    embeddings.embed_query("text")
    assert embeddings.flush(HANG)
    before = server.connections()
    for _ in range(20):
        assert asyncio.run(embeddings.aembed_query("text")) == vector_of("text")
        assert server.connections() == before  # they are no loop's own
    assert embeddings.stats().errors == 0
    assert embeddings.stats().hits == 20


def test_loops_side_by_side(cached: Any, model: CountingModel) -> None:
    embeddings = cached(model)
    embeddings.embed_query("text")
    assert embeddings.flush(HANG)
    barrier = threading.Barrier(4)
    failures: list[BaseException] = []

    async def main() -> None:
        await asyncio.to_thread(barrier.wait, HANG)
        for _ in range(50):
            assert await embeddings.aembed_query("text") == vector_of("text")

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert failures == []
    assert (embeddings.stats().hits, embeddings.stats().errors) == (200, 0)


def test_a_loop_that_is_just_closed(cached: Any, model: CountingModel, server: RedisServer) -> None:
    """Without `asyncio.run`'s shutdown nothing can be closed in order; it must still work."""
    embeddings = cached(model)
    for _ in range(5):
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(embeddings.aembed_query("text")) == vector_of("text")
        loop.close()
    assert embeddings.stats().errors == 0
    assert embeddings.stats().hits == 4


def test_closing_reaches_other_loops(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    embeddings = cached(model)
    before = server.connections()
    asked, done = threading.Event(), threading.Event()

    async def main() -> None:
        await embeddings.aembed_query("text")
        asked.set()
        await asyncio.to_thread(done.wait, HANG)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert asked.wait(HANG)
    embeddings.close()
    until(lambda: server.connections() == before)
    done.set()
    thread.join(HANG)


async def test_cancelled_callers_leave_whole_connections(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    embeddings = cached(model)
    texts = [str(number) for number in range(20)]
    for text in texts:
        embeddings.embed_query(text)
    assert await asyncio.to_thread(embeddings.flush, HANG)
    for turns in range(12):  # cancelled at every point of the way
        tasks = [asyncio.create_task(embeddings.aembed_query(text)) for text in texts]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for text, task in zip(texts[1::2], tasks[1::2], strict=True):
            assert task.result() == vector_of(text)
        for text in texts:
            assert await embeddings.aembed_query(text) == vector_of(text)
    assert embeddings.stats().errors == 0
    assert model.aqueries == []
    await embeddings.aclose()


def in_child(check: Any) -> None:
    """Run `check` in a forked child; assert that it returned."""
    child = os.fork()
    if child == 0:
        try:
            check()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("given", [False, True])
def test_a_forked_child_has_connections_of_its_own(
    cached: Any, model: CountingModel, server: RedisServer, given: bool
) -> None:
    with server.client() as client:
        embeddings = cached(model, **({"client": client} if given else {}))
        embeddings.embed_query("text")
        assert embeddings.flush(HANG)
        embeddings.embed_query("text")

        def child() -> None:
            assert embeddings.stats().hits == 0
            for _ in range(50):
                assert embeddings.embed_query("text") == vector_of("text")
            embeddings.embed_query("child")
            assert asyncio.run(embeddings.aembed_query("text")) == vector_of("text")
            assert embeddings.flush(HANG)
            assert embeddings.stats().hits == 51
            assert embeddings.stats().writes == 1
            embeddings.close()

        in_child(child)
        assert embeddings.embed_query("text") == vector_of("text")
        assert embeddings.embed_query("child") == vector_of("child")
        assert (embeddings.stats().hits, embeddings.stats().errors) == (3, 0)
        embeddings.close()


async def test_a_fork_on_an_event_loop_leaves_the_parents_connections(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    embeddings = cached(model)
    await embeddings.aembed_query("text")
    assert await asyncio.to_thread(embeddings.flush, HANG)

    def child() -> None:
        embeddings.close()
        gc.collect()

    in_child(child)
    assert await embeddings.aembed_query("text") == vector_of("text")
    assert (embeddings.stats().hits, embeddings.stats().errors) == (1, 0)
    await embeddings.aclose()


@contextlib.asynccontextmanager
async def with_async_client(
    cached: Any, model: CountingModel, server: RedisServer, **options: Any
) -> AsyncIterator[RedisCachedEmbeddings]:
    """Yield a tier whose async client belongs to the running loop, with "text" stored."""
    async with redis.asyncio.Redis(port=server.port) as client:
        embeddings = cached(model, async_client=client, **options)
        await embeddings.aembed_query("text")
        assert await asyncio.to_thread(embeddings.flush, HANG)
        yield embeddings
        await embeddings.aclose()


async def test_a_forked_child_leaves_the_parents_async_client_alone(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    """Its connections are the parent's: each would read the other's answers."""
    async with with_async_client(cached, model, server) as embeddings:

        def child() -> None:
            asked_in_parent = len(model.aqueries)
            thread = threading.Thread(target=asyncio.run, args=(ask(),))
            thread.start()
            thread.join(HANG)
            assert len(model.aqueries) == asked_in_parent + 1
            stats = embeddings.stats()
            assert (stats.skipped, stats.writes_dropped, stats.errors) == (1, 1, 0)

        async def ask() -> None:
            assert await embeddings.aembed_query("text") == vector_of("text")

        in_child(child)
        for _ in range(5):
            assert await embeddings.aembed_query("text") == vector_of("text")
        assert (embeddings.stats().hits, embeddings.stats().errors) == (5, 0)


@pytest.mark.parametrize("closed", [False, True])
def test_nor_does_the_child_use_it_where_its_loop_is_free(
    cached: Any, model: CountingModel, server: RedisServer, closed: bool
) -> None:
    before = server.connections()
    embeddings = cached(model, async_client=redis.asyncio.Redis(port=server.port))

    async def ask() -> None:
        assert await embeddings.aembed_query("text") == vector_of("text")
        await auntil(lambda: embeddings.flush(0.0))

    def parent() -> None:  # itself a child, since it leaves an open connection behind
        loop = asyncio.new_event_loop()
        loop.run_until_complete(ask())
        if closed:
            loop.close()

        def child() -> None:
            for _ in range(3):
                asyncio.run(ask()) if closed else loop.run_until_complete(ask())
            stats = embeddings.stats()
            assert (stats.skipped, stats.errors, stats.hits) == (3, 0, 0)

        in_child(child)
        assert server.connections() == before + 1

    in_child(parent)
    until(lambda: server.connections() == before)


async def test_another_loop_does_not_use_up_the_probe_of_an_open_breaker(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    async with with_async_client(cached, model, server) as embeddings:
        clock = ManualTime()
        places: Any = embeddings._tier._places_of_loop()
        health = places.of("any").health
        health.breaker = CircuitBreaker(failures=1, clock=clock)
        health.breaker.failed()
        clock.advance(PAUSE)
        await asyncio.to_thread(asyncio.run, embeddings.aembed_query("text"))
        assert await embeddings.aembed_query("text") == vector_of("text")
        assert health.breaker.closed
        assert (embeddings.stats().hits, embeddings.stats().skipped) == (1, 1)


@pytest.mark.parametrize("besides", ["nothing", "url", "client"])
async def test_other_loops_do_not_use_the_async_client(
    cached: Any, model: CountingModel, server: RedisServer, besides: str
) -> None:
    with server.client() as sync_client:
        more = {"nothing": {}, "url": {"url": server.url}, "client": {"client": sync_client}}
        async with with_async_client(cached, model, server, **more[besides]) as embeddings:
            vector = await asyncio.to_thread(asyncio.run, embeddings.aembed_query("text"))
            assert vector == vector_of("text")
            stats = embeddings.stats()
            hits = 0 if besides == "nothing" else 1
            assert (stats.hits, stats.skipped, stats.errors) == (hits, 1 - hits, 0)
            assert await embeddings.aembed_query("text") == vector_of("text")
            assert embeddings.stats().hits == hits + 1


def test_a_fork_while_another_thread_writes(
    cached: Any, model: CountingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = cached(model)
    entered, gate = threading.Event(), threading.Event()
    with_gate(monkeypatch, "SET", gate, entered)
    embeddings.embed_query("text")
    assert entered.wait(HANG)
    with embeddings._tier.recorder._lock:  # held by one of the parent's threads

        def child() -> None:
            gate.set()
            embeddings.embed_query("child")
            assert embeddings.flush(HANG)

        in_child(child)
    gate.set()
    assert embeddings.flush(HANG)
    assert embeddings.stats().writes == 1


EXIT = """
import sys, time
sys.path[:0] = {path!r}
from tests.redis_tier.insides import with_gate
from tests.redis_tier.models import CountingModel
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
embeddings = RedisCachedEmbeddings(CountingModel(), {url!r}, model_id="test", timeout={timeout})
embeddings.embed_query("text")
"""


def run_to_its_end(server: RedisServer, timeout: float) -> None:
    script = EXIT.format(path=[p for p in sys.path if p], url=server.url, timeout=timeout)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=HANG)


def test_what_was_embedded_last_is_stored_on_exit(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    run_to_its_end(server, 20.0)
    cached(model).embed_query("text")
    assert model.queries == []


def test_a_hanging_server_does_not_keep_the_interpreter(fragile_server: RedisServer) -> None:
    fragile_server.pause()
    run_to_its_end(fragile_server, 0.1)


def test_a_name_that_never_resolves_leaves_the_executor_and_the_exit_alone(
    cached: Any, model: CountingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retrievers without an async path run in the loop's executor, which asyncio resolves in."""
    never = threading.Event()
    resolve = socket.getaddrinfo

    def hang(host: str, *args: Any, **options: Any) -> Any:
        if host == "redis.invalid":
            never.wait(HANG)
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    embeddings = cached(model, "redis://redis.invalid/0", timeout=0.1)

    async def main() -> None:
        executor = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(executor)
        assert await embeddings.aembed_query("text") == vector_of("text")
        await asyncio.wait_for(asyncio.to_thread(int), HANG / 2)

    try:
        asyncio.run(main())
        assert not never.is_set()
        assert embeddings.stats().skipped == 1
    finally:
        never.set()


async def test_a_name_is_resolved_and_its_addresses_tried_in_turn(
    cached: Any, model: CountingModel, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def two(host: str, port: Any, *args: Any, **options: Any) -> Any:
        if host != "redis.test":
            return resolve(host, port, *args, **options)
        return [(10, 1, 6, "", ("::1", port, 0, 0)), (2, 1, 6, "", ("127.0.0.1", port))]

    embeddings = cached(model, f"redis://redis.test:{server.port}/0")
    monkeypatch.setattr(socket, "getaddrinfo", two)
    assert await embeddings.awarm_up() > 0
    assert await embeddings.aembed_query("text") == vector_of("text")
    assert (embeddings.stats().errors, embeddings.stats().misses) == (0, 1)
    await embeddings.aclose()


class MuteTls:
    """TLS in front of a server, until it stops answering for good."""

    def __init__(self, port: int, directory: Path) -> None:
        authority = trustme.CA()
        self.authority = directory / "authority.pem"
        authority.cert_pem.write_to_path(str(self.authority))
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("localhost", "127.0.0.1").configure_cert(self._context)
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._mute = threading.Event()
        self._silent = threading.Semaphore(0)  # released by each connection once it is
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(near,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, near: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self._port)) as far,
            self._context.wrap_socket(near, server_side=True) as tls,
        ):
            while not self._mute.is_set():
                far.settimeout(0.01)
                tls.settimeout(0.01)
                for source, sink in ((tls, far), (far, tls)):
                    with contextlib.suppress(TimeoutError):
                        if not (data := source.recv(65536)):
                            return
                        sink.sendall(data)
            self._silent.release()
            self._ended.wait(HANG)

    def mute(self) -> None:
        """Return once no connection will answer any more."""
        self._mute.set()
        for _ in self._threads[1:]:
            assert self._silent.acquire(timeout=HANG)

    def close(self) -> None:
        self._mute.set()
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(HANG)
            assert not thread.is_alive()


@pytest.mark.parametrize("how", ["aclose", "close", "end of the loop"])
def test_tls_that_is_never_closed_from_the_other_side(
    cached: Any, model: CountingModel, server: RedisServer, tmp_path: Path, how: str
) -> None:
    tls = MuteTls(server.port, tmp_path)
    url = f"rediss://localhost:{tls.port}/0?ssl_ca_certs={tls.authority}"
    embeddings = cached(model, url)
    embeddings.embed_query("text")
    assert embeddings.flush(HANG)

    async def main() -> float:
        assert await embeddings.aembed_query("text") == vector_of("text")
        tls.mute()
        began = time.monotonic()
        if how == "aclose":
            await embeddings.aclose()
        elif how == "close":
            embeddings.close()
        return began

    try:
        began = asyncio.run(main())
        assert time.monotonic() - began < 4.0  # asyncio waits 30 s, redis-py 5 s and then raises
        assert (embeddings.stats().hits, embeddings.stats().errors) == (1, 0)
    finally:
        tls.close()


async def test_closing_does_not_need_a_thread_of_the_executor(
    cached: Any, model: CountingModel
) -> None:
    gate = threading.Event()
    executor = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(executor)
    busy = asyncio.create_task(asyncio.to_thread(gate.wait, HANG))
    embeddings = cached(model)
    await embeddings.aembed_query("text")
    await asyncio.wait_for(embeddings.aclose(), HANG / 2)
    gate.set()
    await busy
    assert embeddings.stats().writes == 1
