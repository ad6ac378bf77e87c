"""What it takes to test a bot without sleeping: a model with a script, time and threads by hand.

Example:
    ```python
    model = ScriptedEmbeddings()
    with ManualPrefetchingEmbeddings(model) as embeddings:
        embeddings.prefetch("how much is it?")  # queued, and nothing runs it by itself
        embeddings.executor.run_next()
        assert embeddings.is_ready("how much is it?")
        embeddings.time.advance(301.0)
        assert not embeddings.is_ready("how much is it?")
    assert_no_leaks(embeddings)
    ```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefetch_embeddings.testing._manual import (
    ManualExecutor,
    ManualPrefetchingEmbeddings,
    ManualPrefetchingRetriever,
    ManualTime,
)
from prefetch_embeddings.testing._scripts import (
    PATIENCE,
    Gate,
    ScriptedEmbeddings,
    ScriptedRetriever,
)

if TYPE_CHECKING:
    from prefetch_embeddings.embeddings import PrefetchingEmbeddings
    from prefetch_embeddings.retriever import PrefetchingRetriever

__all__ = [
    "Gate",
    "ManualExecutor",
    "ManualPrefetchingEmbeddings",
    "ManualPrefetchingRetriever",
    "ManualTime",
    "ScriptedEmbeddings",
    "ScriptedRetriever",
    "assert_no_leaks",
]


def assert_no_leaks(prefetching: PrefetchingEmbeddings | PrefetchingRetriever) -> None:
    """Assert that nothing is under way, nothing hangs and the counters add up.

    To be called when the test's own calls have returned. A wrapper that was closed must have no
    worker thread left either; those that still run a call get some time to notice.

    Raises:
        AssertionError: If something leaked.
    """
    prefetcher = prefetching.prefetcher
    if prefetcher.closed:
        assert prefetcher.join(PATIENCE), "worker threads outlive their pool"
    leaks = prefetcher.leaks()
    assert not leaks, "; ".join(leaks)
