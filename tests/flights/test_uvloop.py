"""On uvloop, which uvicorn takes where it can, queries share the executor as on asyncio's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.flights.test_shared_executor import (
    QUESTIONS,
    THREADS,
    LookingUpHosts,
    Tokenizing,
    aprefetched,
    queries_ahead_of_their_prefetches,
    retriever,
    turn_by_turn,
)
from tests.helpers import PATIENCE

uvloop = pytest.importorskip("uvloop", reason="there is none for this platform")

Wrap = Callable[..., PrefetchingEmbeddings]


def on_uvloop(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        with ThreadPoolExecutor(THREADS) as threads:
            asyncio.get_running_loop().set_default_executor(threads)
            async with asyncio.timeout(PATIENCE):
                return await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


@pytest.mark.parametrize("make_model", [Tokenizing, LookingUpHosts])
@pytest.mark.parametrize("turns", [aprefetched, turn_by_turn, queries_ahead_of_their_prefetches])
def test_50_turns_over_chroma_share_6_threads(
    wrap: Wrap, turns: Callable[..., Any], make_model: Callable[[ScriptedEmbeddings], Embeddings]
) -> None:
    model = ScriptedEmbeddings()
    embeddings = wrap(make_model(model))
    ask = retriever(embeddings).ainvoke
    model_calls_before = len(model.calls)

    answers = on_uvloop(turns(embeddings, ask))

    assert [document.page_content for (document,) in answers] == QUESTIONS
    assert len(model.calls) - model_calls_before == len(QUESTIONS)
    stats = embeddings.stats()
    assert stats.query_recovered == stats.query_failed == 0
