"""Calls a retriever, and takes its documents over: as copies, which nobody else changes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import run_in_executor
from langchain_core.vectorstores import VectorStore

from prefetch_embeddings.model_sides import is_gone_around

if TYPE_CHECKING:
    from collections.abc import Hashable
    from typing import TypeAlias

    from langchain_core.runnables import Runnable, RunnableConfig

    Documents: TypeAlias = tuple[Document, ...]

PASSING: Final = frozenset({"checkpoint_id", "checkpoint_map", "checkpoint_ns"})
"""What LangGraph writes into `configurable` for itself, anew for each of its steps."""


class DocumentLoader:
    """Loads the documents for queries from a retriever.

    What it gets as `options` is the `RunnableConfig` of whoever the call is for, or None.

    Args:
        retriever: A retriever, or a chain that ends in documents.
    """

    loads_many: Final = False

    def __init__(self, retriever: Runnable[str, list[Document]]) -> None:
        self._retriever: Final = retriever
        self._through_sync: Final = _goes_through_sync(retriever)
        self.native_async: Final = not (self._through_sync or _needs_a_thread(retriever))

    def load(self, text: str, options: Any) -> Documents:
        """Return the documents for a query; the calling thread waits."""
        return _taken_over(self._retriever.invoke(text, options))

    async def aload(self, text: str, options: Any) -> Documents:
        """Return the documents for a query, by the retriever's async method."""
        if self._through_sync:
            return await run_in_executor(None, self.load, text, options)
        return _taken_over(await self._retriever.ainvoke(text, options))

    def load_many(self, texts: list[str]) -> list[Documents]:
        """Return the documents for several queries, one after the other."""
        return [self.load(text, None) for text in texts]


def own(documents: Any) -> list[Document]:
    """Return copies of documents, with metadata of their own."""
    return [_copy(document) for document in documents]


def variant_of(config: RunnableConfig) -> Hashable:
    """Return what parts searches for one text: the `configurable` of a config; None if empty."""
    configurable = config.get("configurable") or {}
    parting = {
        name: value
        for name, value in configurable.items()
        if name not in PASSING and not name.startswith("__")
    }
    return _frozen(parting) if parting else None


def _taken_over(documents: Any) -> Documents:
    """Take over what a retriever answered.

    Raises:
        TypeError: If it is not a list of documents.
    """
    if not isinstance(documents, list) or not all(isinstance(d, Document) for d in documents):
        raise TypeError(
            "underlying_retriever must answer with a list of Document, "
            f"not with a {type(documents).__name__}"
        )
    return tuple(map(_copy, documents))


def _copy(document: Document) -> Document:
    try:
        metadata = copy.deepcopy(document.metadata)
    except Exception:  # noqa: BLE001 - somebody's object that cannot be copied is shared
        metadata = dict(document.metadata)
    return document.model_copy(update={"metadata": metadata})


class _Typed(NamedTuple):
    """A value, and its type: 1 and True are equal, and mean different things."""

    kind: type
    value: Hashable


class _Same:
    """Stands for an object that has no hash: only itself is equal to it."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _frozen(value: Any) -> Hashable:
    """Return something that can be hashed, and is equal for values that are."""
    if isinstance(value, dict):
        items = {(_frozen(name), _frozen(item)) for name, item in value.items()}
        return _Typed(dict, frozenset(items))
    if isinstance(value, list | tuple):
        return _Typed(type(value), tuple(map(_frozen, value)))
    if isinstance(value, set | frozenset):
        return _Typed(set, frozenset(map(_frozen, value)))
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return _Typed(type(value), value)


def _goes_through_sync(retriever: object) -> bool:
    """Tell whether the async side knows nothing of what stands in the sync one's place."""
    if is_gone_around(retriever, "invoke"):
        return True
    return (
        isinstance(retriever, BaseRetriever)
        and not _has_default_async(retriever)
        and is_gone_around(retriever, "_get_relevant_documents", "_aget_relevant_documents")
    )


def _needs_a_thread(retriever: object) -> bool:
    """Tell whether the async side is LangChain's default: the sync one, in a thread."""
    if not isinstance(retriever, BaseRetriever):
        return False
    store = getattr(retriever, "vectorstore", None)
    if isinstance(store, VectorStore):
        return type(store).asimilarity_search is VectorStore.asimilarity_search
    return _has_default_async(retriever)


def _has_default_async(retriever: BaseRetriever) -> bool:
    name = "_aget_relevant_documents"  # what LangChain has its users write, or leave
    return getattr(type(retriever), name) is getattr(BaseRetriever, name)
