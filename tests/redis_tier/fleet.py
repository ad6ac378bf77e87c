"""Eight processes that share a Redis server."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.redis_tier.models import CountingModel, vector_of
from tests.redis_tier.server import HANG

PROCESSES = 8


class Fleet:
    """Processes that embed what they are sent, all at once, through a tier each.

    The first call to a model for a text that starts with "gated" stays in it until it is killed.
    """

    def __init__(self, url: str, **options: Any) -> None:
        context = multiprocessing.get_context("fork")
        self.barrier = context.Barrier(PROCESSES)
        self.calls = context.Value("i", 0)
        self.gate = context.Event()
        self.owner = context.Value("i", 0)
        self.owner_entered = context.Event()
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        self._url = url
        self._options = options
        for _ in range(PROCESSES):
            near, far = context.Pipe()
            process = context.Process(target=self._work, args=(far,), daemon=True)
            process.start()
            far.close()
            self.pipes.append(near)
            self.processes.append(process)

    def _work(self, pipe: Any) -> None:
        fleet = self

        class Model(CountingModel):
            def embed_query(self, text: str, **kwargs: object) -> list[float]:
                with fleet.calls.get_lock():
                    fleet.calls.value += 1
                    first = fleet.calls.value == 1
                if first and text.startswith("gated"):
                    fleet.owner.value = os.getpid()
                    fleet.owner_entered.set()
                    fleet.gate.wait(HANG)
                return vector_of(text)

        options = {"model_id": "fleet", "timeout": 20.0, "single_flight": True, **self._options}
        embeddings = RedisCachedEmbeddings(Model(), self._url, **options)
        for text in iter(pipe.recv, None):
            self.barrier.wait(HANG)
            pipe.send((os.getpid(), embeddings.embed_query(text)))

    def ask(self, text: str) -> None:
        for pipe in self.pipes:
            pipe.send(text)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(HANG)
