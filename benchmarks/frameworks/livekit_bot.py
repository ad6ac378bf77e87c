"""A LiveKit session with a recogniser, a voice detector and a language model that play a script.

The "audio" that comes in is JSON: what the recogniser and the detector are to say of it. All
between them and the language model's answer is LiveKit's own; there is no room and no server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Never

from livekit import rtc
from livekit.agents import (
    Agent,
    AgentSession,
    APIConnectOptions,
    ChatMessage,
    ConversationItemAddedEvent,
    TurnHandlingOptions,
    stt,
    vad,
)
from livekit.agents.language import LanguageCode
from livekit.agents.llm import LLM
from livekit.agents.types import DEFAULT_API_CONNECT_OPTIONS
from livekit.agents.voice.io import AudioInput

RATE = 16_000
PATIENCE = 30.0

_EVENTS = {
    "partial": stt.SpeechEventType.INTERIM_TRANSCRIPT,
    "final": stt.SpeechEventType.FINAL_TRANSCRIPT,
}
_DETECTED = {
    "speech_started": vad.VADEventType.START_OF_SPEECH,
    "speech_stopped": vad.VADEventType.END_OF_SPEECH,
}


def _frame(said: dict[str, str]) -> rtc.AudioFrame:
    data = json.dumps(said).encode()
    data += b" " * (len(data) % 2)
    return rtc.AudioFrame(data, RATE, 1, len(data) // 2)


def _said(frame: Any) -> dict[str, str]:
    data = bytes(getattr(frame, "data", b""))
    said: dict[str, str] = json.loads(data) if data.startswith(b"{") else {"e": "silence"}
    return said


class ScriptedSTT(stt.STT[str]):
    """Says of the audio what the audio says."""

    def __init__(self) -> None:
        super().__init__(capabilities=stt.STTCapabilities(streaming=True, interim_results=True))

    async def _recognize_impl(self, *_: Any, **__: Any) -> Never:
        raise NotImplementedError

    def stream(
        self, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS, **_: Any
    ) -> Any:
        return _Recognising(stt=self, conn_options=conn_options)


class _Recognising(stt.RecognizeStream):
    async def _run(self) -> None:
        async for frame in self._input_ch:
            said = _said(frame)
            if said["e"] in _EVENTS:
                data = stt.SpeechData(LanguageCode("en"), said["text"])
                self._event_ch.send_nowait(stt.SpeechEvent(_EVENTS[said["e"]], alternatives=[data]))


class ScriptedVAD(vad.VAD):
    """Hears what the audio says."""

    def __init__(self) -> None:
        super().__init__(capabilities=vad.VADCapabilities(update_interval=0.03))

    def stream(self) -> vad.VADStream:
        return _Detecting(self)


class _Detecting(vad.VADStream):
    async def _main_task(self) -> None:
        async for frame in self._input_ch:
            said = _said(frame)
            if said["e"] in _DETECTED:
                self._event_ch.send_nowait(
                    vad.VADEvent(
                        _DETECTED[said["e"]],
                        samples_index=0,
                        timestamp=0.0,
                        speech_duration=0.5,
                        silence_duration=0.0,
                        speaking=said["e"] == "speech_started",
                    )
                )


class _NoLLM(LLM[str]):
    """Lets the session reply; the agent's `llm_node` does so."""

    def chat(self, **_: Any) -> Never:
        raise AssertionError("the agent's llm_node is asked")


class _Line(AudioInput):
    """What the caller says."""

    def __init__(self) -> None:
        super().__init__(label="script")
        self.frames: asyncio.Queue[rtc.AudioFrame] = asyncio.Queue()

    async def __anext__(self) -> rtc.AudioFrame:
        return await self.frames.get()


class Session:
    """A running session."""

    def __init__(self, session: AgentSession[None], line: _Line) -> None:
        self.session = session
        self._line = line
        self.added: asyncio.Queue[str] = asyncio.Queue()
        self.messages: list[str] = []
        session.on("conversation_item_added", self._on_item)

    def hears(self, kind: str, text: str = "") -> None:
        """Have something heard: "partial", "final", "speech_started" or "speech_stopped"."""
        self._line.frames.put_nowait(_frame({"e": kind, "text": text}))

    async def message(self) -> str:
        """Wait for the user's next message."""
        return await asyncio.wait_for(self.added.get(), PATIENCE)

    def _on_item(self, event: ConversationItemAddedEvent) -> None:
        if isinstance(event.item, ChatMessage) and event.item.role == "user":
            text = event.item.raw_text_content or ""
            self.messages.append(text)
            self.added.put_nowait(text)


@contextlib.asynccontextmanager
async def livekit_session(
    agent: Agent,
    *,
    prefetch: Callable[[AgentSession[None]], object],
    min_delay: float = 0.0,
) -> AsyncIterator[Session]:
    """Run a session.

    Args:
        agent: Whose `llm_node` answers.
        prefetch: Is called with the session before it starts.
        min_delay: Seconds from the detector's "stopped" to the end of the turn.
    """
    session = AgentSession[None](
        vad=ScriptedVAD(),
        stt=ScriptedSTT(),
        llm=_NoLLM(),
        session_close_transcript_timeout=0.0,
        turn_handling=TurnHandlingOptions(
            turn_detection="vad",
            endpointing={"mode": "fixed", "min_delay": min_delay, "max_delay": min_delay},
            preemptive_generation={"enabled": False},
        ),
    )
    line = _Line()
    session.input.audio = line
    prefetch(session)
    running = Session(session, line)
    await session.start(agent)
    try:
        yield running
    finally:
        await session.aclose()
