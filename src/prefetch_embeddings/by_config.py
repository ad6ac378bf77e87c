"""What stands for a prefetched retrieval: a text, and what parts searches for one text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_core.runnables.config import ensure_config

from prefetch_embeddings.documents import variant_of
from prefetch_embeddings.face import Face

if TYPE_CHECKING:
    from collections.abc import Hashable

    from langchain_core.runnables import RunnableConfig


class FaceByConfig(Face):
    """Waits and looks, where a `RunnableConfig` parts what is prefetched for one text."""

    def wait_for_prefetch(
        self, text: str, timeout: float | None = None, config: RunnableConfig | None = None
    ) -> bool:
        """Wait until the prefetch of `text` has ended.

        Queries need no such wait. Without a timeout, a prefetch that is still queued is run at
        once, whatever the queue.

        Args:
            text: The prefetched text.
            timeout: The longest wait in seconds; None for no limit.
            config: The one it was prefetched with.

        Returns:
            True if the documents are there; False if they are not, for whatever reason.

        Raises:
            TypeError: If `text` is not a `str`.
            RuntimeError: If the retriever itself waits for the text that it retrieves for.
        """
        return self.prefetcher.wait(text, timeout, variant(config))

    async def await_for_prefetch(
        self, text: str, timeout: float | None = None, config: RunnableConfig | None = None
    ) -> bool:
        """Do what `wait_for_prefetch` does, without blocking the loop."""
        return await self.prefetcher.await_(text, timeout, variant(config))

    def is_ready(self, text: str, config: RunnableConfig | None = None) -> bool:
        """Tell whether a query for `text` would be answered at once. Changes nothing.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self.prefetcher.is_ready(text, variant(config))

    def expected_wait(self, text: str, config: RunnableConfig | None = None) -> float:
        """Estimate what a query for `text` would wait now, from how long recent calls took.

        Returns:
            Seconds; 0.0 if the documents are there.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self.prefetcher.expected_wait(text, variant(config))

    def forget(self, text: str, config: RunnableConfig | None = None) -> bool:
        """Drop what is kept or under way for `text`. Who waits for it still gets the documents.

        Returns:
            True if there was anything.

        Raises:
            TypeError: If `text` is not a `str`.
        """
        return self.prefetcher.forget(text, variant(config))


def variant(config: RunnableConfig | None) -> Hashable:
    """Return what parts searches for one text, here and now: the current run's config counts."""
    return variant_of(ensure_config(config))
