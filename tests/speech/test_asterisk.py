"""The adapter for Asterisk's REST interface, fed with events as its WebSocket brings them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from examples.integrations.asterisk_ari import CallPrefetch
from prefetch_embeddings import UtterancePrefetcher
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings

Manual = Callable[..., ManualPrefetchingEmbeddings]

QUESTION = "how much is a ticket to the zoo?"
DEBOUNCE = 0.4


@pytest.fixture
def embeddings(manual: Manual, model: ScriptedEmbeddings) -> Iterator[ManualPrefetchingEmbeddings]:
    embeddings = manual(model)
    yield embeddings
    embeddings.time.advance(DEBOUNCE)
    assert embeddings.time.calls_to_come == 0, "the timer keeps what nobody needs"


def _embedded(embeddings: ManualPrefetchingEmbeddings) -> list[str]:
    """Run what is queued; return the texts embedded so far."""
    embeddings.executor.run_all()
    model = embeddings.underlying_embeddings
    assert isinstance(model, ScriptedEmbeddings)
    return [text for _, texts in model.calls for text in texts]


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
    assert calls.take_turn(CHANNEL) == QUESTION
    calls.on_event(_ari("ChannelTalkingStarted"))
    assert _embedded(embeddings) == []


def test_ari_talking_that_is_noticed_late_leaves_its_own_words_standing(
    embeddings: ManualPrefetchingEmbeddings, calls: CallPrefetch
) -> None:
    calls.on_event(_ari("StasisStart", args=[]))
    calls.on_transcript(CHANNEL, QUESTION, final=False)
    calls.on_event(_ari("ChannelTalkingStarted"))
    calls.on_event(_ari("ChannelTalkingFinished", duration=1900))
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


def test_ari_joins_the_final_segments_of_a_turn_and_of_no_more(
    embeddings: ManualPrefetchingEmbeddings, calls: CallPrefetch
) -> None:
    calls.on_event(_ari("StasisStart", args=[]))
    for turn in (["how much is", "a ticket", "to the zoo?"], ["and for", "a child?"]):
        calls.on_event(_ari("ChannelTalkingStarted"))
        for segment in turn:
            calls.on_transcript(CHANNEL, segment, final=False)
            calls.on_transcript(CHANNEL, segment, final=True)
        calls.on_event(_ari("ChannelTalkingFinished", duration=1900))
        embeddings.time.advance(DEBOUNCE)
        question = calls.take_turn(CHANNEL)
        assert question == " ".join(turn)
        assert _embedded(embeddings)[-1] == question
        embeddings.embed_query(question)
    assert _embedded(embeddings) == ["how much is a ticket to the zoo?", "and for a child?"]
    assert embeddings.stats().query_ready == 2
    assert calls.take_turn(CHANNEL) == ""


def test_ari_turn_that_is_taken_while_the_caller_talks_is_prefetched(
    embeddings: ManualPrefetchingEmbeddings, calls: CallPrefetch
) -> None:
    calls.on_event(_ari("StasisStart", args=[]))
    calls.on_event(_ari("ChannelTalkingStarted"))
    calls.on_transcript(CHANNEL, QUESTION, final=True)
    assert _embedded(embeddings) == []
    assert calls.take_turn(CHANNEL) == QUESTION
    assert _embedded(embeddings) == [QUESTION]


def test_ari_without_talk_detect_of_use_goes_by_the_transcripts(
    embeddings: ManualPrefetchingEmbeddings,
) -> None:
    calls = CallPrefetch(
        lambda: UtterancePrefetcher(embeddings, debounce=DEBOUNCE), speech_signals=False
    )
    calls.on_event(_ari("StasisStart", args=[]))
    calls.on_event(_ari("ChannelTalkingStarted"))
    calls.on_transcript(CHANNEL, QUESTION, final=True)
    assert _embedded(embeddings) == [QUESTION], "2.5 s before the talking is called finished"


def test_ari_knows_nothing_of_a_turn_in_a_call_that_has_ended(calls: CallPrefetch) -> None:
    assert calls.take_turn(CHANNEL) == ""
