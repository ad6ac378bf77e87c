"""Asterisk: prefetches what callers are about to ask, next to a client of its REST interface (ARI).

Written to the event models that Asterisk publishes (the same from 16 to 22), and not run against
a live one; no package is needed. It takes the events as the WebSocket brings them, and the
transcripts from whatever recogniser listens to the call (which gets the audio by `externalMedia`):

    calls = CallPrefetch(lambda: UtterancePrefetcher.for_few_partials(embeddings))
    async for message in websocket:  # ws://asterisk:8088/ari/events?app=bot&api_key=...
        calls.on_event(json.loads(message))

    recogniser.on_result(lambda text, final: calls.on_transcript(channel_id, text, final=final))

    question = calls.take_turn(channel_id)  # where the bot decides to answer
    documents = await retriever.ainvoke(question)

The dialplan needs ``Set(TALK_DETECT(set)=300)`` before ``Stasis(bot)``, or the bot sets that
variable by ARI. The number is the silence, in milliseconds, after which the caller counts as
silent. Without it Asterisk waits 2.5 s, longer than any recogniser: then make it
``speech_signals=False``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefetch_embeddings import UtterancePrefetcher
from prefetch_embeddings.replay import LoggedSpeech


@dataclass
class _Call:
    speech: UtterancePrefetcher | LoggedSpeech
    segments: str = ""  # the final ones of this turn, joined
    turn_has_words: bool = False
    is_talking: bool = False
    told: str = ""  # the last final text, if the caller was silent then


class CallPrefetch:
    """Keeps an `UtterancePrefetcher` and the turn's text for each call in the application.

    Asterisk knows no turns. So this keeps the only copy of the text, and the bot takes it from here
    (`take_turn`). Use it from the event loop that reads the WebSocket.

    Args:
        new_speech: Makes one for a call that comes in.
        speech_signals: Whether TALK_DETECT has a silence of less than about half a second.
    """

    def __init__(
        self,
        new_speech: Callable[[], UtterancePrefetcher | LoggedSpeech],
        *,
        speech_signals: bool = True,
    ) -> None:
        self._new_speech = new_speech
        self._speech_signals = speech_signals
        self._calls: dict[str, _Call] = {}  # by the caller's channel

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take in an ARI event; those that say nothing about a call's turns are ignored."""
        channel_id = event.get("channel", {}).get("id")
        if event["type"] == "StasisStart":
            self._calls[channel_id] = _Call(self._new_speech())
            return
        call = self._calls.get(channel_id)
        if call is None:
            return
        match event["type"]:
            case "ChannelTalkingStarted":  # late: the recogniser may have heard words before
                if not call.turn_has_words:
                    call.speech.reset()  # the caller talks into the answer
                if self._speech_signals:
                    call.is_talking = True
                    call.speech.on_speech_started()
            case "ChannelTalkingFinished":
                if self._speech_signals:
                    call.is_talking = False
                    call.speech.on_speech_stopped()
            case "ChannelHangupRequest" | "StasisEnd" | "ChannelDestroyed":
                del self._calls[channel_id]
                call.speech.reset()

    def on_transcript(self, channel_id: str, text: str, *, final: bool) -> None:
        """Take in what the recogniser heard.

        Args:
            channel_id: The caller's channel. One that has hung up is ignored: recognisers lag.
            text: What was heard since the last final segment.
            final: Whether this segment is final.
        """
        call = self._calls.get(channel_id)
        if call is None or not text.strip():
            return
        call.turn_has_words = True
        turn_so_far = f"{call.segments} {text}".strip()
        if final:
            call.segments = turn_so_far
            call.told = "" if call.is_talking else turn_so_far
            call.speech.on_final(turn_so_far)
        else:
            call.speech.on_partial(turn_so_far)

    def take_turn(self, channel_id: str) -> str:
        """Return what the caller has said in this turn, and begin the next one.

        Ask the retriever with exactly this text.
        """
        call = self._calls.get(channel_id)
        if call is None:
            return ""
        question, call.segments = call.segments, ""
        call.turn_has_words = False
        if question and question != call.told:
            if call.is_talking:
                call.speech.on_speech_stopped()  # so the bot has judged
            call.speech.on_final(question)
            if call.is_talking:
                call.speech.on_speech_started()
        return question
