"""A Pipecat pipeline with a recogniser and a language model that play a script.

The "audio" that comes in is JSON: what the recogniser is to say of it. All between it and the
language model's answer is Pipecat's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.retrievers import BaseRetriever
from pipecat.frames import frames
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import (
    LLMContextAggregatorPair,
    LLMUserAggregator,
    LLMUserAggregatorParams,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.llm_service import LLMService
from pipecat.services.settings import LLMSettings, STTSettings
from pipecat.services.stt_service import STTService
from pipecat.turns.user_mute import BaseUserMuteStrategy
from pipecat.turns.user_turn_strategies import UserTurnStrategies
from pipecat.workers.runner import WorkerRunner

from examples.integrations.pipecat_processor import PrefetchProcessor, RetrievalProcessor

if TYPE_CHECKING:
    from prefetch_embeddings import UtterancePrefetcher

PATIENCE = 30.0

_STT = STTSettings(model="script", language=None)
_LLM = LLMSettings(
    model="script",
    system_instruction=None,
    temperature=None,
    max_tokens=None,
    top_p=None,
    top_k=None,
    frequency_penalty=None,
    presence_penalty=None,
    seed=None,
)


class ScriptedSTT(STTService):
    """Says of the audio what the audio says."""

    def __init__(self) -> None:
        super().__init__(settings=_STT, ttfs_p99_latency=0.0)

    async def run_stt(self, audio: bytes) -> AsyncGenerator[frames.Frame | None, None]:
        """Recognise."""
        heard = json.loads(audio)
        kind = {
            "partial": frames.InterimTranscriptionFrame,
            "eager": frames.EagerTranscriptionFrame,
        }.get(heard["e"])
        if kind is None:
            yield frames.TranscriptionFrame(heard["text"], "caller", "", finalized=True)
        else:
            yield kind(heard["text"], "caller", "")


class ScriptedLLM(LLMService[Any]):
    """Answers a context with what comes next."""

    def __init__(self, answer: Callable[[LLMContext], str]) -> None:
        super().__init__(settings=_LLM)
        self._answer = answer

    async def process_frame(self, frame: frames.Frame, direction: FrameDirection) -> None:
        """Answer."""
        await super().process_frame(frame, direction)
        if not isinstance(frame, frames.LLMContextFrame):
            await self.push_frame(frame, direction)
            return
        await self.push_frame(frames.LLMFullResponseStartFrame())
        await self._push_llm_text(self._answer(frame.context))
        await self.push_frame(frames.LLMFullResponseEndFrame())


class _Ends(FrameProcessor):
    """An end of the pipeline: keeps what comes, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.came: asyncio.Queue[frames.Frame] = asyncio.Queue()

    async def process_frame(self, frame: frames.Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        self.came.put_nowait(frame)
        await self.push_frame(frame, direction)


class Bot:
    """A running pipeline."""

    def __init__(self, worker: PipelineWorker, context: LLMContext, end: _Ends) -> None:
        self.worker = worker
        self.context = context
        self._end = end

    async def hears(self, kind: str, text: str) -> None:
        """Have the recogniser say something: "partial", "eager" or "final"."""
        audio = json.dumps({"e": kind, "text": text}).encode()
        await self.worker.queue_frame(frames.InputAudioRawFrame(audio, 16_000, 1))

    async def send(self, *sent: frames.Frame) -> None:
        """Send frames from the front."""
        for frame in sent:
            await self.worker.queue_frame(frame)

    async def comes(self, kind: type[frames.Frame]) -> frames.Frame:
        """Wait until a frame of a kind has come through."""
        async with asyncio.timeout(PATIENCE):
            while not isinstance(frame := await self._end.came.get(), kind):
                pass
        return frame

    def messages(self) -> list[str]:
        """The user's messages so far."""
        return [
            str(message["content"])
            for message in self.context.get_messages()
            if isinstance(message, dict) and message["role"] == "user"
        ]


@contextlib.asynccontextmanager
async def pipecat_bot(
    retriever: BaseRetriever,
    strategies: UserTurnStrategies,
    *,
    new_processor: Callable[[LLMUserAggregator], FrameProcessor] | None,
    answer: Callable[[LLMContext], str] = lambda _: "nine euros",
    mute: Sequence[BaseUserMuteStrategy] = (),
) -> AsyncIterator[Bot]:
    """Run a bot.

    Args:
        retriever: Is asked for each message of the user.
        strategies: When turns begin and end.
        new_processor: Makes what goes before the user's aggregator; None for nothing.
        answer: What the language model says.
        mute: When the user is not listened to.
    """
    context = LLMContext()
    pair = LLMContextAggregatorPair(
        context,
        user_params=LLMUserAggregatorParams(
            user_turn_strategies=strategies, user_mute_strategies=list(mute)
        ),
    )
    user, assistant = pair.user(), pair.assistant()
    before = [] if new_processor is None else [new_processor(user)]
    llm, end = ScriptedLLM(answer), _Ends()
    stages = [ScriptedSTT(), *before, user, RetrievalProcessor(retriever), llm, end, assistant]
    worker = PipelineWorker(Pipeline(stages), cancel_on_idle_timeout=False, enable_rtvi=False)
    started = asyncio.Event()

    async def on_started(*_: object) -> None:
        started.set()

    worker.add_event_handler("on_pipeline_started", on_started)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    running = asyncio.create_task(runner.run())
    try:
        await asyncio.wait_for(started.wait(), PATIENCE)
        yield Bot(worker, context, end)
    finally:
        await worker.queue_frame(frames.EndFrame())
        await asyncio.wait_for(running, PATIENCE)


def prefetching(
    speech: UtterancePrefetcher, **options: Any
) -> Callable[[LLMUserAggregator], PrefetchProcessor]:
    """Return what makes the adapter for a user's aggregator."""
    return lambda user: PrefetchProcessor(speech, user, **options)
