"""Pipecat: prefetches what the user is about to ask, and retrieves for it.

Checked with pipecat-ai 1.14. The first processor goes before the user's context aggregator, the
second between that and the language model:

    speech = UtterancePrefetcher.for_many_partials(embeddings)  # one per conversation
    user, assistant = LLMContextAggregatorPair(context)
    Pipeline([
        transport.input(), stt,
        PrefetchProcessor(speech, user), user, RetrievalProcessor(retriever),
        llm, tts, transport.output(), assistant,
    ])
"""

from langchain_core.retrievers import BaseRetriever
from pipecat.frames import frames
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMUserAggregator
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.utils.string import TextPartForConcatenation, concatenate_aggregated_text

from prefetch_embeddings import UtterancePrefetcher
from prefetch_embeddings.replay import LoggedSpeech


class PrefetchProcessor(FrameProcessor):
    """Prefetches from what the user's aggregator makes of the transcripts; passes frames on.

    What a turn's text is, the aggregator alone decides: its turn strategies drop segments that are
    no turn, write a message while the turn stays open, keep what came too late for the next one.
    So this keeps no text of its own. Each time the aggregator has handled a frame, it asks it for
    its text; an interim transcript is what would be added to that.

    Args:
        speech: For this conversation alone.
        aggregator: The user's, of the same pipeline.
        partials: What to take as a partial transcript: `EagerTranscriptionFrame` for a recogniser
            that predicts the end of a turn, together with `for_eager_turn_ends`.
    """

    def __init__(
        self,
        speech: UtterancePrefetcher | LoggedSpeech,
        aggregator: LLMUserAggregator,
        partials: type[frames.TextFrame] = frames.InterimTranscriptionFrame,
    ) -> None:
        super().__init__()
        self._speech = speech
        self._aggregator = aggregator
        self._partials = partials
        self._user_is_speaking = False  # by the voice activity detector
        self._user_is_muted = False
        self._turn_has_words = False
        self._told = ""  # the last final text, if the user was silent then
        aggregator.add_event_handler("on_after_process_frame", self._on_handled)
        aggregator.add_event_handler("on_before_push_frame", self._on_pushed)

    async def process_frame(self, frame: frames.Frame, direction: FrameDirection) -> None:
        """Pass a frame on."""
        await super().process_frame(frame, direction)
        await self.push_frame(frame, direction)

    async def cleanup(self) -> None:
        """Drop what is pending: the conversation is over."""
        await super().cleanup()  # type: ignore[no-untyped-call]
        self._speech.reset()

    async def _on_handled(self, aggregator: LLMUserAggregator, frame: frames.Frame) -> None:
        """Look what the aggregator has made of a frame."""
        if isinstance(frame, frames.EndFrame | frames.CancelFrame):
            self._speech.reset()
        elif self._user_is_muted:
            return  # it ignores what the user says, and so do we
        elif isinstance(frame, frames.VADUserStartedSpeakingFrame):
            self._user_is_speaking = True
            self._speech.on_speech_started()
        elif isinstance(frame, frames.VADUserStoppedSpeakingFrame):
            self._user_is_speaking = False
            self._speech.on_speech_stopped()
        elif isinstance(frame, frames.TranscriptionFrame):
            turn_so_far = aggregator.aggregation_string()
            self._turn_has_words = bool(turn_so_far)
            if turn_so_far:
                self._told = "" if self._user_is_speaking else turn_so_far
            self._speech.on_final(
                turn_so_far
            )  # blank if it was dropped, or is in a message already
        elif isinstance(frame, self._partials) and frame.text.strip():
            self._turn_has_words = True
            parts = [
                TextPartForConcatenation(part, frame.includes_inter_frame_spaces)
                for part in (aggregator.aggregation_string(), frame.text)
            ]
            self._speech.on_partial(concatenate_aggregated_text(parts))

    async def _on_pushed(self, _: LLMUserAggregator, frame: frames.Frame) -> None:
        """Take in what the aggregator tells others."""
        if isinstance(frame, frames.LLMContextUserTurnFrame):  # comes twice, up and down
            self._turn_has_words = False
            if frame.text != self._told:
                self._take_message(frame.text)
        elif isinstance(frame, frames.InterruptionFrame):
            if not self._turn_has_words:  # else it was this very turn's words that interrupted
                self._speech.reset()
        elif isinstance(frame, frames.UserMuteStartedFrame | frames.UserMuteStoppedFrame):
            self._user_is_muted = isinstance(frame, frames.UserMuteStartedFrame)

    def _take_message(self, text: str) -> None:
        """Take in the user's message, whether or not the detector has heard its end."""
        self._told = text
        if self._user_is_speaking:
            self._speech.on_speech_stopped()
        self._speech.on_final(text)
        if self._user_is_speaking:
            self._speech.on_speech_started()


class RetrievalProcessor(FrameProcessor):
    """Retrieves for each message of the user, and shows the passages to the language model.

    Only the model sees them: what is retrieved for one question does not stay in the conversation.

    Args:
        retriever: Its embeddings are those that `PrefetchProcessor`'s `speech` was made with.
    """

    def __init__(self, retriever: BaseRetriever) -> None:
        super().__init__()
        self._retriever = retriever

    async def process_frame(self, frame: frames.Frame, direction: FrameDirection) -> None:
        """Pass a frame on; a context whose last message is the user's, with passages."""
        await super().process_frame(frame, direction)
        if isinstance(frame, frames.LLMContextFrame):
            frame = await self._with_passages(frame)
        await self.push_frame(frame, direction)

    async def _with_passages(self, frame: frames.LLMContextFrame) -> frames.LLMContextFrame:
        messages = frame.context.get_messages()
        last = messages[-1] if messages else None
        question = (
            last.get("content") if isinstance(last, dict) and last["role"] == "user" else None
        )
        if not isinstance(question, str) or last is None:
            return frame
        documents = await self._retriever.ainvoke(question)
        passages = "\n\n".join(document.page_content for document in documents)
        return frames.LLMContextFrame(
            context=LLMContext(
                [*messages[:-1], {"role": "developer", "content": passages}, last],
                tools=frame.context.tools,
                tool_choice=frame.context.tool_choice,
            ),
            speculation=frame.speculation,
        )
