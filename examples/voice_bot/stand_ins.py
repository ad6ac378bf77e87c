"""What stands in for Asterisk, the recogniser, a search far away, and the models.

Not to be copied: they only take their time, so that a turn lasts as long as a real one. What the
recogniser hears is made in `transcripts`.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore

from examples.voice_bot.handler import StasisHandler
from examples.voice_bot.transcripts import Heard


@dataclass(frozen=True)
class Durations:
    """How long the parts of a turn take besides the embedding, in seconds.

    Args:
        pause: Silence before the filler.
        filler: The filler phrase.
        search: The vector search, over a network.
        rerank: The reranker.
        llm: From the prompt to the answer's first sentence.
        tts: From a sentence to its audio.
    """

    pause: float = 0.20
    filler: float = 0.80
    search: float = 0.12
    rerank: float = 0.15
    llm: float = 0.85
    tts: float = 0.50

    def scaled(self, factor: float) -> "Durations":
        """All of them, multiplied."""
        return Durations(*(seconds * factor for seconds in dataclasses.astuple(self)))

    @property
    def after_embedding(self) -> float:
        """What a retrieval takes besides the embedding."""
        return self.search + self.rerank


FILLER = b"one moment, please"

STOP_SECONDS = 0.2
"""Silence after which a voice activity detector says that the caller has stopped."""


class Moment(NamedTuple):
    """Something that is told while a caller speaks."""

    at: float
    """In seconds from the first word."""
    what: Literal["speech_started", "speech_stopped", "partial", "final"]
    text: tuple[str, ...] = ()
    """The transcript, if it is one."""


def moments(heard: Heard, *, signals: bool = True) -> list[Moment]:
    """Return what is told when; the final transcript comes last.

    Args:
        heard: What the recogniser says.
        signals: Whether a voice activity detector tells of speech and silence, too.
    """
    told = [Moment(at, "partial", (text,)) for at, text in heard.partials]
    if signals:
        told.append(Moment(0.0, "speech_started"))
        for began, ended in (*heard.silences, (heard.spoken, heard.final_at)):
            if began + STOP_SECONDS < ended:
                told.append(Moment(began + STOP_SECONDS, "speech_stopped"))
                if ended < heard.spoken:
                    told.append(Moment(ended, "speech_started"))
    told.sort(key=lambda moment: moment.at)
    return [*told, Moment(heard.final_at, "final", (heard.question,))]


@dataclass(frozen=True)
class StandInRecogniser:
    """Stands in for the caller and the recogniser: tells the handler what is heard, when it is.

    Args:
        time_scale: Factor on all times.
    """

    time_scale: float = 1.0

    async def hear(self, handler: StasisHandler, heard: Heard) -> float:
        """Let a caller ask a question.

        Returns:
            When the final transcript came, on `time.perf_counter`.
        """
        tell: dict[str, Callable[..., None]] = {
            "speech_started": handler.on_speech_started,
            "speech_stopped": handler.on_speech_stopped,
            "partial": handler.on_partial_transcript,
            "final": handler.on_final_transcript,
        }
        began = now = time.perf_counter()
        for at, what, text in moments(heard):
            await self._until(began, at)
            now = time.perf_counter()
            tell[what](*text)
        return now

    async def _until(self, began: float, at: float) -> None:
        await asyncio.sleep(began + at * self.time_scale - time.perf_counter())


@dataclass
class StandInChannel:
    """Stands in for an Asterisk channel: keeps what it played, from when to when.

    The filler takes its time; the answer's audio is over at once, since the measurement ends where
    it begins.
    """

    filler_seconds: float
    played: list[tuple[bytes, float, float]] = field(default_factory=list)

    async def play(self, audio: bytes) -> None:
        """Play audio to its end."""
        began = time.perf_counter()
        await asyncio.sleep(self.filler_seconds if audio == FILLER else 0.0)
        self.played.append((audio, began, time.perf_counter()))


@dataclass(frozen=True)
class StandInTextToSpeech:
    """Stands in for speech synthesis."""

    seconds: float

    async def synthesise(self, text: str) -> bytes:
        """Take the time of a synthesis; the audio is the text itself."""
        await asyncio.sleep(self.seconds)
        return text.encode()


class FarRetrieval(BaseRetriever):
    """Stands in for a search over a network and a reranker: takes their time besides its own.

    The search itself is real: that of a Chroma store.
    """

    store: VectorStore
    seconds: float
    searches: list[str] = []  # noqa: RUF012 - pydantic copies it for each object

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        self.searches.append(query)
        found = await self.store.asimilarity_search(query, k=3)
        await asyncio.sleep(self.seconds)
        return found

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        self.searches.append(query)
        found = self.store.similarity_search(query, k=3)
        time.sleep(self.seconds)
        return found


class StandInLLM(BaseChatModel):
    """Stands in for a chat model: reads out the first sentence that it is given."""

    seconds: float

    @property
    def _llm_type(self) -> str:
        return "stand-in"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        raise NotImplementedError("the voice bot streams")

    async def _astream(
        self,
        messages: list[BaseMessage],
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> AsyncIterator[ChatGenerationChunk]:
        await asyncio.sleep(self.seconds)
        _, passage, *_ = messages[0].text.split("\n\n")
        sentence, _, _ = passage.partition(". ")
        yield ChatGenerationChunk(message=AIMessageChunk(content=sentence))
