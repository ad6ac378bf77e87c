"""What all tests share: wrappers that are closed and checked for leaks after every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import (
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
    assert_no_leaks,
)
from tests.helpers import TimeByHand

# A time bound on a test case is one that a loaded machine breaks.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

if interval := os.environ.get("SWITCH_INTERVAL"):  # hunts for races: 1e-6 switches all the time
    sys.setswitchinterval(float(interval))


@pytest.fixture
def model() -> ScriptedEmbeddings:
    return ScriptedEmbeddings()


@pytest.fixture
def wrap() -> Iterator[Callable[..., PrefetchingEmbeddings]]:
    """Makes wrappers with real threads; checks each after the test."""
    made: list[PrefetchingEmbeddings] = []

    def make(model: Embeddings, **options: Any) -> PrefetchingEmbeddings:
        made.append(PrefetchingEmbeddings(model, **options))
        return made[-1]

    yield make
    for embeddings in made:
        embeddings.close()
        assert_no_leaks(embeddings)


@pytest.fixture
def timed() -> Iterator[Callable[..., TimeByHand]]:
    """Makes wrappers with real threads whose time the test drives; checks each after the test."""
    made: list[TimeByHand] = []

    def make(model: Embeddings, **options: Any) -> TimeByHand:
        made.append(TimeByHand(model, **options))
        return made[-1]

    yield make
    for embeddings in made:
        embeddings.close()
        assert_no_leaks(embeddings)


@pytest.fixture
def manual() -> Iterator[Callable[..., ManualPrefetchingEmbeddings]]:
    """Makes wrappers whose background and time the test drives; checks each after the test."""
    made: list[ManualPrefetchingEmbeddings] = []

    def make(model: Embeddings, **options: Any) -> ManualPrefetchingEmbeddings:
        made.append(ManualPrefetchingEmbeddings(model, **options))
        return made[-1]

    yield make
    for embeddings in made:
        embeddings.close()
        assert_no_leaks(embeddings)
