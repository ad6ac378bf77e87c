"""Models for measurements: vectors of 1536 floats, at once or after a pause."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from langchain_core.embeddings import Embeddings

DIMENSIONS = 1536

_random = random.Random(7)
VECTOR = [_random.gauss(0.0, 0.025) for _ in range(DIMENSIONS)]


class PausingEmbeddings(Embeddings):
    """Pauses like a network call, then returns a vector; notes how long each call took.

    Args:
        pause: Returns the pause in seconds for a text.
    """

    def __init__(self, pause: Callable[[str], float] = lambda _: 0.0) -> None:
        self._pause = pause
        self.calls = 0
        self.took: dict[str, float] = {}

    def embed_query(self, text: str) -> list[float]:
        self.calls += 1
        if seconds := self._pause(text):
            began = time.perf_counter()
            time.sleep(seconds)
            self.took[text] = time.perf_counter() - began
        return VECTOR

    async def aembed_query(self, text: str) -> list[float]:
        self.calls += 1
        if seconds := self._pause(text):
            began = time.perf_counter()
            await asyncio.sleep(seconds)
            self.took[text] = time.perf_counter() - began
        return VECTOR

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]
