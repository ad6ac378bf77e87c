"""`PrefetchingRetriever`: the LangChain face of flights that bring documents."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterable  # noqa: TC003 - pydantic reads them
from typing import TYPE_CHECKING, Any, Final, Self

from langchain_core.documents import Document  # noqa: TC002 - pydantic reads it
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, patch_config
from langchain_core.vectorstores import VectorStore
from pydantic import PrivateAttr

from prefetch_embeddings import misses
from prefetch_embeddings._background import Background
from prefetch_embeddings._background.pool import WorkerPool
from prefetch_embeddings._background.timer import Timer
from prefetch_embeddings._flights.patience import Hedge
from prefetch_embeddings._flights.prefetcher import Prefetcher
from prefetch_embeddings.amiss import Amiss
from prefetch_embeddings.arguments import (
    check_counts,
    check_functions,
    check_kind,
    check_seconds,
    kind_of,
)
from prefetch_embeddings.by_config import FaceByConfig, variant
from prefetch_embeddings.documents import DocumentLoader, own, variant_of
from prefetch_embeddings.events import PrefetchEvent  # noqa: TC001 - pydantic reads it
from prefetch_embeddings.keys import key_of
from prefetch_embeddings.reporting import Reporter
from prefetch_embeddings.wrapping import without_what_cannot_be_pickled

if TYPE_CHECKING:
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
    )

    from prefetch_embeddings._flights.flight import PrefetchOutcome
    from prefetch_embeddings.documents import Documents
    from prefetch_embeddings.misses import Miss

LOOKED_FOR: Final = frozenset(
    {
        "add_documents",
        "aadd_documents",
        "base_compressor",
        "base_retriever",
        "retrievers",
        "search_kwargs",
        "search_type",
        "vectorstore",
    }
)
"""What chains and programs read of a retriever by name."""


class PrefetchingRetriever(FaceByConfig, BaseRetriever):
    """Retrieves ahead of time, and hands chains the pending documents.

    Call `prefetch` as soon as a question is known: the wrapped retriever's embedding, search and
    reranking begin in the background. Whoever retrieves for the same text later, a chain above all,
    gets the documents if they are there, waits for them if they are on their way, and has the
    wrapped retriever called where nothing better is to be had.

    It is a `BaseRetriever` like any other: for chains, tools, ensembles, graphs, `|` and `batch`.
    What it promises is what `PrefetchingEmbeddings` does. In front of a store whose model is a
    `PrefetchingEmbeddings`, one prefetch of the retrieval makes one call to the model, and who asks
    for the embedding alone finds it, too.

    Example:
        ```python
        retriever = PrefetchingRetriever(store.as_retriever())
        chain = create_retrieval_chain(retriever, answer)

        retriever.prefetch(question)  # returns at once
        play_filler()
        answer = chain.invoke({"input": question})  # finds the documents, or waits the rest
        ```

    Args:
        underlying_retriever: A retriever, or any `Runnable` from a `str` to a list of `Document`.
        ttl: Seconds that documents are kept, counted from their arrival.
        max_entries: Results kept. Those that have served a query leave before the others.
        max_workers: Threads that prefetch, started as needed. They wait for the network.
        max_pending: Prefetches that may wait for a thread (with `aprefetch`: that may be under
            way). One more is dropped.
        attempts: Tries of a prefetch that no query waits for. Queries try once.
        match: Returns what texts must share to be the same. By default they must be equal.
        hedge: When a retrieval that somebody waits for gets a second one beside it; by default
            never.
        on_event: Is called with each event, in the thread where it happens, and should be quick.
        name: The name of its runs in traces.
        tags: Tags of its runs.
        metadata: Metadata of its runs.

    Raises:
        TypeError: If an argument is of a wrong type, such as a store in the place of a retriever.
        ValueError: If a number is out of range.
    """

    underlying_retriever: Runnable[str, list[Document]]
    ttl: float = 60.0
    max_entries: int = 256
    max_workers: int = 32
    max_pending: int = 256
    attempts: int = 2
    match: Callable[[str], Hashable] | None = None
    hedge: Hedge | None = None
    on_event: Callable[[PrefetchEvent], None] | None = None

    _prefetcher: Prefetcher[Documents] = PrivateAttr()
    _amiss: Amiss = PrivateAttr(default_factory=Amiss)

    def __init__(
        self,
        underlying_retriever: BaseRetriever | Runnable[str, list[Document]],
        *,
        ttl: float = 60.0,
        max_entries: int = 256,
        max_workers: int = 32,
        max_pending: int = 256,
        attempts: int = 2,
        match: Callable[[str], Hashable] | None = None,
        hedge: Hedge | None = None,
        on_event: Callable[[PrefetchEvent], None] | None = None,
        name: str | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        _check_retriever(underlying_retriever)
        check_seconds("ttl", ttl, endless=True)
        check_counts(
            max_entries=max_entries,
            max_workers=max_workers,
            max_pending=max_pending,
            attempts=attempts,
        )
        check_functions(match=match, on_event=on_event)
        check_kind("hedge", hedge, Hedge, "Hedge(quantile=0.95)")
        fields: dict[str, Any] = {
            "underlying_retriever": underlying_retriever,
            "ttl": float(ttl),
            "max_entries": int(max_entries),
            "max_workers": int(max_workers),
            "max_pending": int(max_pending),
            "attempts": int(attempts),
            "match": match,
            "hedge": hedge,
            "on_event": on_event,
            "name": name,
            "tags": tags,
            "metadata": metadata,
        }
        super().__init__(**fields)
        self._prefetcher = Prefetcher(
            DocumentLoader(underlying_retriever),
            key=key_of(match),
            ttl=self.ttl,
            max_entries=self.max_entries,
            max_workers=self.max_workers,
            max_pending=self.max_pending,
            attempts=self.attempts,
            hedge=hedge,
            background=self._background(),
            reporter=Reporter(
                on_event,
                "retrieval",
                on_dropped=self._amiss.dropped,
                on_ready=self._amiss.succeeded,
            ),
            on_missed=misses.log_at_debug,
        )
        self._amiss.watch(self._prefetcher)

    def _background(self) -> Background:
        """Return threads and time; tests put others in their place."""
        return Background(time.monotonic, Timer(), WorkerPool)

    @property
    def prefetcher(self) -> Prefetcher[Documents]:
        """The core, for what stands beside: `UtterancePrefetcher`, instrumentation, tests."""
        return self._prefetcher

    # --- Prefetching ---------------------------------------------------------------------------

    def prefetch(self, text: str, config: RunnableConfig | None = None) -> PrefetchOutcome:
        """Start retrieving for `text` in the background.

        Takes microseconds, also on an event loop. Failures of the retriever never show here. The
        retrieval is traced as a run of the wrapped retriever, below whatever run is current here.

        Args:
            text: What will be asked, exactly as the chain will ask it (see `match`).
            config: What the wrapped retriever is called with. A query whose config has another
                `configurable` is not served by this prefetch.

        Returns:
            `STARTED`; `IN_FLIGHT` or `READY` if there was nothing to do; `DROPPED` if the queue is
            full, calls keep failing, the retriever is closed or the text is blank.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._prefetcher.prefetch(text, config, variant(config))

    def prefetch_many(
        self, texts: Iterable[str], config: RunnableConfig | None = None
    ) -> list[PrefetchOutcome]:
        """Start retrieving for several texts, each by a call of its own.

        Args:
            texts: What will be asked, one by one.
            config: As for `prefetch`.

        Returns:
            An outcome for each text, in order.

        Raises:
            TypeError: If one of the texts is not a `str`, or `texts` is one; nothing is started.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be several texts, not one str")
        several, parting = list(texts), variant(config)
        for text in several:
            self._prefetcher.key(text)  # raises for what is none
        return [self._prefetcher.prefetch(text, config, parting) for text in several]

    async def aprefetch(self, text: str, config: RunnableConfig | None = None) -> PrefetchOutcome:
        """Start retrieving for `text` by the retriever's async method, on the running loop.

        Returns once the call is under way. A retriever that has no async method of its own runs in
        the threads that `prefetch` uses.

        Args:
            text: What will be asked.
            config: As for `prefetch`.

        Returns:
            As `prefetch`. `DROPPED` if `max_pending` such calls are under way.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return await self._prefetcher.aprefetch(text, config, variant(config))

    def explain_miss(self, text: str, config: RunnableConfig | None = None) -> Miss | None:
        """Tell why a query for `text` missed, or would miss: what was prefetched that is like it.

        Returns:
            The reason and the nearest recent prefetch that no query used, as digests; None if
            there is a prefetch that the query can use.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._amiss.explain(text, variant(config))

    # --- LangChain -----------------------------------------------------------------------------

    def invoke(
        self,
        input: str,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return the documents for a query: the prefetched ones, or the wrapped retriever's answer.

        Args:
            input: The query.
            config: LangChain's. Its `configurable` must be that of the prefetch.
            kwargs: If there are any, they go to the wrapped retriever with the query, past the map.

        Returns:
            A list of documents. They are the caller's own.

        Raises:
            Exception: What the wrapped retriever raised in a call made for a query.
            TypeError: If `input` is not a `str`.
            RuntimeError: If the wrapped retriever, while it retrieves for a text, asks for that
                text.
        """
        config = ensure_config(config)
        return super().invoke(input, config, **kwargs, _asked_with=config)

    async def ainvoke(
        self,
        input: str,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Do what `invoke` does, by the wrapped retriever's async method. Blocks no thread.

        Cancelling the caller leaves everybody else who waits for it alone, and the work, too, if a
        prefetch asked for it. What nobody else wants is cancelled.
        """
        config = ensure_config(config)
        return await super().ainvoke(input, config, **kwargs, _asked_with=config)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        _asked_with: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = patch_config(_asked_with, callbacks=run_manager.get_child())
        if kwargs:
            return own(self.underlying_retriever.invoke(query, config, **kwargs))
        return own(self._prefetcher.get(query, config, variant_of(config)))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        _asked_with: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = patch_config(_asked_with, callbacks=run_manager.get_child())
        if kwargs:
            return own(await self.underlying_retriever.ainvoke(query, config, **kwargs))
        return own(await self._prefetcher.aget(query, config, variant_of(config)))

    # --- Passing for the wrapped retriever -------------------------------------------------------

    if not TYPE_CHECKING:  # for a type checker there is no attribute but those that are declared

        def __getattr__(self, name: str) -> Any:
            if name in LOOKED_FOR:
                return getattr(self.underlying_retriever, name)
            return super().__getattr__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        made_with = without_what_cannot_be_pickled(self._made_with())
        return _remake, (type(self), made_with)

    def __copy__(self) -> Self:
        return type(self)(**self._made_with())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        retriever = copy.deepcopy(self.underlying_retriever, memo)
        copied = type(self)(**{**self._made_with(), "underlying_retriever": retriever})
        if memo is not None:
            memo[id(self)] = copied
        return copied

    def _made_with(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields}


def _remake(kind: type[PrefetchingRetriever], made_with: dict[str, Any]) -> PrefetchingRetriever:
    return kind(**made_with)


def _check_retriever(retriever: Any) -> None:
    """Raise a `TypeError` if a retriever is none."""
    what = "underlying_retriever must be a LangChain retriever, or a chain from a str to documents"
    if isinstance(retriever, PrefetchingRetriever):
        raise TypeError("underlying_retriever is a PrefetchingRetriever already: one is enough")
    if isinstance(retriever, VectorStore):
        raise TypeError(f"{what}, not a store: take its as_retriever()")
    if isinstance(retriever, Embeddings):
        raise TypeError(f"{what}, not a model: that is for PrefetchingEmbeddings")
    if not isinstance(retriever, Runnable):
        raise TypeError(f"{what}, not {kind_of(retriever)}")
