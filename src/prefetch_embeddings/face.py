"""What `PrefetchingEmbeddings` and `PrefetchingRetriever` have in common, beside their core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefetch_embeddings.wrapping import ClosedByWith

if TYPE_CHECKING:
    from prefetch_embeddings._flights.prefetcher import Prefetcher
    from prefetch_embeddings.stats import PrefetchStats


class Face(ClosedByWith):
    """Housekeeping by way of the core."""

    @property
    def prefetcher(self) -> Prefetcher[Any]:
        """The core, for what stands beside: `UtterancePrefetcher`, instrumentation, tests."""
        raise NotImplementedError

    def clear(self) -> None:
        """Drop everything that is kept or under way, as `forget` does."""
        self.prefetcher.clear()

    def stats(self) -> PrefetchStats:
        """Return one consistent snapshot of the counters. Queries with `kwargs` do not count."""
        return self.prefetcher.stats()

    def close(self) -> None:
        """Stop prefetching. Does not wait for calls that are running.

        Who waits for a prefetch makes a call of its own instead. Queries work on, with nothing
        kept.
        """
        self.prefetcher.close()
