"""What identifies a vector space is told from well-known models; of others the user must say it."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.stores import InMemoryByteStore
from langchain_openai import AzureOpenAIEmbeddings, OpenAIEmbeddings
from pydantic import SecretStr

from prefetch_embeddings._redis.model_id import derive_dimensions, derive_model_id
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings

KEY = SecretStr("sk-secret")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_BASE", "OPENAI_BASE_URL", "AZURE_OPENAI_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def openai(**options: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(api_key=KEY, **options)


def azure(**options: Any) -> AzureOpenAIEmbeddings:
    return AzureOpenAIEmbeddings(api_key=KEY, api_version="2024-02-01", **options)


def stand_in(class_name: str, module: str, **attributes: Any) -> Embeddings:
    """Return an instance of a class that looks like one of a package that is not installed."""
    made: Embeddings = type(class_name, (DeterministicFakeEmbedding,), {"__module__": module})(
        size=2
    )
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


def test_openai() -> None:
    identity = derive_model_id(openai(model="text-embedding-3-small"))
    assert "text-embedding-3-small" in identity
    assert "https://api.openai.com/v1" in identity
    assert "secret" not in identity
    assert identity == derive_model_id(openai(model="text-embedding-3-small", max_retries=7))
    assert identity != derive_model_id(openai(model="text-embedding-3-large"))
    assert identity != derive_model_id(openai(model="text-embedding-3-small", base_url="http://l"))


def test_openai_url_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://one/v1/")
    assert "http://one/v1" in derive_model_id(openai())
    monkeypatch.setenv("OPENAI_API_BASE", "http://two/v1")
    assert "http://two/v1" in derive_model_id(openai())
    assert "http://three" in derive_model_id(openai(base_url="http://three"))


def test_dimensions() -> None:
    assert derive_dimensions(openai(dimensions=256)) == 256
    assert derive_dimensions(openai()) is None
    google = stand_in("GoogleGenerativeAIEmbeddings", "langchain_google_genai", model="m")
    object.__setattr__(google, "output_dimensionality", 768)
    assert derive_dimensions(google) == 768


def test_azure() -> None:
    options = {"azure_endpoint": "https://one.openai.azure.com", "azure_deployment": "mine"}
    identity = derive_model_id(azure(**options))
    assert identity == derive_model_id(azure(**options))
    for change in ({"azure_endpoint": "https://other"}, {"azure_deployment": "b"}, {"model": "m"}):
        assert identity != derive_model_id(azure(**{**options, **change}))


@pytest.mark.parametrize(
    ("class_name", "module", "attribute"),
    [
        ("CohereEmbeddings", "langchain_cohere.embeddings", "model"),
        ("VoyageAIEmbeddings", "langchain_voyageai.embeddings", "model"),
        ("OllamaEmbeddings", "langchain_ollama.embeddings", "model"),
        ("HuggingFaceEmbeddings", "langchain_huggingface.embeddings", "model_name"),
        ("HuggingFaceEndpointEmbeddings", "langchain_huggingface.embeddings", "model"),
        ("HuggingFaceEndpointEmbeddings", "langchain_huggingface.embeddings", "repo_id"),
        ("MistralAIEmbeddings", "langchain_mistralai.embeddings", "model"),
        ("GoogleGenerativeAIEmbeddings", "langchain_google_genai.embeddings", "model"),
        ("VertexAIEmbeddings", "langchain_google_vertexai.embeddings", "model_name"),
        ("BedrockEmbeddings", "langchain_aws.embeddings.bedrock", "model_id"),
        ("BedrockEmbeddings", "langchain_community.embeddings.bedrock", "model_id"),
        ("JinaEmbeddings", "langchain_community.embeddings.jina", "model_name"),
        ("NVIDIAEmbeddings", "langchain_nvidia_ai_endpoints.embeddings", "model"),
    ],
)
def test_well_known_models(class_name: str, module: str, attribute: str) -> None:
    one = derive_model_id(stand_in(class_name, module, **{attribute: "one"}))
    assert "one" in one
    assert one == derive_model_id(stand_in(class_name, module, **{attribute: "one"}))
    assert one != derive_model_id(stand_in(class_name, module, **{attribute: "other"}))


def test_what_changes_the_vectors_changes_the_identity() -> None:
    def local(**options: Any) -> str:
        module = "langchain_huggingface.embeddings.huggingface"
        return derive_model_id(stand_in("HuggingFaceEmbeddings", module, **options))

    plain = local(model_name="m", encode_kwargs={})
    assert plain != local(model_name="m", encode_kwargs={"normalize_embeddings": True})


def test_wrappers_are_looked_through() -> None:
    wrapped = CacheBackedEmbeddings(openai(dimensions=3), InMemoryByteStore())  # type: ignore[arg-type]
    tier = RedisCachedEmbeddings(wrapped, "redis://x")
    assert derive_model_id(tier) == derive_model_id(openai(dimensions=3))
    assert derive_dimensions(tier) == 3


def test_a_subclass_is_another_model() -> None:
    class Normalised(OpenAIEmbeddings):
        pass

    assert derive_model_id(Normalised(api_key=KEY)) != derive_model_id(openai())


@pytest.mark.parametrize(
    "unknown",
    [
        DeterministicFakeEmbedding(size=3),
        stand_in("OpenAIEmbeddings", "somebody.else", model="m"),
        stand_in("CohereEmbeddings", "langchain_cohere", model=None),
    ],
)
def test_of_others_the_user_must_say_it(unknown: Embeddings) -> None:
    with pytest.raises(ValueError, match="pass model_id="):
        RedisCachedEmbeddings(unknown, "redis://x")
    RedisCachedEmbeddings(unknown, "redis://x", model_id="mine")


def test_a_wrapper_that_may_change_vectors_is_another_model() -> None:
    class Normalised(Embeddings):
        def __init__(self) -> None:
            self.underlying_embeddings = openai(dimensions=3)

        def embed_query(self, text: str) -> list[float]:
            return [0.0]

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[0.0] for _ in texts]

    assert derive_model_id(Normalised()) != derive_model_id(openai(dimensions=3))
    assert derive_dimensions(Normalised()) == 3


def test_an_object_that_has_every_attribute_is_not_unwrapped_for_ever() -> None:
    class Permissive(Embeddings):
        embed_query = embed_documents = None  # type: ignore[assignment]

        def __getattr__(self, name: str) -> Any:
            return Permissive()

    RedisCachedEmbeddings(Permissive(), "redis://x", model_id="mine")
