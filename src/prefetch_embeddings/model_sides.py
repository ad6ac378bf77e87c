"""The two sides of a model, sync and async, and which of them has the model's own behaviour.

A team that keeps a cache in a subclass often overrides `embed_query` alone. Its `aembed_query` is
then inherited from above, and would go around the cache. Such a model is asked by its sync method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor

if TYPE_CHECKING:
    from collections.abc import Iterator


def embeds_on_loops(model: Embeddings) -> bool:
    """Tell whether a model, and all that it wraps, embeds queries on event loops by itself.

    LangChain's default `aembed_query` is a thread of the loop's default executor.
    """
    return not any(is_gone_around(tier, "embed_query") for tier in tiers(model))


def tiers(model: Embeddings) -> Iterator[Embeddings]:
    """Yield a model, what it wraps, and so on down to the one that embeds."""
    inner: object = model
    while isinstance(inner, Embeddings):
        yield inner
        inner = getattr(inner, "underlying_embeddings", None)


async def aembed_query(model: Embeddings, text: str, **kwargs: Any) -> list[float]:
    """Ask a model for a query's vector, on the running loop if the model can do it there."""
    if is_gone_around(model, "embed_query"):
        return await run_in_executor(None, model.embed_query, text, **kwargs)
    return await model.aembed_query(text, **kwargs)


async def aembed_documents(model: Embeddings, texts: list[str], **kwargs: Any) -> list[list[float]]:
    """Ask a model for documents' vectors, on the running loop if the model can do it there."""
    if is_gone_around(model, "embed_documents"):
        return await run_in_executor(None, model.embed_documents, texts, **kwargs)
    return await model.aembed_documents(texts, **kwargs)


def is_gone_around(model: object, method: str, amethod: str = "") -> bool:
    """Tell whether the async method knows nothing of what was last put in the sync one's place."""
    return _distance(model, method) < _distance(model, amethod or f"a{method}")


def _distance(model: object, method: str) -> int:
    """Return how far up a method comes from: 0 of the object itself, then class by class."""
    places = (vars(model) if hasattr(model, "__dict__") else {}, *map(vars, type(model).__mro__))
    return next((number for number, place in enumerate(places) if method in place), len(places))
