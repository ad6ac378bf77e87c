"""The local stand-in for OpenAI's embeddings endpoint, driven through the real client."""

import asyncio
import http.client
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr

from examples.local_openai import Delays, Fault, LocalOpenAI, ServerStats

ROOT = Path(__file__).parents[2]
KEY = SecretStr("none-needed")


@pytest.fixture(params=["thread", "process"])
def server(request: pytest.FixtureRequest) -> Iterator[LocalOpenAI]:
    """An endpoint of either kind: what holds for one holds for the other."""
    with LocalOpenAI(process=request.param == "process") as endpoint:
        yield endpoint


@contextmanager
def client(server: LocalOpenAI, **options: Any) -> Iterator[OpenAIEmbeddings]:
    """The real client, with its sync connections closed at the end."""
    verify = server.client_context() if server.base_url.startswith("https") else True
    with openai.DefaultHttpxClient(verify=verify) as connections:
        yield OpenAIEmbeddings(
            base_url=server.base_url,
            api_key=KEY,
            check_embedding_ctx_length=False,
            http_client=connections,
            **{"max_retries": 0, **options},
        )


class AsyncClient:
    """The real client, with its async connections closed at the end."""

    def __init__(self, server: LocalOpenAI, **options: Any) -> None:
        self._connections = openai.DefaultAsyncHttpxClient()
        self._embeddings = OpenAIEmbeddings(
            base_url=server.base_url,
            api_key=KEY,
            check_embedding_ctx_length=False,
            http_async_client=self._connections,
            **{"max_retries": 0, **options},
        )

    async def __aenter__(self) -> OpenAIEmbeddings:
        return self._embeddings

    async def __aexit__(self, *_: object) -> None:
        await self._connections.aclose()


