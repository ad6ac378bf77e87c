"""The adapters for voice frameworks: each in the real framework, frames and events fed by hand."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from typing import Any, Never

import pytest
from livekit import rtc
from livekit.agents import (
    Agent,
    AgentSession,
    ChatContext,
    ChatMessage,
    CloseEvent,
    CloseReason,
    ConversationItemAddedEvent,
    ModelSettings,
    StopResponse,
    TurnHandlingOptions,
    UserInputTranscribedEvent,
    UserStateChangedEvent,
)
from livekit.agents.language import LanguageCode
from livekit.agents.llm import LLM
from livekit.agents.stt import STT, SpeechData, SpeechEvent, SpeechEventType, STTCapabilities
from livekit.agents.voice.io import AudioInput
from pipecat.frames import frames
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import (
    LLMUserAggregator,
    LLMUserAggregatorParams,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.tests.utils import QueuedFrameProcessor, run_test
from pipecat.turns.user_turn_strategies import ExternalUserTurnStrategies
from pipecat.workers.runner import WorkerRunner

from examples.integrations.asterisk_ari import CallPrefetch
from examples.integrations.livekit_session import SessionPrefetch
from examples.integrations.pipecat_processor import PrefetchProcessor
from prefetch_embeddings import UtterancePrefetcher
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.helpers import PATIENCE

Manual = Callable[..., ManualPrefetchingEmbeddings]

QUESTION = "how much is a ticket to the zoo?"
DEBOUNCE = 0.4


@pytest.fixture
def embeddings(manual: Manual, model: ScriptedEmbeddings) -> Iterator[ManualPrefetchingEmbeddings]:
    embeddings = manual(model)
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


# --- Pipecat -------------------------------------------------------------------------------------


def _interim(text: str) -> frames.InterimTranscriptionFrame:
    return frames.InterimTranscriptionFrame(text, "caller", "2026-01-01T00:00:00Z")


def _final(text: str) -> frames.TranscriptionFrame:
    return frames.TranscriptionFrame(text, "caller", "2026-01-01T00:00:00Z", finalized=True)


class _Line:
    """A running pipeline, with both its ends in hand."""

    def __init__(self, worker: PipelineWorker) -> None:
        self.worker = worker
        self.ends: dict[FrameDirection, asyncio.Queue[frames.Frame]] = {
            direction: asyncio.Queue() for direction in FrameDirection
        }

    async def down(self, *sent: frames.Frame) -> None:
        for frame in sent:
            await self._through(frame, FrameDirection.DOWNSTREAM)

    async def up(self, frame: frames.Frame) -> None:
        await self._through(frame, FrameDirection.UPSTREAM)

    async def _through(self, frame: frames.Frame, direction: FrameDirection) -> None:
        await self.worker.queue_frame(frame, direction)
        assert await self.next(type(frame), direction) is frame

    async def next(self, kind: type[frames.Frame], direction: FrameDirection) -> frames.Frame:
        async with asyncio.timeout(PATIENCE):
            while not isinstance(frame := await self.ends[direction].get(), kind):
                pass
        return frame


@contextlib.asynccontextmanager
async def _line(*processors: FrameProcessor) -> AsyncIterator[_Line]:
    up, down = asyncio.Queue[frames.Frame](), asyncio.Queue[frames.Frame]()
    source = QueuedFrameProcessor(queue=up, queue_direction=FrameDirection.UPSTREAM)
    sink = QueuedFrameProcessor(queue=down, queue_direction=FrameDirection.DOWNSTREAM)
    worker = PipelineWorker(
        Pipeline([source, *processors, sink]), cancel_on_idle_timeout=False, enable_rtvi=False
    )
    line = _Line(worker)
    line.ends = {FrameDirection.UPSTREAM: up, FrameDirection.DOWNSTREAM: down}
    started = asyncio.Event()

    async def on_started(worker: PipelineWorker, frame: frames.Frame) -> None:
        started.set()

    worker.add_event_handler("on_pipeline_started", on_started)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(runner.run())
        await asyncio.wait_for(started.wait(), PATIENCE)
        yield line
        await worker.queue_frame(frames.EndFrame())


async def test_pipecat_frames_pass_unchanged_in_both_directions(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    down: list[frames.Frame] = [
        frames.UserStartedSpeakingFrame(),
        _interim("how much"),
        _interim(QUESTION),
        _final(QUESTION),
        frames.UserStoppedSpeakingFrame(),
        frames.TextFrame("a ticket is nine euros"),
        frames.BotStartedSpeakingFrame(),
    ]
    up: list[frames.Frame] = [frames.UserStoppedSpeakingFrame(), frames.UserMuteStartedFrame()]
    before = copy.deepcopy([vars(frame) for frame in down + up])

    got_down, _ = await run_test(
        PrefetchProcessor(speech), frames_to_send=down, start_timeout=PATIENCE
    )
    _, got_up = await run_test(
        PrefetchProcessor(speech),
        frames_to_send=up,
        frames_to_send_direction=FrameDirection.UPSTREAM,
        start_timeout=PATIENCE,
    )

    assert {id(frame) for frame in got_down} == {id(frame) for frame in down}
    assert len(got_down) == len(down), "a frame was doubled"
    assert [id(frame) for frame in got_up] == [id(frame) for frame in up]
    assert [vars(frame) for frame in down + up] == before


async def test_pipecat_prefetches_an_interim_transcript_that_stands(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    async with _line(PrefetchProcessor(speech)) as line:
        await line.down(_interim("how much"), _interim(QUESTION))
        assert _embedded(embeddings) == []
        embeddings.time.advance(DEBOUNCE)
        assert _embedded(embeddings) == [QUESTION]
        embeddings.time.advance(0.7)
        await line.down(_final(QUESTION))
    assert _embedded(embeddings) == [QUESTION], "the final one had it already"
    assert speech.last_utterance is not None
    assert speech.last_utterance.hit
    assert speech.last_utterance.lead == pytest.approx(0.7)


async def test_pipecat_prefetches_at_the_final_transcript(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    async with _line(PrefetchProcessor(speech)) as line:
        await line.down(_interim("how much"), _final(QUESTION))
        assert _embedded(embeddings) == [QUESTION]
        assert embeddings.embed_query(QUESTION)
    assert embeddings.stats().query_ready == 1


async def test_pipecat_joins_the_segments_of_a_turn_and_of_no_more(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    async with _line(PrefetchProcessor(speech)) as line:
        await line.down(_final(" how much is"), _final("  "), _interim("a ticket"))
        embeddings.time.advance(DEBOUNCE)
        assert _embedded(embeddings) == ["how much is", "how much is a ticket"]
        await line.down(_final("a ticket?"))
        await line.up(frames.UserStoppedSpeakingFrame())
        await line.down(_final("thank you"))
        assert _embedded(embeddings)[2:] == ["how much is a ticket?", "thank you"]


async def test_pipecat_user_message_is_what_was_prefetched(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    """With the real aggregator behind it, whose message is what a retriever is asked."""
    context = LLMContext()
    aggregator = LLMUserAggregator(
        context,
        params=LLMUserAggregatorParams(user_turn_strategies=ExternalUserTurnStrategies()),
    )
    async with _line(PrefetchProcessor(speech), aggregator) as line:
        for turn in (["how much ", " is a", "ticket?"], ["and", " for a child? "]):
            await line.worker.queue_frame(frames.ProposedUserStartedSpeakingFrame())
            await line.next(frames.UserStartedSpeakingFrame, FrameDirection.UPSTREAM)
            for segment in turn:
                await line.worker.queue_frame(_final(segment))
            await line.worker.queue_frame(frames.ProposedUserStoppedSpeakingFrame())
            await line.next(frames.UserStoppedSpeakingFrame, FrameDirection.UPSTREAM)

            messages = [str(m["content"]) for m in context.get_messages() if isinstance(m, dict)]
            embeddings.executor.run_all()
            embeddings.embed_query(messages[-1])
    assert messages == ["how much   is a ticket?", "and  for a child?"]
    assert embeddings.stats().query_ready == 2
    assert embeddings.stats().query_missed == 0


async def test_pipecat_interruption_takes_back_what_was_asked_before(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    async with _line(PrefetchProcessor(speech)) as line:
        await line.down(_final(QUESTION))
        await line.up(frames.UserStoppedSpeakingFrame())
        await line.up(frames.InterruptionFrame())
        assert _embedded(embeddings) == []

        await line.down(_final("no, to the museum"))
        await line.up(frames.InterruptionFrame())  # which these words have brought about
        assert _embedded(embeddings) == ["no, to the museum"]


async def test_pipecat_interruption_by_an_interim_transcript_leaves_it_standing(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    async with _line(PrefetchProcessor(speech)) as line:
        await line.down(_interim(QUESTION))
        await line.up(frames.InterruptionFrame())
        embeddings.time.advance(DEBOUNCE)
        assert _embedded(embeddings) == [QUESTION]


@pytest.mark.parametrize("end", [frames.EndFrame, frames.CancelFrame])
async def test_pipecat_hang_up_drops_what_is_pending(
    embeddings: ManualPrefetchingEmbeddings,
    speech: UtterancePrefetcher,
    end: type[frames.Frame],
) -> None:
    async with _line(PrefetchProcessor(speech)) as line:
        await line.down(_interim(QUESTION))
        await line.worker.queue_frame(end())
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == []


async def test_pipecat_prefetches_eager_ends_of_turn_alone(
    embeddings: ManualPrefetchingEmbeddings,
) -> None:
    speech = UtterancePrefetcher.for_eager_turn_ends(embeddings)
    async with _line(PrefetchProcessor(speech, frames.EagerTranscriptionFrame)) as line:
        await line.down(
            _interim("how much"),
            frames.EagerTranscriptionFrame(QUESTION, "caller", "2026-01-01T00:00:00Z"),
        )
        assert _embedded(embeddings) == [QUESTION]


async def test_pipecat_leaves_out_what_is_said_while_muted(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    async with _line(PrefetchProcessor(speech)) as line:
        await line.up(frames.UserMuteStartedFrame())
        await line.down(_final("are you there"))
        await line.up(frames.UserMuteStoppedFrame())
        await line.down(_final(QUESTION))
        assert _embedded(embeddings) == [QUESTION]


# --- LiveKit Agents ------------------------------------------------------------------------------


def _heard(text: str, *, final: bool = False) -> UserInputTranscribedEvent:
    return UserInputTranscribedEvent(transcript=text, is_final=final)


def _says(role: Any, text: str) -> ConversationItemAddedEvent:
    return ConversationItemAddedEvent(item=ChatMessage(role=role, content=[text]))


def _speaks() -> UserStateChangedEvent:
    return UserStateChangedEvent(old_state="listening", new_state="speaking")


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
    assert _embedded(embeddings) == []
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
    assert _embedded(embeddings)[2:] == ["how much is a ticket?", "thank you"]


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
    events.emit(_heard("a ticket"), _speaks())
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == ["how much is", "how much is a ticket"]


async def test_livekit_close_drops_what_is_pending(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    events = _Events(speech)
    events.emit(_heard(QUESTION), CloseEvent(reason=CloseReason.PARTICIPANT_DISCONNECTED))
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == []


class _Silence(AudioInput):
    """An audio input on which nothing ever comes; the transcripts do without."""

    def __init__(self) -> None:
        super().__init__(label="silence")

    async def __anext__(self) -> Never:
        await asyncio.Event().wait()
        raise AssertionError


class _NoSTT(STT[str]):
    """Lets the recogniser end turns; the agent's `stt_node` does so."""

    def __init__(self) -> None:
        super().__init__(capabilities=STTCapabilities(streaming=True, interim_results=True))

    async def _recognize_impl(self, *_: Any, **__: Any) -> Never:
        raise AssertionError("the agent's stt_node is asked")


