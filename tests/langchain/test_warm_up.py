"""Warming up: one call that puts everything in place for the first query and leaves no trace."""

import time
from collections.abc import Callable, Iterator

import openai
import pytest
import tiktoken
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr

from examples.local_openai import Fault, LocalOpenAI
from prefetch_embeddings import PrefetchEvent, PrefetchingEmbeddings
from prefetch_embeddings.openai import voice_embeddings
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings

Wrap = Callable[..., PrefetchingEmbeddings]
HANDSHAKE = 0.05


async def warm_up(embeddings: PrefetchingEmbeddings, kind: str) -> float:
    return await embeddings.awarm_up() if kind == "async" else embeddings.warm_up()


async def query(embeddings: PrefetchingEmbeddings, kind: str, text: str) -> list[float]:
    if kind == "async":
        return await embeddings.aembed_query(text)
    return embeddings.embed_query(text)


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server() -> Iterator[LocalOpenAI]:
    with LocalOpenAI(secure=True, handshake_delay=HANDSHAKE) as endpoint:
        yield endpoint


class Client:
    """The real client in the wrapper, with its connections closed at the end."""

    def __init__(self, server: LocalOpenAI, wrap: Wrap) -> None:
        self._model = voice_embeddings(
            base_url=server.base_url,
            api_key="none-needed",
            check_embedding_ctx_length=False,
            ssl_context=server.client_context(),
            max_retries=0,
        )
        self._wrap = wrap

    async def __aenter__(self) -> PrefetchingEmbeddings:
        return self._wrap(self._model)

    async def __aexit__(self, *_: object) -> None:
        assert self._model.http_client is not None
        assert self._model.http_async_client is not None
        self._model.http_client.close()
        await self._model.http_async_client.aclose()


async def test_nothing_of_it_stays(
    manual: Callable[..., ManualPrefetchingEmbeddings], kind: str
) -> None:
    model = ScriptedEmbeddings()
    events: list[PrefetchEvent] = []
    keys: list[str] = []

    def match(text: str) -> str:
        keys.append(text)
        return text

    embeddings = manual(model, on_event=events.append, match=match)
    embeddings.prefetch("how late is it")
    before = embeddings.stats()
    events.clear()
    keys.clear()
    await warm_up(embeddings, kind)
    [[text]] = [texts for _, texts in model.calls]
    assert text != "how late is it", "what was prefetched is left to its queue"
    assert embeddings.stats() == before
    assert not events
    assert not keys
    assert not embeddings.is_ready(text)
    assert not embeddings.forget(text), "neither kept nor under way"
    embeddings.executor.run_next()
    assert embeddings.is_ready("how late is it")


async def test_it_says_nothing_about_how_long_queries_take(
    manual: Callable[..., ManualPrefetchingEmbeddings], kind: str
) -> None:
    embeddings = manual(ScriptedEmbeddings())
    expected = embeddings.expected_wait("not asked yet")
    await warm_up(embeddings, kind)
    assert embeddings.expected_wait("not asked yet") == expected


async def test_it_calls_the_model_each_time(wrap: Wrap, kind: str) -> None:
    model = ScriptedEmbeddings()
    embeddings = wrap(model)
    for _ in range(2):
        await warm_up(embeddings, kind)
    method = "aembed_query" if kind == "async" else "embed_query"
    assert [name for name, _ in model.calls] == [method] * 2


async def test_the_connection_is_open_when_the_first_query_comes(
    server: LocalOpenAI, wrap: Wrap, kind: str
) -> None:
    async with Client(server, wrap) as embeddings:
        await warm_up(embeddings, kind)
        assert server.stats().connections == 1
        server.set_connections(handshake_delay=3600.0)  # who opens another one fails
        assert await query(embeddings, kind, "the first question")
        assert server.stats().connections == 1
        stats = embeddings.stats()
    assert (stats.query_missed, stats.query_ready) == (1, 0)
    assert server.times_asked("the first question") == 1
    assert server.stats().requests == 2


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that tiktoken has asked for, in place of their download."""
    loaded: list[str] = []

    def load(url: str, **_: str) -> dict[bytes, int]:
        loaded.append(url)
        return {bytes([byte]): byte for byte in range(256)}

    monkeypatch.setattr("tiktoken_ext.openai_public.load_tiktoken_bpe", load)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # as in a process just started
    return loaded


async def test_the_tokenizer_is_loaded_when_the_first_query_comes(
    wrap: Wrap, kind: str, tokenizer: list[str]
) -> None:
    http = openai.DefaultHttpxClient(), openai.DefaultAsyncHttpxClient()
    with LocalOpenAI() as server:
        model = OpenAIEmbeddings(
            base_url=server.base_url,
            api_key=SecretStr("none-needed"),
            http_client=http[0],
            http_async_client=http[1],
        )
        assert model.check_embedding_ctx_length
        embeddings = wrap(model)
        assert not tokenizer, "it is loaded without any warming up"
        await warm_up(embeddings, kind)
        [url] = tokenizer
        assert url.endswith("/cl100k_base.tiktoken")
        tokenizer.clear()
        assert await query(embeddings, kind, "the first question")
        assert not tokenizer, "the first query had to load it"
        tokens = " ".join(map(str, b"the first question"))
        assert server.times_asked(tokens) == 1, "the query was not split into tokens"
        http[0].close()
        await http[1].aclose()


async def test_the_seconds_are_those_of_the_call(
    server: LocalOpenAI, wrap: Wrap, kind: str
) -> None:
    async with Client(server, wrap) as embeddings:
        began = time.monotonic()
        seconds = await warm_up(embeddings, kind)
        assert HANDSHAKE <= seconds <= time.monotonic() - began


async def test_an_error_of_the_model_is_raised(server: LocalOpenAI, wrap: Wrap, kind: str) -> None:
    server.fail(Fault.SERVER_ERROR)
    async with Client(server, wrap) as embeddings:
        before = embeddings.stats()
        with pytest.raises(openai.InternalServerError):
            await warm_up(embeddings, kind)
        assert embeddings.stats() == before
        assert await warm_up(embeddings, kind) > 0
    assert server.stats().connections == 1


async def test_a_closed_wrapper_still_warms_up_its_model(wrap: Wrap, kind: str) -> None:
    model = ScriptedEmbeddings()
    embeddings = wrap(model)
    embeddings.close()
    assert await warm_up(embeddings, kind) >= 0
    assert len(model.calls) == 1


class Tier(ScriptedEmbeddings):
    """A tier that knows how to warm itself up."""

    warmed = 0

    def warm_up(self) -> float:
        self.warmed += 1
        return 0.0

    async def awarm_up(self) -> float:
        self.warmed += 1
        return 0.0


async def test_a_tier_in_between_warms_itself_up() -> None:
    tier = Tier()
    with PrefetchingEmbeddings(tier) as embeddings:
        embeddings.warm_up()
        await embeddings.awarm_up()
    assert tier.warmed == 2
    assert tier.calls == []
