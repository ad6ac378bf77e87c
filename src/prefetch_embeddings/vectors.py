"""Calls a model, and takes its vectors over: as tuples, which nobody can change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from langchain_core.embeddings import Embeddings

if TYPE_CHECKING:
    from typing import TypeAlias

    Vector: TypeAlias = tuple[float, ...]


class VectorLoader:
    """Loads the vectors of queries from a model.

    Args:
        model: The model.
        symmetric: Whether it embeds queries and documents alike.
    """

    def __init__(self, model: Embeddings, *, symmetric: bool) -> None:
        self._model: Final = model
        self.native_async: Final = embeds_on_loops(model)
        self.loads_many: Final = symmetric

    def load(self, text: str, options: Any) -> Vector:  # noqa: ARG002 - queries have none
        """Return the vector of a query; the calling thread waits."""
        return _tuple(self._model.embed_query(text))

    async def aload(self, text: str, options: Any) -> Vector:  # noqa: ARG002
        """Return the vector of a query, by the model's async method."""
        return _tuple(await self._model.aembed_query(text))

    def load_many(self, texts: list[str]) -> list[Vector]:
        """Return the vectors of several texts, in one call."""
        return [_tuple(vector) for vector in self._model.embed_documents(texts)]


def own(vector: Any) -> list[float]:
    """Return a list that nobody else holds: the model may keep, and reuse, what it returned."""
    if hasattr(vector, "tolist"):  # of an array's own floats, Python's
        return list(vector.tolist())
    return list(vector)


def _tuple(vector: Any) -> Vector:
    return tuple(vector.tolist() if hasattr(vector, "tolist") else vector)


def embeds_on_loops(model: object) -> bool:
    """Tell whether a model, and all that it wraps, has an async side of its own, and no thread's.

    LangChain's default `aembed_query` is a thread of the loop's default executor.
    """
    method = getattr(type(model), "aembed_query", None)
    if method is Embeddings.aembed_query or not hasattr(model, "aembed_query"):
        return False
    inner = getattr(model, "underlying_embeddings", None)
    return not isinstance(inner, Embeddings) or embeds_on_loops(inner)
