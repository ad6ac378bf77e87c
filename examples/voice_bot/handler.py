"""One caller's side of the bot: from what the recogniser hears to the answer's audio."""

import asyncio
import contextlib
import logging
import time
from typing import Protocol

from examples.voice_bot.agent import Agent
from prefetch_embeddings import UtterancePrefetcher

log = logging.getLogger(__name__)

PAUSE_BEFORE_FILLER = 0.20
"""Seconds of silence before the filler, so that it does not fall into the caller's last word."""

FILLER_FROM = 0.30
"""Seconds of expected wait from which the filler is played.

The phrase itself takes 0.8 s. Where the documents are there, or nearly, the caller hears the answer
sooner without it.
"""


class TextToSpeech(Protocol):
    """What the handler needs of speech synthesis."""

    async def synthesise(self, text: str) -> bytes:
        """The text as audio."""
        ...


class Channel(Protocol):
    """What the handler needs of the telephone channel."""

    async def play(self, audio: bytes) -> None:
        """Play audio to the caller, to its end, or until the caller of `play` is cancelled."""
        ...


class StasisHandler:
    """Handles one call: what the recogniser hears, the caller's barging in, and the end.

    A turn is a task of its own. Barge-in and hang-up cancel it, wherever it is; the retrieval
    that it may have been waiting for goes on by itself and troubles nobody.

    All methods are to be called on the event loop.

    Args:
        agent: Answers the questions.
        channel: The caller's channel.
        tts: Speaks the answers.
        kb: The knowledge base that the caller's questions are put to.
        filler: The audio of the phrase that bridges the wait, such as "one moment, please".
        speech: Takes in partial transcripts; `agent.listen(kb)`. None to prefetch at the final one.
        pause: Seconds of silence before the filler.
        filler_from: Seconds of expected wait from which the filler is played; 0.0 for always.
    """

    def __init__(
        self,
        agent: Agent,
        channel: Channel,
        tts: TextToSpeech,
        *,
        kb: str,
        filler: bytes,
        speech: UtterancePrefetcher | None = None,
        pause: float = PAUSE_BEFORE_FILLER,
        filler_from: float = FILLER_FROM,
    ) -> None:
        self._agent = agent
        self._channel = channel
        self._tts = tts
        self._kb = kb
        self._filler = filler
        self._speech = speech
        self._pause = pause
        self._filler_from = filler_from
        self._turns: set[asyncio.Task[None]] = set()  # one, and those that are being cancelled
        self._hung_up = False

    def on_partial_transcript(self, text: str) -> None:
        """Called by the recogniser while the caller speaks, with the whole sentence so far."""
        if self._speech is not None and not self._hung_up:
            self._speech.on_partial(normalise(text))

    def on_speech_started(self) -> None:
        """Called by the voice activity detector: the caller speaks."""
        if self._speech is not None and not self._hung_up:
            self._speech.on_speech_started()

    def on_speech_stopped(self) -> None:
        """Called by the voice activity detector: the caller is silent."""
        if self._speech is not None and not self._hung_up:
            self._speech.on_speech_stopped()

    def on_final_transcript(self, text: str) -> None:
        """Called by the recogniser when the caller has finished a sentence; begins a turn."""
        question = normalise(text)
        if self._hung_up:
            return
        if not question:  # it was a noise, whatever the partial transcripts made of it
            if self._speech is not None:
                self._speech.on_final(question)
            return
        self._stop_talking()
        turn = asyncio.create_task(self._process_user_text(question))
        self._turns.add(turn)
        turn.add_done_callback(self._turns.discard)
        turn.add_done_callback(_log_failure)

    def on_barge_in(self) -> None:
        """Called when the caller begins to speak while the bot does: the turn is void."""
        if self._speech is not None:
            self._speech.reset()
        self._stop_talking()

    async def on_hang_up(self) -> None:
        """Called when the call has ended; returns when nothing of it is left."""
        self._hung_up = True
        self.on_barge_in()
        await self.turn_over()

    async def turn_over(self) -> None:
        """Wait until the bot has nothing more to say."""
        if self._turns:
            await asyncio.wait(self._turns)

    def _stop_talking(self) -> None:
        for turn in self._turns:
            turn.cancel()

    async def _process_user_text(self, question: str) -> None:
        heard = time.perf_counter()
        # The question is known from here on; everything until the chain asks for its documents
        # is time that the retrieval can use.
        if self._speech is None:
            self._agent.ensure_prefetched_embedding(question, self._kb)
        else:
            self._speech.on_final(question)  # the same, if no partial transcript has done it

        await asyncio.sleep(self._pause)
        if self._agent.expected_wait(question, self._kb) >= self._filler_from:
            await self._channel.play(self._filler)

        retrieval = "ready" if self._agent.is_ready(question, self._kb) else "still to come"
        first = True
        answer = self._agent.get_response_generator(question, self._kb)
        async with contextlib.aclosing(answer) as sentences:
            async for sentence in sentences:
                audio = await self._tts.synthesise(sentence)
                if first:
                    seconds = time.perf_counter() - heard
                    log.info("FIRST AUDIO PLAYED after %.3f s, retrieval %s", seconds, retrieval)
                    first = False
                await self._channel.play(audio)


def normalise(text: str) -> str:
    """A transcript with its white space folded: the text that is prefetched and retrieved with."""
    return " ".join(text.split())


def _log_failure(turn: asyncio.Task[None]) -> None:
    if not turn.cancelled() and (error := turn.exception()) is not None:
        log.error("a turn failed", exc_info=error)
