"""The agent: answers questions from several knowledge bases, and embeds them ahead of time."""

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import cast

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.vectorstores import VectorStore

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome, UtterancePrefetcher

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
        store: The passages. With prefetching, its embedding function is `embeddings`.
        embeddings: The embeddings that can start early; the same object for all knowledge bases of
            one embedding model, another for each model. None for one that does not prefetch.
    """

    store: VectorStore
    embeddings: PrefetchingEmbeddings | None


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
        self._embeddings = {name: kb.embeddings for name, kb in knowledge_bases.items()}
        self._retrievers = {
            name: kb.store.as_retriever(search_kwargs={"k": 3})
            for name, kb in knowledge_bases.items()
        }
        self._chain: Runnable[dict[str, str], str] = PROMPT | llm | StrOutputParser()

    def prefetch_query_embedding(self, text: str, kb: str) -> PrefetchOutcome | None:
        """Start embedding a question, unless it is done or under way. Returns at once.

        Args:
            text: The question, exactly as `get_response_generator` will get it.
            kb: The knowledge base that it will be put to, whose model embeds it.

        Returns:
            What came of it; None if this knowledge base does not prefetch.
        """
        embeddings = self._embeddings[kb]
        return None if embeddings is None else embeddings.prefetch(text)

    def ensure_prefetched_embedding(self, text: str, kb: str) -> None:
        """Have the embedding under way if it can be; the answer does not depend on it."""
        if self.prefetch_query_embedding(text, kb) is PrefetchOutcome.DROPPED:
            log.warning("not prefetched: too much is under way, or the question is blank")

    def listen(self, kb: str) -> UtterancePrefetcher | None:
        """Make what takes in the partial transcripts of one call, for `StasisHandler`.

        Returns:
            A new one for each call; None if this knowledge base does not prefetch.
        """
        embeddings = self._embeddings[kb]
        return None if embeddings is None else UtterancePrefetcher.for_many_partials(embeddings)

    def is_ready(self, text: str, kb: str) -> bool:
        """Tell whether the retriever would have the question's embedding at once."""
        embeddings = self._embeddings[kb]
        return embeddings is not None and embeddings.is_ready(text)

    def expected_wait(self, text: str, kb: str) -> float:
        """Estimate the seconds for which the retriever would wait for the question's embedding.

        Returns:
            0.0 if it is ready; infinity if nothing is known, since there is no prefetching.
        """
        embeddings = self._embeddings[kb]
        return math.inf if embeddings is None else embeddings.expected_wait(text)

    async def wait_for_prefetch(self, text: str, timeout: float | None = None) -> bool:
        """Wait until a question's prefetches have ended, with whichever models it was prefetched.

        The retriever needs no such wait, since its query joins what is under way; this is for a
        bot that wants to do something else meanwhile.

        Args:
            text: The question.
            timeout: Seconds to wait at most.

        Returns:
            Whether its embedding is there.
        """
        models = {id(model): model for model in self._embeddings.values() if model is not None}
        ready = await asyncio.gather(
            *(model.await_for_prefetch(text, timeout) for model in models.values())
        )
        return any(ready)

    async def get_response_generator(self, text: str, kb: str) -> AsyncGenerator[str]:
        """Answer a question, sentence by sentence, so that speech can start with the first.

        Args:
            text: The question.
            kb: The knowledge base to answer it from.
        """
        # The retriever's first step is the embedding; here it is found done, or under way.
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
