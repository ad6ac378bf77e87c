"""Models for tests: they count what they are asked."""

from __future__ import annotations

import hashlib
import struct
import threading

from langchain_core.embeddings import Embeddings


def vector_of(text: str, role: str = "query", size: int = 8) -> list[float]:
    """Return a vector that fits 32 bits a float, and that only this text and role have."""
    seed = hashlib.shake_256(f"{role}/{text}".encode("utf-8", "surrogatepass")).digest(2 * size)
    return [number / 65536 for number in struct.unpack(f"<{size}H", seed)]


class ModelError(Exception):
    """What the model raises; its message quotes the text, as real ones do."""


class CountingModel(Embeddings):
    """Embeds by hashing; `queries`, `documents` and their async twins are what it was asked."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.queries: list[str] = []
        self.aqueries: list[str] = []
        self.documents: list[list[str]] = []
        self.adocuments: list[list[str]] = []
        self.failing: set[str] = set()
        self.lock = threading.Lock()

    def _embed(self, text: str, role: str) -> list[float]:
        if text in self.failing:
            raise ModelError(f"cannot embed {text!r}")
        return vector_of(text, role, self.size)

    def embed_query(self, text: str, **kwargs: object) -> list[float]:
        with self.lock:
            self.queries.append(text)
        return self._embed(text, "query")

    async def aembed_query(self, text: str, **kwargs: object) -> list[float]:
        self.aqueries.append(text)
        return self._embed(text, "query")

    def embed_documents(self, texts: list[str], **kwargs: object) -> list[list[float]]:
        self.documents.append(texts)
        return [self._embed(text, "document") for text in texts]

    async def aembed_documents(self, texts: list[str], **kwargs: object) -> list[list[float]]:
        self.adocuments.append(texts)
        return [self._embed(text, "document") for text in texts]
