"""A chat back end that embeds the question while it does what comes before the retrieval.

Offline, on the local stand-in (needs fastapi and uvicorn besides):

    python -m examples.local_openai --p5 0.39 --p95 1.16 -- \
        python -m uvicorn examples.chat_backend:app

    curl -H "Content-Type: application/json" http://127.0.0.1:8000/ask \
        -d '{"conversation": "7", "text": "why is there a red light on my router?"}'
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from langchain_chroma import Chroma
from langchain_openai import OpenAIEmbeddings
from pydantic import BaseModel

from examples.knowledge_base import PASSAGES
from prefetch_embeddings import PrefetchingEmbeddings


class Question(BaseModel):
    """What the client sends."""

    conversation: str
    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make what all requests of this process share."""
    model = OpenAIEmbeddings(check_embedding_ctx_length=False)  # no tokenizer to download
    with PrefetchingEmbeddings(model) as embeddings:
        await asyncio.to_thread(embeddings.warm_up)  # before a caller pays for the connection
        texts = [passage.text for passage in PASSAGES]
        store = await Chroma.afrom_texts(texts, embeddings, collection_name="chat")
        app.state.embeddings = embeddings
        app.state.retriever = store.as_retriever(search_kwargs={"k": 1})
        yield


app = FastAPI(lifespan=lifespan)


async def load_history(conversation: str) -> list[str]:
    """Stand for a database, a token check, a classifier: whatever comes before the retrieval."""
    await asyncio.sleep(0.5)
    return [f"what was said in conversation {conversation}"]


@app.post("/ask")
async def ask(question: Question, request: Request) -> dict[str, list[str]]:
    """Answer a question with the passages found for it."""
    state = request.app.state
    state.embeddings.prefetch(question.text)  # first of all: it takes microseconds
    history = await load_history(question.conversation)
    documents = await state.retriever.ainvoke(question.text)  # or your chain's `ainvoke`
    return {"history": history, "passages": [document.page_content for document in documents]}
