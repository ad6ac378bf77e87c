"""However many threads, tasks and loops ask for one text at once, the model is called once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import Gate, ScriptedEmbeddings
from tests.helpers import PATIENCE, QueriesTakenIn, SyncSideOnly

Wrap = Callable[..., PrefetchingEmbeddings]

ROUNDS = 200
THREADS = 64
LOOPS = 2
COROUTINES_PER_LOOP = 32
QUERIES_PER_ROUND = THREADS + LOOPS * COROUTINES_PER_LOOP
PREFETCHES_PER_ROUND = THREADS // 2 + LOOPS * COROUTINES_PER_LOOP // 2


class Crowd:
    """Threads and event loops that all ask for one text at once, round after round.

    They are the same in all rounds. Between `ask` and the next one they stand still.
    """

    def __init__(self, embeddings: PrefetchingEmbeddings) -> None:
        self._embeddings = embeddings
        self._lined_up = threading.Barrier(THREADS + LOOPS + 1, timeout=PATIENCE)
        self._text: str | None = None
        self._answers: list[list[float]] = []
        self._gate: Gate | None = None
        self._taken_in: QueriesTakenIn
        self._failures: list[BaseException] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self._taken_in = QueriesTakenIn(self._embeddings)
        with ThreadPoolExecutor(THREADS + LOOPS) as pool:
            members = [pool.submit(self._thread, number) for number in range(THREADS)]
            members += [pool.submit(asyncio.run, self._loop()) for _ in range(LOOPS)]
            for member in members:
                member.add_done_callback(self._note_failure)
            try:
                yield
                self._text = None
                self._lined_up.wait()
            except BaseException:
                self._lined_up.abort()
                if self._gate is not None:
                    self._gate.open()
                if self._failures:
                    raise self._failures[0] from None
                raise
        assert not self._failures

    def ask(self, text: str, gate: Gate | None) -> list[list[float]]:
        """Let all ask for `text`; where there is a gate, open it once all have met a flight."""
        self._text = text
        self._answers = []
        self._gate = gate
        self._taken_in.start_anew()
        self._lined_up.wait()
        if gate is not None:
            self._taken_in.wait_for(QUERIES_PER_ROUND)
            gate.open()
        self._lined_up.wait()
        return self._answers

    def _thread(self, number: int) -> None:
        while (text := self._next_text()) is not None:
            if number % 2:
                self._embeddings.prefetch(text)
            self._answers.append(self._embeddings.embed_query(text))
            self._lined_up.wait()

    async def _loop(self) -> None:
        # Blocks its loop between the rounds, when nothing runs there.
        while (text := self._next_text()) is not None:
            await asyncio.gather(
                *(self._coroutine(number, text) for number in range(COROUTINES_PER_LOOP))
            )
            self._lined_up.wait()

    async def _coroutine(self, number: int, text: str) -> None:
        if number % 4 == 1:
            await self._embeddings.aprefetch(text)
        elif number % 4 == 3:
            self._embeddings.prefetch(text)
        self._answers.append(await self._embeddings.aembed_query(text))

    def _next_text(self) -> str | None:
        self._lined_up.wait()
        return self._text

    def _note_failure(self, member: Future[None]) -> None:
        error = member.exception()
        if error is not None:
            if not isinstance(error, threading.BrokenBarrierError):
                self._failures.insert(0, error)
            self._lined_up.abort()


@pytest.mark.parametrize("make_model", [lambda model: model, SyncSideOnly], ids=["async", "sync"])
def test_64_threads_and_64_coroutines_on_2_loops_make_one_call(
    wrap: Wrap,
    make_model: Callable[[ScriptedEmbeddings], Embeddings],
) -> None:
    model = ScriptedEmbeddings()
    embeddings = wrap(make_model(model))
    crowd = Crowd(embeddings)
    with crowd.gathered():
        for number in range(ROUNDS):
            text = f"question {number}"
            # With a gate all but one join; without, they race with the answer.
            gate = model.hold(text) if number % 2 else None
            answers = crowd.ask(text, gate)

            assert model.calls_for(text) == 1
            assert answers == [model.vector(text)] * QUERIES_PER_ROUND
            assert len({id(answer) for answer in answers}) == QUERIES_PER_ROUND

    stats = embeddings.stats()
    assert (
        stats.query_ready + stats.query_joined + stats.query_claimed + stats.query_missed
        == ROUNDS * QUERIES_PER_ROUND
    )
    assert stats.query_joined >= ROUNDS // 2 * (QUERIES_PER_ROUND - 1)
    assert stats.query_recovered == stats.query_failed == 0
    assert stats.prefetch_started + stats.query_missed == ROUNDS
    assert stats.prefetch_started + stats.prefetch_deduplicated == ROUNDS * PREFETCHES_PER_ROUND
    assert stats.prefetch_used == stats.prefetch_succeeded == stats.prefetch_started
    assert len(model.calls) == ROUNDS
