"""Which texts are the same question: normal forms for `match=`.

By default only equal texts match. A recogniser that adds capitals and punctuation to its final
transcript, but not to its partial ones, needs a normal form: `match=match_spoken`, or
`match=MatchSpoken(...)` to leave out filler words, too.

Texts that match share one vector: that of the text which was embedded first. Case and punctuation
move a vector a little, so a query served by a text that differs gets a vector slightly different
from its own. `PrefetchStats.query_matched` counts these queries.
"""

# ruff: noqa: RUF001, RUF002 - Cyrillic is meant

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

ENGLISH_FILLERS: Final = frozenset({"ah", "eh", "er", "erm", "hm", "hmm", "mm", "uh", "uhm", "um"})
"""Sounds of hesitation. "Like", "well" or "so" are words as well, and stay."""

RUSSIAN_FILLERS: Final = frozenset({"ага", "вот", "мм", "ммм", "ну", "хм", "э", "ээ", "эээ", "эм"})
"""Sounds of hesitation, and words that only fill. "Значит" and "типа" can matter, and stay."""

APOSTROPHES: Final = "'`\u00b4\u02bc\u2018\u2019\u201b\u2032"
"""They leave no gap: "what's" is "whats"."""

SPOKEN_SIGNS: Final = "#%&@§‰"
"""Unicode calls them punctuation, but they are read out: 5 % is not 5."""


def match_spoken(text: str) -> str:
    """Return what is left of `text` without what a voice does not carry.

    That is: NFKC, without case, apostrophes and punctuation, `ё` as `е`, white space folded.
    A punctuation mark parts words ("e-mail" is "e mail"), so that "3.5" is not "35". Symbols that
    are read out ("%", "+", "€") stay. Of a text that is nothing but punctuation all of it stays:
    it matches itself alone.
    """
    kept = text.replace("\u00b4", "")  # NFKC would make a space of this apostrophe
    folded = unicodedata.normalize("NFKC", kept).casefold().translate(_PLAIN)
    composed = unicodedata.normalize("NFKC", folded)  # case folding may decompose
    return " ".join(composed.split()) or text


class MatchSpoken:
    """`match_spoken` without filler words.

    Example:
        ```python
        match = MatchSpoken(fillers=ENGLISH_FILLERS | {"please"})
        assert match("Um, what's the price, please?") == match("whats the price")
        ```

    Args:
        fillers: Words to leave out, in any case. Choose with care: a word that can ask for
            something makes different questions the same. By default English and Russian sounds
            of hesitation.
    """

    def __init__(self, fillers: Iterable[str] = ENGLISH_FILLERS | RUSSIAN_FILLERS) -> None:
        self._fillers: Final = frozenset(match_spoken(filler) for filler in fillers)

    def __call__(self, text: str) -> str:
        """Return the normal form of `text`; of one that is nothing but fillers all of them stay."""
        spoken = match_spoken(text)
        return " ".join(word for word in spoken.split() if word not in self._fillers) or spoken


class _Plain(dict[int, int | None]):
    """What `str.translate` makes of each character, found out once for each.

    Two threads may do so at once, to the same effect.
    """

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        parts = unicodedata.category(character).startswith("P") and character not in SPOKEN_SIGNS
        self[code] = ord(" ") if parts else code
        return self[code]


_PLAIN: Final = _Plain({ord("ё"): ord("е")} | dict.fromkeys(map(ord, APOSTROPHES)))
