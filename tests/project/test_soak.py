"""A short soak; `SOAK_SECONDS=60` makes it longer, `-m tests.tools.soak` shows its counts."""

from __future__ import annotations

import os

import pytest

from tests.tools.soak import MOST_WAITING, Soak

SECONDS = float(os.environ.get("SOAK_SECONDS", "15"))


@pytest.mark.timeout(SECONDS + MOST_WAITING + 100)
@pytest.mark.parametrize("retrieval", [False, True], ids=["vectors", "documents"])
def test_everything_happens_and_nothing_is_wrong_or_left(retrieval: bool) -> None:
    Soak(SECONDS, seed=1, retrieval=retrieval).run()