def post(
    server: LocalOpenAI, body: object, path: str = "/v1/embeddings", method: str = "POST"
) -> tuple[http.client.HTTPResponse, Any]:
    """One raw request on a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(server.base_url).netloc, timeout=30)
    try:
        connection.request(method, path, json.dumps(body), {"Connection": "close"})
        response = connection.getresponse()
        return response, json.loads(response.read())
    finally:
        connection.close()


def similarity(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


async def test_sync_async_base64_and_float_give_the_same_vector(server: LocalOpenAI) -> None:
    text = "is the shop open on saturday"
    with client(server) as embeddings:
        sync = embeddings.embed_query(text)
    async with AsyncClient(server) as embeddings:
        asynchronous = await embeddings.aembed_query(text)
    _, answer = post(server, {"model": "m", "input": text, "encoding_format": "float"})
    assert sync == asynchronous == answer["data"][0]["embedding"]
    assert len(sync) == 1536
    assert math.hypot(*sync) == pytest.approx(1.0, abs=1e-6)


def test_a_list_keeps_its_order(server: LocalOpenAI) -> None:
    texts = ["one", "two", "three", "two"]
    with client(server) as embeddings:
        together = embeddings.embed_documents(texts)
        apart = [embeddings.embed_query(text) for text in texts]
    assert together == apart
    assert server.stats().inputs == 8
    # Early versions of langchain-openai ask for each text by itself if they count no tokens.
    assert server.stats().requests in (5, 8)
    assert server.times_asked("two") == 4


def test_dimensions(server: LocalOpenAI) -> None:
    with client(server, dimensions=256) as embeddings:
        vector = embeddings.embed_query("a shorter vector")
    assert len(vector) == 256
    assert math.hypot(*vector) == pytest.approx(1.0, abs=1e-6)


def test_token_ids_are_accepted(server: LocalOpenAI) -> None:
    _, one = post(server, {"model": "m", "input": [9906, 1917]})
    _, several = post(server, {"model": "m", "input": [[9906, 1917], [1]]})
    assert len(several["data"]) == 2
    assert one["data"][0]["embedding"] == several["data"][0]["embedding"]


def test_vectors_compare_spellings(server: LocalOpenAI) -> None:
    with client(server) as embeddings:
        question = embeddings.embed_query("how do i restart my router")
        near, far = embeddings.embed_documents(
            ["First restart the router.", "The bill comes on the third of each month."]
        )
    assert similarity(question, near) > 0.4 > 0.1 > similarity(question, far)


def test_it_says_that_it_is_a_stand_in(server: LocalOpenAI) -> None:
    response, answer = post(server, {"model": "text-embedding-3-small", "input": "hello"})
    assert "stand-in" in str(response.getheader("Server"))
    assert answer["model"] == "local-stand-in-for-text-embedding-3-small"
    assert "stand-in" in str(LocalOpenAI.__doc__)


@pytest.mark.parametrize(
    "body",
    [
        {"input": ""},
        {"input": []},
        {"input": None},
        {"input": ["good", 7]},
        {"input": "x", "encoding_format": "hex"},
        {"input": "x", "dimensions": 0},
        ["no object"],
    ],
)
def test_what_it_cannot_read_is_a_400(body: object) -> None:
    with LocalOpenAI() as server:
        response, answer = post(server, body)
        assert response.status == 400
        assert answer["error"]["message"]
        assert server.stats().requests == 0


def test_unknown_paths_and_methods() -> None:
    with LocalOpenAI() as server:
        assert post(server, {}, path="/v1/chat/completions")[0].status == 404
        assert post(server, {}, method="PUT")[0].status == 405


def test_delays_depend_on_seed_and_text_alone() -> None:
    delays = Delays(p5=0.39, p95=1.16, seed=7)
    texts = [f"question {number}" for number in range(4000)]
    drawn = [delays.seconds_for(text) for text in texts]
    assert drawn == [delays.seconds_for(text) for text in texts]
    assert drawn[::-1] == [delays.seconds_for(text) for text in reversed(texts)]
    assert drawn != [Delays(p5=0.39, p95=1.16, seed=8).seconds_for(text) for text in texts]
    cuts = statistics.quantiles(drawn, n=20)
    assert cuts[0] == pytest.approx(0.39, rel=0.05)
    assert cuts[-1] == pytest.approx(1.16, rel=0.05)


def test_delays_can_be_scaled_constant_redrawn_or_none() -> None:
    delays = Delays(p5=0.39, p95=1.16)
    scaled = Delays(p5=0.39, p95=1.16, time_scale=0.1)
    assert scaled.seconds_for("x") == pytest.approx(delays.seconds_for("x") / 10)
    assert Delays.constant(0.2).seconds_for("x") == pytest.approx(0.2)
    assert Delays().seconds_for("x") == 0.0
    assert delays.seconds_for("x", asked_before=1) == delays.seconds_for("x")
    again = Delays(p5=0.39, p95=1.16, redraw=True)
    assert again.seconds_for("x") == delays.seconds_for("x")
    assert again.seconds_for("x", asked_before=1) != delays.seconds_for("x")
    with pytest.raises(ValueError, match="p5"):
        Delays(p5=1.0, p95=0.5)


def test_stragglers_come_on_top() -> None:
    plain = Delays(p5=0.39, p95=1.16)
    delays = Delays(p5=0.39, p95=1.16, stragglers=0.1, straggler_extra=(2.0, 6.0))
    texts = [f"question {number}" for number in range(4000)]
    extra = [delays.seconds_for(text) - plain.seconds_for(text) for text in texts]
    late = [seconds for seconds in extra if seconds > 0]
    assert len(late) / len(extra) == pytest.approx(0.1, abs=0.03)
    assert 2.0 <= min(late) <= max(late) <= 6.0


def test_the_delay_is_waited_and_can_be_changed(server: LocalOpenAI) -> None:
    with client(server) as embeddings:
        for seconds in (0.05, 0.15):
            server.set_delays(Delays.constant(seconds))
            began = time.perf_counter()
            embeddings.embed_documents(["several", "texts", "wait", "once"])
            assert time.perf_counter() - began >= seconds


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.RATE_LIMIT, openai.RateLimitError),
        (Fault.SERVER_ERROR, openai.InternalServerError),
        (Fault.DISCONNECT, openai.APIConnectionError),
    ],
)
async def test_faults(server: LocalOpenAI, fault: Fault, error: type[Exception]) -> None:
    server.fail(fault, times=2)
    with client(server) as embeddings, pytest.raises(error):
        embeddings.embed_query("sync")
    async with AsyncClient(server) as embeddings:
        with pytest.raises(error):
            await embeddings.aembed_query("async")
        assert len(await embeddings.aembed_query("async")) == 1536
    assert server.stats().faults == 2
    assert server.stats().requests == 3


def test_the_client_retries_when_told_to(server: LocalOpenAI) -> None:
    server.fail(Fault.RATE_LIMIT, times=2, retry_after=0.001)
    with client(server, max_retries=2) as embeddings:
        assert len(embeddings.embed_query("patient")) == 1536
    assert server.times_asked("patient") == 3


def test_faults_for_some_texts_until_healed(server: LocalOpenAI) -> None:
    server.fail(Fault.SERVER_ERROR, times=None, matching=r"\bbill\b")
    with client(server) as embeddings:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                embeddings.embed_documents(["fine", "my bill please"])
        assert embeddings.embed_query("billing")
        server.heal()
        assert embeddings.embed_query("my bill please")


def test_unknown_control_calls_are_refused(server: LocalOpenAI) -> None:
    with pytest.raises(ValueError, match="no such fault"):
        server.fail("no such fault")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="colour"):
        server.wait_until("colour", at_least=1)
    with pytest.raises(TimeoutError):
        server.wait_until("requests", at_least=1, timeout=0.01)


async def test_a_hundred_hanging_requests_are_released_together(server: LocalOpenAI) -> None:
    server.fail(Fault.HANG, times=None)
    async with AsyncClient(server) as embeddings:
        waiting = [
            asyncio.create_task(embeddings.aembed_query(f"question {number}"))
            for number in range(100)
        ]
        stats = await asyncio.to_thread(server.wait_until, "hanging", at_least=100)
        assert stats.in_flight == stats.peak_in_flight == stats.connections_open == 100
        assert not any(task.done() for task in waiting)
        server.release()
        vectors = await asyncio.gather(*waiting)
    assert len({tuple(vector) for vector in vectors}) == 100
    stats = server.wait_until("connections_open", at_most=0)
    assert (stats.in_flight, stats.hanging, stats.requests) == (0, 0, 100)


async def test_a_client_that_gives_up_is_let_go(server: LocalOpenAI) -> None:
    server.fail(Fault.HANG)
    async with AsyncClient(server) as embeddings:
        asking = asyncio.create_task(embeddings.aembed_query("never mind"))
        await asyncio.to_thread(server.wait_until, "hanging", at_least=1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        stats = await asyncio.to_thread(server.wait_until, "in_flight", at_most=0)
        assert stats.hanging == 0


def test_closing_drops_hanging_requests_at_once() -> None:
    outcome: list[BaseException] = []
    endpoint = LocalOpenAI()

    def ask() -> None:
        try:
            with client(endpoint) as embeddings:
                embeddings.embed_query("hello?")
        except openai.APIConnectionError as error:
            outcome.append(error)

    with endpoint:
        endpoint.fail(Fault.HANG)
        caller = threading.Thread(target=ask)
        caller.start()
        endpoint.wait_until("hanging", at_least=1)
    caller.join()
    assert len(outcome) == 1
    assert endpoint.stats().hanging == 1, "the last counts stay readable"
    endpoint.close()
    with pytest.raises(RuntimeError, match="not running"):
        _ = endpoint.base_url


def test_connections_are_kept_and_counted(server: LocalOpenAI) -> None:
    with client(server) as embeddings:
        for number in range(5):
            embeddings.embed_query(f"question {number}")
        assert server.stats().connections == 1
        assert server.stats().connections_open == 1
    server.wait_until("connections_open", at_most=0)
    server.reset_counts()
    assert server.stats() == ServerStats()


def test_idle_connections_are_closed_and_replaced(server: LocalOpenAI) -> None:
    server.set_connections(idle_close=0.05)
    with client(server) as embeddings:
        embeddings.embed_query("before the pause")
        server.wait_until("connections_open", at_most=0)
        embeddings.embed_query("after the pause")
    assert server.stats().connections == 2


@pytest.mark.parametrize("process", [False, True])
def test_tls_with_a_slow_handshake(*, process: bool) -> None:
    with (
        LocalOpenAI(secure=True, process=process, handshake_delay=0.1) as server,
        client(server) as embeddings,
    ):
        began = time.perf_counter()
        embeddings.embed_query("first")
        assert time.perf_counter() - began >= 0.1
        embeddings.embed_query("second")
        assert server.stats().connections == 1


def test_tls_idle_connections_are_closed_and_replaced() -> None:
    with LocalOpenAI(secure=True, idle_close=0.05) as server, client(server) as embeddings:
        embeddings.embed_query("before the pause")
        server.wait_until("connections_open", at_most=0)
        embeddings.embed_query("after the pause")
        assert server.stats().connections == 2


def test_tls_is_not_trusted_by_strangers() -> None:
    with LocalOpenAI(secure=True) as server:
        with openai.DefaultHttpxClient() as connections:
            stranger = OpenAIEmbeddings(
                base_url=server.base_url,
                api_key=KEY,
                check_embedding_ctx_length=False,
                max_retries=0,
                http_client=connections,
            )
            with pytest.raises(openai.APIConnectionError):
                stranger.embed_query("who are you")
        stats = server.wait_until("connections_open", at_most=0)
        assert (stats.connections, stats.requests) == (1, 0)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python; returns only when nobody holds its output any more, its children included."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


@pytest.mark.parametrize("process", [False, True])
def test_an_endpoint_left_open_does_not_outlive_the_program(*, process: bool) -> None:
    script = f"""
import os, threading, urllib.request
from examples.local_openai import Fault, LocalOpenAI

server = LocalOpenAI(process={process}).start()
server.fail(Fault.HANG)
request = urllib.request.Request(server.base_url + "/embeddings", b'{{"input": "x"}}')
threading.Thread(target=urllib.request.urlopen, args=(request,), daemon=True).start()
server.wait_until("hanging", at_least=1)
print("the end", flush=True)
{"os._exit(0)" if process else ""}
"""
    assert run_python("-c", script).stdout == "the end\n"


def test_the_command_line_leads_a_command_to_the_endpoint() -> None:
    command = "import os; print(os.environ['OPENAI_BASE_URL'], os.environ['OPENAI_API_KEY'])"
    done = run_python("-m", "examples.local_openai", "--", sys.executable, "-c", command)
    base_url, api_key = done.stdout.split()
    assert base_url.startswith("http://127.0.0.1:")
    assert api_key == "stand-in"