class _NoLLM(LLM[str]):
    """Lets the session reply; the agent's `llm_node` does so."""

    def chat(self, **_: Any) -> Never:
        raise AssertionError("the agent's llm_node is asked")


class _Retrieving(Agent):
    """An agent whose recogniser is a queue, and whose retriever is asked for each user message."""

    def __init__(self, embeddings: ManualPrefetchingEmbeddings) -> None:
        super().__init__(instructions="")
        self.heard: asyncio.Queue[SpeechEvent] = asyncio.Queue()
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.prefetch: SessionPrefetch | None = None
        self._embeddings = embeddings

    async def stt_node(
        self, audio: AsyncIterable[rtc.AudioFrame], model_settings: ModelSettings
    ) -> AsyncIterator[SpeechEvent]:
        while True:
            yield await self.heard.get()

    async def llm_node(self, *_: Any) -> str:
        return ""

    async def on_user_turn_completed(self, turn_ctx: ChatContext, new_message: ChatMessage) -> None:
        question = new_message.text_content
        assert question is not None
        self._embeddings.executor.run_all()
        await self._embeddings.aembed_query(question)
        await self.asked.put(question)
        if question == "never mind":
            assert self.prefetch is not None
            self.prefetch.clear_user_turn()
            raise StopResponse


def _stt(kind: SpeechEventType, text: str = "") -> SpeechEvent:
    return SpeechEvent(kind, alternatives=[SpeechData(LanguageCode("en"), text)])


