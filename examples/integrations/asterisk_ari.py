"""Asterisk: prefetches what callers are about to ask, next to a client of its REST interface (ARI).

Written to the event models that Asterisk publishes (the same from 16 to 22), and not run against
a live one; no package is needed. It takes the events as the WebSocket brings them, and the
transcripts from whatever recogniser listens to the call (which gets the audio by `externalMedia`):

    calls = CallPrefetch(lambda: UtterancePrefetcher.for_few_partials(embeddings))
    async for message in websocket:  # ws://asterisk:8088/ari/events?app=bot&api_key=...
        calls.on_event(json.loads(message))

    recogniser.on_result(lambda text, final: calls.on_transcript(channel_id, text, final=final))

Barge-in needs ``Set(TALK_DETECT(set)=)`` in the dialplan before ``Stasis(bot)``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefetch_embeddings import UtterancePrefetcher


@dataclass
class _Call:
    speech: UtterancePrefetcher
    is_mid_utterance: bool = False  # whether there was a partial transcript since the last final


class CallPrefetch:
    """Keeps an `UtterancePrefetcher` for each call in the application.

    Use it from the event loop that reads the WebSocket.

    Args:
        new_speech: Makes one for a call that comes in.
    """

    def __init__(self, new_speech: Callable[[], UtterancePrefetcher]) -> None:
        self._new_speech = new_speech
        self._calls: dict[str, _Call] = {}  # by the caller's channel

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take in an ARI event; those that say nothing about a call's turns are ignored."""
        channel_id = event.get("channel", {}).get("id")
        match event["type"]:
            case "StasisStart":
                self._calls[channel_id] = _Call(self._new_speech())
            case "ChannelTalkingStarted":  # late: the recogniser may have heard words before
                call = self._calls.get(channel_id)
                if call is not None and not call.is_mid_utterance:
                    call.speech.reset()  # the caller talks into the answer
            case "ChannelHangupRequest" | "StasisEnd" | "ChannelDestroyed":
                call = self._calls.pop(channel_id, None)
                if call is not None:
                    call.speech.reset()

    def on_transcript(self, channel_id: str, text: str, *, final: bool) -> None:
        """Take in what the recogniser heard.

        Args:
            channel_id: The caller's channel. One that has hung up is ignored: recognisers lag.
            text: The whole utterance so far; when final, exactly as the retriever will get it.
            final: Whether the utterance is over.
        """
        call = self._calls.get(channel_id)
        if call is None:
            return
        call.is_mid_utterance = not final
        if final:
            call.speech.on_final(text)
        else:
            call.speech.on_partial(text)
