"""`voice_embeddings`: connections outlive a pause, waits are bounded, the extra is optional."""

import asyncio
import email.utils
import gc
import os
import subprocess
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from examples.local_openai import Fault, LocalOpenAI
from prefetch_embeddings.openai import _retry_after, voice_embeddings
from tests.helpers import Call
from tests.openai_client import core, http

ROOT = Path(__file__).parents[2]
DIMENSIONS = 1536


@pytest.fixture(params=["plain", "tls"])
def server(request: pytest.FixtureRequest) -> Iterator[LocalOpenAI]:
    with LocalOpenAI(secure=request.param == "tls") as endpoint:
        yield endpoint


@pytest.fixture
def plain() -> Iterator[LocalOpenAI]:
    with LocalOpenAI() as endpoint:
        yield endpoint


class Clock:
    """The connection pools' clock, which stands still until it is told to jump."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(f"{core}._sync.http11.time", clock)
    monkeypatch.setattr(f"{core}._async.http11.time", clock)
    return clock


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own pauses before retries, cut short."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def arguments(server: LocalOpenAI) -> dict[str, Any]:
    return {
        "base_url": server.base_url,
        "api_key": "none-needed",
        "check_embedding_ctx_length": False,
    }


def with_defaults(server: LocalOpenAI) -> OpenAIEmbeddings:
    """The model as it is without the settings, except that it trusts the endpoint."""
    verify = server.client_context() if server.base_url.startswith("https") else True
    return OpenAIEmbeddings(
        http_client=openai.DefaultHttpxClient(verify=verify),
        http_async_client=openai.DefaultAsyncHttpxClient(verify=verify),
        **arguments(server),
    )


def with_settings(server: LocalOpenAI, **options: Any) -> OpenAIEmbeddings:
    context = server.client_context() if server.base_url.startswith("https") else None
    return voice_embeddings(ssl_context=context, **arguments(server), **options)


class Asking:
    """Queries to a model, all sync or all async."""

    def __init__(self, model: OpenAIEmbeddings, kind: str) -> None:
        self._model, self._kind = model, kind

    async def ask(self, text: str) -> list[float]:
        if self._kind == "async":
            return await self._model.aembed_query(text)
        return await asyncio.to_thread(self._model.embed_query, text)


@pytest.fixture(params=["sync", "async"])
def asking(request: pytest.FixtureRequest) -> Callable[[OpenAIEmbeddings], Any]:
    """Makes queries of either kind, and closes the connections after them."""

    @asynccontextmanager
    async def make(model: OpenAIEmbeddings) -> AsyncIterator[Asking]:
        assert model.http_client is not None
        assert model.http_async_client is not None
        try:
            yield Asking(model, request.param)
        finally:
            model.http_client.close()
            await model.http_async_client.aclose()

    return make


Make = Callable[[OpenAIEmbeddings], Any]


# --- Keep-alive ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "idle", "connections"),
    [
        (with_defaults, 4.0, 1),
        (with_defaults, 60.0, 2),
        (with_settings, 60.0, 1),
        (with_settings, 170.0, 1),
        (with_settings, 190.0, 2),
        (lambda server: with_settings(server, keep_alive=10.0), 60.0, 2),
        (lambda server: with_settings(server, keep_alive=600.0), 590.0, 1),
    ],
    ids=["default-4", "default-60", "voice-60", "voice-170", "voice-190", "10-60", "600-590"],
)
async def test_a_connection_is_kept_for_minutes(
    server: LocalOpenAI,
    asking: Make,
    clock: Clock,
    make: Callable[[LocalOpenAI], OpenAIEmbeddings],
    idle: float,
    connections: int,
) -> None:
    async with asking(make(server)) as model:
        await model.ask("before the pause")
        clock.now += idle
        assert len(await model.ask("after the pause")) == DIMENSIONS
    assert server.stats().connections == connections


async def test_a_connection_closed_by_the_server_is_replaced_before_it_is_used(
    server: LocalOpenAI, asking: Make
) -> None:
    async with asking(with_settings(server, max_retries=0)) as model:
        for turn in range(3):
            server.fail(Fault.HANG)
            asked = asyncio.create_task(model.ask(f"turn {turn}"))
            await asyncio.to_thread(server.wait_until, "hanging", at_least=1)
            server.set_connections(idle_close=0.0)  # of this connection, once it has answered
            server.release()
            assert len(await asked) == DIMENSIONS
            await asyncio.to_thread(server.wait_until, "connections_open", at_most=0)
            server.set_connections(idle_close=None)
    assert server.stats().connections == 3
    assert server.stats().requests == 3, "no request was lost on a dead connection"


@pytest.mark.usefixtures("impatient")
async def test_a_connection_lost_under_a_query_costs_a_retry_and_no_error(
    server: LocalOpenAI, asking: Make
) -> None:
    async with asking(with_settings(server)) as model:
        await model.ask("all is well")
        server.fail(Fault.DISCONNECT)
        assert len(await model.ask("the connection goes away")) == DIMENSIONS
    assert server.times_asked("the connection goes away") == 2
    assert server.stats().connections == 2


# --- Bounds ----------------------------------------------------------------------------------


def test_the_bounds_are_seconds() -> None:
    model = voice_embeddings(api_key="none-needed")
    assert model.request_timeout == openai.Timeout(5.0, connect=2.0)
    assert model.max_retries == 1
    assert model.check_embedding_ctx_length, "long documents are split, unless told otherwise"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hanging_server_is_given_up(plain: LocalOpenAI, kind: str) -> None:
    plain.fail(Fault.HANG, times=None)
    model = with_settings(plain, read_timeout=0.2)

    async def ask() -> None:
        try:
            await model.aembed_query("anybody there")
        finally:
            assert model.http_async_client is not None
            await model.http_async_client.aclose()

    call = Call(model.embed_query, "anybody there") if kind == "sync" else Call(asyncio.run, ask())
    assert isinstance(call.error(), openai.APITimeoutError)
    assert plain.wait_until("connections", at_least=2).connections == 2, "one retry"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_handshake_that_never_ends_is_given_up(kind: str) -> None:
    with LocalOpenAI(secure=True, handshake_delay=3600.0) as server:
        model = with_settings(server, connect_timeout=0.05, read_timeout=3600.0, max_retries=0)
        call = (
            Call(model.embed_query, "anybody there")
            if kind == "sync"
            else Call(asyncio.run, model.aembed_query("anybody there"))
        )
        assert isinstance(call.error(), openai.APITimeoutError)


@pytest.mark.parametrize(
    ("fault", "error"),
    [(Fault.RATE_LIMIT, openai.RateLimitError), (Fault.SERVER_ERROR, openai.InternalServerError)],
)
@pytest.mark.parametrize(("options", "tries"), [({}, 2), ({"max_retries": 3}, 4)])
async def test_retries_are_bounded(
    plain: LocalOpenAI,
    asking: Make,
    fault: Fault,
    error: type[Exception],
    options: dict[str, int],
    tries: int,
) -> None:
    plain.fail(fault, times=None, retry_after=0.001)
    async with asking(with_settings(plain, **options)) as model:
        with pytest.raises(error):
            await model.ask("again and again")
    assert plain.times_asked("again and again") == tries


@pytest.mark.parametrize(
    ("fault", "error"),
    [(Fault.RATE_LIMIT, openai.RateLimitError), (Fault.SERVER_ERROR, openai.InternalServerError)],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_server_that_asks_for_a_long_pause_is_not_waited_for(
    plain: LocalOpenAI, kind: str, fault: Fault, error: type[Exception]
) -> None:
    plain.fail(fault, times=None, retry_after=100.0)
    model = with_settings(plain)

    async def ask() -> None:
        assert model.http_async_client is not None
        try:
            await model.aembed_query("now or never")
        finally:
            await model.http_async_client.aclose()

    call = Call(model.embed_query, "now or never") if kind == "sync" else Call(asyncio.run, ask())
    assert isinstance(call.error(), error)
    assert plain.times_asked("now or never") == 1
    assert model.http_client is not None
    model.http_client.close()


async def test_the_longest_pause_is_an_option(plain: LocalOpenAI, asking: Make) -> None:
    plain.fail(Fault.RATE_LIMIT, times=2, retry_after=0.02)
    async with asking(with_settings(plain, max_retry_after=0.01)) as model:
        with pytest.raises(openai.RateLimitError):
            await model.ask("too long")
    async with asking(with_settings(plain, max_retry_after=0.03)) as model:
        assert len(await model.ask("worth waiting for")) == DIMENSIONS


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0.0),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "3", "retry-after-ms": "soon"}, 3.0),
        ({"retry-after": "soon"}, 0.0),
        ({"retry-after": "Fri, 31 Dec 9999999999999 23:59:59 GMT"}, 0.0),
    ],
)
def test_the_pause_asked_for_is_read_as_the_client_reads_it(
    headers: dict[str, str], seconds: float
) -> None:
    assert _retry_after(http.Response(429, headers=headers)) == seconds


def test_the_pause_asked_for_may_be_a_date() -> None:
    headers = {"retry-after": email.utils.formatdate(time.time() + 3600, usegmt=True)}
    assert 3000 < _retry_after(http.Response(503, headers=headers)) <= 3600


# --- Event loops and processes ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # what closed loops leave open
def test_event_loops_may_come_and_go(server: LocalOpenAI) -> None:
    model = with_settings(server, max_retries=0)
    for turn in range(3):
        assert len(asyncio.run(model.aembed_query(f"turn {turn}"))) == DIMENSIONS
    assert server.stats().requests == server.stats().connections == 3
    gc.collect()
    server.wait_until("connections_open", at_most=1)  # nothing holds what closed loops left
    del model
    gc.collect()


def test_event_loops_share_no_connection(server: LocalOpenAI) -> None:
    model = with_settings(server, max_retries=0)
    assert model.http_async_client is not None
    with asyncio.Runner() as one, asyncio.Runner() as other:
        for turn in range(3):
            for runner in (one, other):
                vector = runner.run(model.aembed_query(f"turn {turn}"))
                assert len(vector) == DIMENSIONS
        assert server.stats().connections == 2, "each loop keeps its own"
        for runner in (one, other):
            runner.run(model.http_async_client.aclose())
        server.wait_until("connections_open", at_most=0)


async def test_a_closed_client_says_so(plain: LocalOpenAI, asking: Make) -> None:
    embeddings = with_settings(plain, max_retries=0)
    async with asking(embeddings) as model:
        await model.ask("open")
    with pytest.raises((RuntimeError, openai.APIConnectionError)) as raised:
        await model.ask("closed")
    # Clients before version 2 say that there is no connection, and why.
    said = raised.value if isinstance(raised.value, RuntimeError) else raised.value.__cause__
    assert "closed" in str(said)
    assert embeddings.http_client is not None
    assert embeddings.http_async_client is not None
    assert embeddings.http_client.is_closed
    assert embeddings.http_async_client.is_closed
    assert plain.wait_until("connections_open", at_most=0).requests == 1


def test_a_model_that_is_dropped_leaves_no_connection_open(server: LocalOpenAI) -> None:
    gc.collect()  # what others dropped is no business of this test
    model = with_settings(server)
    model.embed_query("one question only")
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        del model
        gc.collect()
    assert not complaints, "of sockets that nobody closed"
    server.wait_until("connections_open", at_most=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_shares_no_connection(plain: LocalOpenAI) -> None:
    script = f"""
