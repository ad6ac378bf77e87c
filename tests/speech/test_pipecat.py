"""The Pipecat adapter in running pipelines: the user's message is what was prefetched."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pipecat.audio.turn.base_turn_analyzer import BaseTurnAnalyzer, BaseTurnParams, EndOfTurnState
from pipecat.frames import frames
from pipecat.metrics.metrics import MetricsData
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMUserAggregator
from pipecat.processors.frame_processor import FrameDirection
from pipecat.tests.utils import run_test
from pipecat.turns.user_mute import AlwaysUserMuteStrategy
from pipecat.turns.user_start import (
    MinWordsUserTurnStartStrategy,
    TranscriptionUserTurnStartStrategy,
    VADUserTurnStartStrategy,
    WakePhraseUserTurnStartStrategy,
)
from pipecat.turns.user_stop import (
    SpeechTimeoutUserTurnStopStrategy,
    TurnAnalyzerUserTurnStopStrategy,
)
from pipecat.turns.user_turn_strategies import (
    EagerUserTurnStrategies,
    ExternalUserTurnStrategies,
    FilterIncompleteUserTurnStrategies,
    UserTurnStrategies,
)
from pydantic import Field

from benchmarks.frameworks.pipecat_bot import Bot, pipecat_bot, prefetching
from examples.integrations.pipecat_processor import PrefetchProcessor
from prefetch_embeddings import UtterancePrefetcher, match_spoken
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import PATIENCE, auntil

Manual = Callable[..., ManualPrefetchingEmbeddings]

QUESTION = "how much is a ticket to the zoo?"


@pytest.fixture
def embeddings(manual: Manual, model: ScriptedEmbeddings) -> Iterator[ManualPrefetchingEmbeddings]:
    embeddings = manual(model, match=match_spoken)
    yield embeddings
    embeddings.time.advance(5.0)
    assert embeddings.time.calls_to_come == 0, "the timer keeps what nobody needs"


@pytest.fixture
def speech(embeddings: ManualPrefetchingEmbeddings) -> UtterancePrefetcher:
    return UtterancePrefetcher(embeddings)


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


def _embedded(embeddings: ManualPrefetchingEmbeddings) -> list[str]:
    """Let time pass and run what is queued; return the texts embedded so far."""
    embeddings.time.advance(1.0)
    embeddings.executor.run_all()
    model = embeddings.underlying_embeddings
    assert isinstance(model, ScriptedEmbeddings)
    return [text for _, texts in model.calls for text in texts]


def _vad(*, starts: bool) -> frames.Frame:
    if starts:
        return frames.VADUserStartedSpeakingFrame()
    return frames.VADUserStoppedSpeakingFrame(stop_secs=0.2)


@dataclasses.dataclass
class Marker(frames.DataFrame):
    """Comes after what was sent before it."""

    interruptible: bool = dataclasses.field(default=False, init=False)


async def _handled(bot: Bot) -> None:
    """Wait until all that was sent has come through the aggregator."""
    marker = Marker()
    await bot.send(marker)
    while await bot.comes(Marker) is not marker:
        pass


def _soon(seconds: float = 0.01) -> SpeechTimeoutUserTurnStopStrategy:
    return SpeechTimeoutUserTurnStopStrategy(user_speech_timeout=seconds)


def _plain() -> UserTurnStrategies:
    return UserTurnStrategies(
        start=[VADUserTurnStartStrategy(), TranscriptionUserTurnStartStrategy()], stop=[_soon()]
    )


class JudgesAtOnce(BaseTurnAnalyzer):
    """A turn model that takes each silence for the end of a turn."""

    @property
    def speech_triggered(self) -> bool:
        return False

    @property
    def params(self) -> BaseTurnParams:
        return BaseTurnParams()

    def append_audio(self, buffer: bytes, is_speech: bool) -> EndOfTurnState:
        return EndOfTurnState.INCOMPLETE

    async def analyze_end_of_turn(self) -> tuple[EndOfTurnState, MetricsData | None]:
        return EndOfTurnState.COMPLETE, None

    def clear(self) -> None:
        pass


async def _says(bot: Bot, *partials: str, final: str) -> None:
    """Speak a question: partial transcripts, a silence, the final transcript."""
    await bot.send(_vad(starts=True))
    for partial in partials:
        await bot.hears("partial", partial)
        await _handled(bot)
    await bot.send(_vad(starts=False))
    await _handled(bot)
    await bot.hears("final", final)


# --- Each strategy that it ships ------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategies",
    [
        _plain,
        lambda: UserTurnStrategies(
            start=[MinWordsUserTurnStartStrategy(min_words=3)], stop=[_soon()]
        ),
        lambda: UserTurnStrategies(
            start=[VADUserTurnStartStrategy()],
            stop=[TurnAnalyzerUserTurnStopStrategy(turn_analyzer=JudgesAtOnce())],
        ),
        lambda: FilterIncompleteUserTurnStrategies(
            start=[VADUserTurnStartStrategy()], stop=[_soon()]
        ),
    ],
    ids=["speech timeout", "minimum words", "turn analyzer", "filter incomplete"],
)
async def test_the_message_was_prefetched_at_the_stop(
    embeddings: ManualPrefetchingEmbeddings,
    speech: UtterancePrefetcher,
    strategies: Callable[[], UserTurnStrategies],
) -> None:
    retriever = Retriever(embeddings=embeddings)
    async with pipecat_bot(
        retriever, strategies(), new_processor=prefetching(speech), answer=lambda _: "● nine euros"
    ) as bot:
        for question in (QUESTION, "and for a child?"):
            await bot.send(_vad(starts=True))
            for partial in (question[:8], question.rstrip("?")):
                await bot.hears("partial", partial)
                await _handled(bot)  # what is queued is lost when a word interrupts
            embedded = _embedded(embeddings)
            assert question.rstrip("?") not in embedded, "the caller still speaks"
            await bot.send(_vad(starts=False))
            await _handled(bot)
            assert _embedded(embeddings) == [*embedded, question.rstrip("?")]
            await bot.hears("final", question)
            await bot.comes(frames.LLMFullResponseEndFrame)
        assert bot.messages() == [QUESTION, "and for a child?"]
    assert retriever.asked == bot.messages()
    assert embeddings.stats().query_ready == 2
    assert embeddings.stats().prefetch_started == 2, "a call that nobody needed"
    assert speech.stats().served == speech.stats().hits == speech.stats().utterances == 2


async def test_what_minimum_words_drop_is_no_part_of_the_question(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    strategies = UserTurnStrategies(
        start=[MinWordsUserTurnStartStrategy(min_words=3)], stop=[_soon()]
    )
    retriever = Retriever(embeddings=embeddings)
    async with pipecat_bot(retriever, strategies, new_processor=prefetching(speech)) as bot:
        await bot.send(frames.BotStartedSpeakingFrame())
        await bot.hears("final", "Okay.")
        await _handled(bot)
        await bot.send(frames.BotStoppedSpeakingFrame())
        await _says(bot, "how much is a ticket to the zoo", final=QUESTION)
        await bot.comes(frames.LLMFullResponseEndFrame)
        assert bot.messages() == [QUESTION]
    assert embeddings.stats().query_ready == 1
    assert embeddings.stats().prefetch_started == 1


async def test_a_message_that_leaves_the_turn_open_is_no_part_of_the_next(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    strategies = FilterIncompleteUserTurnStrategies(
        start=[VADUserTurnStartStrategy()], stop=[_soon()]
    )
    answers = iter(["○", "● nine euros"])
    retriever = Retriever(embeddings=embeddings)
    async with pipecat_bot(
        retriever, strategies, new_processor=prefetching(speech), answer=lambda _: next(answers)
    ) as bot:
        await _says(bot, "i wanted to ask", final="I wanted to ask")
        await bot.comes(frames.LLMFullResponseEndFrame)
        await _says(bot, "how much is a ticket to the zoo", final=QUESTION)
        await bot.comes(frames.LLMFullResponseEndFrame)
        assert bot.messages() == ["I wanted to ask", QUESTION]
    assert embeddings.stats().query_ready == 2
    assert embeddings.stats().prefetch_started == 2


async def test_a_stop_that_overtakes_its_final_leaves_it_to_the_next_message(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    strategies = UserTurnStrategies(
        start=[VADUserTurnStartStrategy()],
        stop=[
            SpeechTimeoutUserTurnStopStrategy(user_speech_timeout=0.01, wait_for_transcript=False)
        ],
    )
    retriever = Retriever(embeddings=embeddings)
    async with pipecat_bot(retriever, strategies, new_processor=prefetching(speech)) as bot:
        await bot.send(_vad(starts=True), _vad(starts=False))
        await bot.comes(frames.UserStoppedSpeakingFrame)
        await bot.hears("final", "How much is")  # late
        await _handled(bot)
        assert bot.messages() == []
        await bot.send(_vad(starts=True))
        await bot.hears("partial", "a ticket")
        await _handled(bot)
        await bot.hears("final", "a ticket?")
        await _handled(bot)
        await bot.send(_vad(starts=False))
        await _handled(bot)
        _embedded(embeddings)
        await bot.comes(frames.LLMFullResponseEndFrame)
        assert bot.messages() == ["How much is a ticket?"]
    assert embeddings.stats().query_ready == 1


async def test_what_is_said_while_muted_is_no_part_of_the_question(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    retriever = Retriever(embeddings=embeddings)
    async with pipecat_bot(
        retriever,
        _plain(),
        new_processor=prefetching(speech),
        mute=[AlwaysUserMuteStrategy()],  # type: ignore[no-untyped-call]
    ) as bot:
        await bot.send(frames.BotStartedSpeakingFrame(), _vad(starts=True))
        await bot.hears("partial", "are you there")
        await bot.hears("final", "are you there")
        await _handled(bot)
        await bot.send(_vad(starts=False))
        await _handled(bot)
        assert _embedded(embeddings) == []
        await bot.send(frames.BotStoppedSpeakingFrame())
        await _says(bot, "how much is a ticket to the zoo", final=QUESTION)
        await bot.comes(frames.LLMFullResponseEndFrame)
        assert bot.messages() == [QUESTION]
    assert embeddings.stats().query_ready == 1
    assert embeddings.stats().prefetch_started == 1


async def test_what_comes_without_the_wake_phrase_is_no_part_of_the_question(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    strategies = UserTurnStrategies(
        start=[
            WakePhraseUserTurnStartStrategy(phrases=["hey zoo"], timeout=60.0),
            VADUserTurnStartStrategy(),
            TranscriptionUserTurnStartStrategy(),
        ],
        stop=[_soon()],
    )
    retriever = Retriever(embeddings=embeddings)
    async with pipecat_bot(retriever, strategies, new_processor=prefetching(speech)) as bot:
        await bot.hears("final", "not you")
        await _handled(bot)
        await bot.hears("final", "hey zoo how much is it")
        await bot.comes(frames.LLMFullResponseEndFrame)
        await _says(bot, "how much is a ticket to the zoo", final=QUESTION)
        await bot.comes(frames.LLMFullResponseEndFrame)
    assert bot.messages()[-1] == QUESTION
    assert len(bot.messages()) == 2
    assert embeddings.stats().query_ready == 2


async def test_the_segments_of_a_turn_are_one_call_with_a_detector(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    retriever = Retriever(embeddings=embeddings)
    async with pipecat_bot(retriever, _plain(), new_processor=prefetching(speech)) as bot:
        await bot.send(_vad(starts=True))
        for segment in ("how much ", " is a", "ticket?"):
            await bot.hears("final", segment)
            await _handled(bot)
            assert _embedded(embeddings) == []
        await bot.send(_vad(starts=False))
        await bot.comes(frames.LLMFullResponseEndFrame)
        assert bot.messages() == ["how much   is a ticket?"]
    assert embeddings.stats().prefetch_started == 1
    assert speech.stats().utterances == 1


async def test_the_segments_of_a_turn_and_of_no_more_are_joined_without_a_detector(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    retriever = Retriever(embeddings=embeddings)
    strategies = ExternalUserTurnStrategies()
    async with pipecat_bot(retriever, strategies, new_processor=prefetching(speech)) as bot:
        for turn in (["how much ", " is a", "ticket?"], ["and", " for a child? "]):
            await bot.send(frames.ProposedUserStartedSpeakingFrame())
            await bot.comes(frames.UserStartedSpeakingFrame)
            for segment in turn:
                await bot.hears("final", segment)
            await _handled(bot)
            await bot.send(frames.ProposedUserStoppedSpeakingFrame())
            await bot.comes(frames.LLMFullResponseEndFrame)
        assert bot.messages() == ["how much   is a ticket?", "and  for a child?"]
    assert embeddings.stats().query_ready == 2


async def test_an_eager_end_of_turn_is_prefetched_at_once(
    embeddings: ManualPrefetchingEmbeddings,
) -> None:
    speech = UtterancePrefetcher.for_eager_turn_ends(embeddings)
    retriever = Retriever(embeddings=embeddings)
    new_processor = prefetching(speech, partials=frames.EagerTranscriptionFrame)
    strategies = EagerUserTurnStrategies()
    async with pipecat_bot(retriever, strategies, new_processor=new_processor) as bot:
        await bot.send(frames.ProposedUserStartedSpeakingFrame())
        await bot.comes(frames.UserStartedSpeakingFrame)
        await bot.hears("partial", "how much")
        await bot.hears("eager", QUESTION.rstrip("?"))
        await _handled(bot)
        assert _embedded(embeddings) == [QUESTION.rstrip("?")]
        await bot.hears("final", QUESTION)
        await bot.send(frames.ProposedUserStoppedSpeakingFrame())
        await auntil(lambda: bot.messages() == [QUESTION])
    assert embeddings.stats().query_missed == 0
    assert embeddings.stats().prefetch_started == 1


# --- What else happens on the line ---------------------------------------------------------------


async def test_frames_pass_unchanged_in_both_directions(speech: UtterancePrefetcher) -> None:
    down: list[frames.Frame] = [
        frames.InterimTranscriptionFrame("how much", "caller", ""),
        frames.TranscriptionFrame(QUESTION, "caller", ""),
        frames.TextFrame("on"),
        frames.VADUserStartedSpeakingFrame(),
    ]
    up: list[frames.Frame] = [frames.UserStoppedSpeakingFrame(), frames.InterruptionFrame()]
    before = copy.deepcopy([vars(frame) for frame in down + up])

    def processor() -> PrefetchProcessor:
        return PrefetchProcessor(speech, LLMUserAggregator(LLMContext()))

    got_down, _ = await run_test(processor(), frames_to_send=down, start_timeout=PATIENCE)
    _, got_up = await run_test(
        processor(),
        frames_to_send=up,
        frames_to_send_direction=FrameDirection.UPSTREAM,
        start_timeout=PATIENCE,
    )

    assert {id(frame) for frame in got_down} == {id(frame) for frame in down}
    assert len(got_down) == len(down), "a frame was doubled"
    assert [id(frame) for frame in got_up] == [id(frame) for frame in up]
    assert [vars(frame) for frame in down + up] == before


async def test_who_talks_into_the_answer_has_its_prefetch_taken_back(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    retriever = Retriever(embeddings=embeddings)
    strategies = ExternalUserTurnStrategies()  # the turn stays open until told otherwise
    async with pipecat_bot(retriever, strategies, new_processor=prefetching(speech)) as bot:
        await bot.hears("final", QUESTION)
        await _handled(bot)
        await bot.send(frames.InterruptionFrame())  # which these words have brought about
        await _handled(bot)
        assert len(embeddings.executor) == 1


async def test_barge_in_takes_back_what_no_query_has_come_for(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    class Silent(Retriever):
        async def _aget_relevant_documents(self, query: str, **_: Any) -> list[Document]:
            self.asked.append(query)
            return []

    async with pipecat_bot(
        Silent(embeddings=embeddings), _plain(), new_processor=prefetching(speech)
    ) as bot:
        await _says(bot, final=QUESTION)
        await bot.comes(frames.LLMFullResponseEndFrame)
        assert len(embeddings.executor) == 1
        await bot.send(_vad(starts=True))  # begins a turn, and interrupts
        await bot.comes(frames.InterruptionFrame)
        assert len(embeddings.executor) == 0


@pytest.mark.parametrize("end", [frames.EndFrame, frames.CancelFrame])
async def test_a_hang_up_drops_what_is_pending(
    embeddings: ManualPrefetchingEmbeddings,
    speech: UtterancePrefetcher,
    end: type[frames.Frame],
) -> None:
    retriever = Retriever(embeddings=embeddings)
    async with pipecat_bot(retriever, _plain(), new_processor=prefetching(speech)) as bot:
        await bot.hears("partial", QUESTION)
        await _handled(bot)
        await bot.send(end())
    assert _embedded(embeddings) == []


async def test_the_model_sees_the_passages_and_the_conversation_does_not_keep_them(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    seen: list[Any] = []

    def answer(context: LLMContext) -> str:
        seen.append(context.get_messages())
        return "nine euros"

    async with pipecat_bot(
        Retriever(embeddings=embeddings),
        _plain(),
        new_processor=prefetching(speech),
        answer=answer,
    ) as bot:
        await _says(bot, final=QUESTION)
        await bot.comes(frames.LLMFullResponseEndFrame)
    assert [message["content"] for message in seen[0]] == [f"passage for {QUESTION}", QUESTION]
    assert bot.messages() == [QUESTION]
