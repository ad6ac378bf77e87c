"""Which texts are the same question: normal forms for `match=`.

By default only equal texts match. A recogniser that adds capitals and punctuation to its final
transcript, but not to its partial ones, needs a normal form: `match=match_spoken`, or
`match=MatchSpoken("en")` to leave out a language's sounds of hesitation, too.

Texts that match share one vector: that of the text which was embedded first. Case and punctuation
move a vector a little, so a query served by a text that differs gets a vector slightly different
from its own. `PrefetchStats.query_matched` counts these queries.

A normal form that takes two questions for one gives wrong answers; one that takes the same question
for two costs a call. In doubt, the forms here keep a difference.
"""

# ruff: noqa: RUF001, RUF002 - Cyrillic and look-alikes are meant

from __future__ import annotations

import re
import unicodedata
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FILLERS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "de": frozenset({"äh", "ähm", "öh", "öhm"}),
        "en": frozenset({"ehm", "erm", "uh", "uhm", "um"}),
        "es": frozenset({"ehm", "ehmm"}),
        "fr": frozenset({"euh", "heu"}),
        "it": frozenset({"ehm", "uhm"}),
        "ja": frozenset({"えーと", "えっと", "ええと", "えーっと", "うーん"}),
        "pl": frozenset({"eee", "yyy"}),
        "pt": frozenset({"ãh", "hã", "ahn"}),
        "ru": frozenset({"ээ", "эм", "эмм", "хм", "гм"}),
        "tr": frozenset({"ııı", "ıı"}),
        "uk": frozenset({"ее", "ем", "хм", "гм"}),
        "zh": frozenset({"呃", "呃呃"}),
    }
)
"""Sounds of hesitation by language (ISO 639-1), none of which is a word in that language.

"Er", "mm" and "мм" are missing: they are a room, a pronoun and a unit. So are "like", "ну" and
"вот", which are words. `MatchSpoken` knows drawn-out sounds ("ээээ", "hmmm") in any language.
"""

ENGLISH_FILLERS: Final = FILLERS["en"]
"""The English ones of `FILLERS`."""

RUSSIAN_FILLERS: Final = FILLERS["ru"]
"""The Russian ones of `FILLERS`."""


def match_spoken(text: str) -> str:
    """Return what is left of `text` without what a voice does not carry.

    That is: NFKC, without case, punctuation and invisible characters, `ё` as `е`, digits of any
    script as 0 to 9, white space folded. Between signs of scripts that are written without spaces
    (Chinese, Japanese, Thai and their neighbours) white space is left out. A punctuation mark parts
    words ("e-mail" is "e mail").

    What can change a question stays: signs that are read out ("%", "€", "#"), a minus, marks
    between digits ("3.5" is neither "35" nor "3 5"), raised digits ("10²" is "10^2"), marks of feet
    and inches, apostrophes within words ("we're" is not "were"), but for contractions that are no
    other word without ("what's" is "whats").

    Of a text that is nothing but punctuation all of it stays: it matches itself alone.
    """
    marked = text.translate(_KEPT_FROM_NFKC)
    folded = _turkish(unicodedata.normalize("NFKC", marked)).casefold().translate(_PLAIN)
    composed = unicodedata.normalize("NFKC", folded)  # case folding may decompose
    signs = _PRIMES.sub(r"\1\2", _QUOTED.sub(r" \2 ", composed))
    words = _NEITHER_WORD_NOR_SPACE.sub(_kept_sign, signs)
    spaced = " ".join(_CONTRACTED.sub(_without_apostrophe, words).split())
    spoken = _SPACES_THAT_SAY_NOTHING.sub("", spaced)
    return unicodedata.normalize("NFKC", spoken) or text  # what was left out parted other marks


def count_words(text: str) -> int:
    """Return how many words `text` has; of scripts that are written without spaces, signs."""
    return sum(
        len(_SIGN_WITHOUT_SPACES.findall(word)) or any(map(str.isalnum, word))
        for word in text.split()
    )


