"""The tap: a step of a LangChain chain that prefetches the questions which flow through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_core.runnables import RunnablePassthrough

    from prefetch_embeddings.embeddings import PrefetchingEmbeddings
    from prefetch_embeddings.retriever import PrefetchingRetriever


def prefetch_tap(
    prefetching: PrefetchingEmbeddings | PrefetchingRetriever,
) -> RunnablePassthrough[Any]:
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
        prefetching: What prefetches: the model that the retriever uses, or the retriever itself.

    Returns:
        A `Runnable` that takes and returns a `str`, or a list of them. Anything else raises
        `TypeError`. Streams pass through chunk by chunk, and are prefetched when complete.
    """
    from langchain_core.runnables import RunnablePassthrough  # takes a quarter of a second

    def prefetch(questions: str | list[str]) -> None:
        if isinstance(questions, list):
            prefetching.prefetch_many(questions)
        else:
            prefetching.prefetch(questions)

    return RunnablePassthrough(prefetch, name="prefetch_tap")
