"""The chat back end embeds a question while it loads the history, over real HTTP and Chroma."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient

from examples import chat_backend
from examples.local_openai import LocalOpenAI

ROOT = Path(__file__).parents[2]

QUESTION = "there's a red light on my router"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalOpenAI]:
    with LocalOpenAI() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def test_the_question_is_embedded_before_the_history_is_there(
    server: LocalOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load_history(conversation: str) -> list[str]:
        # Would the handler prefetch later, this could never end.
        await asyncio.to_thread(server.wait_until, "inputs", at_least=asked_before + 1)
        return [conversation]

    monkeypatch.setattr(chat_backend, "load_history", load_history)
    with TestClient(chat_backend.app) as client:
        asked_before = server.stats().inputs
        answer = client.post("/ask", json={"conversation": "7", "text": QUESTION})
        stats = chat_backend.app.state.embeddings.stats()
    assert answer.status_code == 200
    assert answer.json()["history"] == ["7"]
    assert "A red light means that there is no signal" in answer.json()["passages"][0]
    assert server.times_asked(QUESTION) == 1
    assert stats.query_ready + stats.query_joined == 1
    assert stats.query_missed == 0


def test_the_manual_shows_the_example_as_it_is() -> None:
    code = Path(chat_backend.__file__).read_text("utf-8")
    assert f"```python\n{code}```" in (ROOT / "docs" / "chat-backends.md").read_text("utf-8")


async def start_embedding(question: chat_backend.Question, request: Request) -> None:
    request.app.state.embeddings.prefetch(question.text)


def test_a_dependency_prefetches_before_the_next_one_ends(server: LocalOpenAI) -> None:
    async def check_token() -> None:
        await asyncio.to_thread(server.wait_until, "inputs", at_least=asked_before + 1)

    app = FastAPI(lifespan=chat_backend.lifespan)
    dependencies = [Depends(start_embedding), Depends(check_token)]
    app.post("/ask", dependencies=dependencies)(chat_backend.ask)
    with TestClient(app) as client:
        asked_before = server.stats().inputs
        answer = client.post("/ask", json={"conversation": "7", "text": QUESTION})
    assert answer.status_code == 200
    assert server.times_asked(QUESTION) == 1
