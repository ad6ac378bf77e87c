"""Errors are not kept, and each caller's exception is its own."""

from __future__ import annotations

import asyncio
import dataclasses
import traceback
from collections.abc import Callable
from typing import Self

import openai
import pytest

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings._flights.failures import own_copy
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import Call, until
from tests.openai_client import http

Wrap = Callable[..., PrefetchingEmbeddings]


def test_the_next_query_after_a_failure_is_a_fresh_call(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    model.fail("q", ValueError("once"))
    with pytest.raises(ValueError, match="once"):
        embeddings.embed_query("q")
    assert embeddings.embed_query("q") == model.vector("q")
    assert model.calls_for("q") == 2
    stats = embeddings.stats()
    assert (stats.query_missed, stats.query_failed) == (2, 1)


async def test_the_next_coroutine_after_a_failure_makes_a_fresh_call(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    model.fail("q", ValueError("once"))
    with pytest.raises(ValueError, match="once"):
        await embeddings.aembed_query("q")
    assert await embeddings.aembed_query("q") == model.vector("q")


def test_many_callers_of_one_failure_get_tracebacks_of_their_own(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    model.fail("q", ValueError("shared"))
    owner = Call(embeddings.embed_query, "q")
    gate.wait_until_entered()
    joined = [Call(embeddings.embed_query, "q") for _ in range(50)]
    until(lambda: embeddings.stats().query_joined == 50)
    gate.open()
    errors = [owner.error(), *(call.error() for call in joined)]
    assert len({id(error) for error in errors}) == 51
    assert all(type(error) is ValueError and error.args == ("shared",) for error in errors)
    assert max(len(traceback.extract_tb(error.__traceback__)) for error in errors) < 20
    assert model.calls_for("q") == 1


async def test_many_coroutines_of_one_failure_get_tracebacks_of_their_own(
    wrap: Wrap, model: ScriptedEmbeddings
) -> None:
    embeddings = wrap(model)
    model.fail("q", ValueError("shared"))
    outcomes = await asyncio.gather(
        *(embeddings.aembed_query("q") for _ in range(50)), return_exceptions=True
    )
    assert all(type(error) is ValueError for error in outcomes)
    assert len({id(error) for error in outcomes}) == 50
    depths = [
        len(traceback.extract_tb(error.__traceback__))
        for error in outcomes
        if isinstance(error, ValueError)
    ]
    assert max(depths) < 20


def _rate_limit() -> openai.RateLimitError:
    request = http.Request("POST", "http://127.0.0.1/v1/embeddings")
    return openai.RateLimitError(
        "slow down", response=http.Response(429, request=request), body={"code": "rate"}
    )


class _WantsMoreError(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class _FrozenError(Exception):
    code: int


class _SlottedError(Exception):
    __slots__ = ("code",)

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@pytest.mark.parametrize(
    "error",
    [
        _FrozenError(5),
        ValueError("plain"),
        _WantsMoreError(7, detail="keyword-only"),
        _rate_limit(),
        OSError(2, "no such thing", "a-file"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        KeyError("key"),
        ExceptionGroup("several", [ValueError(1)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_copy_says_what_the_original_says(error: Exception) -> None:
    BaseException.__setattr__(error, "__cause__", TypeError("the cause"))
    object.__setattr__(error, "__notes__", ["a note"])
    twin = own_copy(error, None)
    assert twin is not error
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert twin.args == error.args
    assert twin.__cause__ is error.__cause__
    assert vars(twin) == vars(error)


def test_a_copy_has_what_stands_in_slots_and_notes_of_its_own() -> None:
    error = _SlottedError("message", 7)
    error.add_note("the model's")
    twin = own_copy(error, None)
    assert isinstance(twin, _SlottedError)
    assert twin.code == 7
    twin.add_note("the caller's")
    assert error.__notes__ == ["the model's"]


def test_a_frozen_exception_reaches_everybody(wrap: Wrap, model: ScriptedEmbeddings) -> None:
    embeddings = wrap(model)
    gate = model.hold("q")
    model.fail("q", _FrozenError(5))
    owner = Call(embeddings.embed_query, "q")
    gate.wait_until_entered()
    joined = Call(embeddings.embed_query, "q")
    until(lambda: embeddings.stats().query_joined == 1)
    gate.open()
    assert owner.error() == joined.error() == _FrozenError(5)


def test_an_exception_that_cannot_be_copied_is_still_raised() -> None:
    class StubbornError(Exception):
        def __new__(cls, *args: object, key: str = "") -> Self:
            if not key:
                raise TypeError("not without a key")
            return super().__new__(cls, *args)

        def __init__(self, *args: object, key: str) -> None:
            super().__init__(*args)

    error = StubbornError("x", key="y")
    for _ in range(10):
        with pytest.raises(StubbornError) as raised:
            raise own_copy(error, None)
        assert raised.value is error
        assert len(traceback.extract_tb(error.__traceback__)) == 1, "its traceback grows"
