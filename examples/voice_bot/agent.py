"""The agent: answers a question from the knowledge base, and embeds it ahead of time."""

import logging
import re
from collections.abc import AsyncIterator

from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.vectorstores import VectorStore

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome

log = logging.getLogger(__name__)

PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer the caller in one or two short sentences, from this text:\n\n{context}"),
        ("human", "{question}"),
    ]
)
_SENTENCE = re.compile(r"(.+?[.!?;:])\s+", re.DOTALL)


class Agent:
    """Answers questions over one vector store.

    Args:
        store: The knowledge base. With prefetching, its embedding function is `prefetching`.
        llm: The chat model that words the answer.
        prefetching: The embeddings that can start early; None for a bot that does not prefetch.
    """

    def __init__(
        self, store: VectorStore, llm: BaseChatModel, prefetching: PrefetchingEmbeddings | None
    ) -> None:
        self._prefetching = prefetching
        retriever = store.as_retriever(search_kwargs={"k": 3})
        self._chain: Runnable[str, str] = (
            {"context": retriever | _joined, "question": RunnablePassthrough()}
            | PROMPT
            | llm
            | StrOutputParser()
        )

    def prefetch_query_embedding(self, text: str) -> PrefetchOutcome | None:
        """Start embedding a question, unless it is done or under way. Returns at once."""
        if self._prefetching is None:
            return None
        return self._prefetching.prefetch(text)

    def ensure_prefetched_embedding(self, text: str) -> None:
        """Have the embedding under way if it can be; the answer does not depend on it."""
        outcome = self.prefetch_query_embedding(text)
        if outcome is PrefetchOutcome.DROPPED:
            log.warning("not prefetched: too much is under way, or the question is blank")

    async def wait_for_prefetch(self, text: str, timeout: float | None = None) -> bool:
        """Wait until a question's embedding is ready.

        The chain needs no such wait, since its query joins what is under way; this is for a bot
        that wants to do something else meanwhile.

        Args:
            text: The question.
            timeout: Seconds to wait at most.

        Returns:
            Whether it is ready.
        """
        if self._prefetching is None:
            return False
        return await self._prefetching.await_for_prefetch(text, timeout)

    async def get_response_generator(self, text: str) -> AsyncIterator[str]:
        """Answer a question, sentence by sentence, so that speech can start with the first."""
        spoken = ""
        async for piece in self._chain.astream(text):
            spoken += piece
            while sentence := _SENTENCE.match(spoken):
                yield sentence[1]
                spoken = spoken[sentence.end() :]
        if spoken.strip():
            yield spoken


def _joined(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)
