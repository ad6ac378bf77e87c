"""Pipecat: a frame processor that prefetches what the user is about to ask.

Checked with pipecat-ai 1.14. It goes between the recogniser and the user's context aggregator:

    speech = UtterancePrefetcher.for_many_partials(embeddings)
    Pipeline([transport.input(), stt, PrefetchProcessor(speech), user_aggregator, ...])
"""

from pipecat.frames import frames
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.utils.string import TextPartForConcatenation, concatenate_aggregated_text

from prefetch_embeddings import UtterancePrefetcher


class PrefetchProcessor(FrameProcessor):
    """Passes every frame on as it is, and prefetches from the transcripts among them.

    A recogniser may cut a turn into several final segments. They are joined as the aggregator
    joins them, so that the last text prefetched is the user's message, character for character.
    Any segment may be the last, and is prefetched at once: a turn of three costs three calls.

    Args:
        speech: For this conversation alone.
        partials: What to take as a partial transcript: `EagerTranscriptionFrame` for a recogniser
            that predicts the end of a turn, together with `for_eager_turn_ends`.
    """

    def __init__(
        self,
        speech: UtterancePrefetcher,
        partials: type[frames.TextFrame] = frames.InterimTranscriptionFrame,
    ) -> None:
        super().__init__()
        self._speech = speech
        self._partials = partials
        self._segments: list[TextPartForConcatenation] = []  # the final ones of this turn
        self._turn_has_words = False
        self._user_is_muted = False

    async def process_frame(self, frame: frames.Frame, direction: FrameDirection) -> None:
        """Look at a frame and pass it on."""
        await super().process_frame(frame, direction)
        if isinstance(frame, frames.TranscriptionFrame | self._partials):
            self._transcript(frame)
        elif isinstance(frame, frames.UserStoppedSpeakingFrame):  # by the aggregator: turn is over
            self._segments.clear()
            self._turn_has_words = False
        elif isinstance(frame, frames.InterruptionFrame):
            if not self._turn_has_words:  # else it was this very turn's words that interrupted
                self._speech.reset()
        elif isinstance(frame, frames.UserMuteStartedFrame | frames.UserMuteStoppedFrame):
            self._user_is_muted = isinstance(frame, frames.UserMuteStartedFrame)
        elif isinstance(frame, frames.EndFrame | frames.CancelFrame):
            self._speech.reset()
        await self.push_frame(frame, direction)

    def _transcript(self, frame: frames.TextFrame) -> None:
        if self._user_is_muted or not frame.text.strip():  # the aggregator leaves these out, too
            return
        self._turn_has_words = True
        segment = TextPartForConcatenation(frame.text, frame.includes_inter_frame_spaces)
        turn_so_far = concatenate_aggregated_text([*self._segments, segment])
        if isinstance(frame, frames.TranscriptionFrame):
            self._segments.append(segment)
            self._speech.on_final(turn_so_far)
        else:
            self._speech.on_partial(turn_so_far)
