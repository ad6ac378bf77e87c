"""The stand-in's vectors: hashed words and character n-grams, scaled to length 1.

Texts that share words or word stems come out similar, in any language; synonyms do not. That is
enough for sensible retrieval over a small knowledge base, and all that is claimed.
"""

import base64
import math
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

DEFAULT_DIMENSIONS = 1536

# Words that say nothing about the topic would otherwise decide which passage is nearest.
_STOP_WORDS = frozenset(
    Path(__file__).with_name("stop_words.txt").read_text(encoding="utf-8").split()
)
_WORD = re.compile(r"\w+")
_IO_AS_IE = str.maketrans(
    "\N{CYRILLIC SMALL LETTER IO}", "\N{CYRILLIC SMALL LETTER IE}"
)  # spelled either way in Russian


def _features(text: str) -> Iterator[tuple[str, float]]:
    """The features of a text, each with the weight of one occurrence."""
    for word in _WORD.findall(text.casefold().translate(_IO_AS_IE)):
        if word in _STOP_WORDS:
            continue
        yield word, 1.0
        padded = f"<{word}>"
        for size in (3, 4, 5):
            for start in range(len(padded) - size + 1):
                yield padded[start : start + size], 0.4


@lru_cache(maxsize=8192)
def vector(text: str, dimensions: int = DEFAULT_DIMENSIONS) -> "array[float]":
    """The unit vector of a text, as 32-bit floats. Shared: not to be changed."""
    totals: defaultdict[str, float] = defaultdict(float)
    for feature, weight in _features(text):
        totals[feature] += weight
    buckets: defaultdict[int, float] = defaultdict(float)
    for feature, weight in totals.items():
        code = zlib.crc32(feature.encode())
        sign = 1.0 if code & 0x8000_0000 else -1.0
        buckets[(code & 0x7FFF_FFFF) % dimensions] += sign * math.sqrt(weight)
    norm = math.hypot(*buckets.values())
    if norm == 0:  # nothing but stop words or punctuation
        buckets[zlib.crc32(text.encode()) % dimensions] = norm = 1.0
    values = array("f", [0.0]) * dimensions
    for bucket, value in buckets.items():
        values[bucket] = value / norm
    return values


@lru_cache(maxsize=8192)
def packed(text: str, dimensions: int = DEFAULT_DIMENSIONS) -> str:
    """The same vector in the API's ``base64`` encoding: little-endian 32-bit floats."""
    values = array("f", vector(text, dimensions))
    if values.itemsize != 4:  # pragma: no cover
        raise RuntimeError("this platform's C float is not 32 bits wide")
    if _BIG_ENDIAN:  # pragma: no cover
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")


_BIG_ENDIAN = array("H", [1]).tobytes() == b"\0\1"
