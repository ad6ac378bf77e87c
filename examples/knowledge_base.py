"""A small knowledge base to try retrieval on: the help desk of Northlight, an invented provider.

The passages, and the questions as callers would put them, stand in ``knowledge_base.json``; most
are English, some Russian. Both were written for this project.
"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Passage:
    """One short passage of the help desk's texts."""

    id: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question as it is spoken, and the `id` of the passage that answers it."""

    text: str
    passage: str


_ENTRIES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

PASSAGES = tuple(Passage(entry["id"], entry["text"]) for entry in _ENTRIES)
QUESTIONS = tuple(Question(text, entry["id"]) for entry in _ENTRIES for text in entry["questions"])
