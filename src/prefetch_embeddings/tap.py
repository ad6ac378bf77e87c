"""The tap: a step of a LangChain chain that prefetches the questions which flow through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_core.runnables import RunnablePassthrough

    from prefetch_embeddings.embeddings import PrefetchingEmbeddings


def prefetch_tap(embeddings: PrefetchingEmbeddings) -> RunnablePassthrough[Any]:
    """Make a step that prefetches what it is given and passes it on, unchanged.

    It belongs behind whatever rewrites the question: the rewritten question is the one that the
    retriever embeds, and a prefetch of the original never serves it. Several questions start at
    once, also where the retriever goes through them one by one. For a single question the tap
    hides as much as the chain still does before it comes to the retriever.

    Example:
        ```python
        tap = prefetch_tap(embeddings)

        # One question, rewritten by the chat's history:
        chain = create_history_aware_retriever(llm, tap | retriever, prompt)

        # Several questions:
        retriever = MultiQueryRetriever.from_llm(retriever, llm)
        retriever.llm_chain = retriever.llm_chain | tap
        ```

    Args:
        embeddings: What prefetches; the retriever must use it, too.

    Returns:
        A `Runnable` that takes and returns a `str`, or a list of them. Anything else raises
        `TypeError`. Streams pass through chunk by chunk, and are prefetched when complete.
    """
    from langchain_core.runnables import RunnablePassthrough  # takes a quarter of a second

    def prefetch(questions: str | list[str]) -> None:
        if isinstance(questions, list):
            embeddings.prefetch_many(questions)
        else:
            embeddings.prefetch(questions)

    return RunnablePassthrough(prefetch, name="prefetch_tap")
