"""A short soak; `SOAK_SECONDS=60` makes it longer, `python -m tests.soak` shows its counts."""

from __future__ import annotations

import os

import pytest

from tests.soak import Soak

SECONDS = float(os.environ.get("SOAK_SECONDS", "15"))


@pytest.mark.timeout(SECONDS + 300)
def test_nothing_is_wrong_and_nothing_is_left() -> None:
    tally, stats = Soak(SECONDS, seed=1).run()
    for happened in (tally.served, tally.failed, tally.cancelled, tally.removals):
        assert happened
    for counted in (
        stats.prefetch_dropped,
        stats.prefetch_used,
        stats.prefetch_wasted,
        stats.prefetch_failed,
        stats.prefetch_retried,
        stats.prefetch_withdrawn,
        stats.query_ready,
        stats.query_joined,
        stats.query_claimed,
        stats.query_missed,
        stats.query_recovered,
        stats.hedge_won,
    ):
        assert counted, f"a soak in which this never happened: {stats}"