async def test_livekit_user_message_is_what_was_prefetched(
    embeddings: ManualPrefetchingEmbeddings, speech: UtterancePrefetcher
) -> None:
    """In a running session, without a room: the message is what a retriever is asked."""
    session = AgentSession[None](
        vad=None,
        session_close_transcript_timeout=0.0,
        stt=_NoSTT(),
        llm=_NoLLM(),
        turn_handling=TurnHandlingOptions(
            turn_detection="stt",
            endpointing={"mode": "fixed", "min_delay": 0.0, "max_delay": 0.0},
            preemptive_generation={"enabled": False},
        ),
    )
    session.input.audio = _Silence()
    agent = _Retrieving(embeddings)
    agent.prefetch = SessionPrefetch(session, speech)
    noted: asyncio.Queue[str] = asyncio.Queue()

    @session.on("conversation_item_added")
    def on_item(event: ConversationItemAddedEvent) -> None:
        if isinstance(event.item, ChatMessage) and event.item.role == "user":
            noted.put_nowait(event.item.raw_text_content or "")

    async with asyncio.timeout(PATIENCE):
        await session.start(agent)
        for turn in (["how much ", "is a", "ticket?"], ["never mind"], ["and for", "a child?"]):
            agent.heard.put_nowait(_stt(SpeechEventType.START_OF_SPEECH))
            for segment in turn:
                agent.heard.put_nowait(_stt(SpeechEventType.FINAL_TRANSCRIPT, segment))
            agent.heard.put_nowait(_stt(SpeechEventType.END_OF_SPEECH))
            question = await agent.asked.get()
            assert question == " ".join(turn)
            if question != "never mind":
                assert await noted.get() == question
        await session.aclose()

    assert embeddings.stats().query_ready == 3
    assert embeddings.stats().query_missed == 0


