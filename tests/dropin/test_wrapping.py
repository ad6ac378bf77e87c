"""A wrapper has its model's names, and copies and pickles as its model does."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings.wrapping import LOOKED_FOR, WrapsAModel, remembers_arguments


class Model(Embeddings):
    model = "text-embedding-3-small"

    def __init__(self) -> None:
        self.made_in = "a shop"
        self.wrapper: Any = None

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [[1.0] for _ in texts]

    def embed_query(self, text: str) -> list[float]:
        return [1.0]

    def embed_image(self, uris: list[str]) -> list[list[float]]:
        return [[2.0] for _ in uris]


class Wrapper(WrapsAModel):
    @remembers_arguments
    def __init__(
        self,
        underlying_embeddings: Embeddings,
        *,
        ttl: float = 300.0,
        on_event: Callable[[object], None] | None = None,
    ) -> None:
        self.ttl = ttl
        self.lock = threading.Lock()  # cannot be copied
        self.kept: dict[str, list[float]] = {}

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.underlying_embeddings.embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        return self.underlying_embeddings.embed_query(text)


class OfATeam(Wrapper):
    """With an `__init__` of its own, that takes other arguments."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        super().__init__(Model(), ttl=7.0)
        self.names = [tenant]


def listener(event: object) -> None:
    """Can be pickled by its name."""


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda wrapper: pickle.loads(pickle.dumps(wrapper)),
    "pickle, oldest": lambda wrapper: pickle.loads(pickle.dumps(wrapper, 0)),
    "asdict": lambda wrapper: dataclasses.asdict(Holder(wrapper))["embeddings"],
}
EVERY_WAY = pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)


@dataclasses.dataclass
class Holder:
    embeddings: Wrapper


# --- Names -----------------------------------------------------------------------------------


def test_what_is_looked_for_is_there_if_the_model_has_it() -> None:
    wrapper: Any = Wrapper(Model())
    assert wrapper.model == "text-embedding-3-small"
    assert wrapper.embed_image(["a.png", "b.png"]) == [[2.0], [2.0]]
    assert not hasattr(wrapper, "model_name")
    assert not hasattr(wrapper, "embed_video")
    wrapper.underlying_embeddings.model_name = "set later"
    assert wrapper.model_name == "set later"


def test_through_two_wrappers() -> None:
    wrapper: Any = Wrapper(Wrapper(Model()))
    assert wrapper.model == "text-embedding-3-small"
    assert hasattr(wrapper, "embed_image")
    assert not hasattr(wrapper, "aembed_image")


def test_nothing_else_of_the_model_shows() -> None:
    wrapper: Any = Wrapper(Model())
    for name in ("made_in", "wrapper", "prefech", "embedd_query", "__len__", "_model"):
        assert not hasattr(wrapper, name), name


def test_an_error_names_the_wrapper_and_what_is_missing() -> None:
    wrapper: Any = Wrapper(Model())
    with pytest.raises(AttributeError, match="'Wrapper' object has no attribute 'embed_video'"):
        _ = wrapper.embed_video
    with pytest.raises(AttributeError, match="'Wrapper' object has no attribute 'prefech'"):
        _ = wrapper.prefech


def test_before_it_is_made_it_has_nothing() -> None:
    wrapper: Any = Wrapper.__new__(Wrapper)
    for name in ("underlying_embeddings", "embed_image", *LOOKED_FOR):
        assert not hasattr(wrapper, name), name


# --- Copies ----------------------------------------------------------------------------------


@EVERY_WAY
def test_a_copy_has_the_settings_and_starts_empty(way: Callable[[Wrapper], Wrapper]) -> None:
    wrapper = Wrapper(Model(), ttl=5.0, on_event=listener)
    wrapper.kept["text"] = [1.0]
    copied = way(wrapper)
    assert type(copied) is Wrapper
    assert copied.ttl == 5.0
    assert copied._made_with["on_event"] is listener
    assert copied.kept == {}
    assert copied.lock is not wrapper.lock
    assert type(copied.underlying_embeddings) is Model
    assert wrapper.kept == {"text": [1.0]}, "the original notices nothing"


@EVERY_WAY
def test_a_copy_of_a_copy(way: Callable[[Wrapper], Wrapper]) -> None:
    assert way(way(Wrapper(Model(), ttl=5.0))).ttl == 5.0


@EVERY_WAY
def test_what_a_subclass_has_set_comes_along(way: Callable[[OfATeam], OfATeam]) -> None:
    wrapper = OfATeam("acme")
    wrapper.kept["text"] = [1.0]
    copied = way(wrapper)
    assert (copied.tenant, copied.names, copied.ttl) == ("acme", ["acme"], 7.0)
    assert copied.kept == {}


def test_who_shares_the_model() -> None:
    wrapper = Wrapper(Model())
    assert copy.copy(wrapper).underlying_embeddings is wrapper.underlying_embeddings
    assert copy.deepcopy(wrapper).underlying_embeddings is not wrapper.underlying_embeddings


def test_a_model_that_knows_its_wrapper() -> None:
    model = Model()
    wrapper = model.wrapper = Wrapper(model)
    copied = copy.deepcopy(wrapper)
    inner: Any = copied.underlying_embeddings
    assert inner.wrapper is copied


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = Model()
    model.wrapper = threading.Lock()
    with pytest.raises(TypeError, match="lock"):
        copy.deepcopy(Wrapper(model))
    with pytest.raises(TypeError, match="lock"):
        pickle.dumps(Wrapper(model))
    assert copy.copy(Wrapper(model)).underlying_embeddings is model


def test_a_listener_is_shared_by_copies_and_left_behind_by_pickles(
    caplog: pytest.LogCaptureFixture,
) -> None:
    events: list[object] = []
    lock = threading.Lock()

    def local(event: object) -> None:
        with lock:
            events.append(event)

    wrapper = Wrapper(Model(), ttl=5.0, on_event=local)
    assert copy.deepcopy(wrapper)._made_with["on_event"] is local
    assert not caplog.records
    pickled = pickle.dumps(wrapper)
    [record] = caplog.records
    assert (record.levelno, "on_event" in record.message) == (logging.WARNING, True)
    assert pickle.loads(pickled)._made_with["on_event"] is None
    assert pickle.loads(pickled).ttl == 5.0


def test_a_wrong_argument_is_named() -> None:
    make: Any = Wrapper
    with pytest.raises(TypeError, match="underlying_embeddings"):
        make()
    with pytest.raises(TypeError, match="tll"):
        make(Model(), tll=5.0)
