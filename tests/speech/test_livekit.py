"""The LiveKit adapter: in a running session, and event by event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from livekit.agents import (
    AgentSession,
    ChatContext,
    ChatMessage,
    CloseEvent,
    CloseReason,
    ConversationItemAddedEvent,
    StopResponse,
    UserInputTranscribedEvent,
    UserStateChangedEvent,
)
from pydantic import Field

from benchmarks.frameworks.livekit_bot import Session, livekit_session
from examples.integrations.livekit_session import RetrievingAgent, SessionPrefetch
from prefetch_embeddings import UtterancePrefetcher, match_spoken
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import PATIENCE, auntil

Manual = Callable[..., ManualPrefetchingEmbeddings]

QUESTION = "how much is a ticket to the zoo?"
DEBOUNCE = 0.4


@pytest.fixture
def embeddings(manual: Manual, model: ScriptedEmbeddings) -> Iterator[ManualPrefetchingEmbeddings]:
    embeddings = manual(model, match=match_spoken)
    yield embeddings
    embeddings.time.advance(DEBOUNCE)
    assert embeddings.time.calls_to_come == 0, "the timer keeps what nobody needs"


@pytest.fixture
def speech(embeddings: ManualPrefetchingEmbeddings) -> UtterancePrefetcher:
    return UtterancePrefetcher(embeddings, debounce=DEBOUNCE)


def _embedded(embeddings: ManualPrefetchingEmbeddings) -> list[str]:
    """Run what is queued; return the texts embedded so far."""
    embeddings.executor.run_all()
    model = embeddings.underlying_embeddings
    assert isinstance(model, ScriptedEmbeddings)
    return [text for _, texts in model.calls for text in texts]


# --- In a running session -------------------------------------------------------------------------


class Retriever(BaseRetriever):
    """Lets what is queued be done before it asks for the question's embedding."""

    embeddings: Any
    asked: list[str] = Field(default_factory=list)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        raise NotImplementedError

    async def _aget_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        self.embeddings.executor.run_all()
        await self.embeddings.aembed_query(query)
        self.asked.append(query)
        return [Document(f"passage for {query}")]


class Answering(RetrievingAgent):
    """Answers at once; says nothing to "never mind", and leaves numbers out of the history."""

    def __init__(self, retriever: Retriever) -> None:
        super().__init__(retriever, instructions="")
        self.seen: list[list[str]] = []
        self.entered = asyncio.Event()

    async def on_enter(self) -> None:
        self.entered.set()

    async def on_user_turn_completed(self, turn_ctx: ChatContext, new_message: ChatMessage) -> None:
        await super().on_user_turn_completed(turn_ctx, new_message)
        if new_message.text_content == "never mind":
            raise StopResponse
        if new_message.text_content == "my card is 1234":
            new_message.content = ["[redacted]"]

    async def llm_node(self, chat_ctx: ChatContext, *_: Any) -> str:
        self.seen.append([item.text_content or "" for item in chat_ctx.messages()])
        return ""


class Line:
    """A running session, with what a test looks at."""

    def __init__(self, running: Session, retriever: Retriever, agent: Answering) -> None:
        self.running = running
        self.retriever = retriever
        self.agent = agent
        self.heard: list[str] = []
        running.session.on("user_input_transcribed", self._on_transcript)

    def _on_transcript(self, event: UserInputTranscribedEvent) -> None:
        self.heard.append(event.transcript)

    async def hears(self, kind: str, text: str = "") -> None:
        """Have something heard, and wait until the session has told of it."""
        count = len(self.heard)
        self.running.hears(kind, text)
        if kind in ("partial", "final"):
            await auntil(lambda: len(self.heard) > count)
        else:
            state = "speaking" if kind == "speech_started" else "listening"
            await auntil(lambda: self.running.session.user_state == state)

    async def says(self, *segments: str) -> None:
        """Speak a turn of several final segments, until the retriever was asked."""
        asked = len(self.retriever.asked)
        await self.hears("speech_started")
        for segment in segments:
            await self.hears("partial", segment.rstrip("?"))
            await self.hears("final", segment)
        await self.hears("speech_stopped")
        await auntil(lambda: len(self.retriever.asked) > asked)


