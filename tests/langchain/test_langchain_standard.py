"""LangChain's own standard suites hold for the wrapper, whatever was prefetched before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import ScriptedEmbeddings

Wrap = Callable[..., PrefetchingEmbeddings]
SUITES_QUERIES = ("foo", "bar")


class OverAScriptedModel:
    @property
    def embeddings_class(self) -> type[PrefetchingEmbeddings]:
        return PrefetchingEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"underlying_embeddings": ScriptedEmbeddings()}


class TestUnit(OverAScriptedModel, EmbeddingsUnitTests):
    pass


class TestUnprepared(OverAScriptedModel, EmbeddingsIntegrationTests):
    pass


class TestPrefetched(OverAScriptedModel, EmbeddingsIntegrationTests):
    @pytest.fixture
    def model(self, wrap: Wrap) -> Embeddings:
        embeddings = wrap(ScriptedEmbeddings())
        for text in SUITES_QUERIES:
            embeddings.prefetch(text)
        return embeddings


class TestReady(OverAScriptedModel, EmbeddingsIntegrationTests):
    @pytest.fixture
    def model(self, wrap: Wrap) -> Embeddings:
        embeddings = wrap(ScriptedEmbeddings())
        for text in SUITES_QUERIES:
            embeddings.prefetch(text)
            assert embeddings.wait_for_prefetch(text)
        return embeddings


class TestSymmetricBatch(OverAScriptedModel, EmbeddingsIntegrationTests):
    @pytest.fixture
    def model(self, wrap: Wrap) -> Embeddings:
        embeddings = wrap(ScriptedEmbeddings(), symmetric=True)
        embeddings.prefetch_many(SUITES_QUERIES)
        return embeddings


class TestFailedPrefetch(OverAScriptedModel, EmbeddingsIntegrationTests):
    @pytest.fixture
    def model(self, wrap: Wrap) -> Embeddings:
        scripted = ScriptedEmbeddings()
        embeddings = wrap(scripted, attempts=1)
        for text in SUITES_QUERIES:
            scripted.fail(text, ConnectionError("unreachable"))
            embeddings.prefetch(text)
            assert not embeddings.wait_for_prefetch(text)
        return embeddings


class TestModelWithoutAsyncSide(OverAScriptedModel, EmbeddingsIntegrationTests):
    @pytest.fixture
    def model(self, wrap: Wrap) -> Embeddings:
        return wrap(DeterministicFakeEmbedding(size=8))


class TestClosed(OverAScriptedModel, EmbeddingsIntegrationTests):
    @pytest.fixture
    def model(self, wrap: Wrap) -> Embeddings:
        embeddings = wrap(ScriptedEmbeddings())
        embeddings.close()
        return embeddings
