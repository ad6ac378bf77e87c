"""Celery tasks that embed, with one wrapper, made when the module is imported."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from tests.runtimes.bot import embeddings, model

folder = os.environ["CELERY_FOLDER"]
app = Celery("tasks", broker="filesystem://", backend=f"file://{folder}/results")
app.conf.update(
    broker_transport_options={
        "data_folder_in": f"{folder}/queue",
        "data_folder_out": f"{folder}/queue",
        "control_folder": f"{folder}/control",
    },
    broker_connection_retry_on_startup=True,
)


@app.task
def ask(text: str) -> dict[str, Any]:
    """Prefetch a text, and embed it."""
    embeddings.prefetch(text)
    return answered(text)


@app.task(soft_time_limit=1)
def ask_in_vain(text: str) -> str:
    """Wait for a call that takes longer than the task may."""
    model.seconds = 3.0
    embeddings.prefetch(text)
    try:
        embeddings.embed_query(text)
    except SoftTimeLimitExceeded:
        return "interrupted"
    finally:
        model.seconds = 0.05
    return "answered"


@app.task
def answer(text: str) -> dict[str, Any]:
    """Embed a text."""
    return answered(text)


def answered(text: str) -> dict[str, Any]:
    """Return the vector of a text, and what it took."""
    vector = embeddings.embed_query(text)
    return {"vector": vector, "calls": model.calls[text], "process": os.getpid()}