@pytest.fixture
def talk(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> Callable[[Callable[[Line], Any]], None]:
    """Runs a conversation in a session with the adapter."""

    def talk(conversation: Callable[[Line], Any]) -> None:
        async def run() -> None:
            retriever = Retriever(embeddings=embeddings)
            agent = Answering(retriever)
            async with (
                asyncio.timeout(PATIENCE),
                livekit_session(
                    agent, prefetch=lambda session: SessionPrefetch(session, speech)
                ) as running,
            ):
                await conversation(Line(running, retriever, agent))

        asyncio.run(run())

    return talk


Talk = Callable[[Callable[[Line], Any]], None]


def test_what_stands_at_the_stop_is_prefetched(
    talk: Talk, embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    async def conversation(line: Line) -> None:
        for question in (QUESTION, "and for a child?"):
            await line.hears("speech_started")
            await line.hears("partial", question[:8])
            await line.hears("partial", question.rstrip("?"))
            embeddings.time.advance(5.0)
            assert question.rstrip("?") not in _embedded(embeddings), "the caller still speaks"
            await line.hears("speech_stopped")
            embeddings.time.advance(0.1)
            assert _embedded(embeddings)[-1] == question.rstrip("?")
            await line.hears("final", question)
            assert await line.running.message() == question

    talk(conversation)
    assert embeddings.stats().query_ready == 2
    assert embeddings.stats().prefetch_started == 2
    assert speech.stats().served == speech.stats().hits == speech.stats().utterances == 2


def test_the_segments_of_a_turn_are_one_call(
    talk: Talk, embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    async def conversation(line: Line) -> None:
        await line.says("how much ", "is a", "ticket?")
        await line.says("and for", "a child?")
        assert line.retriever.asked == ["how much  is a ticket?", "and for a child?"]

    talk(conversation)
    assert embeddings.stats().query_ready == 2
    assert embeddings.stats().prefetch_started == 2
    assert speech.stats().utterances == 2


def test_a_turn_that_gets_no_reply_is_no_part_of_the_next(
    talk: Talk, embeddings: ManualPrefetchingEmbeddings
) -> None:
    async def conversation(line: Line) -> None:
        await line.says("never mind")
        await line.says(QUESTION)
        assert line.retriever.asked == ["never mind", QUESTION]

    talk(conversation)
    assert embeddings.stats().query_ready == 2
    assert sorted(_embedded(embeddings)) == sorted({"never mind", QUESTION})


def test_a_turn_whose_message_was_edited_is_over(
    talk: Talk, embeddings: ManualPrefetchingEmbeddings
) -> None:
    async def conversation(line: Line) -> None:
        await line.says("my card is 1234")
        assert await line.running.message() == "[redacted]"
        await line.says(QUESTION)

    talk(conversation)
    assert embeddings.stats().query_ready == 2
    assert _embedded(embeddings)[-1] == QUESTION


def test_what_is_typed_in_the_middle_of_a_spoken_turn_ends_it_not(
    talk: Talk, embeddings: ManualPrefetchingEmbeddings
) -> None:
    async def conversation(line: Line) -> None:
        await line.hears("speech_started")
        await line.hears("final", "how much is")
        line.running.session.generate_reply(user_input="a typed line")
        assert await line.running.message() == "a typed line"
        await line.hears("final", "a ticket?")
        await line.hears("speech_stopped")
        embeddings.time.advance(0.1)
        assert await line.running.message() == "how much is a ticket?"

    talk(conversation)
    assert embeddings.stats().query_ready == 1
    assert _embedded(embeddings) == ["how much is a ticket?"]


def test_an_agent_that_takes_over_is_listened_to(
    talk: Talk, embeddings: ManualPrefetchingEmbeddings
) -> None:
    async def conversation(line: Line) -> None:
        await line.says("never mind")
        taking_over = Answering(line.retriever)
        line.running.session.update_agent(taking_over)
        await taking_over.entered.wait()
        await line.says("never mind")
        await line.says(QUESTION)

    talk(conversation)
    assert _embedded(embeddings) == ["never mind", QUESTION]


def test_the_model_sees_the_passages_and_the_conversation_does_not_keep_them(talk: Talk) -> None:
    async def conversation(line: Line) -> None:
        await line.says(QUESTION)
        await auntil(lambda: line.agent.seen)
        assert f"passage for {QUESTION}" in line.agent.seen[0]
        assert await line.running.message() == QUESTION
        history = [item.text_content for item in line.running.session.history.messages()]
        assert f"passage for {QUESTION}" not in history

    talk(conversation)


# --- Event by event ------------------------------------------------------------------------------


def _heard(text: str, *, final: bool = False) -> UserInputTranscribedEvent:
    return UserInputTranscribedEvent(transcript=text, is_final=final)


def _says(role: Any, text: str) -> ConversationItemAddedEvent:
    confidence = 0.9 if role == "user" else None
    message = ChatMessage(role=role, content=[text], transcript_confidence=confidence)
    return ConversationItemAddedEvent(item=message)


def _speaks() -> UserStateChangedEvent:
    return UserStateChangedEvent(old_state="listening", new_state="speaking")


def _is_silent() -> UserStateChangedEvent:
    return UserStateChangedEvent(old_state="speaking", new_state="listening")


class _Events:
    """A session that has not started, and emits what a test wants."""

    def __init__(self, speech: UtterancePrefetcher) -> None:
        self.session = AgentSession[None](vad=None)
        self.prefetch = SessionPrefetch(self.session, speech)

    def emit(self, *events: Any) -> None:
        for event in events:
            self.session.emit(event.type, event)


async def test_livekit_prefetches_an_interim_transcript_that_stands(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    events = _Events(speech)
    events.emit(_speaks(), _heard("how much"), _heard(QUESTION))
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == []
    events.emit(_is_silent())
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == [QUESTION]
    embeddings.time.advance(0.7)
    events.emit(_heard(""), _heard(QUESTION, final=True))
    assert _embedded(embeddings) == [QUESTION], "the final one had it already"
    assert speech.last_utterance is not None
    assert speech.last_utterance.hit


async def test_livekit_joins_the_segments_of_a_turn_and_of_no_more(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    events = _Events(speech)
    events.emit(_heard("how much is", final=True), _heard("a ticket"))
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == ["how much is", "how much is a ticket"]
    events.emit(
        _heard("a ticket?", final=True),
        _says("user", "how much is a ticket?"),
        _says("assistant", "nine euros"),
        _heard("thank you", final=True),
    )
    assert _embedded(embeddings)[2:] == ["thank you"], "of no more, and the ticket was there"


async def test_livekit_turn_that_began_before_the_last_one_was_noted_is_kept(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    events = _Events(speech)
    events.emit(
        _heard(QUESTION, final=True),
        _heard("and for", final=True),
        _says("user", QUESTION),
        _heard("a child?", final=True),
    )
    assert _embedded(embeddings)[-1] == "and for a child?"


@pytest.mark.parametrize("message", ["[redacted]", ""])
async def test_livekit_turn_whose_message_was_edited_is_over(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher, message: str
) -> None:
    events = _Events(speech)
    events.emit(_heard("my card", final=True), _says("user", message), _heard(QUESTION, final=True))
    assert _embedded(embeddings) == ["my card", QUESTION]


async def test_livekit_barge_in_takes_back_what_was_asked_before(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    events = _Events(speech)
    events.emit(_heard(QUESTION, final=True), _says("user", QUESTION), _speaks())
    assert _embedded(embeddings) == []


async def test_livekit_pause_within_a_turn_is_no_barge_in(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    events = _Events(speech)
    events.emit(
        _heard("how much is", final=True),
        _heard(""),
        UserStateChangedEvent(old_state="speaking", new_state="listening"),
        _says("assistant", "yes?"),
    )
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == ["how much is"]
    events.emit(_heard("a ticket"), _speaks(), _is_silent())
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == ["how much is", "how much is a ticket"]


async def test_livekit_close_drops_what_is_pending(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    events = _Events(speech)
    events.emit(_heard(QUESTION), CloseEvent(reason=CloseReason.PARTICIPANT_DISCONNECTED))
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == []
