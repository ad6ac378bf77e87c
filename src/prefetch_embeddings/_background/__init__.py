"""Threads and time of the package's own: pools, the timer, the fork hook."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefetch_embeddings._background.pool import Executor, Source
    from prefetch_embeddings._background.timer import Scheduler


@dataclasses.dataclass(frozen=True, slots=True)
class Background:
    """What stands behind a prefetcher, and what tests put in its place.

    Attributes:
        clock: A monotonic clock, in seconds.
        scheduler: Calls functions later.
        executor: Makes what takes jobs from a source, on so many workers.
    """

    clock: Callable[[], float]
    scheduler: Scheduler
    executor: Callable[[Source, int], Executor]
