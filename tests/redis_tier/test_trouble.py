"""Redis only ever helps: whatever happens to it, the model answers, in time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio

from prefetch_embeddings._redis.breaker import CircuitBreaker
from prefetch_embeddings.existing import CacheBackedEmbeddingsCache, RedisVLEmbeddingsCache
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.helpers import until
from tests.redis_tier.insides import breaker, key, never_open, set_timeout
from tests.redis_tier.models import CountingModel, vector_of
from tests.redis_tier.server import HANG, Proxy, RedisServer

# Where these tests bound a wait, the bound only tells "in time" from "hung": the alternative would
# take redis-py's 5 s a try, 10 tries and more.
IN_TIME = 4.0


def ask(embeddings: RedisCachedEmbeddings, face: str, text: str = "text") -> list[float]:
    if face == "sync":
        return embeddings.embed_query(text)
    return asyncio.run(asyncio.wait_for(embeddings.aembed_query(text), HANG))


def ask_many(embeddings: RedisCachedEmbeddings, face: str, texts: list[str]) -> list[list[float]]:
    if face == "sync":
        return embeddings.embed_documents(texts)
    return asyncio.run(embeddings.aembed_documents(texts))


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_where_nobody_listens_the_model_answers(
    cached: Any, model: CountingModel, refusing_port: int, face: str
) -> None:
    embeddings = cached(model, f"redis://127.0.0.1:{refusing_port}/0")
    for number in range(10):
        assert ask(embeddings, face, str(number)) == vector_of(str(number))
    assert ask_many(embeddings, face, ["a", "b"])[1] == vector_of("b", "document")
    stats = embeddings.stats()
    assert stats.errors >= 3
    assert stats.skipped >= 1  # the breaker is open
    assert (stats.hits, stats.hits + stats.misses + stats.skipped) == (0, 12)
    until(lambda: embeddings.stats().writes_dropped == 12)


def test_a_paused_server_costs_the_timeout_and_then_nothing(
    cached: Any, model: CountingModel, fragile_server: RedisServer, face: str
) -> None:
    embeddings = cached(model, fragile_server.url, timeout=0.2)
    ask(embeddings, face, "before")
    assert embeddings.flush(HANG)
    fragile_server.pause()
    for number in range(10):
        assert ask(embeddings, face, str(number)) == vector_of(str(number))
    stats = embeddings.stats()
    assert 1 <= stats.errors <= 8  # 3, and what the writer met; probes on a slow machine
    assert stats.skipped >= 1
    assert stats.redis_seconds < IN_TIME


def test_after_a_pause_hits_come_back(
    cached: Any, model: CountingModel, fragile_server: RedisServer, face: str
) -> None:
    embeddings = cached(model, fragile_server.url, timeout=0.5)
    ask(embeddings, face)
    assert embeddings.flush(HANG)
    fragile_server.pause()
    while breaker(embeddings).closed:
        ask(embeddings, face, "other")
    fragile_server.resume()

    def hit() -> bool:
        before = embeddings.stats()
        assert ask(embeddings, face) == vector_of("text")
        # A vector that still waits to be written is a hit as well, whatever Redis does.
        return bool((embeddings.stats() - before).hits) and breaker(embeddings).closed

    until(hit)


def test_killed_and_restarted_under_load(
    cached: Any, model: CountingModel, fragile_server: RedisServer
) -> None:
    embeddings = cached(model, fragile_server.url, timeout=0.5)
    stop = threading.Event()
    failures: list[BaseException] = []

    def load() -> None:
        try:
            while not stop.is_set():
                assert embeddings.embed_query("text") == vector_of("text")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: embeddings.stats().hits > 100)
    fragile_server.kill()
    until(lambda: embeddings.stats().skipped > 10)
    fragile_server.start()
    hits = embeddings.stats().hits
    until(lambda: embeddings.stats().hits > hits + 100)
    stop.set()
    for thread in threads:
        thread.join(HANG)
    assert failures == []


def test_an_idle_connection_that_the_server_closed_is_not_an_error(
    cached: Any, model: CountingModel, server: RedisServer, proxy: Proxy
) -> None:
    embeddings = cached(model, proxy.url)
    for _ in range(3):
        embeddings.embed_query("text")
        assert embeddings.flush(HANG)
        proxy.cut()
    assert embeddings.stats().errors == 0
    assert embeddings.stats().hits == 2


@pytest.mark.parametrize("how", ["url", "client", "async_client"])
def test_an_answer_that_drips_in_is_given_up_as_a_whole(
    cached: Any, model: CountingModel, server: RedisServer, proxy: Proxy, how: str
) -> None:
    """Each byte arrives well within any socket timeout; only all of them do not."""
    cached(model).embed_query("text")
    with server.client() as direct:
        until(direct.dbsize)
    options: dict[str, Any] = {"port": proxy.port, "decode_responses": True}
    if how == "url":
        embeddings = cached(model, proxy.url, timeout=0.3)
        embeddings.warm_up()
        proxy.drip = 0.05
        assert ask(embeddings, "sync") == vector_of("text")
        assert ask(embeddings, "async", "other") == vector_of("other")
    elif how == "client":
        with redis.Redis(**options) as client:  # 5 s, 10 tries
            embeddings = cached(model, client=client, timeout=0.3)
            embeddings.warm_up()
            proxy.drip = 0.05
            assert ask(embeddings, "sync") == vector_of("text")
            assert ask(embeddings, "async", "other") == vector_of("other")
            proxy.drip = 0.0
            embeddings.close()
    else:

        async def with_client() -> RedisCachedEmbeddings:
            async with redis.asyncio.Redis(**options) as client:
                embeddings: RedisCachedEmbeddings = cached(model, async_client=client, timeout=0.3)
                await embeddings.awarm_up()
                proxy.drip = 0.05
                assert await embeddings.aembed_query("text") == vector_of("text")
                return embeddings

        embeddings = asyncio.run(with_client())
    proxy.drip = 0.0
    assert embeddings.stats().hits == 0
    assert embeddings.stats().errors >= 1
    assert embeddings.stats().redis_seconds < IN_TIME


def test_a_late_answer_is_nobody_elses(
    cached: Any, model: CountingModel, fragile_server: RedisServer, face: str
) -> None:
    embeddings = never_open(cached(model, fragile_server.url, timeout=0.2))
    other = cached(model, fragile_server.url)
    for text in "abc":
        other.embed_query(text)
    assert other.flush(HANG)
    ask(embeddings, face, "a")
    fragile_server.pause()
    ask(embeddings, face, "b")  # times out; its answer is still to come
    fragile_server.resume()
    set_timeout(embeddings, 20.0)
    assert ask(embeddings, face, "c") == vector_of("c")
    assert embeddings.stats().hits == 2


@contextlib.contextmanager
def deaf_server() -> Iterator[int]:
    """A port where connections wait for ever: the backlog is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            yield port


