"""Which vector space a model embeds into, told from its attributes without importing its package.

Only what changes the vectors belongs here: the model, its dimensions, its normalisation and
instructions, and the server where the same name may mean another model.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from langchain_core.embeddings import Embeddings

if TYPE_CHECKING:
    from collections.abc import Mapping

_INSTRUCTIONS: Final = ("embed_instruction", "query_instruction")
_LOCAL: Final = ("model_kwargs", "encode_kwargs", "query_encode_kwargs", *_INSTRUCTIONS)

# Class name -> the attributes of which the first that is set names the model, and those that change
# its vectors. The integration packages and langchain-community use the same class names.
_KNOWN: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "OpenAIEmbeddings": (
        ("model",),
        ("openai_api_base", "model_kwargs", "check_embedding_ctx_length", "embedding_ctx_length"),
    ),
    "AzureOpenAIEmbeddings": (
        ("deployment", "model"),
        ("model", "azure_endpoint", "openai_api_base", "model_kwargs"),
    ),
    "BedrockEmbeddings": (("model_id",), ("model_kwargs", "normalize", "endpoint_url")),
    "CohereEmbeddings": (("model",), ("truncate", "base_url")),
    "DashScopeEmbeddings": (("model",), ()),
    "FastEmbedEmbeddings": (("model_name",), ("doc_embed_type", "max_length")),
    "FireworksEmbeddings": (("model",), ("base_url",)),
    "GoogleGenerativeAIEmbeddings": (("model",), ("task_type", "base_url")),
    "HuggingFaceBgeEmbeddings": (("model_name",), _LOCAL),
    "HuggingFaceEmbeddings": (("model_name",), (*_LOCAL, "multi_process")),
    "HuggingFaceEndpointEmbeddings": (("model", "repo_id"), ("repo_id", "task", "model_kwargs")),
    "HuggingFaceHubEmbeddings": (("model", "repo_id"), ("repo_id", "task", "model_kwargs")),
    "HuggingFaceInferenceAPIEmbeddings": (("model_name",), ("api_url",)),
    "HuggingFaceInstructEmbeddings": (("model_name",), _LOCAL),
    "JinaEmbeddings": (("model_name", "model"), ()),
    "MistralAIEmbeddings": (("model",), ("endpoint",)),
    "NVIDIAEmbeddings": (("model",), ("base_url", "truncate")),
    "NomicEmbeddings": (("model",), ("inference_mode",)),
    "OllamaEmbeddings": (("model",), ("base_url", "num_ctx", "model_kwargs", *_INSTRUCTIONS)),
    "TogetherEmbeddings": (("model",), ("together_api_base",)),
    "VertexAIEmbeddings": (("model_name", "model"), ()),
    "VoyageAIEmbeddings": (("model",), ("truncation",)),
    "VoyageEmbeddings": (("model",), ("voyage_api_base", "truncation")),
}
_TRANSPARENT: Final = {"CacheBackedEmbeddings", "PrefetchingEmbeddings", "RedisCachedEmbeddings"}
_DIMENSIONS: Final = ("dimensions", "output_dimensionality", "output_dimension", "dimensionality")
_DEEPEST: Final = 16
"""Wrappers within each other that are looked through."""

_OPENAI_URL: Final = "https://api.openai.com/v1"


def derive_model_id(model: Embeddings) -> str:
    """Return what identifies the vector space of `model`.

    Wrappers with an attribute `underlying_embeddings` are looked through; those that are not known
    to leave the vectors alone are part of the identity.

    Raises:
        ValueError: The class is not among the well-known ones, or does not name its model.
    """
    innermost, wrappers = _unwrap(model)
    for known in type(innermost).__mro__:
        if known.__name__ in _KNOWN and known.__module__.partition(".")[0].startswith("langchain_"):
            naming, shaping = _KNOWN[known.__name__]
            name = next((value for value in _read(innermost, naming).values() if value), None)
            if name is None:
                break
            identity = {"class": known.__name__, "name": name, **_read(innermost, shaping)}
            if known.__name__ == "OpenAIEmbeddings":
                identity["openai_api_base"] = _openai_url(innermost)
            if known is not type(innermost):  # a subclass may change what it embeds
                identity["subclass"] = _name(innermost)
            if wrappers:  # they may change what it embeds, or the vectors
                identity["wrappers"] = wrappers
            return json.dumps(identity, sort_keys=True, default=str)
    raise ValueError(
        f"Which vectors {type(innermost).__name__} makes cannot be told from its attributes: pass "
        "model_id=, a name that changes whenever the vectors would, such as "
        '"openai/text-embedding-3-small" or "my-model@2024-06"'
    )


def check_nesting(model: Any) -> None:
    """Raise unless `model` is a model that a Redis tier can wrap.

    Raises:
        TypeError: It is no `Embeddings`.
        ValueError: There is a prefetching tier inside, whose prefetches would pass Redis by.
    """
    if not isinstance(model, Embeddings):
        raise TypeError(
            f"underlying_embeddings: expected an Embeddings, not {type(model).__name__}"
        )
    for _ in range(_DEEPEST):
        if type(model).__name__ == "PrefetchingEmbeddings":
            raise ValueError(
                "underlying_embeddings: expected a model, not PrefetchingEmbeddings, whose "
                "prefetches would pass Redis by. Wrap the other way round: "
                "PrefetchingEmbeddings(RedisCachedEmbeddings(model, ...))"
            )
        inner = getattr(model, "underlying_embeddings", None)
        if not isinstance(inner, Embeddings):
            return
        model = inner


def derive_dimensions(model: Embeddings) -> int | None:
    """Return the dimensions that `model` was asked for; None where it was not, or doesn't say."""
    for value in _read(_unwrap(model)[0], _DIMENSIONS).values():
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _unwrap(model: Any) -> tuple[Any, list[str]]:
    """Return the innermost model, and the wrappers around it that may not just cache."""
    wrappers: list[str] = []
    for _ in range(_DEEPEST):  # an object that has every attribute has this one, too
        inner = getattr(model, "underlying_embeddings", None)
        if not isinstance(inner, Embeddings):
            break
        if type(model).__name__ not in _TRANSPARENT:
            wrappers.append(_name(model))
        model = inner
    return model, wrappers


def _name(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _read(model: Any, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(model, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _openai_url(model: Any) -> str:
    url = (
        getattr(model, "openai_api_base", None)
        or os.environ.get("OPENAI_API_BASE")
        or os.environ.get("OPENAI_BASE_URL")
        or _OPENAI_URL
    )
    return str(url).rstrip("/")
