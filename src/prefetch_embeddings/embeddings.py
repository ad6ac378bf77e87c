"""`PrefetchingEmbeddings`: the LangChain face of flights."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings

from prefetch_embeddings import warming
from prefetch_embeddings._background.pool import Executor, WorkerPool
from prefetch_embeddings._background.timer import Scheduler, Timer
from prefetch_embeddings._flights.map import FlightMap, PrefetchOutcome
from prefetch_embeddings._flights.runner import FlightRunner
from prefetch_embeddings.events import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable
    from typing import Self

    from prefetch_embeddings._flights.patience import Hedge
    from prefetch_embeddings.events import PrefetchEvent
    from prefetch_embeddings.misses import Miss
    from prefetch_embeddings.stats import PrefetchStats


class PrefetchingEmbeddings(Embeddings):
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
            max_entries: Vectors kept; the least recently used leave first.
            max_workers: Threads that prefetch, started as needed. They wait for the network.
            max_pending: Prefetches that may wait for a thread (with `aprefetch`: that may be under
                way). One more is dropped.
            attempts: Tries of a prefetch that no query waits for. Queries try once.
            match: Returns what texts must share to be the same, for instance a normalised form.
                By default texts are the same if they are equal.
            symmetric: Whether the model embeds queries and documents alike. Then `prefetch_many`
                makes one call of `embed_documents`.
            hedge: When a call that somebody waits for gets a second one beside it; by default
                never. With it, queries call the model in threads of the wrapper's.
            on_event: Is called with each event, in the thread where it happens, and should be
                quick. What it raises is logged and ignored.

        Raises:
            ValueError: If a number is out of range.
        """
        for name, number, least in (
            ("max_entries", max_entries, 1),
            ("max_workers", max_workers, 1),
            ("max_pending", max_pending, 1),
            ("attempts", attempts, 1),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, not {number}")
        if not ttl > 0:
            raise ValueError(f"ttl must be more than 0 seconds, not {ttl}")
        self._model = underlying_embeddings
        self._match = match
        self._reporter = Reporter(on_event)
        self._flights: FlightMap[list[float]] = FlightMap(
            ttl=ttl,
            max_entries=max_entries,
            capacity=max_pending + max_workers,
            max_on_loops=max_pending,
            attempts=attempts,
            hedge=hedge,
            clock=self._clock(),
        )
        self._runner = FlightRunner(
            self._flights,
            load=self._load,
            aload=self._aload,
            load_many=self._load_many if symmetric else None,
            native_async=_embeds_on_loops(underlying_embeddings),
            executor=self._executor(max_workers),
            aside=WorkerPool(None),
            scheduler=self._scheduler(),
            reporter=self._reporter,
        )

    # What tests put in the place of threads and time:

    def _clock(self) -> Callable[[], float]:
        return time.monotonic

    def _executor(self, max_workers: int) -> Executor:
        return WorkerPool(max_workers)

    def _scheduler(self) -> Scheduler:
        return Timer()

    @property
    def underlying_embeddings(self) -> Embeddings:
        """The wrapped model."""
        return self._model

    # --- Prefetching ---------------------------------------------------------------------------

    def prefetch(self, text: str) -> PrefetchOutcome:
        """Start embedding `text` in the background.

        Takes microseconds, also on an event loop. Failures of the model never show here.

        Args:
            text: What will be asked, exactly as the retriever will get it (see `match`).

        Returns:
            `STARTED`; `IN_FLIGHT` or `READY` if there was nothing to do; `DROPPED` if the queue is
            full, the wrapper is closed or the text is blank.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._runner.prefetch(self._key(text), text)

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
        return self._runner.prefetch_many([(self._key(text), text) for text in texts])

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
        return await self._runner.aprefetch(self._key(text), text)

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
        return self._runner.wait(self._key(text), timeout)

    async def await_for_prefetch(self, text: str, timeout: float | None = None) -> bool:
        """Do what `wait_for_prefetch` does, without blocking the loop.

        A prefetch that is still queued is run at once, by the model's async method, also with a
        timeout if that method needs no thread.
        """
        return await self._runner.await_(self._key(text), timeout)

    def is_ready(self, text: str) -> bool:
        """Tell whether a query for `text` would be answered at once. Changes nothing.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._flights.is_ready(self._key(text))

    def expected_wait(self, text: str) -> float:
        """Estimate what a query for `text` would wait now, from how long recent calls took.

        Returns:
            Seconds; 0.0 if the vector is there.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self._flights.expected_wait(self._key(text))

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
        return self._runner.explain_miss(self._key(text), text)

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
            return _own(self._model.embed_query(text, **kwargs))
        key = self._key(text)
        flight = self._flights.ready(key, text)
        if flight is None:
            return self._runner.get(key, text).copy()
        if self._reporter.listening:
            self._reporter.served(text, flight.number, "ready", 0.0)
        return flight.value.copy()

    async def aembed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Return the vector of a query, as `embed_query` does, by the model's async method.

        Cancelling the caller leaves the work, and everybody else who waits for it, alone.
        """
        if kwargs:
            return _own(await self._model.aembed_query(text, **kwargs))
        key = self._key(text)
        flight = self._flights.ready(key, text)
        if flight is None:
            return (await self._runner.aget(key, text)).copy()
        if self._reporter.listening:
            self._reporter.served(text, flight.number, "ready", 0.0)
        return flight.value.copy()

    def embed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """Pass documents straight through to the model."""
        return [_own(vector) for vector in self._model.embed_documents(texts, **kwargs)]

    async def aembed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """Pass documents straight through to the model's async method."""
        return [_own(vector) for vector in await self._model.aembed_documents(texts, **kwargs)]

    # --- Housekeeping --------------------------------------------------------------------------

    def warm_up(self) -> float:
        """Make one call whose result nobody keeps, so that the first query finds all in place.

        It loads the model's tokenizer, opens its connection and that of a `RedisCachedEmbeddings`
        in between. (Other caches may keep the throw-away vector.)

        Returns:
            Seconds it took.

        Raises:
            Exception: What the model raised.
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
        return self._runner.forget(self._key(text))

    def clear(self) -> None:
        """Drop everything that is kept or under way, as `forget` does."""
        self._runner.clear()

    def stats(self) -> PrefetchStats:
        """Return one consistent snapshot of the counters. Queries with `kwargs` do not count."""
        return self._flights.stats()

    def close(self) -> None:
        """Stop prefetching. Does not wait for calls that are running.

        Who waits for a prefetch calls the model instead. Queries work on, with nothing kept.
        """
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    # --- Behind the curtain --------------------------------------------------------------------

    def _key(self, text: str) -> Hashable:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        if self._match is None:
            return text
        key = self._match(text)
        hash(key)  # raises here what it would raise amid the map's steps
        return key

    def _load(self, text: str) -> list[float]:
        return _own(self._model.embed_query(text))

    async def _aload(self, text: str) -> list[float]:
        return _own(await self._model.aembed_query(text))

    def _load_many(self, texts: list[str]) -> list[list[float]]:
        return [_own(vector) for vector in self._model.embed_documents(texts)]


def _own(vector: Any) -> list[float]:
    """Return a list that nobody else holds: the model may keep, and reuse, what it returned."""
    if hasattr(vector, "tolist"):  # of an array's own floats, Python's
        return list(vector.tolist())
    return list(vector)


def _embeds_on_loops(model: object) -> bool:
    """Tell whether a model, and all that it wraps, has an async side of its own, and no thread's.

    LangChain's default `aembed_query` is a thread of the loop's default executor.
    """
    method = getattr(type(model), "aembed_query", None)
    if method is Embeddings.aembed_query or not hasattr(model, "aembed_query"):
        return False
    inner = getattr(model, "underlying_embeddings", None)
    return not isinstance(inner, Embeddings) or _embeds_on_loops(inner)