# --- Asterisk ------------------------------------------------------------------------------------

CHANNEL = "1763812345.42"


def _ari(kind: str, channel: str = CHANNEL, **fields: Any) -> dict[str, Any]:
    """An event as the WebSocket brings it."""
    message = json.dumps(
        {
            "type": kind,
            "timestamp": "2026-01-01T12:00:00.000+0000",
            **fields,
            "channel": {
                "id": channel,
                "name": "PJSIP/trunk-0000002a",
                "state": "Up",
                "protocol_id": "f1a8",
                "caller": {"name": "", "number": "100"},
                "connected": {"name": "", "number": ""},
                "accountcode": "",
                "dialplan": {
                    "context": "from-trunk",
                    "exten": "200",
                    "priority": 3,
                    "app_name": "Stasis",
                    "app_data": "bot",
                },
                "creationtime": "2026-01-01T11:59:59.000+0000",
                "language": "en",
            },
            "asterisk_id": "02:42:ac:11:00:02",
            "application": "bot",
        }
    )
    event: dict[str, Any] = json.loads(message)
    return event


PLAYBACK = {
    "type": "PlaybackFinished",
    "timestamp": "2026-01-01T12:00:01.000+0000",
    "playback": {
        "id": "5b8ea8c2",
        "media_uri": "sound:one-moment-please",
        "target_uri": f"channel:{CHANNEL}",
        "language": "en",
        "state": "done",
    },
    "asterisk_id": "02:42:ac:11:00:02",
    "application": "bot",
}