class MatchSpoken:
    """`match_spoken` without sounds of hesitation.

    Drawn-out sounds ("hmmm", "ээээ", "м-м-м") are left out in every language, shorter ones where
    they are no word: name the languages that are spoken. Nothing is left out after a number:
    "5 um" may be five micrometres.

    Example:
        ```python
        match = MatchSpoken("en", fillers={"please"})
        assert match("Um, what's the price, please?") == match("whats the price")
        ```

    Args:
        *languages: Whose `FILLERS` to leave out, as ISO 639-1 codes.
        fillers: Further words to leave out, in any case. Choose with care: a word that can ask for
            something makes different questions the same.

    Raises:
        TypeError: If a language is not a `str`, or `fillers` is one.
        ValueError: If `FILLERS` does not have a language.
    """

    def __init__(self, *languages: str, fillers: Iterable[str] = ()) -> None:
        if isinstance(fillers, str):
            raise TypeError("fillers must be several words, such as {'please'}, not a str")
        left_out = set(fillers)
        for language in languages:
            if not isinstance(language, str):
                raise TypeError(f"a language must be a str such as 'en', not {language!r}")
            if language not in FILLERS:
                raise ValueError(f"no fillers for {language!r}, but for {', '.join(FILLERS)}")
            left_out |= FILLERS[language]
        self._fillers: Final = frozenset(match_spoken(filler) for filler in left_out)

    def __call__(self, text: str) -> str:
        """Return the normal form of `text`; of one that is nothing but fillers all of them stay."""
        kept = _TOKEN_BUT_NOT_AFTER_A_NUMBER.sub(self._kept, text)
        return match_spoken(kept if any(map(str.isalnum, kept)) else text)

    def _kept(self, token: re.Match[str]) -> str:
        word = token[0]
        spoken = match_spoken(word)
        return " " if spoken in self._fillers or _is_drawn_out(word) else word


def _is_drawn_out(word: str) -> bool:
    return _DRAWN_OUT.fullmatch(unicodedata.normalize("NFKC", word).casefold()) is not None


# --- Sounds ---------------------------------------------------------------------------------------

_TOKEN_BUT_NOT_AFTER_A_NUMBER: Final = re.compile(
    r"""
    (?<![\w'’-]) (?<!\d[\s.,:;…]) (?<!\d[\s.,:;…]{2})
    [^\W\d_]+ (?:['’-][^\W\d_]+)* (?![\w'’-])
    """,
    re.VERBOSE,
)
_DRAWN_OUT: Final = re.compile(
    r"""
    ([эмamuhäöe])(?:-\1)+    # "э-э", "m-m-m"
    | э{3,} | а{3,}м* | м{4,} | э+м{2,} | [хг]м{2,}
    | m{4,} | hm{2,} | um{3,} | eh?m{2,}
    | [aeouäöü]+h{2,}m* | ([eäöü])\2+h+m* | [äöü]+h*m{2,}
    """,
    re.VERBOSE,
)
"""Long enough to be no abbreviation either ("МММ" and "ЭЭ" are, "AAA" and "ООО" as well)."""

# --- Characters -----------------------------------------------------------------------------------

SPOKEN_SIGNS: Final = "#%&@§‰‱*"
"""Unicode calls them punctuation, but they are read out: 5 % is not 5."""

_APOSTROPHES: Final = "'`\u00b4\u02bc\u2018\u2019\u201b"
_DASHES: Final = "-\u2010\u2011\u2012\u2013\u2212"
_LONG_DASHES: Final = "\u2014\u2015\u301c"
"""Punctuation before a number, a range between two."""
_BETWEEN_DIGITS: Final = ".,:/_·\u066b\u066c\u2044"

_SIGNS_WITHOUT_SPACES: Final = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"  # Chinese and Japanese
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
)
_SIGN_WITHOUT_SPACES: Final = re.compile(f"[{_SIGNS_WITHOUT_SPACES}]")
_SPACES_THAT_SAY_NOTHING: Final = re.compile(
    rf"(?<=[{_SIGNS_WITHOUT_SPACES}])\ | \ (?=[{_SIGNS_WITHOUT_SPACES}])"
    r"|(?<=\d)\ (?=[%‰‱°](?!\ ?\d)) | (?<=\d[°])\ (?=[^\W\d]\b) | (?<=\d)\ (?=[€$£¥₽₴₺₸](?!\ ?\d))"
    r"| (?:(?<=^[€$£¥₽₴₺₸§#]) | (?<=[^\d]\ [€$£¥₽₴₺₸§#]))\ (?=\d)",
    re.VERBOSE,
)
"""Those at signs of scripts without spaces, in "10 %" and in "№ 5"."""

_NEITHER_WORD_NOR_SPACE: Final = re.compile(r"[^\w\s]|_")
_QUOTED: Final = re.compile(r"(['\"])(\d[\d.,]*)\1")
_PRIMES: Final = re.compile(r"(\d)('|\"|\u2032|\u2033)(?!\w*['\"])")


