"""Which passages and questions of the help desk belong to which of the bot's knowledge bases."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.knowledge_base import PASSAGES, QUESTIONS

FAULTS, CONTRACTS, RUSSIAN = "faults", "contracts", "russian"

MODELS: Mapping[str, str] = {
    FAULTS: "text-embedding-3-small",
    CONTRACTS: "text-embedding-3-small",
    RUSSIAN: "text-embedding-3-large",
}
"""The knowledge bases, each with its embedding model."""

_ABOUT_CONTRACTS = frozenset(
    {
        *("opening-hours", "tariffs", "change-tariff", "contract-length", "cancel", "moving-house"),
        *("compensation", "bill-date", "paper-bill", "payment-methods", "late-payment"),
        *("instalments", "bank-details", "landline", "keep-number", "mobile", "roaming"),
        *("business", "student-discount", "refer-friend", "privacy", "complaint"),
    }
)


@dataclass(frozen=True)
class Asked:
    """A question, and the knowledge base that it is put to."""

    text: str
    kb: str


def passages_of(kb: str) -> list[str]:
    """The texts of one knowledge base."""
    return [passage.text for passage in PASSAGES if _kb_of(passage.id) == kb]


def questions() -> list[Asked]:
    """The help desk's questions."""
    return [Asked(question.text, _kb_of(question.passage)) for question in QUESTIONS]


def questions_in(path: Path) -> list[Asked]:
    """Somebody's own questions: one a line; blank lines and those that begin with # do not count.

    They are all put to the first knowledge base, since only their embedding is of interest.
    """
    lines = (" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines())
    texts = dict.fromkeys(line for line in lines if line and not line.startswith("#"))
    return [Asked(text, FAULTS) for text in texts]


def _kb_of(passage_id: str) -> str:
    if passage_id.startswith("ru-"):
        return RUSSIAN
    return CONTRACTS if passage_id in _ABOUT_CONTRACTS else FAULTS