@pytest.fixture
def calls(embeddings: ManualPrefetchingEmbeddings) -> CallPrefetch:
    return CallPrefetch(lambda: UtterancePrefetcher(embeddings, debounce=DEBOUNCE))


def test_ari_prefetches_for_a_call(
    embeddings: ManualPrefetchingEmbeddings, calls: CallPrefetch
) -> None:
    calls.on_event(_ari("StasisStart", args=[]))
    calls.on_event(_ari("ChannelTalkingStarted"))
    calls.on_transcript(CHANNEL, "how much", final=False)
    calls.on_transcript(CHANNEL, QUESTION, final=False)
    calls.on_event(PLAYBACK)
    calls.on_event(_ari("ChannelTalkingFinished", duration=1900))
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == [QUESTION]
    calls.on_transcript(CHANNEL, QUESTION, final=True)
    assert _embedded(embeddings) == [QUESTION]


def test_ari_barge_in_takes_back_what_was_asked_before(
    embeddings: ManualPrefetchingEmbeddings, calls: CallPrefetch
) -> None:
    calls.on_event(_ari("StasisStart", args=[]))
    calls.on_transcript(CHANNEL, QUESTION, final=True)
    calls.on_event(_ari("ChannelTalkingStarted"))
    assert _embedded(embeddings) == []


def test_ari_talking_that_is_noticed_late_leaves_its_own_words_standing(
    embeddings: ManualPrefetchingEmbeddings, calls: CallPrefetch
) -> None:
    calls.on_event(_ari("StasisStart", args=[]))
    calls.on_transcript(CHANNEL, QUESTION, final=False)
    calls.on_event(_ari("ChannelTalkingStarted"))
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == [QUESTION]


@pytest.mark.parametrize("end", ["ChannelHangupRequest", "StasisEnd", "ChannelDestroyed"])
def test_ari_hang_up_drops_what_is_pending_of_that_call_alone(
    embeddings: ManualPrefetchingEmbeddings, calls: CallPrefetch, end: str
) -> None:
    for channel in (CHANNEL, "other"):
        calls.on_event(_ari("StasisStart", channel, args=[]))
    calls.on_transcript(CHANNEL, QUESTION, final=False)
    calls.on_transcript("other", "are you open", final=False)
    calls.on_event(_ari(end, cause=16))
    calls.on_event(_ari(end, cause=16))  # as another of the three, which come one after the other
    calls.on_transcript(CHANNEL, QUESTION, final=True)  # the recogniser lags
    embeddings.time.advance(DEBOUNCE)
    assert _embedded(embeddings) == ["are you open"]


def test_ari_keeps_nothing_of_calls_that_ended(
    embeddings: ManualPrefetchingEmbeddings, calls: CallPrefetch
) -> None:
    for number in range(100):
        calls.on_event(_ari("StasisStart", str(number), args=[]))
        calls.on_event(_ari("ChannelTalkingStarted", "a channel that is not ours"))
        calls.on_event(_ari("StasisEnd", str(number)))
    assert calls._calls == {}
