"""LiveKit Agents: prefetches what the user is about to ask, from a session's events.

Checked with livekit-agents 1.8. The retriever is asked where LiveKit says so, with the user's text:

    speech = UtterancePrefetcher.for_many_partials(embeddings)  # one per session
    session = AgentSession(...)
    SessionPrefetch(session, speech)
    await session.start(RetrievingAgent(retriever, instructions="..."))
"""

import contextlib
from typing import Any

from langchain_core.retrievers import BaseRetriever
from livekit.agents import (
    Agent,
    AgentSession,
    ChatContext,
    ChatMessage,
    ConversationItemAddedEvent,
    UserInputTranscribedEvent,
    UserStateChangedEvent,
)

from prefetch_embeddings import UtterancePrefetcher
from prefetch_embeddings.replay import LoggedSpeech


class SessionPrefetch:
    """Listens to a session, and prefetches from its transcripts.

    LiveKit joins the final segments of a turn, and tells their text when the turn is over: in
    `Agent.on_user_turn_completed`, which is called for every turn, also for one that
    `StopResponse` leaves unanswered. So that method of each agent in charge is wrapped, and its
    message says which segments are used up. Until then they are joined as the session joins them.
    What the user types ends no spoken turn.

    Args:
        session: Whose events to listen to.
        speech: For this session alone.
    """

    def __init__(
        self, session: AgentSession[Any], speech: UtterancePrefetcher | LoggedSpeech
    ) -> None:
        self._session = session
        self._speech = speech
        self._segments = ""  # the final ones that no message of the user's has used up, joined
        self._turn_has_words = False
        self._told = ""  # the last final text, if the user was silent then
        self._message_id = ""  # of the last turn
        self._agent: Agent | None = None  # whose method is wrapped
        session.on("user_input_transcribed", self._on_transcript)
        session.on("conversation_item_added", self._on_message)
        session.on("user_state_changed", self._on_user_state)
        session.on("close", self._on_close)

    def clear_user_turn(self) -> None:
        """Forget the turn so far. Call it together with the session's method of that name."""
        self._segments = ""
        self._turn_has_words = False
        self._speech.reset()

    def _on_transcript(self, event: UserInputTranscribedEvent) -> None:
        self._wrap_agent()
        if not event.transcript:
            return
        self._turn_has_words = True
        turn_so_far = f"{self._segments} {event.transcript}".lstrip()
        if event.is_final:
            self._segments = turn_so_far
            self._told = "" if self._session.user_state == "speaking" else turn_so_far
            self._speech.on_final(turn_so_far)
        else:
            self._speech.on_partial(turn_so_far)

    def _on_user_state(self, event: UserStateChangedEvent) -> None:
        """Who begins to speak while the last turn is being answered voids that answer."""
        self._wrap_agent()
        if event.new_state != "speaking":
            self._speech.on_speech_stopped()
            return
        if not self._turn_has_words:
            self._speech.reset()
        self._speech.on_speech_started()

    def _on_message(self, event: ConversationItemAddedEvent) -> None:
        """A spoken message that no agent was asked about ends the turn, too."""
        message = event.item
        if (
            isinstance(message, ChatMessage)
            and message.role == "user"
            and message.transcript_confidence is not None  # else it was typed
        ):
            self._end_turn(message)

    def _on_turn_completed(self, message: ChatMessage) -> None:
        """Take in the text of a turn, as the retriever will be asked for it."""
        text = self._end_turn(message)
        if text and text != self._told and not self._segments:
            is_speaking = self._session.user_state == "speaking"
            if is_speaking:
                self._speech.on_speech_stopped()  # so the session has judged
            self._speech.on_final(text)
            if is_speaking:
                self._speech.on_speech_started()

    def _end_turn(self, message: ChatMessage) -> str:
        """Forget what a message has used up; what was said after it begins the next turn.

        Returns:
            The message's text; nothing if it was taken in already.
        """
        if message.id == self._message_id:
            return ""
        self._message_id = message.id
        text = message.raw_text_content or ""
        goes_on = text != "" and self._segments.startswith(text)
        self._segments = self._segments[len(text) :].lstrip() if goes_on else ""
        self._turn_has_words = bool(self._segments)
        return text

    def _on_close(self, _: object) -> None:
        self.clear_user_turn()

    def _wrap_agent(self) -> None:
        """See to it that the agent in charge says which turns it is asked about."""
        with contextlib.suppress(RuntimeError):  # the session has not started
            agent = self._session.current_agent
            if agent is not self._agent:
                self._agent = agent
                self._wrap(agent)

    def _wrap(self, agent: Agent) -> None:
        asked = agent.on_user_turn_completed

        async def on_user_turn_completed(turn_ctx: ChatContext, new_message: ChatMessage) -> None:
            self._on_turn_completed(new_message)
            await asked(turn_ctx, new_message)

        agent.on_user_turn_completed = on_user_turn_completed  # type: ignore[method-assign]


class RetrievingAgent(Agent):
    """Retrieves for each message of the user, and shows the passages to the language model.

    Only the model sees them: what is retrieved for one question does not stay in the conversation.

    Args:
        retriever: Its embeddings are those that `SessionPrefetch`'s `speech` was made with.
        **options: As any agent's.
    """

    def __init__(self, retriever: BaseRetriever, **options: Any) -> None:
        super().__init__(**options)
        self._retriever = retriever

    async def on_user_turn_completed(self, turn_ctx: ChatContext, new_message: ChatMessage) -> None:
        """Retrieve."""
        question = new_message.text_content
        if question:
            documents = await self._retriever.ainvoke(question)
            passages = "\n\n".join(document.page_content for document in documents)
            turn_ctx.add_message(role="developer", content=passages)
