"""The agent: answers questions from several knowledge bases, and retrieves ahead of time."""

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import cast

from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.vectorstores import VectorStore

from prefetch_embeddings import (
    PrefetchingEmbeddings,
    PrefetchingRetriever,
    PrefetchOutcome,
    UtterancePrefetcher,
)

log = logging.getLogger(__name__)

PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer the caller in one or two short sentences, from this text:\n\n{context}"),
        ("human", "{question}"),
    ]
)
_SENTENCE = re.compile(r"(.+?[.!?;:])\s+", re.DOTALL)


@dataclass(frozen=True)
class KnowledgeBase:
    """One collection of passages.

    Args:
        store: The passages. Where embeddings start early, they are its embedding function.
        ahead: What can start early: the store's `PrefetchingEmbeddings`, the same object for all
            knowledge bases of one embedding model, another for each model; or a
            `PrefetchingRetriever`, for the whole retrieval. None for one that does not prefetch.
        retriever: What finds the passages; by default `ahead` if it is a retriever, else a search
            in the store.
    """

    store: VectorStore
    ahead: PrefetchingEmbeddings | PrefetchingRetriever | None
    retriever: Runnable[str, list[Document]] | None = None

    def to_ask(self) -> Runnable[str, list[Document]]:
        """Return what the chain asks for passages."""
        if self.retriever is not None:
            return self.retriever
        if isinstance(self.ahead, PrefetchingRetriever):
            return self.ahead
        return self.store.as_retriever(search_kwargs={"k": 3})


class Agent:
    """Answers questions, each from the knowledge base that it is put to.

    Example:
        ```python
        small = PrefetchingEmbeddings(voice_embeddings(model="text-embedding-3-small"))
        large = PrefetchingEmbeddings(voice_embeddings(model="text-embedding-3-large"))
        agent = Agent(
            {
                "faults": KnowledgeBase(Chroma("faults", small), small),
                "contracts": KnowledgeBase(Chroma("contracts", small), small),
                "russian": KnowledgeBase(Chroma("russian", large), large),
            },
            llm,
        )
        ```

    Args:
        knowledge_bases: By name.
        llm: The chat model that words the answers.
    """

    def __init__(self, knowledge_bases: Mapping[str, KnowledgeBase], llm: BaseChatModel) -> None:
        self._ahead = {name: kb.ahead for name, kb in knowledge_bases.items()}
        self._retrievers = {name: kb.to_ask() for name, kb in knowledge_bases.items()}
        self._chain: Runnable[dict[str, str], str] = PROMPT | llm | StrOutputParser()

    def prefetch_query_embedding(self, text: str, kb: str) -> PrefetchOutcome | None:
        """Start what can start of a question's retrieval. Returns at once.

        Args:
            text: The question, exactly as `get_response_generator` will get it.
            kb: The knowledge base that it will be put to.

        Returns:
            What came of it; None if this knowledge base does not prefetch.
        """
        ahead = self._ahead[kb]
        return None if ahead is None else ahead.prefetch(text)

    def ensure_prefetched_embedding(self, text: str, kb: str) -> None:
        """Have it under way if that can be; the answer does not depend on it."""
        if self.prefetch_query_embedding(text, kb) is PrefetchOutcome.DROPPED:
            log.warning("not prefetched: too much is under way, or the question is blank")

    def listen(self, kb: str) -> UtterancePrefetcher | None:
        """Make what takes in the partial transcripts of one call, for `StasisHandler`.

        Returns:
            A new one for each call; None if this knowledge base does not prefetch.
        """
        ahead = self._ahead[kb]
        return None if ahead is None else UtterancePrefetcher.for_many_partials(ahead)

    def is_ready(self, text: str, kb: str) -> bool:
        """Tell whether what can start early is there."""
        ahead = self._ahead[kb]
        return ahead is not None and ahead.is_ready(text)

    def expected_wait(self, text: str, kb: str) -> float:
        """Estimate the seconds for which the chain would wait for what can start early.

        Returns:
            0.0 if it is ready; infinity if nothing is known, since there is no prefetching.
        """
        ahead = self._ahead[kb]
        return math.inf if ahead is None else ahead.expected_wait(text)

    async def wait_for_prefetch(self, text: str, timeout: float | None = None) -> bool:
        """Wait until a question's prefetches have ended, wherever it was prefetched.

        The retriever needs no such wait, since its query joins what is under way; this is for a
        bot that wants to do something else meanwhile.

        Args:
            text: The question.
            timeout: Seconds to wait at most.

        Returns:
            Whether it is there.
        """
        distinct = {id(ahead): ahead for ahead in self._ahead.values() if ahead is not None}
        ready = await asyncio.gather(
            *(ahead.await_for_prefetch(text, timeout) for ahead in distinct.values())
        )
        return any(ready)

    async def get_response_generator(self, text: str, kb: str) -> AsyncGenerator[str]:
        """Answer a question, sentence by sentence, so that speech can start with the first.

        Args:
            text: The question.
            kb: The knowledge base to answer it from.
        """
        # What was prefetched is found here, done or under way.
        documents = await self._retrievers[kb].ainvoke(text)
        context = "\n\n".join(document.page_content for document in documents)
        answer = self._chain.astream({"context": context, "question": text})
        spoken = ""
        async with contextlib.aclosing(cast(AsyncGenerator[str], answer)) as pieces:
            async for piece in pieces:
                spoken += piece
                while sentence := _SENTENCE.match(spoken):
                    yield sentence[1]
                    spoken = spoken[sentence.end() :]
        if spoken.strip():
            yield spoken
