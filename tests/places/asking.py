"""Asks a place a question that was prefetched, and counts the calls of the model."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, Literal

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import PATIENCE, auntil
from tests.places.places import ANSWER, DIMENSIONS, QUESTION, Place

Kind = Literal["sync", "async"]
Moment = Literal["ready", "under way"]

KINDS: Final[tuple[Kind, ...]] = ("sync", "async")
MOMENTS: Final[tuple[Moment, ...]] = ("ready", "under way")


class LexiconEmbeddings(ScriptedEmbeddings):
    """Places the question exactly where its answer is, though the texts differ.

    Its vectors have the length 1, as most models' have: some places compare by the inner product.
    """

    def vector(self, text: str) -> list[float]:
        vector = super().vector(ANSWER if text == QUESTION else text)
        length = math.hypot(*vector)
        return [number / length for number in vector]


async def calls(place: Place, kind: Kind, moment: Moment, folder: Path) -> int | None:
    """Return how often the model was called for the question; None if it cannot be asked so.

    Raises:
        AssertionError: The answer was not the right one.
    """
    model = LexiconEmbeddings(DIMENSIONS)
    async with AsyncExitStack() as closing:
        embeddings = closing.enter_context(PrefetchingEmbeddings(model, symmetric=place.symmetric))
        way = await place.make(embeddings, folder, closing)
        if (way.coroutine if kind == "async" else way.sync) is None:
            return None
        gate = model.hold(QUESTION) if moment == "under way" else None
        assert embeddings.prefetch(QUESTION) is PrefetchOutcome.STARTED
        if gate is None:
            assert await embeddings.await_for_prefetch(QUESTION, PATIENCE)
        else:
            await gate.await_until_entered()
        if kind == "async":
            assert way.coroutine is not None
            asking = asyncio.ensure_future(way.coroutine(QUESTION))
        else:
            assert way.sync is not None
            asking = asyncio.ensure_future(asyncio.to_thread(way.sync, QUESTION))
        if gate is not None:
            try:
                await auntil(lambda: embeddings.stats().query_joined or asking.done())
            finally:
                gate.open()
        assert await asyncio.wait_for(asking, PATIENCE) == ANSWER, place.name
    return model.calls_for(QUESTION)
