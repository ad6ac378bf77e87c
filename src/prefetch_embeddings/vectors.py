"""Calls a model, and takes its vectors over: as tuples, which nobody can change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings.model_sides import aembed_query, embeds_on_loops, is_gone_around

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from langchain_core.embeddings import Embeddings

    Vector: TypeAlias = tuple[float, ...]


class VectorLoader:
    """Loads the vectors of queries from a model.

    Args:
        model: The model.
        symmetric: Whether it embeds queries and documents alike.
    """

    def __init__(self, model: Embeddings, *, symmetric: bool) -> None:
        self._model: Final = model
        self._through_sync: Final = is_gone_around(model, "embed_query")
        self.native_async: Final = embeds_on_loops(model)
        self.loads_many: Final = symmetric

    def load(self, text: str, options: Any) -> Vector:  # noqa: ARG002 - queries have none
        """Return the vector of a query; the calling thread waits."""
        return _tuple(self._model.embed_query(text))

    async def aload(self, text: str, options: Any) -> Vector:  # noqa: ARG002
        """Return the vector of a query, by the model's async method."""
        if self._through_sync:
            return _tuple(await aembed_query(self._model, text))
        return _tuple(await self._model.aembed_query(text))

    def load_many(self, texts: list[str]) -> list[Vector]:
        """Return the vectors of several texts, in one call."""
        return [_tuple(vector) for vector in self._model.embed_documents(texts)]


def own(vector: Any) -> list[float]:
    """Return a list that nobody else holds: the model may keep, and reuse, what it returned."""
    return list(_plain(vector))


def sort_out(
    texts: list[str], holds: Callable[[str], bool] | None
) -> tuple[dict[int, str], list[str]]:
    """Return the texts that somebody holds, by their places, and the others in their order."""
    if holds is None:
        return {}, texts
    known = {place: text for place, text in enumerate(texts) if holds(text)}
    return known, [text for place, text in enumerate(texts) if place not in known]


def in_order(vectors: dict[int, Vector], answer: list[list[float]]) -> list[list[float]]:
    """Return vectors that were there, at their places, and a model's answer in the others."""
    if not vectors:
        return [own(vector) for vector in answer]
    rest = iter(answer)
    count = len(vectors) + len(answer)
    return [list(vectors[n]) if n in vectors else own(next(rest)) for n in range(count)]


def _tuple(vector: Any) -> Vector:
    return tuple(_plain(vector))


def _plain(vector: Any) -> Any:
    """Return a vector of Python's floats: an array has floats of its own."""
    return vector if type(vector) is list or not hasattr(vector, "tolist") else vector.tolist()