def _kept_sign(sign: re.Match[str]) -> str:
    """What becomes of a character that is neither a letter, a digit nor white space."""
    mark, text = sign[0], sign.string
    before, after = text[: sign.start()], text[sign.end() :]
    last, following = before[-1:], after[:1]
    if mark in _DASHES or mark in _LONG_DASHES:
        is_between = before.rstrip()[-1:].isdigit() and after.lstrip()[:1].isdigit()
        is_minus = following.isdigit() and not last.isalnum() and mark in _DASHES
        return "-" if is_between or is_minus or mark == "\u2212" else " "
    if mark in "'\"\u2032\u2033":
        if last.isdigit() or last == "\u2032":
            return "\u2032\u2032" if mark in '"\u2033' else "\u2032"
        if mark == '"':
            return " "
        return "'" if last.isalpha() and following.isalpha() else ""
    if mark in _BETWEEN_DIGITS:
        if mark == "_" and last.isalpha():
            return ""  # "CO₂" is "CO2"
        return mark if last.isdigit() and following.isdigit() else " "
    is_punctuation = unicodedata.category(mark).startswith("P") and mark not in SPOKEN_SIGNS
    return " " if is_punctuation else mark


# --- Contractions ---------------------------------------------------------------------------------

_CONTRACTED: Final = re.compile(
    r"\b(?:(?:what|where|who|how|when|why|that|there|here)'s"
    r"|(?:do|does|did|is|are|was|were|have|has|had|could|would|should|must|need|ca)n't"
    r"|i'm|(?:you|they)'re|(?:i|you|we|they)'ve|(?:you|they|that|it)'ll|(?:you|they|it)'d)\b"
)
"""Those that are no other word without their apostrophe, as "we're" and "I'll" are."""


def _without_apostrophe(contracted: re.Match[str]) -> str:
    return contracted[0].replace("'", "")


# --- Turkish --------------------------------------------------------------------------------------


def _turkish(text: str) -> str:
    """The text with its i's such that a capital at the beginning makes no difference.

    "I" is the capital of "ı" in Turkish, and of "i" elsewhere; the rest of the text says which.
    Where it does not, the first letter is an "i" whichever it is.
    """
    start = next((place for place, letter in enumerate(text) if letter.isalnum()), len(text))
    first, rest = text[start : start + 1], text[start + 1 :]
    if first not in ("I", "ı", "İ", "i"):
        return text.replace("İ", "i")
    rest = rest.replace("İ", "i").removeprefix("\u0307")
    is_turkish = any(letter in rest for letter in "ışŞğĞ")
    dotless = first == "ı" or (first == "I" and not text[start + 1 :].startswith("\u0307"))
    return text[:start] + ("ı" if is_turkish and dotless else "i") + rest


# --- Tables for str.translate, each character found out once --------------------------------------


class _KeptFromNFKC(dict[int, str | int | None]):
    """Keeps what NFKC would merge with its neighbours: raised digits, "½", "①"; and "№", "´".

    Two threads may find out the same character at once, to the same effect.
    """

    def __missing__(self, code: int) -> str | int | None:
        character = chr(code)
        plain = unicodedata.normalize("NFKC", character)
        kept: str | int | None = code
        if plain != character and not character.isdecimal():
            how = unicodedata.decomposition(character).partition(" ")[0]
            if how == "<super>" and plain[:1].isdigit():
                kept = f"^{plain}"
            elif how == "<sub>" and plain[:1].isdigit():
                kept = f"_{plain}"
            elif plain[:1].isdigit() or plain[-1:].isdigit():
                kept = f" {plain} "
        self[code] = kept
        return kept


class _Plain(dict[int, str | int | None]):
    """Digits of any script as 0 to 9, and nothing for what cannot be seen.

    Two threads may find out the same character at once, to the same effect.
    """

    def __missing__(self, code: int) -> str | int | None:
        character = chr(code)
        if character.isdecimal():
            self[code] = str(unicodedata.decimal(character))
        elif unicodedata.category(character) == "Cf":
            self[code] = None
        else:
            self[code] = code
        return self[code]


_KEPT_FROM_NFKC: Final = _KeptFromNFKC({ord("№"): "#", ord("\u00b4"): "'"})
_PLAIN: Final = _Plain(
    {
        ord("ё"): "е",
        ord("\u0640"): None,
        ord("\u034f"): None,
        ord("\u066a"): "%",
        ord("\u2044"): "/",
    }
    | dict.fromkeys(range(0xFE00, 0xFE10), None)
    | dict.fromkeys(map(ord, _APOSTROPHES), "'")
    | dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')
)