def test_connecting_counts_as_well(cached: Any, model: CountingModel, face: str) -> None:
    with deaf_server() as port:
        embeddings = cached(model, f"redis://127.0.0.1:{port}/0", timeout=0.2)
        assert ask(embeddings, face) == vector_of("text")
        assert embeddings.stats().redis_seconds < IN_TIME
        assert (embeddings.stats().skipped, embeddings.stats().misses) == (1, 0)


def test_a_name_that_never_resolves(
    cached: Any, model: CountingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    resolve = socket.getaddrinfo

    def hang(host: str, *args: Any, **options: Any) -> Any:
        if host == "redis.invalid":
            never.wait(HANG)
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    embeddings = cached(model, "redis://redis.invalid/0", timeout=0.2)
    try:
        assert embeddings.embed_query("text") == vector_of("text")
        assert not never.is_set()
        assert embeddings.stats().skipped == 1
    finally:
        never.set()


def test_out_of_memory(cached: Any, model: CountingModel, fragile_server: RedisServer) -> None:
    embeddings = cached(model, fragile_server.url)
    embeddings.embed_query("before")
    assert embeddings.flush(HANG)
    with fragile_server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        for number in range(5):
            assert embeddings.embed_query(str(number)) == vector_of(str(number))
            assert embeddings.flush(HANG)
        stats = embeddings.stats()
        assert (stats.writes, stats.writes_dropped) == (1, 5)
        assert stats.errors == 5
        assert embeddings.embed_query("before") == vector_of("before")  # reading still helps
        assert embeddings.stats().hits == 1
        client.config_set("maxmemory", "0")
    embeddings.embed_query("after")
    assert embeddings.flush(HANG)
    assert embeddings.stats().writes == 2


def test_a_read_only_replica(
    cached: Any, model: CountingModel, fragile_server: RedisServer, refusing_port: int
) -> None:
    embeddings = cached(model, fragile_server.url)
    embeddings.embed_query("before")
    assert embeddings.flush(HANG)
    with fragile_server.client() as client:
        client.config_set("replica-serve-stale-data", "yes")
        client.replicaof("127.0.0.1", refusing_port)
        embeddings.embed_query("text")
        assert embeddings.flush(HANG)
        assert embeddings.embed_query("before") == vector_of("before")
        stats = embeddings.stats()
        assert (stats.hits, stats.writes, stats.writes_dropped) == (1, 1, 1)
        client.replicaof("NO", "ONE")


@pytest.mark.parametrize("single_flight", [False, True])
def test_a_wrong_password(
    cached: Any, model: CountingModel, face: str, single_flight: bool, caplog: Any
) -> None:
    server = RedisServer("--requirepass", "right")
    try:
        for url in (server.url, server.url.replace("//", "//:wrong@")):
            embeddings = cached(model, url, single_flight=single_flight)
            for number in range(5):
                assert ask(embeddings, face, str(number)) == vector_of(str(number))
            assert embeddings.stats().errors >= 3
            assert embeddings.stats().skipped >= 1
        right = cached(model, server.url.replace("//", "//:right@"), single_flight=single_flight)
        ask(right, face)
        assert right.flush(HANG)
        ask(right, face)
        assert (right.stats().hits, right.stats().errors) == (1, 0)
    finally:
        server.close()
    assert "wrong" not in caplog.text


@pytest.mark.parametrize("single_flight", [False, True])
@pytest.mark.parametrize(
    "harm",
    [
        lambda client, key: client.set(key, b"garbage"),
        lambda client, key: client.set(key, b""),
        lambda client, key: client.set(key, client.get(key)[:-1]),
        lambda client, key: client.set(key, b"[0.1, 0.2]"),
        lambda client, key: (client.delete(key), client.lpush(key, "x")),
        lambda client, key: client.setrange(key, 20, b"\0\1"),
    ],
    ids=["garbage", "empty", "truncated", "json", "list", "damaged"],
)
def test_what_does_not_check_is_a_miss_and_overwritten(
    cached: Any,
    model: CountingModel,
    server: RedisServer,
    face: str,
    harm: Any,
    single_flight: bool,
) -> None:
    embeddings = cached(model, single_flight=single_flight)
    ask(embeddings, face)
    assert embeddings.flush(HANG)
    with server.client() as client:
        harm(client, key(embeddings, "text"))
        assert ask(embeddings, face) == vector_of("text")
        assert embeddings.flush(HANG)
        stats = embeddings.stats()
        assert (stats.corrupt, stats.misses, stats.hits, stats.errors) == (1, 2, 0, 0)
        assert ask(embeddings, face) == vector_of("text")
        assert embeddings.stats().hits == 1


def test_what_does_not_check_is_a_miss_in_a_batch(
    cached: Any, model: CountingModel, server: RedisServer, face: str
) -> None:
    embeddings = cached(model)
    ask_many(embeddings, face, list("abc"))
    assert embeddings.flush(HANG)
    with server.client() as client:
        client.set(key(embeddings, "b", "document"), b"garbage")
        client.delete(key(embeddings, "c", "document"))
        client.lpush(key(embeddings, "c", "document"), "x")
    assert ask_many(embeddings, face, list("abc")) == [vector_of(t, "document") for t in "abc"]
    assert embeddings.flush(HANG)
    assert ask_many(embeddings, face, list("abc")) == [vector_of(t, "document") for t in "abc"]
    assert (embeddings.stats().corrupt, embeddings.stats().hits) == (2, 4)


def test_a_value_of_another_dimension_is_a_miss(cached: Any, model: CountingModel) -> None:
    before = cached(CountingModel(4))
    before.embed_query("text")
    assert before.flush(HANG)
    embeddings = cached(model)
    embeddings.embed_query("other")  # from here on the length of the model's vectors is known
    assert embeddings.embed_query("text") == vector_of("text")
    assert embeddings.flush(HANG)
    assert embeddings.stats().corrupt == 1
    assert embeddings.embed_query("text") == vector_of("text")
    assert embeddings.stats().hits == 1


def test_a_ready_made_client_with_patience_of_its_own(
    cached: Any, model: CountingModel, fragile_server: RedisServer, face: str
) -> None:
    with fragile_server.client() as client:  # 5 s a try, 10 tries
        embeddings = cached(model, client=client, timeout=0.2)
        ask(embeddings, face, "before")
        assert embeddings.flush(HANG)
        fragile_server.pause()
        for number in range(6):
            assert ask(embeddings, face, str(number)) == vector_of(str(number))
        assert embeddings.stats().redis_seconds < IN_TIME
        assert embeddings.stats().skipped >= 1
        fragile_server.resume()
        embeddings.close()


def test_any_exception_of_a_client_is_survived(
    cached: Any, model: CountingModel, face: str
) -> None:
    class Broken(redis.Redis):
        def execute_command(self, *args: Any, **options: Any) -> Any:
            raise LookupError("what a client should never raise")

        def pipeline(self, *args: Any, **options: Any) -> Any:
            raise LookupError("what a client should never raise")

    embeddings = cached(model, client=Broken())
    assert ask(embeddings, face) == vector_of("text")
    assert ask_many(embeddings, face, ["a"]) == [vector_of("a", "document")]
    assert embeddings.stats().errors >= 2
    embeddings.close()


def test_another_number_of_replies_than_of_commands_is_an_error(
    cached: Any, model: CountingModel, fragile_server: RedisServer, face: str
) -> None:
    class Short(redis.Redis):
        def pipeline(self, *args: Any, **options: Any) -> Any:
            pipeline = super().pipeline(*args, **options)
            pipeline.execute = lambda **more: [None]  # type: ignore[method-assign]
            return pipeline

    with Short(port=fragile_server.port) as client:
        embeddings = cached(model, client=client)
        assert ask_many(embeddings, face, ["a", "b"]) == [vector_of(t, "document") for t in "ab"]
        assert (embeddings.stats().misses, embeddings.stats().corrupt) == (2, 0)
        assert embeddings.stats().errors >= 1
        embeddings.close()


async def test_more_coroutines_than_slots_all_get_their_vector(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    embeddings = cached(model)
    await embeddings.aembed_query("text")
    assert await asyncio.to_thread(embeddings.flush, HANG)
    vectors = await asyncio.gather(*(embeddings.aembed_query("text") for _ in range(300)))
    assert vectors == [vector_of("text")] * 300
    assert embeddings.stats().errors == 0
    assert server.connections() < 100
    await embeddings.aclose()


def test_the_breaker_lets_one_probe_through_after_each_pause() -> None:
    now = [0.0]
    breaker = CircuitBreaker(failures=3, pause=1.0, clock=lambda: now[0])
    assert [breaker.failed(), breaker.failed()] == [False, False]
    assert not breaker.succeeded()  # in a row: a success between starts the count anew
    assert [breaker.failed(), breaker.failed(), breaker.closed] == [False, False, True]
    assert breaker.failed()
    assert not breaker.closed
    assert not breaker.allows()
    now[0] = 1.0
    assert [breaker.allows(), breaker.allows()] == [True, False]  # one probe
    now[0] = 2.0
    assert [breaker.allows(), breaker.allows()] == [True, False]  # the first never reported
    assert not breaker.failed()
    assert not breaker.allows()
    now[0] = 3.0
    assert breaker.allows()
    assert breaker.succeeded()
    assert breaker.allows()


class NonsenseServer:
    """Answers every command with the same bytes; a lookup of one key with "nothing" if asked to."""

    def __init__(self, answer: bytes, *, get_is_nil: bool) -> None:
        self._answer = answer
        self._get_is_nil = get_is_nil
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                arguments = []
                for _ in range(int(line[1:])):
                    size = int(lines.readline()[1:])
                    arguments.append(lines.read(size + 2)[:-2])
                if arguments[0] == b"CLIENT":
                    connection.sendall(b"+OK\r\n")
                elif arguments[0] == b"GET" and self._get_is_nil:
                    connection.sendall(b"$-1\r\n")
                else:
                    connection.sendall(self._answer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(HANG)
            assert not thread.is_alive()


@pytest.mark.parametrize("get_is_nil", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        b":5\r\n",
        b"+OK\r\n",
        b"$-1\r\n",
        b"*0\r\n",
        b"*1\r\n*1\r\n:1\r\n",
        b"*3\r\n$6\r\nwaiter\r\n$-1\r\n:-2\r\n",
        b"*9\r\n" + 9 * b"$-1\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-NOAUTH Authentication required.\r\n",
        b"-MOVED 1 127.0.0.1:1\r\n",
        b"-MASTERDOWN Link with MASTER is down\r\n",
        b"-\r\n",
        b"$99999999999\r\nabc",
        b"what is this\r\n",
    ],
)
def test_answers_that_make_no_sense_are_misses(
    cached: Any, model: CountingModel, face: str, answer: bytes, get_is_nil: bool
) -> None:
    nonsense = NonsenseServer(answer, get_is_nil=get_is_nil)
    url = f"redis://127.0.0.1:{nonsense.port}/0"
    older = [
        CacheBackedEmbeddingsCache(roles=["query", "document"]),
        RedisVLEmbeddingsCache(roles=["query", "document"], model_name="m"),
    ]
    for options in ({}, {"single_flight": True}, {"read_through": older}):
        embeddings = never_open(cached(model, url, timeout=0.2, **options))
        assert ask(embeddings, face) == vector_of("text")
        assert ask_many(embeddings, face, ["a", "b"]) == [vector_of(t, "document") for t in "ab"]
        stats = embeddings.stats()
        assert stats.hits + stats.misses + stats.skipped == 3
        embeddings.close()
    nonsense.close()


def test_no_more_coroutines_than_the_urls_max_connections(
    cached: Any, model: CountingModel, server: RedisServer
) -> None:
    embeddings = cached(model, f"{server.url}?max_connections=2")

    async def main() -> None:
        await asyncio.gather(*(embeddings.aembed_query("text") for _ in range(50)))
        await embeddings.aclose()

    asyncio.run(main())
    assert (embeddings.stats().errors, embeddings.stats().skipped) == (0, 0)


def test_a_client_without_a_connection_to_spare_says_nothing_about_redis(
    cached: Any, model: CountingModel, face: str
) -> None:
    class Exhausted(redis.Redis):
        def execute_command(self, *args: Any, **options: Any) -> Any:
            raise redis.exceptions.MaxConnectionsError

    embeddings = cached(model, client=Exhausted())
    for number in range(5):
        assert ask(embeddings, face, str(number)) == vector_of(str(number))
    assert embeddings.stats().skipped == 5
    embeddings.close()
