"""What users pass in wrongly is refused with the parameter's name, and what is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding

from prefetch_embeddings import arguments
from prefetch_embeddings._flights.patience import Hedge


def function() -> None:
    pass


async def coroutine_function() -> None:
    pass


class AsyncCall:
    async def __call__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "not None"),
        ("text-embedding-3-small", "not a str"),
        (function, "not a function"),
        (lambda text: [1.0], "not a function"),
        (openai.OpenAI(api_key="none-needed"), "not an OpenAI"),
        (DeterministicFakeEmbedding, r"DeterministicFakeEmbedding\(\.\.\.\), not the class"),
        (dict, "not the class dict"),
    ],
)
def test_a_model_must_be_one(model: Any, said: str) -> None:
    with pytest.raises(TypeError, match=rf"^underlying_embeddings must be .*{said}"):
        arguments.check_model("underlying_embeddings", model)


def test_a_model_is_accepted() -> None:
    arguments.check_model("underlying_embeddings", DeterministicFakeEmbedding(size=3))


@pytest.mark.parametrize("count", ["8", None, 1.5, True, [1]])
def test_a_count_must_be_a_whole_number(count: Any) -> None:
    with pytest.raises(TypeError, match=r"^max_entries must be an int, not "):
        arguments.check_count("max_entries", count)


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_has_a_least(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^max_entries must be at least 1, not {count}"):
        arguments.check_count("max_entries", count)


def test_counts_are_accepted() -> None:
    arguments.check_count("max_entries", 1)
    arguments.check_count("max_entries", np.int64(5))
    arguments.check_count("max_retries", 0, least=0)


@pytest.mark.parametrize("seconds", ["8", None, True, [1], 1j])
def test_seconds_must_be_a_number(seconds: Any) -> None:
    with pytest.raises(TypeError, match=r"^ttl must be a number of seconds, not "):
        arguments.check_seconds("ttl", seconds)


@pytest.mark.parametrize(
    ("seconds", "options"),
    [
        (0, {}),
        (-1.0, {"or_zero": True}),
        (float("nan"), {"endless": True}),
        (float("-inf"), {"endless": True}),
        (float("inf"), {}),
    ],
)
def test_seconds_must_be_in_range(seconds: float, options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"^ttl must be .* seconds.*, not "):
        arguments.check_seconds("ttl", seconds, **options)


def test_seconds_are_accepted() -> None:
    arguments.check_seconds("ttl", 1)
    arguments.check_seconds("ttl", np.float32(0.5))
    arguments.check_seconds("ttl", None, or_none=True)
    arguments.check_seconds("ttl", 0, or_zero=True)
    arguments.check_seconds("ttl", float("inf"), endless=True)


@pytest.mark.parametrize("flag", [None, 1, "yes"])
def test_a_flag_must_be_one(flag: Any) -> None:
    with pytest.raises(TypeError, match=r"^symmetric must be True or False, not "):
        arguments.check_flag("symmetric", flag)
    arguments.check_flag("symmetric", True)


@pytest.mark.parametrize("wrong", ["lower", True, coroutine_function, AsyncCall()])
def test_a_function_must_be_one(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^match must be a .*function"):
        arguments.check_function("match", wrong)


@pytest.mark.parametrize(
    "right", [None, str.lower, lambda text: text, type("Match", (), {"__call__": id})()]
)
def test_functions_are_accepted(right: Any) -> None:
    arguments.check_function("match", right)


@pytest.mark.parametrize("wrong", [True, 3, Hedge])
def test_a_kind_is_asked_for(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^hedge must be a Hedge, such as Hedge\(quantile=0\.95\), not "
    ):
        arguments.check_kind("hedge", wrong, Hedge, "Hedge(quantile=0.95)")


def test_a_kind_is_accepted() -> None:
    arguments.check_kind("hedge", Hedge(quantile=0.95), Hedge, "Hedge(quantile=0.95)")
    arguments.check_kind("hedge", None, Hedge, "Hedge(quantile=0.95)")


@pytest.mark.parametrize(
    "check", ["check_count", "check_seconds", "check_flag", "check_function", "check_model"]
)
def test_no_value_is_shown(check: str) -> None:
    with pytest.raises(TypeError) as raised:
        getattr(arguments, check)("name", "a text that nobody should read in a log")
    assert "nobody" not in str(raised.value)
