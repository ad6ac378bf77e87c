"""One caller's side of the bot: from a final transcript to the answer's audio."""

import asyncio
import logging
import time
from typing import Protocol

from examples.voice_bot.agent import Agent

log = logging.getLogger(__name__)

PAUSE_BEFORE_FILLER = 0.20
"""Seconds of silence before the filler, so that it does not fall into the caller's last word."""


class TextToSpeech(Protocol):
    """What the handler needs of speech synthesis."""

    async def synthesise(self, text: str) -> bytes:
        """The text as audio."""
        ...


class Channel(Protocol):
    """What the handler needs of the telephone channel."""

    async def play(self, audio: bytes) -> None:
        """Play audio to the caller, to its end."""
        ...


class StasisHandler:
    """Handles what the recogniser hears on one call.

    Args:
        agent: Answers the questions.
        channel: The caller's channel.
        tts: Speaks the answers.
        filler: The audio of the phrase that bridges the wait, such as "one moment, please".
        pause: Seconds of silence before the filler.
    """

    def __init__(
        self,
        agent: Agent,
        channel: Channel,
        tts: TextToSpeech,
        *,
        filler: bytes,
        pause: float = PAUSE_BEFORE_FILLER,
    ) -> None:
        self._agent = agent
        self._channel = channel
        self._tts = tts
        self._filler = filler
        self._pause = pause

    async def on_final_transcript(self, text: str) -> None:
        """Called by the recogniser when the caller has finished a sentence."""
        if text.strip():
            await self._process_user_text(text)

    async def _process_user_text(self, text: str) -> None:
        heard = time.perf_counter()
        question = normalise(text)
        # The question is known from here on; everything until the chain asks for its embedding
        # is time that the embedding can use.
        self._agent.ensure_prefetched_embedding(question)

        await asyncio.sleep(self._pause)
        await self._channel.play(self._filler)

        first = True
        async for sentence in self._agent.get_response_generator(question):
            audio = await self._tts.synthesise(sentence)
            if first:
                log.info("FIRST AUDIO PLAYED after %.3f s", time.perf_counter() - heard)
                first = False
            await self._channel.play(audio)


def normalise(text: str) -> str:
    """A transcript with its white space folded: the text that is prefetched and retrieved with."""
    return " ".join(text.split())
