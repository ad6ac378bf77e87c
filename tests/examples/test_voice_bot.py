"""The voice bot: prefetches in time, plays a filler where it is due, and can be interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from typing import Any

import chromadb
import pytest
from langchain_chroma import Chroma
from langchain_core.language_models import FakeListChatModel
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from examples.voice_bot.agent import Agent, KnowledgeBase
from examples.voice_bot.handler import StasisHandler
from examples.voice_bot.stand_ins import (
    FILLER,
    StandInChannel,
    StandInLLM,
    StandInTextToSpeech,
)
from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.speech import UtterancePrefetcher
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.helpers import auntil

QUESTION = "when do you open"
ANSWER = [b"We open at nine.", b"We close at seven"]
PASSAGE = "The shop opens at nine. It closes at seven."

Wrap = Callable[..., PrefetchingEmbeddings]
Manual = Callable[..., ManualPrefetchingEmbeddings]
MakeStore = Callable[[PrefetchingEmbeddings], VectorStore]


def in_memory(embeddings: PrefetchingEmbeddings) -> VectorStore:
    """A store that embeds on the event loop."""
    return InMemoryVectorStore(embeddings)


def in_chroma(embeddings: PrefetchingEmbeddings) -> VectorStore:
    """A store that embeds in a thread."""
    store = Chroma("voice-bot", embeddings, client=chromadb.EphemeralClient())
    store.reset_collection()
    return store


STORES = pytest.mark.parametrize("make_store", [in_memory, in_chroma])


def bot(embeddings: PrefetchingEmbeddings, make_store: MakeStore = in_memory) -> Agent:
    store = make_store(embeddings)
    store.add_texts([PASSAGE])
    llm = FakeListChatModel(responses=["We open at nine. We close at seven"])
    return Agent({"shop": KnowledgeBase(store, embeddings)}, llm)


class Call(StasisHandler):
    """A call whose parts take no time."""

    def __init__(self, agent: Agent, speech: UtterancePrefetcher | None = None, **options: Any):
        self.channel = StandInChannel(filler_seconds=0.0)
        super().__init__(
            agent,
            self.channel,
            StandInTextToSpeech(0.0),
            kb="shop",
            filler=FILLER,
            speech=speech,
            **{"pause": 0.0, "filler_from": 0.0, **options},
        )

    @property
    def played(self) -> list[bytes]:
        return [audio for audio, _, _ in self.channel.played]


async def ask(call: StasisHandler, question: str) -> None:
    call.on_final_transcript(question)
    await call.turn_over()


# The agent.


async def test_knowledge_bases_of_one_model_share_its_flights_and_others_do_not() -> None:
    small, large = ScriptedEmbeddings(4), ScriptedEmbeddings(8)
    with PrefetchingEmbeddings(small) as by_small, PrefetchingEmbeddings(large) as by_large:
        knowledge_bases = {
            "faults": KnowledgeBase(InMemoryVectorStore(by_small), by_small),
            "contracts": KnowledgeBase(InMemoryVectorStore(by_small), by_small),
            "russian": KnowledgeBase(InMemoryVectorStore(by_large), by_large),
        }
        for kb in knowledge_bases.values():
            kb.store.add_texts([PASSAGE])
        agent = Agent(knowledge_bases, FakeListChatModel(responses=["At nine."]))
        for kb_name in knowledge_bases:
            agent.ensure_prefetched_embedding(QUESTION, kb_name)
        assert await agent.wait_for_prefetch(QUESTION)
        for kb_name in knowledge_bases:
            assert [s async for s in agent.get_response_generator(QUESTION, kb_name)]
        assert small.calls_for(QUESTION) == large.calls_for(QUESTION) == 1
        assert by_small.stats().query_missed == by_large.stats().query_missed == 0
    assert_no_leaks(by_small)
    assert_no_leaks(by_large)


async def test_an_agent_that_does_not_prefetch_answers_alike(model: ScriptedEmbeddings) -> None:
    store = InMemoryVectorStore(model)
    store.add_texts([PASSAGE])
    agent = Agent({"shop": KnowledgeBase(store, None)}, StandInLLM(seconds=0.0))
    assert agent.prefetch_query_embedding(QUESTION, "shop") is None
    assert agent.listen("shop") is None
    assert not await agent.wait_for_prefetch(QUESTION)
    assert agent.expected_wait(QUESTION, "shop") == math.inf
    assert not agent.is_ready(QUESTION, "shop")
    call = Call(agent)
    await ask(call, QUESTION)
    assert call.played == [FILLER, b"The shop opens at nine"]


async def test_a_wait_for_a_prefetch_may_be_limited(model: ScriptedEmbeddings, wrap: Wrap) -> None:
    agent = bot(wrap(model))
    gate = model.hold(QUESTION)
    agent.ensure_prefetched_embedding(QUESTION, "shop")
    await gate.await_until_entered()
    assert not await agent.wait_for_prefetch(QUESTION, timeout=0.001)
    gate.open()
    assert await agent.wait_for_prefetch(QUESTION)


def test_a_prefetch_that_is_dropped_is_logged_without_its_text(
    model: ScriptedEmbeddings, wrap: Wrap, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = wrap(model)
    agent = bot(embeddings)
    embeddings.close()
    agent.ensure_prefetched_embedding(QUESTION, "shop")
    assert "not prefetched" in caplog.text
    assert QUESTION not in caplog.text


# A turn.


@STORES
async def test_a_turn_prefetches_what_the_chain_then_asks_for(
    model: ScriptedEmbeddings,
    wrap: Wrap,
    make_store: MakeStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    embeddings = wrap(model)
    call = Call(bot(embeddings, make_store))
    await ask(call, "  when do  you open ")
    assert call.played == [FILLER, *ANSWER]
    assert model.calls_for(QUESTION) == 1
    assert embeddings.stats().prefetch_started == 1
    assert embeddings.stats().query_missed == 0
    assert caplog.text.count("FIRST AUDIO PLAYED after") == 1
    assert QUESTION not in caplog.text


async def test_the_prefetch_comes_before_the_pause(model: ScriptedEmbeddings, wrap: Wrap) -> None:
    call = Call(bot(wrap(model)), pause=3600.0)
    gate = model.hold(QUESTION)
    call.on_final_transcript(QUESTION)
    await gate.await_until_entered()
    assert call.played == []
    gate.open()
    await call.on_hang_up()


async def test_silence_is_no_turn(model: ScriptedEmbeddings, manual: Manual) -> None:
    embeddings = manual(model)
    agent = bot(embeddings)
    call = Call(agent, agent.listen("shop"))
    call.on_partial_transcript("this is not a question")
    await ask(call, "  ")
    embeddings.time.advance(10.0)
    assert call.played == []
    assert embeddings.stats().prefetch_started == 0
    assert embeddings.stats().prefetch_dropped == 0


async def test_the_filler_is_played_only_for_a_wait_that_warrants_it(
    model: ScriptedEmbeddings, wrap: Wrap
) -> None:
    embeddings = wrap(model)
    agent = bot(embeddings)
    embeddings.prefetch(QUESTION)
    assert await agent.wait_for_prefetch(QUESTION)
    ready = Call(agent, filler_from=0.1)
    await ask(ready, QUESTION)
    assert ready.played == ANSWER, "nothing to wait for"

    class Patient(Agent):
        def expected_wait(self, text: str, kb: str) -> float:
            assert (text, kb) == (QUESTION, "shop")
            return 0.5

    store = InMemoryVectorStore(embeddings)
    store.add_texts([PASSAGE])
    llm = FakeListChatModel(responses=["We open at nine. We close at seven"])
    slow = Call(Patient({"shop": KnowledgeBase(store, embeddings)}, llm), filler_from=0.5)
    await ask(slow, QUESTION)
    assert slow.played == [FILLER, *ANSWER]


async def test_a_turn_that_fails_ends_and_is_logged(
    model: ScriptedEmbeddings, wrap: Wrap, caplog: pytest.LogCaptureFixture
) -> None:
    call = Call(bot(wrap(model, attempts=1)))
    model.fail(QUESTION, ConnectionError("no"), ConnectionError("still no"))
    await ask(call, QUESTION)
    assert "a turn failed" in caplog.text
    await ask(call, QUESTION)
    assert call.played[-2:] == ANSWER, "the next turn is a new one"


# Partial transcripts.


async def test_what_a_partial_transcript_prefetched_serves_the_turn(
    model: ScriptedEmbeddings, manual: Manual
) -> None:
    embeddings = manual(model)
    speech = UtterancePrefetcher(embeddings, debounce=0.25)
    call = Call(bot(embeddings), speech)
    call.on_partial_transcript("when do")
    call.on_partial_transcript(" when do  you open")
    embeddings.time.advance(0.25)
    embeddings.executor.run_all()
    assert embeddings.is_ready(QUESTION)
    await ask(call, QUESTION)
    assert call.played == [FILLER, *ANSWER]
    assert embeddings.stats().query_ready == 1
    assert model.calls_for(QUESTION) == 1
    assert speech.last_utterance is not None
    assert speech.last_utterance.hit


async def test_after_a_hang_up_nothing_is_heard_any_more(
    model: ScriptedEmbeddings, manual: Manual
) -> None:
    embeddings = manual(model)
    call = Call(bot(embeddings), UtterancePrefetcher(embeddings, debounce=0.25))
    call.on_partial_transcript(QUESTION)
    await call.on_hang_up()
    call.on_partial_transcript(QUESTION)
    await ask(call, QUESTION)
    embeddings.time.advance(1.0)
    assert call.played == []
    assert embeddings.stats().prefetch_started == 0


async def test_a_void_turn_takes_its_queued_prefetch_back(
    model: ScriptedEmbeddings, manual: Manual
) -> None:
    embeddings = manual(model)
    call = Call(bot(embeddings), UtterancePrefetcher(embeddings), pause=3600.0)
    call.on_final_transcript(QUESTION)
    await asyncio.sleep(0)  # the turn has begun
    await call.on_hang_up()
    assert embeddings.stats().prefetch_withdrawn == 1
    assert model.calls_for(QUESTION) == 0


# Barge-in and hang-up.


@types.coroutine
def _interrupted(
    turn: Coroutine[Any, Any, None], at: int, interrupt: Callable[[], object]
) -> Generator[Any, Any, None]:
    """Run a turn, and interrupt it when it awaits for the `at`-th time."""
    awaits = 0
    result: Any = None
    error: BaseException | None = None
    while True:
        try:
            waits_for = turn.send(result) if error is None else turn.throw(error)
        except StopIteration:
            return
        awaits += 1
        if awaits == at:
            interrupt()
        try:
            result, error = (yield waits_for), None
        except BaseException as raised:
            result, error = None, raised


class InterruptedCall(Call):
    """A call in which something happens when the first turn awaits for the n-th time."""

    def __init__(self, agent: Agent, at: int, interrupt: Callable[[InterruptedCall], object]):
        super().__init__(agent)
        self.interrupted = False
        self._at = at
        self._interrupt = interrupt

    async def _process_user_text(self, question: str) -> None:
        def interrupt() -> None:
            self.interrupted = True
            self._interrupt(self)

        turn = super()._process_user_text(question)
        await _interrupted(turn, 0 if self.interrupted else self._at, interrupt)


async def at_every_await(
    model: ScriptedEmbeddings,
    make_store: MakeStore,
    interrupt: Callable[[InterruptedCall], object],
    afterwards: Callable[[InterruptedCall], Awaitable[None]],
) -> int:
    """Run turn after turn, each interrupted one await later, until one gets to its end."""
    for at in range(1, 1000):
        with PrefetchingEmbeddings(model) as embeddings:
            call = InterruptedCall(bot(embeddings, make_store), at, interrupt)
            await ask(call, f"{QUESTION} {at}")
            await afterwards(call)
            await auntil(lambda: asyncio.all_tasks() == {asyncio.current_task()})
            # The threads that a cancelled query left behind still end theirs.
            await auntil(lambda: _clean(embeddings))
        assert_no_leaks(embeddings)
        if not call.interrupted:
            assert call.played == [FILLER, *ANSWER]
            return at - 1
    raise AssertionError("the turn never ends")


def _clean(embeddings: PrefetchingEmbeddings) -> bool:
    with contextlib.suppress(AssertionError):
        assert_no_leaks(embeddings)
        return True
    return False


@STORES
async def test_a_call_may_be_hung_up_at_every_await(
    model: ScriptedEmbeddings, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    hangings_up: list[asyncio.Task[None]] = []

    def hang_up(call: InterruptedCall) -> None:
        call.on_barge_in()  # cancels at this very await
        hangings_up.append(asyncio.create_task(call.on_hang_up()))

    async def nothing_more(call: InterruptedCall) -> None:
        if call.interrupted:
            await hangings_up.pop()
            played = len(call.played)
            await ask(call, QUESTION)
            assert len(call.played) == played
            assert call.played != [FILLER, *ANSWER]

    awaits = await at_every_await(model, make_store, hang_up, nothing_more)
    assert awaits >= 6, "pause, filler, chain, and for each sentence speech and playing"
    assert "a turn failed" not in caplog.text


@STORES
async def test_a_caller_may_barge_in_at_every_await(
    model: ScriptedEmbeddings, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask_again(call: InterruptedCall) -> None:
        if call.interrupted:
            call.channel.played.clear()
            await ask(call, "and when do you close")
            assert call.played == [FILLER, *ANSWER]

    await at_every_await(model, make_store, InterruptedCall.on_barge_in, ask_again)
    assert "a turn failed" not in caplog.text


async def test_an_interrupted_answer_is_closed_at_once(
    model: ScriptedEmbeddings, wrap: Wrap
) -> None:
    speaking, closed = asyncio.Event(), asyncio.Event()

    class Talkative(Agent):
        async def get_response_generator(self, text: str, kb: str) -> AsyncGenerator[str]:
            try:
                while True:
                    yield "And another thing."
            finally:
                closed.set()

    class Slow(StandInTextToSpeech):
        async def synthesise(self, text: str) -> bytes:
            speaking.set()
            await asyncio.Event().wait()
            raise AssertionError

    embeddings = wrap(model)
    agent = Talkative(
        {"shop": KnowledgeBase(in_memory(embeddings), embeddings)}, StandInLLM(seconds=0)
    )
    call = StasisHandler(agent, StandInChannel(0.0), Slow(0.0), kb="shop", filler=FILLER, pause=0.0)
    call.on_final_transcript(QUESTION)
    await speaking.wait()
    await call.on_hang_up()
    assert closed.is_set()


@STORES
async def test_a_hang_up_while_the_embedding_is_awaited_leaves_it_to_others(
    model: ScriptedEmbeddings, wrap: Wrap, make_store: MakeStore
) -> None:
    embeddings = wrap(model)
    agent = bot(embeddings, make_store)
    gate = model.hold(QUESTION)
    call, other = Call(agent), Call(agent)
    call.on_final_transcript(QUESTION)
    other.on_final_transcript(QUESTION)
    await gate.await_until_entered()
    await auntil(lambda: embeddings.prefetcher.waiters(QUESTION) == 2)
    await call.on_hang_up()
    gate.open()
    await other.turn_over()
    assert call.played == [FILLER]
    assert other.played == [FILLER, *ANSWER]
    assert model.calls_for(QUESTION) == 1


async def test_a_new_question_takes_the_place_of_the_one_being_answered(
    model: ScriptedEmbeddings, wrap: Wrap
) -> None:
    call = Call(bot(wrap(model)))
    gate = model.hold("what about sunday")
    call.on_final_transcript("what about sunday")
    await gate.await_until_entered()
    await auntil(lambda: call.played == [FILLER])
    await ask(call, QUESTION)
    gate.open()
    assert call.played == [FILLER, FILLER, *ANSWER]
