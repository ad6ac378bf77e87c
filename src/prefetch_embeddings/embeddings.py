"""`PrefetchingEmbeddings`: the LangChain face of flights."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from prefetch_embeddings import misses, warming
from prefetch_embeddings._background import Background
from prefetch_embeddings._background.pool import WorkerPool
from prefetch_embeddings._background.timer import Timer
from prefetch_embeddings._flights.patience import Hedge
from prefetch_embeddings._flights.prefetcher import Prefetcher
from prefetch_embeddings.amiss import Amiss
from prefetch_embeddings.arguments import (
    check_counts,
    check_flag,
    check_functions,
    check_kind,
    check_model,
    check_seconds,
)
from prefetch_embeddings.face import Face
from prefetch_embeddings.keys import key_of
from prefetch_embeddings.model_sides import aembed_documents, aembed_query
from prefetch_embeddings.reporting import Reporter
from prefetch_embeddings.soundness import SoundVectors
from prefetch_embeddings.vectors import VectorLoader, in_order, own, sort_out
from prefetch_embeddings.wrapping import WrapsAModel, remembers_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from langchain_core.embeddings import Embeddings

    from prefetch_embeddings._flights.flight import PrefetchOutcome
    from prefetch_embeddings.events import PrefetchEvent
    from prefetch_embeddings.misses import Miss
    from prefetch_embeddings.vectors import Vector


class PrefetchingEmbeddings(Face, WrapsAModel):
    """Embeds queries ahead of time, and hands retrievers the pending result.

    Call `prefetch` as soon as a question is known. Whoever embeds the same text later, a vector
    store's retriever above all, gets the vector if it is there, waits for it if it is on its way,
    and calls the model itself where nothing better is to be had. A prefetch can fail, or be
    dropped, or never come: no query is ever the worse for it.

    Threads, coroutines and event loops may share one instance; for one text at a time there is one
    call to the model.

    Example:
        ```python
        embeddings = PrefetchingEmbeddings(OpenAIEmbeddings())
        retriever = Chroma(embedding_function=embeddings).as_retriever()

        embeddings.prefetch(question)  # returns at once
        play_filler()
        documents = retriever.invoke(question)  # finds the embedding done, or under way
        ```
    """

    @remembers_arguments
    def __init__(
        self,
        underlying_embeddings: Embeddings,
        *,
        ttl: float = 300.0,
        max_entries: int = 1024,
        max_workers: int = 32,
        max_pending: int = 256,
        attempts: int = 2,
        match: Callable[[str], Hashable] | None = None,
        symmetric: bool = False,
        hedge: Hedge | None = None,
        on_event: Callable[[PrefetchEvent], None] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            underlying_embeddings: The model, or another wrapper around it, such as a cache.
            ttl: Seconds that a vector is kept, counted from its arrival.
            max_entries: Vectors kept. Those that have served a query leave before the others.
            max_workers: Threads that prefetch, started as needed. They wait for the network.
            max_pending: Prefetches that may wait for a thread (with `aprefetch`: that may be under
                way). One more is dropped.
            attempts: Tries of a prefetch that no query waits for. Queries try once.
            match: Returns what texts must share to be the same, for instance a normalised form.
                By default texts are the same if they are equal.
            symmetric: Whether the model embeds queries and documents alike. Then `prefetch_many`
                makes one call of `embed_documents`, and `embed_documents` finds what was
                prefetched, for stores that embed questions with it.
            hedge: When a call that somebody waits for gets a second one beside it; by default
                never. With it, queries call the model in threads of the wrapper's.
            on_event: Is called with each event, in the thread where it happens, and should be
                quick. What it raises is logged and ignored.

        Raises:
            TypeError: If an argument is of a wrong type, such as a class or a client in the place
                of a model.
            ValueError: If a number is out of range.
        """
        check_model("underlying_embeddings", underlying_embeddings)
        check_seconds("ttl", ttl, endless=True)
        check_counts(
            max_entries=max_entries,
            max_workers=max_workers,
            max_pending=max_pending,
            attempts=attempts,
        )
        check_functions(match=match, on_event=on_event)
        check_flag("symmetric", symmetric)
        check_kind("hedge", hedge, Hedge, "Hedge(quantile=0.95)")
        self._model = underlying_embeddings
        self._amiss = Amiss()
        self._prefetcher: Prefetcher[Vector] = Prefetcher(
            VectorLoader(underlying_embeddings, symmetric=symmetric),
            key=key_of(match),
            ttl=ttl,
            max_entries=max_entries,
            max_workers=max_workers,
            max_pending=max_pending,
            attempts=attempts,
            hedge=hedge,
            background=self._background(),
            reporter=Reporter(
                on_event, on_dropped=self._amiss.dropped, on_ready=self._amiss.succeeded
            ),
            sound=SoundVectors().accept,
            on_missed=misses.log_at_debug,
        )
        self._amiss.watch(self._prefetcher)
        self._holds = self._prefetcher.holds if symmetric else None

    def _background(self) -> Background:
        """Return threads and time; tests put others in their place."""
        return Background(time.monotonic, Timer(), WorkerPool)

    @property
    def prefetcher(self) -> Prefetcher[Vector]:
        """The core, for what stands beside: `UtterancePrefetcher`, instrumentation, tests."""
        return self._prefetcher

    # --- Prefetching ---------------------------------------------------------------------------

    def prefetch(self, text: str) -> PrefetchOutcome:
        """Start embedding `text` in the background.

        Takes microseconds, also on an event loop. Failures of the model never show here.

        Args:
            text: What will be asked, exactly as the retriever will get it (see `match`).

        Returns:
            `STARTED`; `IN_FLIGHT` or `READY` if there was nothing to do; `DROPPED` if the queue is
            full, calls keep failing, the wrapper is closed or the text is blank.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._prefetcher.prefetch(text)

    def prefetch_many(self, texts: Iterable[str]) -> list[PrefetchOutcome]:
        """Start embedding several texts: several calls, or one if the model is `symmetric`.

        Args:
            texts: What will be asked, one by one.

        Returns:
            An outcome for each text, in order.

        Raises:
            TypeError: If one of the texts is not a `str`, or `texts` is one; nothing is started.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be several texts, not one str")
        return self._prefetcher.prefetch_many(texts)

    async def aprefetch(self, text: str) -> PrefetchOutcome:
        """Start embedding `text` with the model's own async client on the running loop.

        Returns once the call is under way. A model without an async client of its own embeds in
        the threads that `prefetch` uses.

        Args:
            text: What will be asked.

        Returns:
            As `prefetch`. `DROPPED` if `max_pending` such calls are under way.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return await self._prefetcher.aprefetch(text)

    def wait_for_prefetch(self, text: str, timeout: float | None = None) -> bool:
        """Wait until the prefetch of `text` has ended.

        Queries need no such wait. Without a timeout, a prefetch that is still queued is run at
        once, whatever the queue.

        Args:
            text: The prefetched text.
            timeout: The longest wait in seconds; None for no limit.

        Returns:
            True if the vector is there; False if it is not, for whatever reason: no prefetch, a
            failed one, or not yet.

        Raises:
            TypeError: If `text` is not a `str`.
            RuntimeError: If the model itself waits for the text that it is embedding.
        """
        return self._prefetcher.wait(text, timeout)

    async def await_for_prefetch(self, text: str, timeout: float | None = None) -> bool:
        """Do what `wait_for_prefetch` does, without blocking the loop.

        A prefetch that is still queued is run at once, by the model's async method, also with a
        timeout if that method needs no thread.
        """
        return await self._prefetcher.await_(text, timeout)

    def is_ready(self, text: str) -> bool:
        """Tell whether a query for `text` would be answered at once. Changes nothing.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._prefetcher.is_ready(text)

    def expected_wait(self, text: str) -> float:
        """Estimate what a query for `text` would wait now, from how long recent calls took.

        Returns:
            Seconds; 0.0 if the vector is there.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._prefetcher.expected_wait(text)

    def explain_miss(self, text: str) -> Miss | None:
        """Tell why a query for `text` missed, or would miss: what was prefetched that is like it.

        Takes some milliseconds; meant for looking into a poor rate of hits. The same is logged at
        DEBUG level with every query that misses.

        Returns:
            The reason and the nearest recent prefetch that no query used, as digests; None if
            there is a prefetch that the query can use.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._amiss.explain(text)

    # --- LangChain -----------------------------------------------------------------------------

    def embed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Return the vector of a query: the prefetched one, or the model's answer.

        Args:
            text: The query.
            kwargs: If there are any, they go to the model with the text, past the map.

        Returns:
            A list of the model's dimension. It is the caller's own.

        Raises:
            Exception: What the model raised in a call made for a query.
            TypeError: If `text` is not a `str`.
            RuntimeError: If the model, while it embeds a text, asks for that text.
        """
        if kwargs:
            return own(self._model.embed_query(text, **kwargs))
        return list(self._prefetcher.get(text))

    async def aembed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Return the vector of a query, as `embed_query` does, by the model's async method.

        Cancelling the caller leaves everybody else who waits for it alone, and the work, too, if a
        prefetch asked for it. What nobody else wants is cancelled, and holds no connection.
        """
        if kwargs:
            return own(await aembed_query(self._model, text, **kwargs))
        return list(await self._prefetcher.aget(text))

    def embed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """Return the vectors of documents, from the model.

        If the model is `symmetric`, texts that were prefetched are taken from there, ready or
        under way, and the model gets the others, in one call: some stores embed the question of a
        search as a document. With `kwargs` the model gets all texts.

        Returns:
            A list of the model's dimension for each text, in order. They are the caller's own.
        """
        known, others = sort_out(texts, None if kwargs else self._holds)
        answer = self._model.embed_documents(others, **kwargs) if others or not known else []
        return in_order({n: self._prefetcher.get(text) for n, text in known.items()}, answer)

    async def aembed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """Do what `embed_documents` does, by the model's async method."""
        known, others = sort_out(texts, None if kwargs else self._holds)
        answer: list[list[float]] = []
        if others or not known:
            answer = await aembed_documents(self._model, others, **kwargs)
        vectors = await asyncio.gather(*map(self._prefetcher.aget, known.values()))
        return in_order(dict(zip(known, vectors, strict=True)), answer)

    # --- Housekeeping --------------------------------------------------------------------------

    def warm_up(self) -> float:
        """Make one call whose result nobody keeps, so that the first query finds all in place.

        It loads the model's tokenizer, opens its connection and that of a `RedisCachedEmbeddings`
        in between. (Other caches may keep the throw-away vector.) What the model raises is raised.

        Returns:
            Seconds it took.
        """
        began = time.monotonic()
        warming.warm_up(self._model)
        return time.monotonic() - began

    async def awarm_up(self) -> float:
        """Do what `warm_up` does for the model's async client."""
        began = time.monotonic()
        await warming.awarm_up(self._model)
        return time.monotonic() - began

    def forget(self, text: str) -> bool:
        """Drop what is kept or under way for `text`. Who waits for it still gets the vector.

        Returns:
            True if there was anything.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._prefetcher.forget(text)
