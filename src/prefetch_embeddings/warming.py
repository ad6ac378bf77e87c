"""Warming up through tiers: each readies itself, then what is under it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

TEXT: Final = "warm-up"


@runtime_checkable
class WarmsUp(Protocol):
    """A tier that can be warmed up without anything staying in it."""

    def warm_up(self) -> float:
        """Ready itself and what is under it; return the seconds it took."""

    async def awarm_up(self) -> float:
        """Do what `warm_up` does for the async clients."""


def warm_up(model: Embeddings) -> None:
    """Warm up a tier by its own method, a model by one call."""
    if isinstance(model, WarmsUp):
        model.warm_up()
    else:
        model.embed_query(TEXT)


async def awarm_up(model: Embeddings) -> None:
    """Do what `warm_up` does for the async clients."""
    if isinstance(model, WarmsUp):
        await model.awarm_up()
    else:
        await model.aembed_query(TEXT)