import os
from prefetch_embeddings.openai import voice_embeddings

model = voice_embeddings(**{arguments(plain)!r}, max_retries=0)
model.embed_query("before the fork")
child = os.fork()
model.embed_query(f"after the fork in {{'parent' if child else 'child'}}")
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    run_python(script)
    assert plain.times_asked("after the fork in parent") == 1
    assert plain.times_asked("after the fork in child") == 1
    assert plain.stats().connections == 2, "the parent's, kept, and the child's own"


# --- Options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timeout", "request_timeout", "http_client", "http_async_client"])
def test_what_it_makes_itself_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: 1.0}
    with pytest.raises(TypeError, match=name):
        voice_embeddings(api_key="none-needed", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_alive": 0.0},
        {"connect_timeout": -1.0},
        {"read_timeout": float("nan")},
        {"max_retries": -1},
        {"max_retry_after": -0.1},
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        voice_embeddings(api_key="none-needed", **options)


def test_everything_else_goes_to_the_model() -> None:
    model = voice_embeddings(api_key="none-needed", model="text-embedding-3-small", dimensions=256)
    assert type(model) is OpenAIEmbeddings
    assert (model.model, model.dimensions) == ("text-embedding-3-small", 256)


@pytest.mark.parametrize("variable", ["OPENAI_PROXY", "ALL_PROXY", None])
async def test_proxies_are_used(
    plain: LocalOpenAI, asking: Make, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    nobody = "http://127.0.0.1:9"
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    options = {} if variable else {"openai_proxy": nobody}
    if variable:
        monkeypatch.setenv(variable, nobody)
    async with asking(with_settings(plain, max_retries=0, **options)) as model:
        with pytest.raises(openai.APIConnectionError):
            await model.ask("through the proxy")
    assert plain.stats().connections == 0


# --- The extra -------------------------------------------------------------------------------


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_package_does_without_the_extra() -> None:
    run_python("""
import sys
import prefetch_embeddings
assert not {"openai", "langchain_openai", "prefetch_embeddings.openai"} & set(sys.modules)
""")


@pytest.mark.parametrize("missing", ["langchain_openai", "openai"])
def test_a_missing_extra_is_named(missing: str) -> None:
    run_python(f"""
import sys
sys.modules[{missing!r}] = None
try:
    import prefetch_embeddings.openai
except ImportError as error:
    assert "prefetch-embeddings[openai]" in str(error), error
else:
    raise AssertionError("it was imported")
""")
