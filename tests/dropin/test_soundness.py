"""Which vectors are worth keeping."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefetch_embeddings.soundness import SURE, SoundVectors, is_sound

LARGEST = sys.float_info.max


@pytest.mark.parametrize(
    "vector",
    [
        [],
        [0.0, 0.0],
        [-0.0, 0.0],
        [math.nan, 1.0],
        [1.0, math.nan],
        [math.nan, math.nan],
        [math.inf, 1.0],
        [1.0, -math.inf],
        [math.inf, -math.inf],
        [None, 1.0],
        ["1.0"],
        [10**400, 1.0],
    ],
    ids=repr,
)
def test_what_is_no_direction_is_not_sound(vector: list[float]) -> None:
    assert not is_sound(vector)


@pytest.mark.parametrize(
    "vector",
    [
        [1.0],
        [0.0, 5e-324],
        [LARGEST, LARGEST],  # their sum is infinite
        [LARGEST, -LARGEST],
        [1, -1],
    ],
    ids=repr,
)
def test_any_finite_direction_is_sound(vector: list[float]) -> None:
    assert is_sound(vector)


@given(st.lists(st.floats(width=64), max_size=20))
def test_it_is_what_each_number_says(vector: list[float]) -> None:
    by_each = all(math.isfinite(x) for x in vector) and any(x != 0.0 for x in vector)
    assert is_sound(vector) == by_each


def test_a_vector_of_another_length_is_not_accepted() -> None:
    vectors = SoundVectors()
    assert vectors.accept([0.5] * 8)
    assert not vectors.accept([0.5] * 5)
    assert vectors.accept([0.5] * 8)
    assert not vectors.accept([0.5] * 5)


def test_unsound_vectors_teach_no_length() -> None:
    vectors = SoundVectors()
    for bad in ([], [0.0] * 3, [math.nan] * 3):
        assert not vectors.accept(bad)
    assert vectors.accept([0.5] * 8)


def test_a_first_vector_that_was_the_wrong_one_is_outvoted() -> None:
    vectors = SoundVectors()
    assert vectors.accept([0.5] * 5)
    assert [vectors.accept([0.5] * 8) for _ in range(3)] == [False, True, True]
    assert not vectors.accept([0.5] * 5)


def test_a_model_may_change_its_length_for_good() -> None:
    vectors = SoundVectors()
    for _ in range(100):
        vectors.accept([0.5] * 8)
    assert [vectors.accept([0.5] * 4) for _ in range(SURE + 2)] == [False] * SURE + [True] * 2


def test_wrong_lengths_with_right_ones_between_are_never_accepted() -> None:
    vectors = SoundVectors()
    vectors.accept([0.5] * 8)
    for length in (5, 6) * 20:
        assert not vectors.accept([0.5] * length)
    for _ in range(20):
        assert vectors.accept([0.5] * 8)
        assert not vectors.accept([0.5] * 5)
