"""Keys of texts: what decides that two texts are the same.

What `match=` returns may be anybody's object, whose `__eq__` and `__hash__` run anybody's code.
That code runs here, before the core takes its lock, and never again: such an object is exchanged
for a token that stands for all objects equal to it.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from prefetch_embeddings._flights.loader import Key

_PLAIN: Final = (str, bytes, int, float, bool, type(None))


def key_of(match: Callable[[str], Hashable] | None) -> Key:
    """Return what finds out what texts must share to be the same, by `match`.

    Without one it is the text itself. What is returned raises a `TypeError` for what is not a
    `str`, or if `match` returns None; and whatever `match` raises, or the hash of what it returns.
    """
    tokens = _Tokens()

    def text_itself(text: str, variant: Hashable = None) -> Hashable:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        return text if variant is None else tokens.safe((text, variant))

    if match is None:
        return text_itself

    def key(text: str, variant: Hashable = None) -> Hashable:
        text_itself(text)
        matched = match(text)
        if matched is None:  # all texts would be the same
            raise TypeError("match must return what texts share, not None: has it no return?")
        return tokens.safe(matched if variant is None else (matched, variant))

    return key


def _is_plain(key: object) -> bool:
    """Tell whether hashing and comparing a key runs nobody's code."""
    if type(key) is tuple:
        return all(type(part) in _PLAIN for part in key)
    return type(key) in _PLAIN


class _Token:
    """Stands for all keys that are equal to `key`. Equal to itself alone."""

    __slots__ = ("__weakref__", "key")

    def __init__(self, key: Hashable) -> None:
        self.key: Final = key


class _Tokens:
    """The tokens that are in use: they go when no flight has them any more.

    Changed by single atomic steps, since foreign code must not run under a lock. Of two threads
    that bring equal keys at once, each adds a token, looks, and takes the first.
    """

    def __init__(self) -> None:
        self._by_hash: dict[int, list[weakref.ref[_Token]]] = {}

    def safe(self, key: Hashable) -> Hashable:
        """Return a key itself if that runs nobody's code, else a token for it."""
        return key if _is_plain(key) else self.token(key)

    def token(self, key: Hashable) -> _Token:
        number = hash(key)
        found = self._find(number, key)
        if found is not None:
            return found
        token = _Token(key)

        def remove(reference: weakref.ref[_Token]) -> None:
            references = self._by_hash.get(number, [])
            if reference in references:  # compared by identity: what they referred to is gone
                references.remove(reference)

        self._by_hash.setdefault(number, []).append(weakref.ref(token, remove))
        return self._find(number, key) or token

    def _find(self, number: int, key: Hashable) -> _Token | None:
        for reference in list(self._by_hash.get(number, ())):
            token = reference()
            if token is not None and _same(token.key, key):
                return token
        return None


def _same(one: Hashable, other: Hashable) -> bool:
    if one is other:
        return True
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - keys whose comparison fails are not the same
        return False
