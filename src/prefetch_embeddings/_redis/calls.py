"""One call of the face: what it looks for, and what it keeps of what the model answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from prefetch_embeddings._redis.lease import Lease
    from prefetch_embeddings._redis.lookup import Lookups
    from prefetch_embeddings._redis.requests import Request, Slot
    from prefetch_embeddings._redis.shelf import Shelf

UPSTREAM_TEXTS: Final = 100
"""Texts of one call to a model that does not say how many it sends at once."""


class Query:
    """One query's way; a context manager that leaves no lease behind, however it ends."""

    __slots__ = ("_lease", "_lookups", "_moment", "_shelf", "_slot")

    def __init__(self, shelf: Shelf, lookups: Lookups, text: str) -> None:
        self._shelf = shelf
        self._lookups = lookups
        self._slot = shelf.slot("query", text)
        self._moment = shelf.moment
        self._lease: Lease | None = None

    def steps(self) -> Generator[Request, Any, list[float] | None]:
        """Look for the vector, or else for the right to make the call."""
        found = yield from self._lookups.one(self._slot)
        self._lease = found.lease
        return found.vector

    def keep(self, vector: Sequence[float]) -> list[float]:
        """Have the model's vector stored; return a copy for the caller."""
        held, self._lease = self._lease, None
        return self._shelf.keep(self._slot, vector, self._moment, held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        held, self._lease = self._lease, None
        self._shelf.give_up(self._slot, held)


class Batch:
    """The texts of one call for documents, and their vectors as they come in."""

    def __init__(self, shelf: Shelf, lookups: Lookups, texts: Sequence[str]) -> None:
        self._shelf = shelf
        self._lookups = lookups
        self._slots = [shelf.slot("document", text) for text in texts]
        self._moment = shelf.moment
        self._vectors: dict[Slot, list[float]] = {}

    def steps(self) -> Generator[Request, Any, None]:
        """Look for the vectors."""
        self._vectors = yield from self._lookups.many(self._slots)

    def missing(self, model: object) -> Iterator[list[Slot]]:
        """Yield what was not found, each text once, in calls of the model's own size."""
        missing = [slot for slot in dict.fromkeys(self._slots) if slot not in self._vectors]
        size = getattr(model, "chunk_size", None)
        if not isinstance(size, int) or size < 1:
            size = UPSTREAM_TEXTS
        for start in range(0, len(missing), size):
            yield missing[start : start + size]

    def keep(self, asked: Sequence[Slot], answer: Sequence[Sequence[float]]) -> None:
        """Have the model's vectors stored.

        Raises:
            ValueError: There are more or fewer of them than were asked for.
        """
        if len(answer) != len(asked):
            raise ValueError(f"the model returned {len(answer)} vectors for {len(asked)} texts")
        for slot, vector in zip(asked, answer, strict=True):
            self._vectors[slot] = self._shelf.keep(slot, vector, self._moment)

    def in_order(self) -> list[list[float]]:
        """Return all vectors in the order of the texts, each a list of its own."""
        given: set[Slot] = set()
        ordered = []
        for slot in self._slots:
            vector = self._vectors[slot]
            ordered.append(vector.copy() if slot in given else vector)
            given.add(slot)
        return ordered
