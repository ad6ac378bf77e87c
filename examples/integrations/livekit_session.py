"""LiveKit Agents: prefetches what the user is about to ask, from a session's events.

Checked with livekit-agents 1.8. The retriever is asked where LiveKit says so, with the user's text:

    session = AgentSession(...)
    SessionPrefetch(session, UtterancePrefetcher.for_many_partials(embeddings))

    class Assistant(Agent):
        async def on_user_turn_completed(self, turn_ctx, new_message):
            documents = await retriever.ainvoke(new_message.text_content)
"""

from typing import Any

from livekit.agents import (
    AgentSession,
    ConversationItemAddedEvent,
    UserInputTranscribedEvent,
    UserStateChangedEvent,
)
from livekit.agents.llm import ChatMessage

from prefetch_embeddings import UtterancePrefetcher


class SessionPrefetch:
    """Listens to a session, and prefetches from its transcripts.

    A turn may come in several final segments. They are joined as the session joins them, so that
    the last text prefetched is the user's message, character for character. Any segment may be the
    last, and is prefetched at once: a turn of three costs three calls.

    Args:
        session: Whose events to listen to.
        speech: For this session alone.
    """

    def __init__(self, session: AgentSession[Any], speech: UtterancePrefetcher) -> None:
        self._speech = speech
        self._segments = ""  # the final ones of this turn, joined
        self._turn_has_words = False
        session.on("user_input_transcribed", self._on_transcript)
        session.on("conversation_item_added", self._on_message)
        session.on("user_state_changed", self._on_user_state)
        session.on("close", self.clear_user_turn)

    def clear_user_turn(self) -> None:
        """Forget the turn so far, as the session's method of that name does.

        Call it together with that one, and before an agent raises `StopResponse`: a turn that gets
        no reply has no event of its own.
        """
        self._segments = ""
        self._turn_has_words = False
        self._speech.reset()

    def _on_transcript(self, event: UserInputTranscribedEvent) -> None:
        if not event.transcript:
            return
        self._turn_has_words = True
        turn_so_far = f"{self._segments} {event.transcript}".lstrip()
        if event.is_final:
            self._segments = turn_so_far
            self._speech.on_final(turn_so_far)
        else:
            self._speech.on_partial(turn_so_far)

    def _on_message(self, event: ConversationItemAddedEvent) -> None:
        """The user's message ends the turn. What was said after it begins the next one."""
        if isinstance(event.item, ChatMessage) and event.item.role == "user":
            message = event.item.raw_text_content
            self._segments = self._segments.partition(message)[2] if message else ""
            self._turn_has_words = bool(self._segments)

    def _on_user_state(self, event: UserStateChangedEvent) -> None:
        """Who begins to speak while the last turn is being answered voids that answer."""
        if event.new_state == "speaking" and not self._turn_has_words:
            self._speech.reset()
